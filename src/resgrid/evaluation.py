"""Scores of trained weights, measured afresh from the weights file: never copied from training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from resgrid.runs import WEIGHTS, Run, Status, read_history, read_json, verify_weights
from resgrid.training.engine import Scores, score
from resgrid.weights import load_model


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
    """One cell as the comparison sees it; of one that is not current only what its folder says of itself."""

    cell: Cell
    status: Status
    cause: str | None = None  # of a divergence, or why there is no current result, as far as it is known
    scores: Scores | None = None  # of the last epoch's weights on the test split, in fp32
    predictions: Predictions | None = None  # of that scoring
    metrics: dict[str, Any] | None = None  # runs/<cell>/run.json
    timing: dict[str, Any] | None = None  # runs/<cell>/timing.json
    history: pd.DataFrame | None = None  # runs/<cell>/history.csv


def evaluate(run: Run, test: Split, device: torch.device) -> Result:
    """Score the weights of a current run on `test`; others are told as they are.

    Raises ResgridError for files of a current run that cannot be read or do not belong together.
    """
    result = Result(cell=run.cell, status=run.status, cause=run.reason, metrics=run.record)
    if run.record is None:
        return result
    result = replace(result, timing=read_json(run.folder / "timing.json"))
    if not run.is_current:
        return result
    verify_weights(run.folder, run.record, run.cell.stage)
    model, info = load_model(run.folder / WEIGHTS)
    scores, predictions = predict(model, test, info.mean, info.std, device)
    history = read_history(run.folder / "history.csv")
    return replace(result, scores=scores, predictions=predictions, history=history)


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


def score_file(
    weights: Path,
    data: Path,
    split: str,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> Scores:
    """Score any weights file on the `split` of whatever images stand at `data`, in fp32.

    `say` is told what is passed over. The labels are matched to the model's outputs by class name; raises
    ResgridError if they differ.
    """
    model, info = load_model(weights)
    source = open_source(data, info.resize)
    if set(source.class_names) != set(info.class_names):
        raise ResgridError(
            f"{data}: its classes are {', '.join(source.class_names[:12])}; {weights} knows "
            f"{', '.join(info.class_names[:12])}. Give data with the same classes."
        )
    images = source.load(split)
    for note in source.notes:
        say(note)
    place = torch.tensor([info.class_names.index(name) for name in source.class_names])
    return score(model, Split(images=images.images, labels=place[images.labels]), info.mean, info.std, device)
