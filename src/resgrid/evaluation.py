"""Scores of trained weights, measured afresh from the weights file: never copied from training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resgrid.config import Triple
from resgrid.data.dataset import Split
from resgrid.data.sources import open_source
from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.runs import FAILURE, WEIGHTS, read_history, read_json, verify_weights
from resgrid.training.engine import Scores, score
from resgrid.weights import load_model

Status = Literal["completed", "diverged", "missing"]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of each image of a split, in their order.

    Held in memory and written nowhere: the top class and its probability are all that the report needs
    (130 kB a cell for 10,000 images, at any number of classes), and the weights they come from are at hand.
    """

    classes: NDArray[np.int64]  # (N,)
    confidence: NDArray[np.float32]  # (N,), the probability of that class
    correct: NDArray[np.bool_]  # (N,)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell as the comparison sees it; without a finished run there is only the cell."""

    cell: Cell
    status: Status
    cause: str | None = None  # of a divergence, or why there is no result, as far as it is known
    failed: bool = False  # its training ended with an error
    scores: Scores | None = None  # of the last epoch's weights on the test split, in fp32
    predictions: Predictions | None = None  # of that scoring
    metrics: dict[str, Any] | None = None  # runs/<cell>/run.json
    timing: dict[str, Any] | None = None  # runs/<cell>/timing.json
    history: pd.DataFrame | None = None  # runs/<cell>/history.csv


def evaluate_cell(cell: Cell, run_folder: Path, test: Split, device: torch.device) -> Result:
    """Score the weights in `run_folder` on `test`.

    Without its weights a cell counts as missing. Raises ResgridError if another of its files is gone, or the
    weights are not those that the metrics were written for.
    """
    if not (run_folder / "run.json").is_file():
        if not (run_folder / FAILURE).is_file():
            return Result(cell=cell, status="missing")
        cause = (run_folder / FAILURE).read_text(encoding="utf-8").strip()
        return Result(cell=cell, status="missing", cause=cause, failed=True)
    if not (run_folder / WEIGHTS).is_file():
        cause = f"{run_folder / WEIGHTS} is gone: `dvc checkout --force` restores it."
        return Result(cell=cell, status="missing", cause=cause)
    metrics = read_json(run_folder / "run.json")
    timing = read_json(run_folder / "timing.json")
    history = read_history(run_folder / "history.csv")
    verify_weights(run_folder, metrics, cell.stage)
    model, info = load_model(run_folder / WEIGHTS)
    scores, predictions = predict(model, test, info.mean, info.std, device)
    return Result(
        cell=cell,
        status=metrics["status"],
        cause=metrics["cause"],
        scores=scores,
        predictions=predictions,
        metrics=metrics,
        timing=timing,
        history=history,
    )


def predict(
    model: nn.Module, split: Split, mean: Triple, std: Triple, device: torch.device
) -> tuple[Scores, Predictions]:
    """`score`, with what the model said of each image in that same pass."""
    classes: list[Tensor] = []
    confidence: list[Tensor] = []

    def listen(_model: nn.Module, _images: tuple[Tensor], logits: Tensor) -> None:
        top = logits.argmax(1, keepdim=True)  # (B, 1)
        classes.append(top)
        confidence.append(logits.float().softmax(1).gather(1, top).nan_to_num(0.0))

    hook = model.register_forward_hook(listen)
    try:
        scores = score(model, split, mean, std, device)
    finally:
        hook.remove()
    predicted = torch.cat(classes).flatten().cpu()
    return scores, Predictions(
        classes=predicted.numpy(),
        confidence=torch.cat(confidence).flatten().cpu().numpy(),
        correct=(predicted == split.labels.cpu()).numpy(),
    )


def evaluate_all(cells: list[Cell], runs: Path, test: Split, device: torch.device) -> Iterator[Result]:
    """Every cell of the grid and its studies, in order, scored on the split `test`."""
    for cell in cells:
        yield evaluate_cell(cell, runs / cell.id, test, device)


def score_file(weights: Path, data: Path, split: str, device: torch.device) -> Scores:
    """Score any weights file on the `split` of whatever images stand at `data`, in fp32.

    The labels are matched to the model's outputs by class name; raises ResgridError if they differ.
    """
    model, info = load_model(weights)
    source = open_source(data, info.resize)
    if set(source.class_names) != set(info.class_names):
        raise ResgridError(
            f"{data}: its classes are {', '.join(source.class_names[:12])}; {weights} knows "
            f"{', '.join(info.class_names[:12])}. Give data with the same classes."
        )
    images = source.load(split)
    place = torch.tensor([info.class_names.index(name) for name in source.class_names])
    return score(model, Split(images=images.images, labels=place[images.labels]), info.mean, info.std, device)
