"""Residual networks for CIFAR by depth: 16, 32 and 64 filters, and few parameters.

The depths are those of He et al. 2015 (arXiv 1512.03385, section 4.2), the pre-activation units those of
He et al. 2016 (arXiv 1603.05027). Details follow the first original, which was written in Keras, so that
its published weights work here:

- stride 2 pads as TensorFlow's SAME does: a row below and a column to the right, none above or to the left;
- shortcuts have no parameters: 2x2 average pooling, and channels of zeros, half before and half after;
- the network's first unit takes its shortcut after BN and ReLU, every other one from its input;
- batch norm: epsilon 1e-3; Keras's momentum of 0.99 is 0.01 in PyTorch, which weighs the new value.

Parameters with 10 classes (total = trainable + moving means and variances):

| depth | total     | trainable | not trainable |
|-------|-----------|-----------|---------------|
| 20    | 271,098   | 269,722   | 1,376         |
| 32    | 466,426   | 464,154   | 2,272         |
| 44    | 661,754   | 658,586   | 3,168         |
| 56    | 857,082   | 853,018   | 4,064         |
| 110   | 1,736,058 | 1,727,962 | 8,096         |
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


def build(blocks: tuple[int, ...], num_classes: int, dropout: float) -> tuple[nn.Module, nn.Module]:
    """Base, images (N, 3, 32, 32) to (N, 64, 8, 8), and head, from there to logits (N, num_classes).

    `blocks`: units a stage, (depth - 2) / 6 in each, for two convolutions a unit, the stem and the head.
    """
    assert dropout == 0, "this family has no dropout"
    base = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 16, 3, padding=1, bias=False),  # (N, 16, 32, 32)
            stage1=_stage(blocks[0], 16, 16, stride=1, opens_network=True),
            stage2=_stage(blocks[1], 16, 32, stride=2),  # (N, 32, 16, 16)
            stage3=_stage(blocks[2], 32, 64, stride=2),  # (N, 64, 8, 8)
        )
    )
    head = nn.Sequential(
        OrderedDict(
            norm=_norm(64),
            relu=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),  # (N, 64, 1, 1)
            classifier=nn.Conv2d(64, num_classes, 1),
            flatten=nn.Flatten(),  # (N, num_classes)
        )
    )
    return base, head


class Unit(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, plus the shortcut: (N, C, H, W) to (N, C', H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, opens_network: bool) -> None:
        super().__init__()
        self.stride = stride
        self.opens_network = opens_network
        self.new_channels = out_channels - in_channels
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0, bias=False
        )
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.norm1(x), inplace=True)
        shortcut = y if self.opens_network else x
        if self.stride == 2:
            y = F.pad(y, (0, 1, 0, 1))  # (N, C, H + 1, W + 1)
            shortcut = F.avg_pool2d(shortcut, 2)  # (N, C, H / 2, W / 2)
        if self.new_channels:
            half = self.new_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, half, half))  # (N, C', H / 2, W / 2)
        y = F.relu(self.norm2(self.conv1(y)), inplace=True)
        y = self.conv2(y)
        return shortcut + y


def _stage(
    units: int, in_channels: int, out_channels: int, stride: int, opens_network: bool = False
) -> nn.Sequential:
    rest = (Unit(out_channels, out_channels, 1, False) for _ in range(units - 1))
    return nn.Sequential(Unit(in_channels, out_channels, stride, opens_network), *rest)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
