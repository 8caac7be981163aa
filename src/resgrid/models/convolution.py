"""A 3x3 convolution whose weight gradient is one matrix product where images are small and channels many.

oneDNN's bf16 kernel for that gradient is slow at few pixels: 512 channels at 2x2, batch 128, take it 14 ms on
two cores with AVX512-BF16, and the product of the unfolded input and the gradient 6 ms; on cores with AMX
the same was reported of 4x4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_PIXELS = 16  # of a feature map, 4x4; at 8x8 the unfolding costs more than it gains
MIN_CHANNELS = 256


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` of kernel 3, stride 1 and padding 1, with the same parameters under the same names."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        pixels = input.shape[2] * input.shape[3]
        if (
            input.device.type != "cpu"
            or pixels > MAX_PIXELS
            or self.in_channels < MIN_CHANNELS
            or not torch.is_autocast_enabled("cpu")
            or not (torch.is_grad_enabled() and self.weight.requires_grad)
            or torch.compiler.is_compiling()
        ):
            return super().forward(input)
        y: Tensor = _Convolution.apply(input.bfloat16(), self.weight.bfloat16())
        return y if self.bias is None else y + self.bias.bfloat16()[:, None, None]


class _Convolution(torch.autograd.Function):
    """x (N, C, H, W) and weight (D, C, 3, 3) to (N, D, H, W), all bf16 and channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )
        if ctx.needs_input_grad[1]:
            num, channels, height, width = x.shape
            padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (N, H + 2, W + 2, C)
            by_image, by_row, by_column, by_channel = padded.stride()
            windows = padded.as_strided(
                (num, height, width, 3, 3, channels),
                (by_image, by_row, by_column, by_row, by_column, by_channel),
            ).reshape(-1, 9 * channels)  # (N H W, 9 C)
            rows = gradient.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])  # (N H W, D)
            of_weight = (rows.t() @ windows).view(-1, 3, 3, channels).permute(0, 3, 1, 2)  # (D, C, 3, 3)
        return of_x, of_weight
