"""Dropout (Srivastava et al. 2014) whose masks cost little on a CPU.

torch draws each element of a mask as a random number of its own, in one thread: a seventh of a training step
of ResNet-18, a quarter of one of VGG-16. Here 64 random bits serve four elements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 2**16  # a rate is a whole number of these; 0.1 becomes 0.100006


class Dropout(nn.Module):
    """Sets each element to zero at `rate`, below 1, and scales the others up so that the mean stays.

    Draws from torch's global generator. Any shape; other devices than the CPU use torch's own kernel.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return nn.functional.dropout(x, self.rate, self.training)
        dropped = round(self.rate * LEVELS)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        drawn = bits.view(torch.int16)[: x.numel()]  # uniform over -2^15 … 2^15 - 1
        mask = (drawn >= dropped - LEVELS // 2).to(x.dtype)
        # In the order of x's memory: channels-last in, channels-last out.
        mask = mask.as_strided(x.shape, x.stride()) if _is_dense(x) else mask.view(x.shape)
        return (x * mask).mul_(LEVELS / (LEVELS - dropped))  # a mask that holds this in bf16 is off by 0.2 %

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
