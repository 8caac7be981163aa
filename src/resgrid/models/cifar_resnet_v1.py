"""The residual networks of He et al. 2015 (arXiv 1512.03385, section 4.2), as they were first published.

Here a unit is convolution, BN, ReLU, convolution, BN, the shortcut, ReLU: "post-activation", in contrast to
`cifar_resnet`. The details are those of akamaster/pytorch_resnet_cifar10, whose checkpoints work here:

- stride 2 pads a pixel on every side, and shortcuts have no parameters (option A): every other pixel, and
  channels of zeros, half before and half after;
- BN, ReLU follow the stem, and a dense layer the pooling; batch norm has torch's own epsilon and momentum.

The dense layer's bias begins at zero, there with torch's uniform draw.

Parameters with 10 classes, ResNet-20: 271,098, of which 269,722 are trainable ("0.27M" in its table) and
1,376 are running means and variances.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


def build(blocks: tuple[int, ...], num_classes: int, dropout: float) -> tuple[nn.Module, nn.Module]:
    """Base, images (N, 3, 32, 32) to (N, 64, 8, 8), and head, from there to logits (N, num_classes)."""
    assert dropout == 0, "this family has no dropout"
    base = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 16, 3, padding=1, bias=False),  # (N, 16, 32, 32)
            norm=nn.BatchNorm2d(16),
            relu=nn.ReLU(inplace=True),
            stage1=_stage(blocks[0], 16, 16, 1),
            stage2=_stage(blocks[1], 16, 32, 2),  # (N, 32, 16, 16)
            stage3=_stage(blocks[2], 32, 64, 2),  # (N, 64, 8, 8)
        )
    )
    head = nn.Sequential(
        OrderedDict(
            pool=nn.AvgPool2d(8),  # (N, 64, 1, 1)
            flatten=nn.Flatten(),  # (N, 64)
            classifier=nn.Linear(64, num_classes),
        )
    )
    return base, head


class Unit(nn.Module):
    """3x3 convolution and BN, twice, plus the shortcut: (N, C, H, W) to (N, C', H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        half = self.new_channels // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half)) if half else x
        return F.relu(y + shortcut, inplace=True)


def _stage(units: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    rest = (Unit(out_channels, out_channels, 1) for _ in range(units - 1))
    return nn.Sequential(Unit(in_channels, out_channels, stride), *rest)
