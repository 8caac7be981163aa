"""Scores of trained weights, measured afresh from the weights file: never copied from training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from resgrid.data.dataset import Split, load_split
from resgrid.data.sources import open_source
from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.models.weights import load_model
from resgrid.runs import WEIGHTS, read_json, verify_weights
from resgrid.training.engine import Scores, score

Status = Literal["completed", "diverged", "missing"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell as the comparison sees it; without a finished run there is only the cell."""

    cell: Cell
    status: Status
    scores: Scores | None = None  # of the last epoch's weights on the test split, in fp32
    metrics: dict[str, Any] | None = None  # runs/<cell>/metrics.json
    timing: dict[str, Any] | None = None  # runs/<cell>/timing.json


def evaluate_cell(cell: Cell, run_folder: Path, test: Split, device: torch.device) -> Result:
    """Score the weights in `run_folder` on `test`.

    Raises ResgridError if the folder is incomplete or its weights are not those that its metrics were
    written for.
    """
    if not (run_folder / "metrics.json").is_file():
        return Result(cell=cell, status="missing")
    metrics = read_json(run_folder / "metrics.json")
    timing = read_json(run_folder / "timing.json")
    verify_weights(run_folder, metrics, cell.stage)
    model, info = load_model(run_folder / WEIGHTS)
    scores = score(model, test, info.mean, info.std, device)
    return Result(cell=cell, status=metrics["status"], scores=scores, metrics=metrics, timing=timing)


def evaluate_all(cells: list[Cell], runs: Path, data_folder: Path, device: torch.device) -> Iterator[Result]:
    """Every cell of the grid and its studies, in order, scored on the test split."""
    test = load_split(data_folder, "test")
    for cell in cells:
        yield evaluate_cell(cell, runs / cell.id, test, device)


def score_file(weights: Path, data: Path, split: str, device: torch.device) -> Scores:
    """Score any weights file on the `split` of whatever images stand at `data`, in fp32.

    The labels are matched to the model's outputs by class name; raises ResgridError if they differ.
    """
    model, info = load_model(weights)
    source = open_source(data)
    if set(source.class_names) != set(info.class_names):
        raise ResgridError(
            f"{data}: its classes are {', '.join(source.class_names[:12])}; {weights} knows "
            f"{', '.join(info.class_names[:12])}. Give data with the same classes."
        )
    images = source.load(split)
    place = torch.tensor([info.class_names.index(name) for name in source.class_names])
    return score(model, Split(images=images.images, labels=place[images.labels]), info.mean, info.std, device)
