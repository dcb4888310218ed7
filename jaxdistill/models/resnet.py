# SPDX-License-Identifier: Apache-2.0
"""Residual networks for CIFAR and for ImageNet, layer for layer as in PyTorch.

Layers are created in the order of PyTorch's state dicts (torchvision, RepDistiller), so
`pretrained.from_torch` pairs them without a list of names.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.models.convolution import convolve
from jaxdistill.models.layers import Norm, normalise, with_channels
from jaxdistill.types import Array, Outputs

_CIFAR_WIDTHS = {1: (16, 16, 32, 64), 4: (32, 64, 128, 256)}
_IMAGENET_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def _conv(width: int, size: int, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        width,
        (size, size),
        strides=stride,
        # As in PyTorch: "SAME" pads a strided layer on one side only.
        padding=size // 2,
        use_bias=False,
        # He et al. 2015, Delving Deep into Rectifiers, equation 14.
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        conv_general_dilated=convolve,
    )


class ResidualBlock(nn.Module):
    """ReLU of a shortcut plus two or three normalised convolutions.

    The shortcut is the identity where shapes allow, else a normalised 1x1 convolution
    (option B of He et al. 2016, section 4.1; their own CIFAR networks have option A).

    Attributes:
      width: channels of the 3x3 convolutions.
      stride: of the first 3x3 convolution and of the shortcut.
      bottleneck: 1x1, 3x3, 1x1 with `4 * width` channels out, in place of 3x3, 3x3.
        The stride is in the 3x3 (v1.5, as in torchvision), the paper's in the first.
      norm: "batch" or "group".
      axis_name: the pmap axis that BatchNorm sums over, or None.

    References:
      He et al. 2016, Deep Residual Learning for Image Recognition, figure 5.
    """

    width: int
    stride: int = 1
    bottleneck: bool = False
    norm: Norm = "batch"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, train=False) -> Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, out]`, rounded up."""
        if self.bottleneck:
            out = 4 * self.width
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)]
        else:
            out = self.width
            layers = [(out, 3, self.stride), (out, 3, 1)]
        y = x
        for i, layer in enumerate(layers):
            y = nn.relu(y) if i else y
            y = normalise(_conv(*layer)(y), mask, train, self.norm, self.axis_name)
        if self.stride != 1 or x.shape[-1] != out:
            x = _conv(out, 1, self.stride)(x)
            x = normalise(x, mask, train, self.norm, self.axis_name)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over positions, one dense layer.

    Every stage but the first begins with stride 2.

    Attributes:
      num_classes: C.
      stages: blocks per stage.
      widths: channels of the stem, then each stage's `ResidualBlock.width`.
      bottleneck: the kind of block.
      large_stem: 7x7 with stride 2 and 3x3 max pooling with stride 2 (ImageNet), in
        place of 3x3 (CIFAR).
      norm: "batch" or "group".
      axis_name: the pmap axis that BatchNorm sums over, or None.
      remat: whether the backward pass computes each block again, from its input, in
        place of keeping what is inside: less memory, a third more time.

    References:
      He et al. 2016, Deep Residual Learning for Image Recognition, sections 4.1, 4.2.
    """

    num_classes: int
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool = False
    large_stem: bool = False
    norm: Norm = "batch"
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]` from images `[B, H, W]` or `[B, H, W, channels]`.

        Hidden states: the map `[B, h, w, D]` after each stage, after its ReLU, then the
        mean over positions `[B, D]`.
        """
        stem, *widths = self.widths
        conv = _conv(stem, 7, stride=2) if self.large_stem else _conv(stem, 3)
        x = conv(with_channels(inputs))
        x = nn.relu(normalise(x, mask, train, self.norm, self.axis_name))
        if self.large_stem:
            # After a ReLU zeros are never larger than what is there. The window has its
            # name and no padding of its own: jax2onnx takes it no other way, and drops
            # the padding without a word.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
        hidden_states, block = [], ResidualBlock
        if self.remat:
            block = nn.remat(ResidualBlock, static_argnums=3)  # `train`
        for stage, (blocks, width) in enumerate(zip(self.stages, widths, strict=True)):
            for i in range(blocks):
                x = block(
                    width,
                    stride=2 if stage and not i else 1,
                    bottleneck=self.bottleneck,
                    norm=self.norm,
                    axis_name=self.axis_name,
                    # Lower case sorts after the stem, where `convert` expects it.
                    name=f"stage{stage}_block{i}",
                )(x, mask, train)
            hidden_states.append(x)
        hidden_states.append(x.mean((1, 2)))
        logits = nn.Dense(self.num_classes)(hidden_states[-1])
        return Outputs(logits, tuple(hidden_states))


def resnet_cifar(
    depth: int, num_classes: int = 10, width: int = 1, **options: Any
) -> ResNet:
    """The ResNets for 32x32 images: 20, 32, 44, 56, 110, or 8x4 and 32x4.

    Three stages of basic blocks with 16, 32 and 64 channels, four times as many with
    `width=4` (there the stem has twice as many, 32). The shortcuts are option B, as in
    RepDistiller: 278,324 parameters for depth 20 and 100 classes.

    Args:
      depth: `6 n + 2`, for n blocks per stage.
      num_classes: C.
      width: 1, or 4 for the networks that RepDistiller calls resnet8x4 and resnet32x4.
      options: `norm`, `axis_name` and `remat`, see `ResNet`.

    Raises:
      ValueError: no such depth or width.

    References:
      He et al. 2016, Deep Residual Learning for Image Recognition, section 4.2.
      Tian et al. 2020, Contrastive Representation Distillation, whose code is
      RepDistiller.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"no CIFAR ResNet has depth {depth}: expected 8, 14, 20, ...")
    if width not in _CIFAR_WIDTHS:
        raise ValueError(f"width={width}, expected one of {sorted(_CIFAR_WIDTHS)}")
    return ResNet(num_classes, (blocks,) * 3, _CIFAR_WIDTHS[width], **options)


def resnet_imagenet(depth: int, num_classes: int = 1000, **options: Any) -> ResNet:
    """The ResNets for 224x224 images: 18 and 34 of basic blocks, 50 of bottlenecks.

    As torchvision's: 11,689,512, 21,797,672 and 25,557,032 parameters.

    Args:
      depth: 18, 34 or 50.
      num_classes: C.
      options: `norm`, `axis_name` and `remat`, see `ResNet`.

    Raises:
      ValueError: no such depth.

    References:
      He et al. 2016, Deep Residual Learning for Image Recognition, table 1.
    """
    if depth not in _IMAGENET_STAGES:
        depths = sorted(_IMAGENET_STAGES)
        raise ValueError(
            f"no ImageNet ResNet of depth {depth}: expected one of {depths}"
        )
    return ResNet(
        num_classes,
        stages=_IMAGENET_STAGES[depth],
        widths=(64, 64, 128, 256, 512),
        bottleneck=depth >= 50,
        large_stem=True,
        **options,
    )
