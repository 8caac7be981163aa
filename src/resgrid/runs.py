"""A cell's folder `runs/<cell>/`, as training leaves it and everything else reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resgrid.errors import ResgridError

if TYPE_CHECKING:  # half a second to import, which `resgrid train` need not wait for
    import pandas as pd

WEIGHTS = "weights.safetensors"
RUN = "run.json"  # written last: all about the run but its epochs and its times
METRICS = "metrics.json"  # for DVC alone
FILES = ("summary.txt", "history.csv", RUN, "timing.json", WEIGHTS)
FAILURE = "failure.txt"  # why there are none of these: the message that the training ended with


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run; raises ResgridError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResgridError(f"{path}: cannot be read ({error}). `dvc checkout --force` restores it.") from None
    assert isinstance(content, dict)
    return content


def read_history(path: Path) -> pd.DataFrame:
    """The epochs in a run's history.csv; raises ResgridError if it cannot be read."""
    import pandas as pd

    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ResgridError(f"{path}: cannot be read ({error}). `dvc checkout --force` restores it.") from None


@contextmanager
def noted_failure(run_folder: Path) -> Iterator[None]:
    """Leave the message of an error in `run_folder`: by it a failed cell is told from one not yet trained."""
    (run_folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        message = str(error) if isinstance(error, ResgridError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the disk may be full, which is then what the error says
            run_folder.mkdir(parents=True, exist_ok=True)
            (run_folder / FAILURE).write_text(message + "\n", encoding="utf-8")
        raise


def verify_weights(run_folder: Path, metrics: dict[str, Any], stage: str) -> None:
    """Raises ResgridError unless the weights are those that `metrics` was written for."""
    path = run_folder / WEIGHTS
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ResgridError(
            f"{path}: cannot be read: {error.strerror}. `dvc checkout --force` restores it."
        ) from None
    if found != metrics["weights_sha256"]:
        raise ResgridError(
            f"{path}: the file has changed since it was trained. "
            "`dvc checkout --force` restores it. If it stays so, DVC's copy is damaged as well: `resgrid gc` "
            f"deletes that, and `dvc repro {stage}` trains it again."
        )
