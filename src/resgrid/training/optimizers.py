"""torch.optim's optimizers, as a cell asks for them.

Weight decay is torch's coupled one (L2): the gradient of weight_decay / 2 · ‖w‖² joins the loss's. Keras adds
λ · ‖w‖² to the loss, so its λ is half of a weight decay here. A decoupled optimizer has a weight decay among
its own settings, which takes the place of the recipe's.
"""

from __future__ import annotations

from torch import Tensor, nn, optim

from resgrid.grid import Cell
from resgrid.optimizers import OPTIMIZERS


def build_optimizer(cell: Cell, model: nn.Module) -> optim.Optimizer:
    """The cell's optimizer over the parameters of `model` that require a gradient.

    Unless the recipe decays norms and biases too, there are two groups: the kernels of convolutions and dense
    layers, which decay, and the rest, which do not.
    """
    kernels: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Kernels have 2 or 4 axes; biases and the scales and offsets of batch norm have 1.
            (kernels if parameter.ndim > 1 else others).append(parameter)
    settings = {"weight_decay": cell.recipe.weight_decay} | cell.optimizer.settings.model_dump()
    weight_decay = settings.pop("weight_decay")
    groups = [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": others, "weight_decay": weight_decay if cell.recipe.decay_norm_and_bias else 0.0},
    ]
    torch_class = getattr(optim, OPTIMIZERS[cell.optimizer.name].torch_class)
    optimizer: optim.Optimizer = torch_class(groups, lr=cell.optimizer.lr, **settings)
    return optimizer


def set_learning_rate(optimizer: optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step: the one place that sets it, and no wait for the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
