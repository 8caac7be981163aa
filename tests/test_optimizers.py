"""Two steps of each optimizer against NumPy, and which parameters decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ruamel.yaml import YAML
from torch import nn

from resgrid.config import Recipe, parse_params
from resgrid.grid import Cell, find_cell, flat
from resgrid.models import build_model
from resgrid.optimizers import OPTIMIZERS
from resgrid.training.optimizers import build_optimizer, set_learning_rate

RAW = YAML(typ="safe").load(Path(__file__).parents[1] / "params.yaml")
PARAMS = parse_params(RAW | {"grid": RAW["grid"] | {"optimizers": list(OPTIMIZERS)}})
DECAY = 0.01
Vector = NDArray[np.float64]
WEIGHT = np.array([[0.5, -1.0, 2.0]])
BIAS = np.array([0.3])
GRADIENTS = [np.array([[0.2, -0.4, 0.1]]), np.array([[-0.3, 0.5, 0.7]])]
BIAS_GRADIENTS = [np.array([0.6]), np.array([-0.2])]


def cell(cell_id: str, settings: dict[str, Any] | None = None, **recipe: Any) -> Cell:
    found = find_cell(PARAMS, cell_id)
    changed = Recipe.model_validate(found.recipe.model_dump() | recipe)
    optimizer = found.optimizer.model_copy(
        update={
            "settings": type(found.optimizer.settings).model_validate(
                found.optimizer.settings.model_dump() | (settings or {})
            )
        }
    )
    return found.model_copy(update={"recipe": changed, "optimizer": optimizer})


def sgd(w: Vector, gradients: list[Vector], lr: float, decay: float) -> Vector:
    """Nesterov's momentum of 0.9 in the form of Sutskever et al. 2013 that torch documents."""
    buffer = np.zeros_like(w)
    for gradient in gradients:
        g = gradient + decay * w
        buffer = 0.9 * buffer + g
        w = w - lr * (g + 0.9 * buffer)
    return w


def adam(w: Vector, gradients: list[Vector], lr: float, decay: float) -> Vector:
    """Kingma & Ba 2015, algorithm 1."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + decay * w
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w


def rmsprop(w: Vector, gradients: list[Vector], lr: float, decay: float) -> Vector:
    """Hinton's lecture 6e, with a smoothing of 0.99."""
    v = np.zeros_like(w)
    for gradient in gradients:
        g = gradient + decay * w
        v = 0.99 * v + 0.01 * g**2
        w = w - lr * g / (np.sqrt(v) + 1e-8)
    return w


def adagrad(w: Vector, gradients: list[Vector], lr: float, decay: float) -> Vector:
    """Duchi et al. 2011, the diagonal form."""
    total = np.zeros_like(w)
    for gradient in gradients:
        g = gradient + decay * w
        total = total + g**2
        w = w - lr * g / (np.sqrt(total) + 1e-10)
    return w


def adamw(w: Vector, gradients: list[Vector], lr: float, decay: float) -> Vector:
    """Loshchilov & Hutter 2019, algorithm 2, whose decay torch scales by the rate: at decay 0 it is Adam."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        w = (1 - lr * decay) * w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w


@pytest.mark.parametrize("reference", [sgd, adam, rmsprop, adagrad, adamw])  # a function an optimizer
@pytest.mark.parametrize("decay_all", [False, True])
def test_two_steps_are_those_of_the_hand_calculation(reference, decay_all):
    name = reference.__name__
    own = {"weight_decay": DECAY} if name == "adamw" else {}
    recipe = {"weight_decay": 0.9 if own else DECAY, "decay_norm_and_bias": decay_all}
    trained = cell(f"resnet20-{name}-0", own, **recipe)
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(WEIGHT))
        model.bias.copy_(torch.from_numpy(BIAS))
    optimizer = build_optimizer(trained, model)
    for gradient, bias_gradient in zip(GRADIENTS, BIAS_GRADIENTS, strict=True):
        model.weight.grad = torch.from_numpy(gradient)
        model.bias.grad = torch.from_numpy(bias_gradient)
        optimizer.step()
    lr = trained.optimizer.lr
    expected = reference(WEIGHT, GRADIENTS, lr, DECAY)
    expected_bias = reference(BIAS, BIAS_GRADIENTS, lr, DECAY if decay_all else 0.0)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(model.bias.detach().numpy(), expected_bias, rtol=1e-12)


def test_adamw_without_decay_is_adam_bit_for_bit():
    states = []
    for name, settings in (("adam", {}), ("adamw", {"weight_decay": 0.0})):
        torch.manual_seed(0)
        model = build_model("resnet20", 10)
        optimizer = build_optimizer(cell(f"resnet20-{name}-0", settings, weight_decay=0.0), model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_decay_that_is_told_is_the_one_that_works():
    assert flat(cell("resnet20-adam-0").numbers)["weight_decay"] == 2e-4
    assert flat(cell("resnet20-adamw-0").numbers)["weight_decay"] == 0.05


def test_settings_reach_torch_under_torchs_own_names():
    changed = {
        "sgd": {"momentum": 0.5, "nesterov": False},
        "adam": {"betas": (0.8, 0.95), "eps": 1e-5},
        "rmsprop": {"alpha": 0.9, "momentum": 0.3, "eps": 1e-4},
        "adamw": {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.2},
        "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3},
    }
    for name, settings in changed.items():
        optimizer = build_optimizer(cell(f"resnet20-{name}-0", settings), nn.Linear(3, 1))
        assert type(optimizer).__name__.lower() == name
        kernels = optimizer.param_groups[0]
        assert {key: kernels[key] for key in settings} == settings


@pytest.mark.parametrize(("architecture", "kernels"), [("resnet20", 20), ("resnet10", 13), ("vgg16", 15)])
def test_kernels_decay_and_norms_and_biases_do_not(architecture, kernels):
    model = build_model(architecture, 10, PARAMS.recipes[architecture].dropout)
    optimizer = build_optimizer(cell(f"{architecture}-sgd-0", weight_decay=DECAY), model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    owners = dict(model.named_modules())
    found = 0
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        kernel = isinstance(owners[module], nn.Conv2d | nn.Linear) and kind == "weight"
        assert decay.pop(id(parameter)) == (DECAY if kernel else 0.0), name
        found += kernel
    assert not decay
    assert found == kernels  # counted by hand in the originals' tables, projection shortcuts included


def test_everything_decays_where_the_recipe_says_so():
    recipe = {"weight_decay": DECAY, "decay_norm_and_bias": True}
    optimizer = build_optimizer(cell("resnet20-adam-0", **recipe), build_model("resnet20", 10, 0.0))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, DECAY]


def test_frozen_parameters_are_left_out():
    model = build_model("resnet20", 10, 0.0)
    model.base.requires_grad_(False)
    optimizer = build_optimizer(cell("resnet20-sgd-0"), model)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.head.parameters()}
    assert sum(p.numel() for p in model.head.parameters()) == 778  # BN 2 x 64, 1x1 convolution 640 + 10


def test_the_learning_rate_is_set_in_every_group():
    model = nn.Linear(3, 1)
    optimizer = build_optimizer(cell("resnet20-sgd-0"), model)
    set_learning_rate(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]
