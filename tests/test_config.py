"""params.yaml is read into typed models, and every mistake in it is named with its key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from ruamel.yaml import YAML

from resgrid.cli import COMMANDS
from resgrid.config import Constant, load_params, parse_params
from resgrid.errors import ResgridError
from resgrid.grid import expand, find_cell
from resgrid.optimizers import Sgd

ROOT = Path(__file__).parents[1]
OTHER = {"architecture": "resnet10", "optimizer": "adam", "seed": 1}


@pytest.fixture
def raw() -> dict[str, Any]:
    params: dict[str, Any] = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    return params


def change(raw: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split("/")
    node = raw
    for key in parents:
        node = node[key]
    node[last] = value


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


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("lerning", 1, "lerning: unknown key"),
        ("recipes/resnet20/epoch", 1, "recipes.resnet20.epoch: unknown key. Check its spelling"),
        ("recipes/resnet20/epochs", 0, "recipes.resnet20.epochs: Input should be greater than or equal to 1 (it is 0)"),
        ("recipes/resnet20/epochs", 1.5, "recipes.resnet20.epochs: Input should be a valid integer (it is 1.5)"),
        ("recipes/resnet20/epochs", True, "recipes.resnet20.epochs: Input should be a valid integer (it is true)"),
        ("recipes/resnet10/dropout", 1.5, "recipes.resnet10.dropout: Input should be less than 1 (it is 1.5)"),
        ("recipes/vgg16/dropout", 0.1, "recipes.vgg16.dropout: VGG-16 takes three rates"),
        ("recipes/resnet20/dropout", 0.1, "recipes.resnet20.dropout: resnet20 has no dropout layer"),
        ("recipes/resnet20/schedule/name", "dorp", "recipes.resnet20.schedule.name: Input tag 'dorp' found using 'name' does not match any of"),
        ("recipes/resnet20/schedule", {"factor": 1.0}, "recipes.resnet20.schedule.name: this key is missing"),
        ("recipes/resnet20/schedule/factor", 2.0, "schedule.factor: Input should be less than or equal to 1 (it is 2.0)"),
        ("recipes/resnet10/initial_weights/name", "imagenet", "imagenet weights exist for vgg16 only"),
        ("recipes/resnet21", {}, "recipes.resnet21: must be 'resnet20'"),
        ("tuning/resnet20/sgd/lr", "1e-3", "tuning.resnet20.sgd.lr: Input should be a valid number (it is \"1e-3\")"),
        ("tuning/resnet20/sgd/lr", -0.1, "tuning.resnet20.sgd.lr: Input should be greater than 0 (it is -0.1)"),
        ("tuning/resnet20/sgd/lr", float("nan"), "tuning.resnet20.sgd.lr: Input should be a finite number"),
        ("tuning/resnet20/sgd", {"nesterov": True}, "tuning.resnet20.sgd.lr: this key is missing"),
        ("tuning/resnet20/sgd", {"lr": 0.1}, "optimizers.sgd.nesterov: this key is missing"),
        ("tuning/resnet20/sgd/momentum", 0.5, "tuning.resnet20.sgd.momentum: stands in optimizers.sgd too"),
        ("tuning/resnet20/sgd/nestrov", True, "tuning.resnet20.sgd.nestrov: unknown key"),
        ("tuning/resnet20/sdg", {"lr": 0.1}, "tuning.resnet20.sdg: Input should be 'sgd', 'adam', 'rmsprop', 'adagrad' or 'adamw'"),
        ("tuning/resnet21", {}, "tuning.resnet21: must be 'resnet20', 'resnet32'"),
        ("optimizers/adam/eps", 0, "optimizers.adam.eps: Input should be greater than 0 (it is 0)"),
        ("optimizers/adam/esp", 1e-8, "optimizers.adam.esp: unknown key"),
        ("optimizers/adams", {}, "optimizers.adams: Input should be 'sgd', 'adam', 'rmsprop', 'adagrad' or 'adamw'"),
        ("optimizers/adamw/weight_decay", 0.1, "tuning.resnet20.adamw.weight_decay: stands in optimizers.adamw too"),
        ("tuning/resnet20/adamw/weight_decay", -0.1, "tuning.resnet20.adamw.weight_decay: Input should be greater than or equal to 0"),
        ("grid/architectures", ["resnet21"], "grid.architectures.0: must be 'resnet20'"),
        ("grid/optimizers", [], "grid.optimizers: Tuple should have at least 1 item"),
        ("grid/seeds", [0, 0], "grid: seeds holds a value twice"),
        ("recipes/resnet10/normalization/mean", [[]], "recipes.resnet10.normalization.mean.0: Input should be a valid"),
        ("data", {"source": "cifar100"}, "data.source: Input tag 'cifar100' found using 'source' does not match"),
        ("data", {"source": "archive", "location": "x", "checksum": "md5:12"}, "data.checksum: String should match"),
        ("data", {"source": "image-folder", "location": "x"}, "data.on_broken: this key is missing"),
        ("preprocess/validation_fraction", 1.0, "preprocess.validation_fraction: Input should be less than 1"),
        ("optimizers/sgd/momentum", 0.0, "optimizers.sgd: nesterov needs a momentum above 0"),
        ("name", "a/b", "name: String should match pattern"),
        ("studies/lr-0p5/lr", 0, "studies.lr-0p5.lr: Input should be greater than 0 (it is 0)"),
        ("studies/lr-0p5/epoch", 3, "studies.lr-0p5.epoch: unknown key; did you mean epochs or approach?"),
        ("studies/lr-0p5/eps", -1.0, "studies.lr-0p5.eps: Input should be greater than 0 (it is -1.0)"),
        ("studies/lr-0p5/momentum", 0.9, "studies.lr-0p5.momentum: unknown key"),
        ("studies/lr-0p5/dropout", [0.1, 0.2, 0.3], "studies.lr-0p5.dropout: resnet10 takes one rate, not three"),
        ("studies/lr-0p5/architecture", "resnet9", "studies.lr-0p5.architecture: must be 'resnet20'"),
        ("studies/lr-0p5/optimizer", "adm", "or 'adamw' (it is \"adm\")"),
        ("studies/lr-0p5", {"optimizer": "adam", "seed": 0}, "studies.lr-0p5.architecture: this key is missing"),
        ("studies/resnet20-sgd-7", OTHER, "studies.resnet20-sgd-7: that is the name of a cell"),
        ("studies/resnet20-sgd-7-x30", OTHER, "studies.resnet20-sgd-7-x30: that is the name of a cell"),
        ("rates", {}, "rates.factors: this key is missing"),
        ("rates/factors", [0.3, 3.0], "rates.factors.1: a factor is a number from 0.001 to 1000, not 1 (that"),
        ("rates/factors", [1], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that"),
        ("rates/factors", [0.0001], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that"),
        ("rates/factors", [10**400], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that"),
        ("rates/factors", [0.1234567], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that"),
        ("rates/factors", ["0.3"], "rates.factors.0: Input should be a valid number (it is \"0.3\")"),
        ("rates/factors", [True], "rates.factors.0: Input should be a valid number (it is true)"),
        ("rates/factors", [0.3, 0.3], "rates: factors holds a value twice"),
        ("recipes/vgg16/initial_weights", {"name": "mlflow", "uri": "models:/vgg@best"}, "uri: an alias moves"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_its_key_and_its_value(raw, path, value, said):
    change(raw, path, value)
    with pytest.raises(ResgridError) as refusal:
        parse_params(raw)
    assert said in str(refusal.value)
    assert str(refusal.value).startswith("params.yaml: ")


def test_a_file_without_rates_says_in_one_line_what_to_add(raw):
    del raw["rates"]
    with pytest.raises(ResgridError) as refusal:
        parse_params(raw)
    assert str(refusal.value) == (
        "params.yaml: rates: this key is missing; add the line `rates: {factors: []}`, for no other learning rates"
    )


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("  validation_fraction: 0.0", "  validation_fraction: 1.0", [
            "params.yaml:13: preprocess.validation_fraction: Input should be less than 1 (it is 1.0)"]),
        ("  precision: auto", "  precision: bf61", [
            "params.yaml:18: engine.precision: Input should be 'auto', 'fp32' or 'bf16' (it is \"bf61\"); "
            "did you mean bf16?"]),
        ("  - resnet32\n", "  - resnet23\n", [
            "params.yaml:27: grid.architectures.1: must be 'resnet20', 'resnet32', 'resnet44', 'resnet56', "
            "'resnet110', 'resnet10', 'resnet18', 'resnet26', 'vgg16' or 'resnet20v1', or listed in "
            "grid.own_architectures (it is 'resnet23'); did you mean resnet32 or resnet26 or resnet20?"]),
        ("  resize: stretch", "  rezise: stretch", [
            "params.yaml:11: preprocess.resize: this key is missing",
            "params.yaml:12: preprocess.rezise: unknown key; did you mean resize? Check its spelling, or delete it"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_has_its_line_and_the_nearest_name(tmp_path, old, new, lines):
    text = (ROOT / "params.yaml").read_text()
    assert text.count(old) == 1
    (tmp_path / "params.yaml").write_text(text.replace(old, new))
    with pytest.raises(ResgridError) as refusal:
        load_params(tmp_path / "params.yaml")
    assert str(refusal.value).replace(f"{tmp_path}/", "").splitlines() == lines


def test_an_architecture_of_the_grid_needs_its_recipe_and_rates(raw):
    del raw["tuning"]["resnet18"]
    with pytest.raises(ResgridError, match=r"tuning\.resnet18\.sgd: is missing"):
        parse_params(raw)
    del raw["recipes"]["resnet18"]
    with pytest.raises(ResgridError, match=r"recipes\.resnet18: is missing, but the grid has resnet18"):
        parse_params(raw)


def test_a_study_is_the_cell_of_its_architecture_but_for_what_it_says(raw):
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


def test_an_unknown_cell_is_answered_with_the_nearest_names():
    with pytest.raises(ResgridError, match="did you mean resnet20-sgd-0"):
        find_cell(load_params(ROOT / "params.yaml"), "resnet20-sdg-0")


@pytest.mark.parametrize("text", ["a: [1, 2", "- 1\n- 2", "", "a: 1\na: 2", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ResgridError, match=r"params\.yaml: "):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_says_where_to_go(tmp_path):
    with pytest.raises(ResgridError, match="Run this in a pipeline's folder"):
        load_params(tmp_path / "params.yaml")
