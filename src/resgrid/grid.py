"""The cells of the grid: architecture x optimizer x seed, at other rates too, and the studies beside it."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from resgrid.config import Engine, Optimizer, Params, Recipe
from resgrid.errors import ResgridError, suggest
from resgrid.models import family_of, own_file
from resgrid.schema import Strict


class Cell(Strict):
    """One training run, with every number that makes its result."""

    id: str  # its folder, its MLflow run and its Prefect task are called by this name
    study: str | None  # None: a cell of the grid, at its own rate or another
    rate_factor: float  # by which its rate differs from the grid's own cell's; 1 for that and for studies
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
        """Every number that makes the result, as JSON has them; the factor stands in the rate."""
        return self.model_dump(mode="json", exclude={"id", "study", "rate_factor", "changes"})

    @property
    def is_base(self) -> bool:
        """Whether it is the grid's own cell: no study, and at the rate that params.yaml names."""
        return self.study is None and self.rate_factor == 1

    @property
    def digest(self) -> str:
        """`sha256:…` of its numbers: on the same data two cells of the same digest are trained alike."""
        content = json.dumps(self.numbers, sort_keys=True)
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    @property
    def stage(self) -> str:
        """The name of its stage in `dvc.yaml`: what stands after the @ is not always its id."""
        if self.study:
            return f"train-study@{self.study}"
        stage = "train-own" if own_file(self.architecture) else "train"
        base = f"{self.architecture}-{self.optimizer.name}-{self.seed}"
        if self.rate_factor == 1:
            return f"{stage}@{base}"
        return f"{stage}-rate@{base}-{self.rate_factor:g}"

    def key(self, name: str) -> str:
        """Where its value of a recipe's key stands in params.yaml, such as `recipes.resnet20.epochs`."""
        return (
            f"studies.{self.study}.{name}" if name in self.changes else f"recipes.{self.architecture}.{name}"
        )


def expand(params: Params) -> list[Cell]:
    """Every cell of `params`: the grid's own, those at other rates, studies; in the order of the lists."""
    base = [
        Cell(
            id=f"{architecture}-{optimizer}-{seed}",
            study=None,
            rate_factor=1,
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
    others = [at_rate(cell, factor) for cell in base for factor in params.rates.factors]
    studies = [
        Cell(id=name, study=name, rate_factor=1, engine=params.engine, **dict(study))
        for name, study in params.studies.items()
    ]
    return base + others + studies


def at_rate(cell: Cell, factor: float) -> Cell:
    """`cell` at `factor` times its learning rate and nothing else; the product is the exact decimal one."""
    rate = float(Decimal(str(cell.optimizer.lr)) * Decimal(str(factor)))  # 0.3 of 0.1 and 3, not 0.30…04
    optimizer = cell.optimizer.model_copy(update={"lr": rate})
    return cell.model_copy(
        update={"id": f"{cell.id}-x{factor:g}", "rate_factor": factor, "optimizer": optimizer}
    )


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
    [cell] = choose(params, [glob.escape(cell_id)])
    return cell


def compared_factors(findings: Mapping[str, Any], current: Collection[str]) -> dict[str, float]:
    """The factor of each `resnet20-sgd` of which `evaluate` compared several rates, from its findings.

    It is 1, the base rate, where none of the cells compared is among the `current` ones any more.
    """
    rates = {(row["architecture"], row["optimizer"]): row["factor"] for row in findings.get("rates", ())}
    return {
        "-".join(key): rates[key] if any(cell in current for cell in row["cells"]) else 1
        for row in findings.get("groups", ())
        if (key := (row["architecture"], row["optimizer"])) in rates
    }
