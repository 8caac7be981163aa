"""What a grid will take here, from steps that are really timed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sleeping import sleeping

from resgrid.cli import main
from resgrid.config import Engine, Params, load_params
from resgrid.cost import announce, sentence
from resgrid.grid import expand
from resgrid.training import device as devices

ROOT = Path(__file__).parents[1]


def params(epochs: dict[str, int], **more: Any) -> Params:
    """The digits' example with ResNet-20, SGD and Adam, and no studies."""
    given = load_params(ROOT / "examples/digits/params.yaml")
    grid = given.grid.model_copy(update={"architectures": tuple(epochs), "optimizers": ("sgd", "adam")})
    recipes = {
        name: recipe.model_copy(update={"epochs": epochs.get(name, recipe.epochs)})
        for name, recipe in given.recipes.items()
    }
    return given.model_copy(update={"grid": grid, "recipes": recipes, "studies": {}, **more})


def test_a_long_grid_is_told_with_its_longest_cell_and_how_to_take_less():
    cells = [cell for cell in expand(params({"resnet20": 1, "resnet10": 1})) if cell.optimizer.name == "sgd"]
    text = sentence(cells, {"resnet20-sgd-0": 3600.0, "resnet10-sgd-0": 90_000.0})
    assert text.startswith("The 2 cells of this grid take about ")
    assert "(resnet10-sgd-0) a cell" in text
    assert "dvc repro train@resnet20-sgd-0" in text
    assert "\n" not in sentence(cells[:1], {"resnet20-sgd-0": 60.0})


def test_cells_for_another_machine_are_no_reason_to_stop(monkeypatch, caplog):
    """A grid in bf16 that a coordinator without bf16 places on workers with a GPU."""
    monkeypatch.setenv("RESGRID_DEVICE", "cpu")
    monkeypatch.setattr(devices, "_multiplies_bf16", lambda device: False)
    caplog.set_level(logging.INFO, "resgrid")
    bf16 = Engine(precision="bf16", compile="never", scored_epochs="all")
    announce(params({"resnet20": 1}, engine=bf16), 1000)
    assert caplog.messages == []
    fp32 = bf16.model_copy(update={"precision": "fp32"})
    announce(params({"resnet20": 1}, engine=fp32), 1000)
    assert caplog.messages[0].startswith("The 2 cells of this grid take about ")


def test_plan_measures_what_nothing_has_been_trained_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RESGRID_DEVICE", "cpu")
    command = ["plan", "--pipeline", str(sleeping(tmp_path / "r", "resnet20", "sgd").root), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] is None
    assert main([*command, "--measure"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
