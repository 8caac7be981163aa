"""Cells of the project's own params.yaml: names of stages, keys, numbers, and patterns that choose cells."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from resgrid.config import load_params
from resgrid.errors import ResgridError
from resgrid.grid import choose, expand, find_cell, flat

PARAMS = load_params(Path(__file__).parents[1] / "params.yaml")


def test_cells_come_in_the_order_of_the_lists_and_studies_last() -> None:
    ids = [cell.id for cell in expand(PARAMS)]
    grid = PARAMS.grid
    assert ids[: len(ids) - len(PARAMS.studies)] == [
        f"{architecture}-{optimizer}-{seed}"
        for architecture in grid.architectures
        for optimizer in grid.optimizers
        for seed in grid.seeds
    ]
    assert ids[len(ids) - len(PARAMS.studies) :] == list(PARAMS.studies)


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
