"""Residual networks of 64 to 512 channels: ResNet-18 of He et al. 2015 (arXiv 1512.03385) made for CIFAR.

As the second original built them in PyTorch: a 3x3 stem without max-pooling, four stages of basic blocks,
projection shortcuts where the shape changes, and dropout in every block after the addition. Batch norm has
torch's own epsilon and momentum.

Parameters with 10 classes (total = trainable + running means and variances):

| model     | blocks       | total      | trainable  | not trainable |
|-----------|--------------|------------|------------|---------------|
| ResNet-10 | [1, 1, 1, 1] | 4,909,002  | 4,903,242  | 5,760         |
| ResNet-18 | [2, 2, 2, 2] | 11,183,562 | 11,173,962 | 9,600         |
| ResNet-26 | [3, 3, 3, 3] | 17,458,122 | 17,444,682 | 13,440        |
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from resgrid.models.convolution import Conv3x3
from resgrid.models.dropout import Dropout


def build(blocks: tuple[int, ...], num_classes: int, dropout: float) -> tuple[nn.Module, nn.Module]:
    """Base, images (N, 3, 32, 32) to (N, 512, 4, 4), and head, from there to logits (N, num_classes)."""
    base = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 64, 3, padding=1, bias=False),  # (N, 64, 32, 32)
            norm=nn.BatchNorm2d(64),
            relu=nn.ReLU(inplace=True),
            stage1=_stage(blocks[0], 64, 64, 1, dropout),
            stage2=_stage(blocks[1], 64, 128, 2, dropout),  # (N, 128, 16, 16)
            stage3=_stage(blocks[2], 128, 256, 2, dropout),  # (N, 256, 8, 8)
            stage4=_stage(blocks[3], 256, 512, 2, dropout),  # (N, 512, 4, 4)
        )
    )
    head = nn.Sequential(
        OrderedDict(
            pool=nn.AvgPool2d(4),  # (N, 512, 1, 1)
            flatten=nn.Flatten(),  # (N, 512)
            classifier=nn.Linear(512, num_classes),
        )
    )
    return base, head


class Block(nn.Module):
    """3x3 convolution and BN, twice, plus the shortcut: (N, C, H, W) to (N, C', H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv1: nn.Conv2d = (
            Conv3x3(in_channels, out_channels, bias=False)
            if stride == 1
            else nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        )
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                    norm=nn.BatchNorm2d(out_channels),
                )
            )
        # A rate of 0 would still draw a mask for every activation.
        self.dropout = Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y)) + self.shortcut(x)
        return F.relu(self.dropout(y))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int, dropout: float) -> nn.Sequential:
    rest = (Block(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1))
    return nn.Sequential(Block(in_channels, out_channels, stride, dropout), *rest)
