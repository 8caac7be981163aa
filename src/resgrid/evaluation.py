"""Scores of trained weights, measured afresh from the weights file: never copied from training."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from resgrid.data.dataset import Split
from resgrid.data.sources import open_source
from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.project import read_json, unreadable, write_whole
from resgrid.run_status import WEIGHTS, Run, Status, read_history, verify_weights
from resgrid.schema import Triple
from resgrid.training.engine import Scores, score
from resgrid.weights import load_model


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of each image of a split, in their order: all of it that the report needs.

    130 kB a cell for 10,000 images, at any number of classes; the logits stand in `reports/predictions`.
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


def evaluate(
    run: Run,
    test: Split,
    device: torch.device,
    validation: Split | None = None,
    predictions: Path | None = None,
) -> Result:
    """Score the weights of a current run on `test`; others keep their status.

    Its logits for both splits go into the folder `predictions`, where one is given.
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
    scores, logits = predict(model, test, info.mean, info.std, device)
    if predictions is not None:
        logits_of = {"test": logits}
        if validation is not None:
            logits_of["validation"] = predict(model, validation, info.mean, info.std, device)[1]
        about = {"cell": run.cell.id, "weights_sha256": run.record["weights_sha256"]}
        predictions.mkdir(parents=True, exist_ok=True)
        write_whole(
            predictions / f"{run.cell.id}.safetensors", save(logits_of, {"resgrid": json.dumps(about)})
        )
    top = logits.argmax(1, keepdim=True)  # (N, 1)
    return replace(
        result,
        scores=scores,
        predictions=Predictions(
            classes=top.flatten().numpy(),
            confidence=logits.softmax(1).gather(1, top).nan_to_num(0.0).flatten().numpy(),
            correct=(top.flatten() == test.labels.cpu()).numpy(),
        ),
        history=read_history(run.folder / "history.csv"),
    )


def predict(
    model: nn.Module, split: Split, mean: Triple, std: Triple, device: torch.device
) -> tuple[Scores, Tensor]:
    """`score`, with the model's logits for each image in that same pass: (N, classes), fp32, on the CPU."""
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda _model, _images, output: logits.append(output.float().cpu()))
    try:
        scores = score(model, split, mean, std, device)
    finally:
        hook.remove()
    return scores, torch.cat(logits)


def load_logits(
    predictions: Path, cell: str, split: str, weights_sha256: str | None = None
) -> NDArray[np.float32]:
    """Logits that `evaluate` wrote of a cell: (N, classes) for every image of a split, in the split's order.

    Raises ResgridError: where there are none, or those of other weights than `weights_sha256`.
    """
    path = predictions / f"{cell}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["resgrid"])
            if weights_sha256 not in (None, about["weights_sha256"]):
                raise ValueError(f"it is of other weights than {cell} has now")
            logits: NDArray[np.float32] = file.get_tensor(split)
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(path, error, "`dvc repro -s evaluate` makes it.") from None
    return logits


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
