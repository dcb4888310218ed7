# SPDX-License-Identifier: Apache-2.0
"""Vision transformers, with DeiT's distillation token if wanted."""

import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.models.layers import with_channels
from jaxdistill.models.transformer import NORMAL, attend, by_head, dense
from jaxdistill.types import Array, Outputs


def _layer_norm(name: str | None = None) -> nn.LayerNorm:
    # Flax's fast variance cancels where the mean is large.
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


class TransformerBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, with exact GELU.

    Attributes:
      heads: H, a divisor of the width.

    References:
      Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, equations 2 and 3.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """`[B, L, D]` to `[B, L, D]` and the attention's probabilities `[B, H, L, L]`.

        Raises:
          ValueError: the heads do not divide the width.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {width}")
        qkv = jnp.split(dense(3 * width)(_layer_norm()(x)), 3, axis=-1)
        mixed, attention = attend(*(by_head(side, self.heads) for side in qkv))
        x = x + dense(width)(mixed)
        inner = nn.gelu(dense(4 * width)(_layer_norm()(x)), approximate=False)
        return x + dense(width)(inner), attention


class ViT(nn.Module):
    """A vision transformer with learned positions and a class token.

    With a distillation token the model has two heads. In training `logits` are the
    class head's, and the distillation head's, for the loss on the teacher, are
    `extras["distillation"]`. In evaluation `logits` are the mean of the two heads', as
    in the official code; the paper's section 4 adds their softmax outputs. Without
    dropout and stochastic depth (DeiT trains with a rate of 0.1 of the latter).

    Attributes:
      num_classes: C.
      width: D.
      depth: blocks.
      heads: H, a divisor of D.
      patch: a patch's side in pixels.
      distillation_token: whether DeiT's token and head are there.
      remat: whether the backward pass computes each block again, from its input, in
        place of keeping what is inside: less memory, a third more time.

    References:
      Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, section 3.1.
      Touvron et al. 2021, Training data-efficient image transformers & distillation
      through attention, section 4.
    """

    num_classes: int
    width: int
    depth: int
    heads: int
    patch: int = 16
    distillation_token: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]` from images `[B, H, W]` or `[B, H, W, channels]`.

        The L tokens are the class token, the distillation token if any, and the patches
        row by row. The number of patches is that of the images at `init`.

        Hidden states: the tokens after each block, `[B, L, D]`. Attentions: each
        block's probabilities, `[B, heads, L, L]`.

        Raises:
          ValueError: the patches do not tile the image.
        """
        del mask  # no layer here looks across examples
        x = self._tokens(with_channels(inputs))
        hidden_states, attentions = [], []
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        for i in range(self.depth):
            # The name is the one it would have without remat.
            x, attention = block(self.heads, name=f"TransformerBlock_{i}")(x)
            hidden_states.append(x)
            attentions.append(attention)
        # Lower case sorts after the blocks, where `pretrained.from_torch` expects it.
        x = _layer_norm("norm")(x)
        logits = dense(self.num_classes, "head")(x[:, 0])
        extras = {}
        if self.distillation_token:
            distilled = dense(self.num_classes, "head_dist")(x[:, 1])
            if train:
                extras = {"distillation": distilled}
            else:
                logits = (logits + distilled) / 2
        return Outputs(
            logits, tuple(hidden_states), attentions=tuple(attentions), extras=extras
        )

    def _tokens(self, images: Array) -> Array:
        batch, height, across, _ = images.shape
        if height % self.patch or across % self.patch:
            raise ValueError(
                f"patches of {self.patch} pixels do not tile {height} x {across} images"
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            # PyTorch's default, which DeiT keeps here: uniform in +-1/sqrt(fan in).
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        )(images)
        x = x.reshape(batch, -1, self.width)
        names = ["cls_token", *["dist_token"] * self.distillation_token]
        tokens = [self.param(name, NORMAL, (1, 1, self.width)) for name in names]
        first = [jnp.broadcast_to(t, (batch, 1, self.width)) for t in tokens]
        x = jnp.concatenate([*first, x], axis=1)
        return x + self.param("pos_embed", NORMAL, (1, *x.shape[1:]))


def deit_tiny(num_classes: int = 1000, distillation_token: bool = True) -> ViT:
    """DeiT-Ti: 5,910,800 parameters for 224x224 images, 192 wide (table 1)."""
    return ViT(num_classes, 192, 12, 3, distillation_token=distillation_token)


def deit_small(num_classes: int = 1000, distillation_token: bool = True) -> ViT:
    """DeiT-S: 22,436,432 parameters for 224x224 images, 384 wide (table 1)."""
    return ViT(num_classes, 384, 12, 6, distillation_token=distillation_token)


def deit_base(num_classes: int = 1000, distillation_token: bool = True) -> ViT:
    """DeiT-B: 87,338,192 parameters for 224x224 images, 768 wide (table 1)."""
    return ViT(num_classes, 768, 12, 12, distillation_token=distillation_token)
