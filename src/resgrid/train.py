"""One cell, from the data folder to its run folder: what `resgrid train` does.

What depends on the clock or the machine stands in `timing.json` alone. The same cell on the same CPU with the
same number of threads writes the same bytes into all other files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from resgrid import __version__
from resgrid.checkpoint import Checkpoints
from resgrid.config import MlflowWeights, WeightsFile
from resgrid.data.batches import statistics
from resgrid.data.dataset import Meta, load_meta, load_split
from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.models import origin_of, own_file
from resgrid.models.classifier import Classifier
from resgrid.project import free_cores, read_json, write_whole
from resgrid.provenance import code_digest, made_by
from resgrid.run_status import METRICS, RUN
from resgrid.summary import count_parameters, summarize
from resgrid.training.device import choose_execution, device_name
from resgrid.training.engine import Epoch, OnStep, Outcome, TrainingData, fit
from resgrid.training.initial import initial_model
from resgrid.weights import WeightsInfo, save_weights

HISTORY = (
    "epoch", "step", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "validation_loss", "validation_accuracy",
)  # fmt: skip


def train_cell(
    cell: Cell,
    data_folder: Path,
    run_folder: Path,
    device: torch.device,
    on_step: OnStep | None = None,
    initial_weights_file: Path | None = None,
    checkpoints: Checkpoints | None = None,
) -> Generator[Epoch, None, Outcome]:
    """Train `cell` on the processed data; yields an `Epoch` after each, and at the end writes `run_folder`.

    The folder gets `weights.safetensors`, `summary.txt`, `history.csv`, `timing.json` and, last of all,
    `run.json`: where that stands, the others are whole, and its figures are those of the weights there.
    Weights in MLflow are fetched by the caller, who passes their file as `initial_weights_file`.
    With `checkpoints` it goes on after the last epoch of an earlier start, and yields those that follow.

    Raises ResgridError for data, initial weights or a folder that cannot be used, and as `fit` does.
    """
    started = checkpoints.started if checkpoints else time.time_ns() // 1000
    origin = made_by()  # now: while it trains, somebody may commit
    meta = load_meta(data_folder)
    mean, std = statistics(meta, cell.recipe.normalization)
    data = TrainingData(
        train=load_split(data_folder, "train"),
        test=load_split(data_folder, "test"),
        validation=load_split(data_folder, "validation") if "validation" in meta.num_images else None,
        mean=mean,
        std=std,
    )
    model = initial_model(cell, len(meta.class_names), initial_weights_file)
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # without it the next line fails where nothing was on the card yet
        torch.cuda.reset_peak_memory_stats(device)

    try:
        outcome = yield from fit(cell, model, data, device, on_step, checkpoints)
    finally:
        if checkpoints is not None:
            checkpoints.flush()

    info = WeightsInfo(
        architecture=cell.architecture, class_names=meta.class_names, mean=mean, std=std, resize=meta.resize
    )
    summary = summarize(cell.architecture, len(meta.class_names), cell.recipe.dropout).table()
    timing = _json(_timing(cell, outcome, meta, device, started) | origin)
    if checkpoints is not None:
        timing = checkpoints.finish(timing)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / RUN).unlink(missing_ok=True)
        save_weights(run_folder / "weights.safetensors", model, info)
        _write(run_folder / "summary.txt", summary + "\n")
        _write(run_folder / "history.csv", _history(outcome.epochs))
        _write(run_folder / "timing.json", timing)
        weights_sha256 = hashlib.sha256((run_folder / "weights.safetensors").read_bytes()).hexdigest()
        _write(run_folder / RUN, _json(_record(cell, model, meta, outcome, weights_sha256)))
    except OSError as error:
        raise ResgridError(
            f"{error.filename or run_folder}: cannot be written: {error.strerror}. Check the folder and the "
            "space on its disk."
        ) from None
    return outcome


def choose_threads(device: torch.device, kept: int | None) -> int:
    """Have torch work with `kept` threads, those of an earlier start, or as many as nothing else computes on.

    Where RESGRID_THREADS or OMP_NUM_THREADS gives a number, a training begins with that. Each operation waits
    for its slowest thread: with two other programs computing on two cores, one thread trained ResNet-10 at 39
    to 76 images/s, and two at 5 to 26. Returns the number of threads.
    """
    if device.type == "cpu":
        if kept is not None:
            torch.set_num_threads(kept)
        elif not (os.environ.get("RESGRID_THREADS") or os.environ.get("OMP_NUM_THREADS")):
            torch.set_num_threads(free_cores())
    return torch.get_num_threads()


def write_metrics(run_folder: Path, pipeline: str) -> None:
    """`metrics.json`, the one figure for DVC's tables: `{<pipeline>: {<cell>: test accuracy}}`.

    `dvc exp show` has a column for each key, and puts the file's path before keys that several files have.
    """
    record = read_json(run_folder / RUN)
    _write(run_folder / METRICS, _json({pipeline: {record["cell"]: record["test_accuracy"]}}))


def _record(
    cell: Cell, model: Classifier, meta: Meta, outcome: Outcome, weights_sha256: str
) -> dict[str, Any]:
    last = outcome.epochs[-1] if outcome.epochs else None
    scored = [epoch for epoch in outcome.epochs if epoch.test_accuracy is not None]
    best = max(scored, key=lambda epoch: epoch.test_accuracy or 0.0, default=None)  # the first of equals
    validation = outcome.validation
    total, trainable, non_trainable = count_parameters(model)
    return {
        "cell": cell.id,
        "cell_digest": cell.digest,
        "study": cell.study,
        "architecture": cell.architecture,
        "family": cell.family,
        "depth": cell.depth,
        "optimizer": cell.optimizer.name,
        "learning_rate": cell.optimizer.lr,
        "batch_size": cell.recipe.batch_size,
        "seed": cell.seed,
        "approach": cell.recipe.approach,
        "initial_weights": _origin(cell),
        "status": outcome.status,
        "cause": outcome.cause,
        "epochs": len(outcome.epochs),
        "epochs_planned": cell.recipe.epochs,
        "steps": last.step if last else 0,
        "train_loss": last.train_loss if last else None,
        "train_accuracy": last.train_accuracy if last else None,
        "test_loss": outcome.test.loss,
        "test_accuracy": outcome.test.accuracy,
        "validation_loss": validation.loss if validation else None,
        "validation_accuracy": validation.accuracy if validation else None,
        "best_test_accuracy": best.test_accuracy if best else None,
        "best_epoch": best.epoch if best else None,
        "num_parameters": total,
        "num_trainable": trainable,  # of a frozen base: the head's
        "num_non_trainable": non_trainable,
        "data_digest": meta.digest,
        "code_digest": code_digest(own=own_file(cell.architecture)),
        "architecture_origin": origin_of(cell.architecture),
        "weights_sha256": weights_sha256,
        "numbers": cell.numbers,  # all that the cell was trained with
    }


def _origin(cell: Cell) -> str:
    match cell.recipe.initial_weights:
        case WeightsFile(path=path):
            return path
        case MlflowWeights(uri=uri):
            return uri
        case other:
            return other.name


def _timing(cell: Cell, outcome: Outcome, meta: Meta, device: torch.device, started: int) -> dict[str, Any]:
    seconds = [epoch.seconds for epoch in outcome.epochs]
    images = sum(epoch.seconds * epoch.images_per_second for epoch in outcome.epochs)
    execution = choose_execution(cell, meta.num_images["train"], device)
    return {
        "started": started,
        "train_seconds": sum(seconds),
        "epoch_seconds": seconds,
        "epoch_images_per_second": [epoch.images_per_second for epoch in outcome.epochs],
        "images_per_second": images / sum(seconds) if seconds else None,
        "peak_memory_bytes": _peak_memory(device),
        "device": device.type,
        "device_name": device_name(device),
        "precision": execution.precision_name,
        "compiled": execution.compiled,
        "graphed": outcome.graphed,
        "sharing": int(os.environ.get("RESGRID_SHARING") or 1),  # how many cells had the device at once
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "resgrid": __version__,
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes: what torch took of a GPU's memory, or else what the process took of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show_history(run_folder: Path, epochs: Sequence[Epoch]) -> None:
    """Write the epochs so far into `history.csv`, for whoever watches, unless a whole result stands there."""
    if (run_folder / RUN).exists():
        return
    with suppress(OSError):  # a full disk is no reason to stop
        _write(run_folder / "history.csv", _history(epochs))


def _history(epochs: Sequence[Epoch]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HISTORY)
    writer.writerows([getattr(epoch, column) for column in HISTORY] for epoch in epochs)
    return text.getvalue()


def _json(content: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in content.items()
    }
    return json.dumps(finite, indent=2, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode())
