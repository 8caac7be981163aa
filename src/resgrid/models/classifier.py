"""What every architecture is: a base that can be frozen, and a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """`head(base(x))`: normalised images (N, 3, 32, 32) to logits (N, num_classes).

    The base alone is frozen by `model.base.requires_grad_(False)`.
    """

    def __init__(self, base: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.base(x))
        return logits


def initialize(model: nn.Module) -> None:
    """He et al. 2015 (arXiv 1502.01852), equation 10: normal, variance 2 / fan-in; biases zero.

    Batch norms stay as torch makes them: scale one, offset zero, mean zero, variance one.
    """
    for module in model.modules():
        # There is nothing to draw on the meta device, and its normal_ imports torch._dynamo: 4 s.
        if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check(model: nn.Module, num_classes: int) -> None:
    """Raises ValueError unless `model` gives logits (N, num_classes); draws no random numbers."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # a forward there imports torch._dynamo
    with torch.no_grad():
        logits = model.eval()(torch.zeros(2, 3, 32, 32))
    model.train()
    if logits.shape != (2, num_classes):
        raise ValueError(
            f"of two images it gives {tuple(logits.shape)}, where logits have (2, {num_classes})"
        )
