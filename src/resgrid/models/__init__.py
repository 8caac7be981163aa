"""The nine architectures: one file a family, one builder for all of them."""

from __future__ import annotations

from torch import Tensor, nn

from resgrid.config import FAMILIES, Architecture
from resgrid.models import cifar_resnet, vgg, wide_resnet


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


def build_model(
    architecture: Architecture, num_classes: int, dropout: float | tuple[float, float, float] = 0.0
) -> Classifier:
    """A new model, its weights drawn from torch's global generator.

    `dropout` is as in `Recipe.dropout`; one rate given to VGG-16 stands for all three of its own.
    Under `torch.device("meta")` the model has shapes and nothing else, and draws nothing.
    """
    family = FAMILIES[architecture]
    if family == "vgg":
        rates = dropout if isinstance(dropout, tuple) else (dropout, dropout, dropout)
        model = Classifier(*vgg.build(num_classes, rates))
    else:
        assert not isinstance(dropout, tuple), f"{architecture} has one rate of dropout"
        if family == "wide_resnet":
            model = Classifier(*wide_resnet.build(wide_resnet.BLOCKS[architecture], num_classes, dropout))
        else:
            assert dropout == 0, f"{architecture} has no dropout"
            model = Classifier(*cifar_resnet.build(cifar_resnet.UNITS[architecture], num_classes))
    _initialize(model)
    return model


def _initialize(model: nn.Module) -> None:
    """He et al. 2015 (arXiv 1502.01852), equation 10: normal, variance 2 / fan-in; biases zero.

    Batch norms stay as torch makes them: scale one, offset zero, mean zero, variance one.
    """
    for module in model.modules():
        # There is nothing to draw on the meta device, and its normal_ imports torch._dynamo: 4 s.
        if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
