# SPDX-License-Identifier: Apache-2.0
"""Convolutions that are fast on a CPU too, and a small network of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.models.layers import Norm, normalise
from jaxdistill.types import Array, Outputs

_DIRECT = ContextVar("direct", default=False)


@contextmanager
def direct() -> Iterator[None]:
    """What is traced in here has convolutions on a CPU too, and no patches.

    For formats whose runtimes have a fast convolution, and no platforms to choose by.
    """
    before = _DIRECT.set(True)
    try:
        yield
    finally:
        _DIRECT.reset(before)


def with_channels(inputs: Array) -> Array:
    """Images `[B, H, W, C]`; grey ones `[B, H, W]` get a channel axis.

    Raises:
      ValueError: another number of axes.
    """
    if inputs.ndim not in (3, 4):
        raise ValueError(
            f"images of shape {inputs.shape}, expected [B, H, W] or [B, H, W, C]"
        )
    return inputs[..., None] if inputs.ndim == 3 else inputs


def convolve(images, kernel, strides, padding, *, dimension_numbers, **others):
    """`lax.conv_general_dilated` for `nn.Conv`: on a CPU, patches times a matrix.

    XLA gives a convolution inside a loop one slow thread there: a training step in a
    scan was 16 times slower than with patches (97 and 6 ms: 3x3, 28x28x1 to 16 to 32
    channels, 64 images, 2 cores), and 4 times slower outside it. Dilation and groups go
    to XLA anyway.
    """

    def convolution(images, kernel):
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            strides,
            padding,
            dimension_numbers=dimension_numbers,
            **others,
        )

    dilated = (others.get("lhs_dilation"), others.get("rhs_dilation"))
    plain = images.ndim == 4 and all(set(d or (1,)) == {1} for d in dilated)
    grouped = others["feature_group_count"] > 1
    if isinstance(padding, str) or not plain or grouped or _DIRECT.get():
        return convolution(images, kernel)

    def patches(images, kernel):
        padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
        height, width = kernel.shape[:2]
        rows = (padded.shape[1] - height) // strides[0] + 1
        columns = (padded.shape[2] - width) // strides[1] + 1
        windows = [
            padded[
                :,
                i : i + strides[0] * (rows - 1) + 1 : strides[0],
                j : j + strides[1] * (columns - 1) + 1 : strides[1],
            ]
            for i in range(height)
            for j in range(width)
        ]
        flat = jnp.concatenate(windows, -1)
        matrix = kernel.reshape(flat.shape[-1], -1)
        return jnp.matmul(flat, matrix, precision=others["precision"])

    return jax.lax.platform_dependent(images, kernel, cpu=patches, default=convolution)


def halve(images: Array) -> Array:
    """2x2 max pooling, an odd last row or column dropped.

    As `nn.max_pool`, but 3 times faster with its gradient on a CPU; equal largest
    values share the gradient.
    """
    batch, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    parts = even.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return parts.max((2, 4))


class ConvNet(nn.Module):
    """3x3 convolution, ReLU and 2x2 max pooling per stage, then one hidden layer.

    Attributes:
      features: the channels of each stage.
      hidden: the width of the dense hidden layer.
      num_classes: C.
      norm: "batch" or "group" between convolution and ReLU, or None.
      dropout: dropout rate on the dense hidden layer.
      axis_name: the pmap axis that BatchNorm sums over, or None.
    """

    features: tuple[int, ...] = (32, 64)
    hidden: int = 128
    num_classes: int = 10
    norm: Norm | None = None
    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]` from images `[B, H, W]` or `[B, H, W, channels]`.

        Hiddens: each stage's map after pooling, `[B, H / 2, W / 2, features[0]]` and so
        on (an odd last row or column is dropped), then the dense layer `[B, hidden]`
        after ReLU.
        """
        x = with_channels(inputs)
        hiddens = []
        for width in self.features:
            # The norm's own bias follows: a second one would have no gradient.
            x = nn.Conv(
                width,
                (3, 3),
                padding=1,
                use_bias=self.norm is None,
                conv_general_dilated=convolve,
            )(x)
            if self.norm is not None:
                x = normalise(x, mask, train, self.norm, self.axis_name)
            x = halve(nn.relu(x))
            hiddens.append(x)
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        hiddens.append(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes)(x), tuple(hiddens))
