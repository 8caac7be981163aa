"""params.yaml is read into typed models; its mistakes stand in test_mistakes.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

from ruamel.yaml import YAML

from resgrid.cli import COMMANDS
from resgrid.config import Constant, load_params, parse_params
from resgrid.grid import expand, find_cell
from resgrid.optimizers import Sgd

ROOT = Path(__file__).parents[1]


def test_the_grid_of_both_originals_has_36_cells_and_10_studies():
    cells = expand(load_params(ROOT / "params.yaml"))
    assert sum(cell.study is None for cell in cells) == 9 * 4
    assert [cell.id for cell in cells if cell.study] == [
        "lr-0p5", "lr-0p1", "dropout-0p2", "dropout-0p3", "dropout-0p4", "dropout-0p5",
        "batch-32", "batch-128", "frozen-resnet20", "frozen-vgg16",
    ]  # fmt: skip
    assert len({cell.id for cell in cells}) == len(cells)


def test_the_recipes_are_those_of_the_originals():
    params = load_params(ROOT / "params.yaml")
    thin, wide, vgg = (find_cell(params, f"{name}-sgd-0") for name in ("resnet56", "resnet18", "vgg16"))
    assert [(c.recipe.epochs, c.recipe.batch_size, c.optimizer.lr) for c in (thin, wide, vgg)] == [
        (250, 128, 0.1),
        (200, 64, 0.01),
        (250, 128, 0.1),
    ]
    assert [(c.recipe.weight_decay, c.recipe.dropout) for c in (thin, wide, vgg)] == [
        (2e-4, 0.0),
        (0.0, 0.1),
        (1e-3, (0.3, 0.4, 0.5)),
    ]
    rates = {(c.architecture, c.optimizer.name): c.optimizer.lr for c in expand(params) if c.study is None}
    assert {rates["resnet110", name] for name in ("adam", "rmsprop")} == {1e-3}
    assert rates["vgg16", "adagrad"] == 1e-2
    sgd = [cell for cell in expand(params) if cell.optimizer.name == "sgd"]
    plain = {cell.architecture for cell in sgd if not cell.optimizer.settings.nesterov}
    assert plain == {"resnet10", "resnet18", "resnet26"}  # those of the original in PyTorch
    assert {rates["resnet26", name] for name in ("sgd", "adam", "rmsprop", "adagrad")} == {0.01}


def test_a_study_is_the_cell_of_its_architecture_but_for_what_it_says():
    raw = YAML(typ="safe").load(ROOT / "params.yaml")
    raw["studies"] = {
        "plain": {"architecture": "resnet110", "optimizer": "sgd", "seed": 0},
        "changed": {
            "architecture": "resnet110", "optimizer": "sgd", "seed": 3, "lr": 0.5, "nesterov": False,
            "schedule": {"name": "constant"},
        },
    }  # fmt: skip
    params = parse_params(raw)
    cell, plain, changed = (find_cell(params, name) for name in ("resnet110-sgd-0", "plain", "changed"))
    assert (plain.numbers, plain.digest) == (cell.numbers, cell.digest)
    assert changed.changes == {"lr": 0.5, "nesterov": False, "schedule": {"name": "constant"}}
    assert changed.recipe.schedule == Constant(name="constant")  # the mapping as a whole
    assert changed.recipe.warmup == cell.recipe.warmup
    assert (changed.optimizer.lr, changed.optimizer.settings) == (0.5, Sgd(momentum=0.9, nesterov=False))
    assert (changed.key("schedule"), changed.key("epochs")) == (
        "studies.changed.schedule", "recipes.resnet110.epochs",
    )  # fmt: skip


def test_help_imports_neither_pydantic_nor_params_and_every_command_has_its_function():
    script = """
import sys
from resgrid.cli import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in ("pydantic", "ruamel.yaml", "resgrid.config", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
    assert all(
        callable(resolve_name(f"resgrid.commands.{command.function}")) for command in COMMANDS.values()
    )
