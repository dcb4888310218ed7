# SPDX-License-Identifier: Apache-2.0
"""Layers that several architectures share.

BatchNorm does not count padded examples. Dropout draws half the random bits, for
transformers, which draw many.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

Norm = Literal["batch", "group"]
"""Our masked BatchNorm, or GroupNorm, which never looks across examples."""


class BatchNorm(nn.Module):
    """Batch normalisation over the real examples of the global batch.

    Statistics are sums over sums of the mask, so uneven padding across devices changes
    nothing: under jit and on a mesh the batch is global already; under pmap name the
    mapped axis, or each device normalises with its own examples. (Flax's own layer
    takes the mean of per-device means: wrong under uneven masks, NaN for a device that
    holds only padding.) A batch without real examples leaves the statistics as they
    are. The running variance is the biased one, as in Flax; PyTorch keeps the unbiased.

    Attributes:
      momentum: the share of the old running statistics kept (PyTorch's is `1 - this`).
      epsilon: added to the variance.
      axis_name: the pmap axis to sum over, or None.

    References:
      Ioffe, Szegedy 2015, Batch Normalization, algorithm 1.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, train=False) -> Array:
        """Normalises `[B, ..., D]` over all axes but the last; `mask` is `[B]`."""
        width = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        var = self.variable("batch_stats", "var", jnp.ones, width)
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        if not train:
            centre, spread = mean.value, var.value
        else:
            centre, spread, count = self._statistics(x, mask)
            keep = jnp.where(count > 0, self.momentum, 1.0)
            mean.value = keep * mean.value + (1 - keep) * jax.lax.stop_gradient(centre)
            var.value = keep * var.value + (1 - keep) * jax.lax.stop_gradient(spread)
        lift = (1,) * (x.ndim - 1) + width
        factor = scale * jax.lax.rsqrt(spread + self.epsilon)
        shift = bias - centre * factor
        return (x * factor.reshape(lift) + shift.reshape(lift)).astype(x.dtype)

    def _statistics(self, x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        weight = jnp.ones(x.shape[:1], x.dtype) if mask is None else mask
        weight = jnp.broadcast_to(
            weight.reshape(weight.shape + (1,) * (x.ndim - 1)), (*x.shape[:-1], 1)
        )
        axes = tuple(range(x.ndim - 1))
        count = self._sum(weight.sum())
        safe = jnp.maximum(count, 1)
        lift = (1,) * (x.ndim - 1) + x.shape[-1:]
        mean = self._sum((weight * x).sum(axes)) / safe
        # Two passes: the mean of squares minus the squared mean cancels in float32.
        var = self._sum((weight * (x - mean.reshape(lift)) ** 2).sum(axes)) / safe
        return mean, var, count

    def _sum(self, value: Array) -> Array:
        return value if self.axis_name is None else jax.lax.psum(value, self.axis_name)


def normalise(x: Array, mask, train, norm: Norm, axis_name: str | None) -> Array:
    """Normalises `[B, H, W, C]` with a layer of the compact module that calls this.

    Groups have 16 channels (Wu, He 2018, Group Normalization, table 3): 32 groups, the
    paper's default, do not exist in a layer of 16 channels. A width that 16 does not
    divide gets groups of their greatest common divisor.

    Args:
      x: `[B, H, W, C]`.
      mask: `[B]` or None; what it leaves out does not count in BatchNorm's statistics.
      train: whether BatchNorm uses the batch's statistics.
      norm: which layer.
      axis_name: the pmap axis that BatchNorm sums over, or None.

    Raises:
      ValueError: `norm` is neither.
    """
    if norm == "batch":
        return BatchNorm(axis_name=axis_name)(x, mask, train)
    if norm == "group":
        return nn.GroupNorm(
            num_groups=None,
            group_size=math.gcd(16, x.shape[-1]),
            epsilon=1e-5,
            use_fast_variance=False,  # cancels where the mean is large
        )(x)
    raise ValueError(f"norm={norm!r}, expected 'batch' or 'group'")


LEVELS = 2**16
"""What a rate is rounded to a fraction of: 16 bits are drawn for each number."""


class Dropout(nn.Module):
    """Zeros numbers at random and scales the others up, so that the mean stays.

    As `nn.Dropout`, which draws 32 bits for each number; on a CPU that is a good part
    of a transformer's training step.

    Attributes:
      rate: the share that is zeroed, in [0, 1], rounded to 2^-16.

    References:
      Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from
      Overfitting, section 4.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """The same shape and type; unchanged unless `train`."""
        kept = round((1 - self.rate) * LEVELS)
        if not train or kept == LEVELS:
            return x
        if kept == 0:
            return jnp.zeros_like(x)
        keep = draws(self.make_rng("dropout"), x.shape) < kept
        return jnp.where(keep, x * (LEVELS / kept), 0).astype(x.dtype)


def draws(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform 16-bit integers of a shape with an axis, two of each 32-bit draw."""
    *outer, last = shape
    words = jax.random.bits(key, (*outer, -(-last // 2)), jnp.uint32)
    halves = [(words >> shift).astype(jnp.uint16) for shift in (0, 16)]
    return jnp.concatenate(halves, axis=-1)[..., :last]


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


def halve(images: Array) -> Array:
    """2x2 max pooling, an odd last row or column dropped.

    As `nn.max_pool`, but 3 times faster with its gradient on a CPU; equal largest
    values share the gradient.
    """
    batch, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    parts = even.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return parts.max((2, 4))
