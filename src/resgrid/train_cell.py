"""One training from top to bottom: what `resgrid train CELL` does, from the data folder to the run folder.

`train` chooses the device, goes on from a checkpoint, mirrors the training into MLflow while it runs, and
shows it. It drives `train_cell`: the training itself and its files.

What depends on the clock or the machine stands in `timing.json` alone. The same cell on the same CPU with the
same number of threads writes the same bytes into all other files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from resgrid import __version__, tracking, watch
from resgrid.allocator import keep_freed_memory
from resgrid.checkpoint import Checkpoints
from resgrid.data.batches import statistics
from resgrid.data.dataset import Meta, load_meta, load_split
from resgrid.errors import ResgridError
from resgrid.gc import checkpoint_folder
from resgrid.grid import Cell
from resgrid.models import origin_of, own_file
from resgrid.models.classifier import Classifier
from resgrid.progress import Progress, amount
from resgrid.project import free_cores, project_root, read_json, write_whole
from resgrid.provenance import code_digest, made_by
from resgrid.run_status import METRICS, RUN
from resgrid.summary import count_parameters, summarize
from resgrid.training.device import choose_device, choose_execution, device_name
from resgrid.training.engine import Epoch, OnStep, Outcome, TrainingData, fit
from resgrid.training.initial import initial_model
from resgrid.weights import WeightsInfo, save_weights

HISTORY = (
    "epoch", "step", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "validation_loss", "validation_accuracy",
)  # fmt: skip

log = logging.getLogger(__name__)


def train(cell: Cell, pipeline: str, device_choice: str | None, afresh: bool) -> None:
    """Train `cell` of the current folder's pipeline, which is called `pipeline`, and record it in MLflow.

    It goes on after the last epoch of an earlier start, unless that is recorded in dvc.lock or `afresh`.
    Raises ResgridError as `train_cell` does.
    """
    watch.watch()
    keep_freed_memory()
    root, data, run_folder = project_root(), Path("data/processed"), Path("runs", cell.id)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / ".resgrid/cache/inductor"))  # for all cells
    device = choose_device(device_choice)
    meta = load_meta(data)
    weights = tracking.fetch_weights(cell.recipe.initial_weights)
    execution = choose_execution(cell, meta.num_images["train"], device)
    folder = checkpoint_folder(root, Path.cwd().resolve())
    checkpoints = Checkpoints(folder, cell, meta.digest, device, str(execution), Path("dvc.lock"), afresh)
    threads = choose_threads(device, checkpoints.threads)
    epochs = [Epoch(**epoch) for epoch in checkpoints.epochs]
    num_epochs, num_before = cell.recipe.epochs, len(epochs)
    images_an_epoch = meta.num_images["train"] // cell.recipe.batch_size * cell.recipe.batch_size
    with (
        tracking.LiveRun(pipeline, cell, meta.digest, checkpoints.started, checkpoints.epochs) as run,
        Progress(cell.id, num_epochs * images_an_epoch, "images") as progress,
    ):
        log.info("%s  %s on %s, %s", cell.id, execution, device_name(device), amount(threads, "threads"))
        if cell.engine.compile == "always" and not execution.compiled:
            log.info("%s  is not compiled: there is no C++ compiler with Python's headers here", cell.id)
        if num_before:
            log.info("%s  goes on after epoch %d/%d", cell.id, num_before, num_epochs)
            progress.done = num_before * images_an_epoch

        def on_step(images: int, _: int) -> None:
            progress.update(len(epochs) * images_an_epoch + images)

        best, is_slow = 0.0, False
        for epoch in train_cell(cell, data, run_folder, device, on_step, weights, checkpoints):
            run.log_epochs([asdict(each) for each in epochs])  # their checkpoint is on the disk by now
            epochs.append(epoch)
            show_history(run_folder, epochs)
            test = "" if epoch.test_accuracy is None else f"test {100 * epoch.test_accuracy:6.2f} %  "
            progress.note = f"epoch {epoch.epoch}/{num_epochs}  {test}".rstrip()
            log.info(
                f"{cell.id}  epoch {epoch.epoch:3}/{num_epochs}  loss {epoch.train_loss:.4f}  "
                f"train {100 * epoch.train_accuracy:6.2f} %  {test}"
                f"{epoch.images_per_second:,.0f} images/s  {progress.remaining()}".rstrip()
            )
            best = max(best, epoch.images_per_second)
            if not is_slow and epoch.images_per_second < best / 4:
                is_slow = True
                log.warning(
                    "%s has fallen to a quarter of its best speed: other programs use what it computes on. "
                    "End them, or begin anew with fewer threads: RESGRID_THREADS=1 resgrid train %s --afresh",
                    cell.id, cell.id,
                )  # fmt: skip
        # `dvc exp show` has a column for each key, and puts the file's path before keys of several files.
        accuracy = read_json(run_folder / RUN)["test_accuracy"]
        write_whole(run_folder / METRICS, _json({pipeline: {cell.id: accuracy}}).encode())
        run.complete(run_folder)


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
        write_whole(run_folder / "summary.txt", f"{summary}\n".encode())
        write_whole(run_folder / "history.csv", _history(outcome.epochs))
        write_whole(run_folder / "timing.json", timing.encode())
        weights_sha256 = hashlib.sha256((run_folder / "weights.safetensors").read_bytes()).hexdigest()
        record = _json(_record(cell, model, meta, outcome, weights_sha256))
        write_whole(run_folder / RUN, record.encode())
    except OSError as error:
        raise ResgridError(
            f"{error.filename or run_folder}: cannot be written: {error.strerror}. Check the folder and the "
            "space on its disk."
        ) from None
    return outcome


def choose_threads(device: torch.device, earlier: int | None) -> int:
    """Set and return torch's number of threads: an `earlier` start's, a variable's, or the free cores.

    Each operation waits for its slowest thread: with two other programs computing on two cores, one thread
    trained ResNet-10 at 39 to 76 images/s, and two at 5 to 26.
    """
    if device.type == "cpu":
        if earlier is not None:
            torch.set_num_threads(earlier)
        elif not (os.environ.get("RESGRID_THREADS") or os.environ.get("OMP_NUM_THREADS")):
            torch.set_num_threads(free_cores())
    return torch.get_num_threads()


def _record(
    cell: Cell, model: Classifier, meta: Meta, outcome: Outcome, weights_sha256: str
) -> dict[str, Any]:
    last = outcome.epochs[-1] if outcome.epochs else None
    scored = [epoch for epoch in outcome.epochs if epoch.test_accuracy is not None]
    best = max(scored, key=lambda epoch: epoch.test_accuracy or 0.0, default=None)  # the first of equals
    start, validation = cell.recipe.initial_weights, outcome.validation
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
        "initial_weights": getattr(start, "path", None) or getattr(start, "uri", start.name),
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
    if not (run_folder / RUN).exists():
        with suppress(OSError):  # a full disk is no reason to stop
            write_whole(run_folder / "history.csv", _history(epochs))


def _history(epochs: Sequence[Epoch]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HISTORY)
    writer.writerows([getattr(epoch, column) for column in HISTORY] for epoch in epochs)
    return text.getvalue().encode()


def _json(content: dict[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in content.items()
    }
    return json.dumps(finite, indent=2, allow_nan=False) + "\n"
