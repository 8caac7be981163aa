"""torch.optim's SGD, Adam, RMSprop and Adagrad, as a cell asks for them.

Weight decay is torch's coupled one (L2): the gradient of weight_decay / 2 · ‖w‖² joins the loss's. Keras adds
λ · ‖w‖² to the loss, so its λ is half of a weight decay here.
"""

from __future__ import annotations

from torch import Tensor, nn, optim

from resgrid.config import OptimizerName
from resgrid.grid import Cell

OPTIMIZERS: dict[OptimizerName, type[optim.Optimizer]] = {
    "sgd": optim.SGD,
    "adam": optim.Adam,
    "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}


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
    recipe = cell.recipe
    groups = [
        {"params": kernels, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": recipe.weight_decay if recipe.decay_norm_and_bias else 0.0},
    ]
    return OPTIMIZERS[cell.optimizer.name](
        groups,
        lr=cell.optimizer.lr,  # type: ignore[call-arg]
        **cell.optimizer.settings.model_dump(),
    )


def set_learning_rate(optimizer: optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step: the one place that sets it, and no wait for the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
