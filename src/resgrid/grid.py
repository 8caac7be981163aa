"""The cells of the grid: architecture x optimizer x seed, and the studies beside it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from resgrid.config import Engine, Optimizer, Params, Recipe
from resgrid.errors import ResgridError, suggest
from resgrid.models import family_of, own_file
from resgrid.schema import Strict


class Cell(Strict):
    """One training run, with every number that makes its result."""

    id: str  # its folder, its MLflow run and its Prefect task are called by this name
    study: str | None  # None: a cell of the grid
    architecture: str
    optimizer: Optimizer
    seed: int
    recipe: Recipe
    engine: Engine
    changes: dict[str, Any]  # of a study: what params.yaml says differs from the architecture's own cell

    @property
    def family(self) -> str:
        return family_of(self.architecture)

    @property
    def depth(self) -> int | None:
        """The first number in the architecture's name: its layers with weights, as its authors count."""
        match = re.search(r"\d+", self.architecture)
        return int(match[0]) if match else None

    @property
    def numbers(self) -> dict[str, Any]:
        """Every number that makes the result, as JSON has them."""
        return self.model_dump(mode="json", exclude={"id", "study", "changes"})

    @property
    def digest(self) -> str:
        """`sha256:…` of its numbers: on the same data two cells of the same digest are trained alike."""
        content = json.dumps(self.numbers, sort_keys=True)
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    @property
    def stage(self) -> str:
        """The name of its stage in `dvc.yaml`."""
        if self.study:
            return f"train-study@{self.study}"
        return f"train-own@{self.id}" if own_file(self.architecture) else f"train@{self.id}"

    def key(self, name: str) -> str:
        """Where its value of a recipe's key stands in params.yaml, such as `recipes.resnet20.epochs`."""
        return (
            f"studies.{self.study}.{name}" if name in self.changes else f"recipes.{self.architecture}.{name}"
        )


def expand(params: Params) -> list[Cell]:
    """Every cell of `params`, the grid's first, in the order of its lists."""
    cells = [
        Cell(
            id=f"{architecture}-{optimizer}-{seed}",
            study=None,
            architecture=architecture,
            optimizer=params.optimizers[architecture][optimizer],
            seed=seed,
            recipe=params.recipes[architecture],
            engine=params.engine,
            changes={},
        )
        for architecture in params.grid.architectures + params.grid.own_architectures
        for optimizer in params.grid.optimizers
        for seed in params.grid.seeds
    ]
    for name, study in params.studies.items():
        cells.append(Cell(id=name, study=name, engine=params.engine, **dict(study)))
    return cells


def flat(numbers: dict[str, Any]) -> dict[str, Any]:
    """A cell's numbers each under a key of its own: `learning_rate`, `schedule`, `schedule.factor`."""
    optimizer = numbers["optimizer"]
    values: dict[str, Any] = {
        "architecture": numbers["architecture"],
        "optimizer": optimizer["name"],
        "learning_rate": optimizer["lr"],
        **optimizer["settings"],  # here for their order
        "seed": numbers["seed"],
        **dict(_leaves(numbers["recipe"])),
        **numbers["engine"],
    }
    values.update(optimizer["settings"])  # a decoupled optimizer's weight decay takes the recipe's place
    return values


def _leaves(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = above if above and key == "name" else f"{above}.{key}" if above else key
        if isinstance(value, dict):
            yield from _leaves(value, path)
        else:
            yield path, value


def choose(params: Params, patterns: Iterable[str]) -> list[Cell]:
    """The cells that `patterns` match, in the order of these; raises ResgridError if one matches none."""
    cells = {cell.id: cell for cell in expand(params)}
    chosen: dict[str, Cell] = {}
    for pattern in patterns:
        names = fnmatch.filter(cells, pattern)
        if not names:
            raise ResgridError(
                f"no cell is called {pattern!r}{suggest(pattern, cells)} `resgrid cells` lists all of them; "
                "resnet20-* and *-adam-? are patterns."
            )
        chosen |= {name: cells[name] for name in names}
    return list(chosen.values())


def find_cell(params: Params, cell_id: str) -> Cell:
    """The cell called `cell_id`; raises ResgridError, with the nearest names, if there is none."""
    cells = {cell.id: cell for cell in expand(params)}
    if cell_id not in cells:
        raise ResgridError(
            f"there is no cell {cell_id!r} in params.yaml{suggest(cell_id, cells)} "
            "`resgrid cells` lists all of them."
        )
    return cells[cell_id]
