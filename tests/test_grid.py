"""Cells of the project's own params.yaml: names of stages, keys, numbers, and patterns that choose cells."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from resgrid.config import Params, load_params, parse_params
from resgrid.edit import assign
from resgrid.errors import ResgridError
from resgrid.grid import choose, expand, find_cell, flat

ROOT = Path(__file__).parents[1]
PARAMS = load_params(ROOT / "params.yaml")


def with_factors(factors: str, text: str = (ROOT / "params.yaml").read_text()) -> Params:
    return parse_params(YAML(typ="safe").load(assign(text, [f"rates.factors={factors}"])))


def test_cells_come_in_the_order_of_the_lists_then_those_at_other_rates_then_studies() -> None:
    params = with_factors("[0.3, 10]")
    grid = params.grid
    own = [
        f"{architecture}-{optimizer}-{seed}"
        for architecture in grid.architectures
        for optimizer in grid.optimizers
        for seed in grid.seeds
    ]
    others = [f"{cell}-x{factor}" for cell in own for factor in ("0.3", "10")]
    assert [cell.id for cell in expand(params)] == [*own, *others, *params.studies]


def test_a_cells_stage_depth_and_keys_are_told_by_its_name_and_study() -> None:
    cell, study = find_cell(PARAMS, "resnet110-adam-0"), expand(PARAMS)[-1]
    assert (cell.stage, cell.depth, cell.key("epochs")) == (
        "train@resnet110-adam-0", 110, "recipes.resnet110.epochs"
    )  # fmt: skip
    changed = next(iter(study.changes))
    assert study.stage == f"train-study@{study.study}"
    assert study.key(changed) == f"studies.{study.study}.{changed}"


def test_each_number_has_a_key_of_its_own() -> None:
    numbers = flat(find_cell(PARAMS, "resnet20-sgd-0").numbers)
    recipe = PARAMS.recipes["resnet20"]
    assert list(numbers)[:5] == ["architecture", "optimizer", "learning_rate", "momentum", "nesterov"]
    assert numbers["schedule"] == recipe.schedule.name
    assert numbers["normalization"] == recipe.normalization.name
    assert numbers["augmentation.crop_padding"] == recipe.augmentation.crop_padding
    assert numbers["warmup.steps"] == recipe.warmup.steps
    assert "schedule.name" not in numbers
    assert "name" not in numbers


def test_the_digest_is_of_the_sorted_numbers_alone() -> None:
    cell = find_cell(PARAMS, "vgg16-sgd-0")
    content = json.dumps(dict(sorted(cell.numbers.items())), sort_keys=True)
    assert cell.digest == f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
    assert {"id", "study", "changes"}.isdisjoint(cell.numbers)
    assert cell.model_copy(update={"id": "another", "study": "s"}).digest == cell.digest


def test_patterns_choose_cells_in_their_order_and_none_twice() -> None:
    chosen = choose(PARAMS, ["vgg16-adam-0", "vgg16-*"])
    assert [cell.id for cell in chosen] == [
        "vgg16-adam-0", "vgg16-sgd-0", "vgg16-rmsprop-0", "vgg16-adagrad-0"
    ]  # fmt: skip
    with pytest.raises(
        ResgridError, match=r"no cell is called 'resnet20-adma-0'; did you mean resnet20-adam-0"
    ):
        choose(PARAMS, ["resnet20-*", "resnet20-adma-0"])


@pytest.mark.parametrize(
    ("file", "digest"),
    [
        ("params.yaml", "e598bb091fbe34f9ea6620c85ad072dd9716f56a14a22e5ec74c3811bcddc6dd"),
        ("examples/digits/params.yaml", "46c72416b7004e09923ef8dce684e47ddbad195f6908200c7dd9d146cb6443e5"),
    ],
)
def test_the_grids_own_cells_have_the_names_and_digests_of_before_there_were_rates(
    file: str, digest: str
) -> None:
    for params in (load_params(ROOT / file), with_factors("[0.1, 3]", (ROOT / file).read_text())):
        cells = [cell for cell in expand(params) if cell.rate_factor == 1]
        lines = "\n".join(f"{cell.id} {cell.stage} {cell.digest}" for cell in cells)
        assert hashlib.sha256(lines.encode()).hexdigest() == digest


def test_a_cell_at_another_rate_is_the_grids_cell_with_its_exact_rate_and_nothing_else() -> None:
    params = with_factors("[0.3, 3]")
    cells = {cell.id: cell for cell in expand(params)}
    assert len(cells) == 36 * 3 + len(params.studies)
    base, low, high = (cells[f"resnet20-sgd-0{end}"] for end in ("", "-x0.3", "-x3"))
    assert (base.optimizer.lr, low.optimizer.lr, high.optimizer.lr) == (0.1, 0.03, 0.3)  # 0.1 * 3 is 0.30…04
    assert (low.rate_factor, low.study, low.is_base, base.is_base) == (0.3, None, False, True)
    assert (low.stage, low.key("epochs")) == ("train-rate@resnet20-sgd-0-0.3", "recipes.resnet20.epochs")
    changed = {key for key, value in flat(low.numbers).items() if flat(base.numbers)[key] != value}
    assert changed == {"learning_rate"}
    assert not any(cell.is_base for cell in cells.values() if cell.study)


def test_a_pattern_takes_all_rates_and_one_that_ends_with_the_seed_the_grids_own() -> None:
    params = with_factors("[0.3, 3]")
    assert [cell.id for cell in choose(params, ["resnet20-sgd*"])] == [
        "resnet20-sgd-0", "resnet20-sgd-0-x0.3", "resnet20-sgd-0-x3"
    ]  # fmt: skip
    assert {cell.rate_factor for cell in choose(params, ["resnet20-*"])} == {0.3, 1, 3}
    assert {cell.rate_factor for cell in choose(params, ["*-adam-?"])} == {1}
    assert {cell.rate_factor for cell in choose(params, ["*-x3"])} == {3}


def test_an_own_network_has_a_stage_of_its_own_for_other_rates() -> None:
    raw = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    raw["grid"] |= {"architectures": ["resnet20"], "own_architectures": ["tiny"], "optimizers": ["sgd"]}
    raw["recipes"]["tiny"], raw["tuning"]["tiny"] = raw["recipes"]["resnet20"], raw["tuning"]["resnet20"]
    raw["rates"] = {"factors": [0.3]}
    assert [cell.stage for cell in expand(parse_params(raw)) if not cell.study] == [
        "train@resnet20-sgd-0", "train-own@tiny-sgd-0",
        "train-rate@resnet20-sgd-0-0.3", "train-own-rate@tiny-sgd-0-0.3",
    ]  # fmt: skip
