"""What a grid will take here, from steps that are really timed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from resgrid.cli import main
from resgrid.commands import stages
from resgrid.config import Engine, Params, load_params
from resgrid.cost import announce, estimate, sentence
from resgrid.training import device as devices

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def params(epochs: dict[str, int], **more: Any) -> Params:
    """The digits' example with ResNet-20, SGD and Adam, and no studies."""
    given = load_params(ROOT / "examples/digits/params.yaml")
    grid = given.grid.model_copy(update={"architectures": tuple(epochs), "optimizers": ("sgd", "adam")})
    recipes = {
        name: recipe.model_copy(update={"epochs": epochs.get(name, recipe.epochs)})
        for name, recipe in given.recipes.items()
    }
    return given.model_copy(update={"grid": grid, "recipes": recipes, "studies": {}, **more})


def test_a_cell_takes_as_long_as_its_epochs_and_images_say() -> None:
    seconds = estimate(params({"resnet20": 3}), 1000, CPU)
    assert list(seconds) == ["resnet20-sgd-0", "resnet20-adam-0"]
    assert seconds["resnet20-sgd-0"] == seconds["resnet20-adam-0"]  # one step is timed for both
    # Between 0.5 and 5,000,000 images/s, whatever the machine and what else it does.
    assert 3 * 1000 / 5_000_000 < seconds["resnet20-sgd-0"] < 3 * 1000 / 0.5


def test_a_long_grid_is_told_with_its_longest_cell_and_how_to_take_less() -> None:
    said = sentence({"resnet20-sgd-0": 3600.0, "vgg16-sgd-0": 90_000.0}, CPU)
    assert said.startswith("The 2 cells of this grid take about ")
    assert "(vgg16-sgd-0) a cell" in said
    assert "dvc repro train@resnet20-sgd-0" in said
    assert "\n" not in sentence({"resnet20-sgd-0": 60.0}, CPU)


def test_on_a_card_it_says_what_sharing_gains(monkeypatch) -> None:
    """Twelve ResNet-20 of 70 epochs, graphed, at 58,422 images/s each; eight at a time they took 397 s."""
    monkeypatch.setattr("resgrid.mps.available", lambda: True)
    said = sentence(
        {f"resnet20-sgd-{seed}": 70 * 50_000 / 58_422 for seed in range(12)}, torch.device("cuda")
    )
    assert said.endswith(
        "on this GPU, one after another; 8 at a time under MPS, about 6 minutes; starting, scoring and comparing "
        "come on top."
    )
    monkeypatch.setattr("resgrid.mps.available", lambda: False)
    assert "MPS" not in sentence({"resnet20-sgd-0": 60.0, "resnet20-sgd-1": 60.0}, torch.device("cuda"))


def test_cells_for_another_machine_are_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A grid in bf16 that a coordinator without bf16 places on workers with a GPU."""
    monkeypatch.setenv("RESGRID_DEVICE", "cpu")
    monkeypatch.setattr(devices, "_multiplies_bf16", lambda device: False)
    bf16 = Engine(precision="bf16", compile="never", scored_epochs="all")
    announce(params({"resnet20": 1}, engine=bf16), 1000)
    assert capsys.readouterr().err == ""
    fp32 = bf16.model_copy(update={"precision": "fp32"})
    announce(params({"resnet20": 1}, engine=fp32), 1000)
    assert capsys.readouterr().err.startswith("The 2 cells of this grid take about ")


def test_the_command_takes_a_number_of_images_or_that_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "examples/digits/params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["cost", "--images", "100", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seconds"] == pytest.approx(sum(told["cells"].values()))
    assert main(["cost", "--images", "-5"]) == 1
    assert "argument --images: -5: there must be at least one" in capsys.readouterr().err
    assert main(["cost"]) == 1
    assert "dvc repro" in capsys.readouterr().err  # there are no data yet


@pytest.mark.parametrize(("threads", "load", "told"), [(2, 9.0, True), (2, 2.0, False), (1, 9.0, False)])
def test_a_busy_machine_is_told_where_threads_wait_for_one_another(
    monkeypatch: pytest.MonkeyPatch, threads: int, load: float, told: bool
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert stages._is_busy() == told
