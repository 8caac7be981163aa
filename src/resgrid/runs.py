"""A cell's folder `runs/<cell>/`, as training leaves it and everything else reads it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from resgrid.errors import ResgridError

WEIGHTS = "weights.safetensors"
FILES = ("summary.txt", "history.csv", "metrics.json", "timing.json", WEIGHTS)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run; raises ResgridError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResgridError(f"{path}: cannot be read ({error}). `dvc checkout --force` restores it.") from None
    assert isinstance(content, dict)
    return content


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
            f"`dvc checkout --force` restores it, `dvc repro -f {stage}` trains it again."
        )
