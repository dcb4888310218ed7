# SPDX-License-Identifier: Apache-2.0
"""A small convolutional network for images of MNIST's size."""

from flax import linen as nn

from jaxdistill.models.norm import Norm, normalise
from jaxdistill.types import Array, Outputs


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
            x = nn.Conv(width, (3, 3), padding=1, use_bias=self.norm is None)(x)
            if self.norm is not None:
                x = normalise(x, mask, train, self.norm, self.axis_name)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
            hiddens.append(x)
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        hiddens.append(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes)(x), tuple(hiddens))
