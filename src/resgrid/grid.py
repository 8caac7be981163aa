"""The cells of the grid: architecture x optimizer x seed, and the studies beside it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable

from resgrid.config import (
    FAMILIES,
    Adagrad,
    Adam,
    Architecture,
    Engine,
    Family,
    OptimizerName,
    Params,
    Recipe,
    RMSprop,
    Sgd,
    Strict,
)
from resgrid.errors import ResgridError


class Optimizer(Strict):
    """One optimizer as a cell uses it; `settings` are the other keywords of torch's class."""

    name: OptimizerName
    lr: float
    settings: Sgd | Adam | RMSprop | Adagrad


class Cell(Strict):
    """One training run, with every number that makes its result."""

    id: str  # its folder, its MLflow run and its Prefect task are called by this name
    study: str | None  # None: a cell of the grid
    architecture: Architecture
    optimizer: Optimizer
    seed: int
    recipe: Recipe
    engine: Engine

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def depth(self) -> int:
        """The number in the architecture's name: its layers with weights, as its authors count."""
        return int("".join(filter(str.isdigit, self.architecture)))

    @property
    def digest(self) -> str:
        """`sha256:…` of all of it: two cells of the same digest are trained alike."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    @property
    def stage(self) -> str:
        """The name of its stage in `dvc.yaml`."""
        return f"train-study@{self.study}" if self.study else f"train@{self.id}"


def expand(params: Params) -> list[Cell]:
    """Every cell of `params`, the grid's first, in the order of its lists."""
    cells = [
        _cell(
            params,
            id=f"{architecture}-{optimizer}-{seed}",
            study=None,
            architecture=architecture,
            optimizer=optimizer,
            seed=seed,
            lr=getattr(params.learning_rates[architecture], optimizer),
            recipe=params.recipes[architecture],
        )
        for architecture in params.grid.architectures
        for optimizer in params.grid.optimizers
        for seed in params.grid.seeds
    ]
    for name, study in params.studies.items():
        recipe = Recipe.model_validate({field: getattr(study, field) for field in Recipe.model_fields})
        cells.append(
            _cell(
                params,
                id=name,
                study=name,
                architecture=study.architecture,
                optimizer=study.optimizer,
                seed=study.seed,
                lr=study.lr,
                recipe=recipe,
            )
        )
    return cells


def _cell(
    params: Params,
    *,
    id: str,
    study: str | None,
    architecture: Architecture,
    optimizer: OptimizerName,
    seed: int,
    lr: float,
    recipe: Recipe,
) -> Cell:
    return Cell(
        id=id,
        study=study,
        architecture=architecture,
        optimizer=Optimizer(name=optimizer, lr=lr, settings=getattr(params.optimizers, optimizer)),
        seed=seed,
        recipe=recipe,
        engine=params.engine,
    )


def find_cell(params: Params, cell_id: str) -> Cell:
    """The cell called `cell_id`; raises ResgridError, with the nearest names, if there is none."""
    cells = {cell.id: cell for cell in expand(params)}
    if cell_id not in cells:
        raise ResgridError(
            f"there is no cell {cell_id!r} in params.yaml{suggest(cell_id, cells)} "
            "`resgrid cells` lists all of them."
        )
    return cells[cell_id]


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for the nearest of `known`, or a full stop."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else "."
