"""A cell's folder `runs/<cell>/`, and the one answer to the question whose result lies there.

DVC says what will run; `find_runs` says what a result is. It reads the folders, which hold the numbers, the
data's digest and the code's that they were trained with, and compares them with those of today. Why there is
no result, the record of the stage says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from resgrid.errors import ResgridError
from resgrid.grid import Cell, flat
from resgrid.models import own_file
from resgrid.project import RESTORED, project_root, read_json, unreadable
from resgrid.provenance import code_digest, package_of
from resgrid.stage_record import Fault, State, read_record

if TYPE_CHECKING:  # half a second to import, which `resgrid train` need not wait for
    import pandas as pd

WEIGHTS = "weights.safetensors"
RUN = "run.json"  # written last: all about the run but its epochs and its times
METRICS = "metrics.json"  # for DVC alone
FILES = ("summary.txt", "history.csv", RUN, "timing.json", WEIGHTS)

Status = Literal["completed", "diverged", "stale", "other data", "failed", "missing"]
STATUSES: tuple[Status, ...] = get_args(Status)  # the best first


@dataclass(frozen=True)
class Run:
    """What a cell's folder holds: the result of the cell as it is now, another one, or none."""

    cell: Cell
    folder: Path
    status: Status
    reason: str | None = None  # why it is not `completed`, as far as it is known
    record: dict[str, Any] | None = None  # its run.json, of whatever was trained there

    @property
    def is_current(self) -> bool:
        """Whether it is what the cell's numbers, data and code give."""
        return self.status in ("completed", "diverged")


def find_runs(cells: Sequence[Cell], pipeline: Path) -> list[Run]:
    """The run of each cell in a pipeline's folder, in order.

    `completed` or `diverged`: trained with today's numbers, data and code. `stale`: with other numbers or
    code; `other data`: on other images (where the data are not here, that is not asked). `missing`: there is
    no whole result. `failed`: there is none, and by the stage's record the training ended with an error.
    """
    data, package = data_digest(pipeline), package_of(pipeline)
    files = {cell.architecture: own_file(cell.architecture, pipeline) for cell in cells}
    code = {file: code_digest(package, file) for file in set(files.values())}
    runs = [run_in(pipeline / "runs" / cell.id, cell, data, code[files[cell.architecture]]) for cell in cells]
    root = project_root(pipeline)
    for i, run in enumerate(runs):
        attempt = None if run.record or run.reason else read_record(root, pipeline.resolve(), run.cell.stage)
        if attempt and attempt.status == State.FAILED and attempt.fault != Fault.NO_RESULT:
            runs[i] = replace(run, status="failed", reason=attempt.why)
    return runs


def data_digest(pipeline: Path) -> str | None:
    """That of the processed data as they are here; None where there are none.

    Raises ResgridError where they are there and cannot be read.
    """
    path = pipeline / "data/processed/meta.json"
    return str(read_json(path).get("digest")) if path.exists() else None


def run_in(folder: Path, cell: Cell, data: str | None, code: str) -> Run:
    """What `folder` holds of `cell`, today's data and code being those of these digests."""
    if not (folder / RUN).is_file():
        return Run(cell, folder, "missing")
    if gone := [name for name in FILES if not (folder / name).is_file()]:
        reason = f"{folder / gone[0]} is gone: `dvc checkout --force` restores it."
        return Run(cell, folder, "missing", reason)
    try:
        record = read_json(folder / RUN)
        trained = flat(record["numbers"])
        other_data = data is not None and record["data_digest"] != data
        other_code = record["code_digest"] != code
        outcome: Status = record["status"]
    except ResgridError as error:
        return Run(cell, folder, "missing", str(error))
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{folder / RUN} is of another version (it lacks {error}): `dvc repro {cell.stage}`"
        return Run(cell, folder, "missing", reason)
    now = flat(cell.numbers)
    changed = [
        f"{key} {_text(trained.get(key))} → {_text(now.get(key))}"
        for key in dict.fromkeys([*now, *trained])
        if trained.get(key) != now.get(key)
    ]
    reasons = [f"trained with {', '.join(changed)} (params.yaml now)"] if changed else []
    if other_code:
        file = own_file(cell.architecture)
        own = f"{file}, " if file else ""
        reasons.append(f"trained by other code in {own}models/, optimizers.py, training/ or data/batches.py")
    if other_data:
        reasons.insert(0, f"trained on other data than {data}: {record['data_digest']}")
    if reasons:
        return Run(cell, folder, "other data" if other_data else "stale", "; ".join(reasons), record)
    return Run(cell, folder, outcome, record["cause"], record)


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def read_history(path: Path) -> pd.DataFrame:
    """The epochs in a run's history.csv; raises ResgridError if it cannot be read."""
    import pandas as pd

    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, RESTORED) from None


def started_at(timing: Mapping[str, Any]) -> int:
    """When a training began, in microseconds since the epoch, by its timing.json.

    Results of 2026-11 and before have an ISO time in whole seconds there.
    """
    started = timing["started"]
    return started if isinstance(started, int) else round(1e6 * datetime.fromisoformat(started).timestamp())


def epoch_ends(started: int, seconds: Iterable[float]) -> list[int]:
    """When each epoch ended, in whole milliseconds since the epoch, as MLflow counts.

    The clock stands still between epochs, so that it is the same each time it is asked, from memory while a
    cell trains and from its files afterwards.
    """
    return [(started + round(1e6 * total)) // 1000 for total in accumulate(seconds)]


def epoch_speeds(timing: Mapping[str, Any]) -> list[float]:
    """Images/s of each epoch, by a timing.json; results of 2026-11 and before have their mean alone."""
    if "epoch_images_per_second" in timing:
        return list(timing["epoch_images_per_second"])
    seconds = timing["epoch_seconds"]
    return [timing["images_per_second"] * sum(seconds) / len(seconds) / each for each in seconds]


def trained_run(cell: Cell, pipeline: Path) -> Run:
    """What was trained for `cell`, its weights checked, also where that is another cell by now.

    Raises ResgridError: where nothing was, or the weights are not those of its record.
    """
    [run] = find_runs([cell], pipeline)
    if run.record is None:
        raise ResgridError(
            f"{cell.id}: this cell has no result ({run.reason or 'not trained yet'}). "
            f"`dvc repro {cell.stage}` trains it."
        )
    verify_weights(run.folder, run.record, cell.stage)
    return run


def refuse_diverged(run: Run) -> None:
    """Raises ResgridError for a run that diverged, as its weights are not what its name promises."""
    if run.record is not None and run.record["status"] == "diverged":
        raise ResgridError(
            f"{run.cell.id}: it diverged: {run.record['cause']} To use these weights all the same, name "
            f"their file: {run.folder / WEIGHTS}"
        )


def verify_weights(run_folder: Path, metrics: dict[str, Any], stage: str) -> None:
    """Raises ResgridError unless the weights are those that `metrics` was written for."""
    path = run_folder / WEIGHTS
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise unreadable(path, error, RESTORED) from None
    if sha256 != metrics["weights_sha256"]:
        raise ResgridError(
            f"{path}: the file has changed since it was trained. "
            "`dvc checkout --force` restores it. If it stays so, DVC's copy is damaged as well: `resgrid gc` "
            f"deletes that, and `dvc repro {stage}` trains it again."
        )
