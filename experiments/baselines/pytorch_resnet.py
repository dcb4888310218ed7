# SPDX-License-Identifier: Apache-2.0
"""Our ResNets in PyTorch: what benchmark times ours beside, and tests compare with."""

import math

import torch
from torch import nn

from jaxdistill import models


class ResNet(nn.ModuleList):
    """The same network: stem, stages, head; images are `[B, 3, H, W]`.

    Args:
      like: ours. `pretrained.from_torch` takes the weights over.
    """

    def __init__(self, like: models.ResNet):
        inner, *widths = like.widths
        if like.large_stem:
            stem = [*layers(like.norm, 3, inner, 7, 2), nn.ReLU()]
            stem.append(nn.MaxPool2d(3, 2, padding=1))
        else:
            stem = [*layers(like.norm, 3, inner, 3), nn.ReLU()]
        stages: list[nn.Module] = []
        for blocks, width in zip(like.stages, widths, strict=True):
            stage = []
            for i in range(blocks):
                stride = 2 if stages and i == 0 else 1
                stage.append(Block(like, inner, width, stride))
                inner = stage[-1].out
            stages.append(nn.Sequential(*stage))
        head = nn.Linear(inner, like.num_classes)
        super().__init__([nn.Sequential(*stem), *stages, head])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[B, C]`."""
        *body, head = self
        for part in body:
            images = part(images)
        return head(images.mean((2, 3)))


class Block(nn.Module):
    """A residual block, basic or a bottleneck; a projection where shapes change."""

    def __init__(self, like: models.ResNet, inner: int, width: int, stride: int):
        super().__init__()
        if like.bottleneck:
            self.out = 4 * width
            main = [*layers(like.norm, inner, width, 1), nn.ReLU()]
            main += [*layers(like.norm, width, width, 3, stride), nn.ReLU()]
            main += layers(like.norm, width, self.out, 1)
        else:
            self.out = width
            main = [*layers(like.norm, inner, width, 3, stride), nn.ReLU()]
            main += layers(like.norm, width, width, 3)
        self.main = nn.Sequential(*main)
        changes = stride != 1 or inner != self.out
        project = layers(like.norm, inner, self.out, 1, stride) if changes else []
        self.shortcut = nn.Sequential(*project)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, inner, H, W]` to `[B, out, H / stride, W / stride]`."""
        return (self.main(x) + self.shortcut(x)).relu()


def layers(norm: str, inner: int, out: int, size: int, stride: int = 1) -> list:
    """A convolution and its normalisation."""
    if norm == "batch":
        layer: nn.Module = nn.BatchNorm2d(out)
    else:
        layer = nn.GroupNorm(out // math.gcd(16, out), out)
    conv = nn.Conv2d(inner, out, size, stride, padding=size // 2, bias=False)
    return [conv, layer]
