"""What the two original experiments published for CIFAR-10 (published.yaml), beside what is measured here.

A figure stands beside a measured one where data and recipe agree. Only settings that an experiment states are
compared.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from resgrid.convert import CIFAR10_CLASSES
from resgrid.data.dataset import Meta
from resgrid.grid import Cell
from resgrid.project import read_yaml

NUM_IMAGES = {"train": 50_000, "test": 10_000}  # of CIFAR-10, all of which both experiments used


class Publication(NamedTuple):
    accuracy: float  # 0-1, of a single run
    settings: dict[str, Any]  # those stated


@cache
def _published() -> dict[str, Publication]:
    """By architecture and optimizer, as `resnet20-sgd`."""
    experiments = read_yaml(Path(__file__).with_suffix(".yaml"))
    return {
        name: Publication(accuracy, experiment["settings"])
        for experiment in experiments.values()
        for name, accuracy in experiment["accuracy"].items()
    }


def publication(cell: Cell, meta: Meta) -> Publication | None:
    """What was published for the grid's own cell; None for others, and for images that are not CIFAR-10's."""
    if not cell.is_base or set(meta.class_names) != set(CIFAR10_CLASSES):
        return None
    return _published().get(f"{cell.architecture}-{cell.optimizer.name}")


def agrees(cell: Cell, meta: Meta, published: Publication) -> bool:
    """Whether `cell` has the data of the published figure and every setting that is stated with it."""
    counts = {split: meta.num_images.get(split, 0) for split in NUM_IMAGES}
    own = {"learning_rate": cell.optimizer.lr} | cell.optimizer.settings.model_dump()
    own = json.loads(json.dumps(own | cell.recipe.model_dump()))  # tuples become lists, as in YAML
    same = (
        bool(own[key] == ((own[key] or {}) | stated if isinstance(stated, dict) else stated))
        for key, stated in published.settings.items()
    )
    return meta.source == "cifar10" and counts == NUM_IMAGES and all(same)


def as_text(value: Any) -> str:
    """A setting's value as a person reads it: `end to end`, `0.3, 0.4, 0.5`, `none`."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    return "none" if value is None else str(value).replace("_", " ")
