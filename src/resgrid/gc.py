"""What interrupted and former work has left on the disk, what of it may go, and what the rest takes.

Checkpoints (see `checkpoint.py`) lie in `.resgrid/checkpoints/<pipeline>` in the project's root, or below the
folder that RESGRID_CHECKPOINTS names, which checkouts and machines may share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOUR, MONTH = 3600.0, 30 * 24 * 3600.0  # seconds


def checkpoint_folder(root: Path, pipeline: Path) -> Path:
    """Where the checkpoints of the cells of a pipeline's folder lie; both paths are absolute."""
    place = os.environ.get("RESGRID_CHECKPOINTS") or root / ".resgrid/checkpoints"
    return Path(place).absolute() / pipeline.relative_to(root)


def checkpoint_files(folder: Path, cell_id: str | None = None) -> list[Path]:
    """What lies in a pipeline's folder of checkpoints, of one cell or of all."""
    return sorted(path for path in folder.glob(f"{cell_id or '*'}.*") if path.is_file())


def checkpoint_head(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, its tensors left unread; empty for what is none."""
    with suppress(OSError, ValueError), path.open("rb") as file:
        file.readline(1000)
        head = json.loads(file.readline(2**24))  # 250 epochs take 80 kB
        return head if isinstance(head, dict) else {}
    return {}


def is_recorded(timing: str | None, lock: Path | None) -> bool:
    """Whether the dvc.lock `lock` lists this timing.json; no two trainings have the same."""
    if timing is None or lock is None or not lock.is_file():
        return False
    md5 = hashlib.md5(timing.encode(), usedforsecurity=False).hexdigest()
    return md5 in lock.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing needs any more."""

    path: Path
    num_bytes: int
    why: str


def find_leftovers(root: Path, pipeline: Path, cache: Path) -> list[Leftover]:
    """What can be deleted of a pipeline in the project `root`; `cache` is DVC's.

    Nothing that a running process uses is among them, nor what a later one would go on from, unless nobody
    has for a month.
    """
    folder, data, reasons = checkpoint_folder(root, pipeline), pipeline / "data", dict[Path, str]()
    is_shared = "RESGRID_CHECKPOINTS" in os.environ  # where it is another's, this dvc.lock says nothing of it
    for path in checkpoint_files(folder):
        if _age(path) > MONTH:
            reasons[path] = "nobody has gone on from it for a month"
        elif not is_shared and path.suffix in (".0", ".1", ".done"):
            reasons[path] = "it is of a former version"
        elif not is_shared and is_recorded(checkpoint_head(path).get("timing"), pipeline / "dvc.lock"):
            reasons[path] = "its training is recorded in dvc.lock"
    for path in (*folder.glob("*.part"), *(pipeline / "runs").glob("*/*.part")):
        if _age(path) > HOUR:
            reasons[path] = "it was never finished"
    for aside, whole in ((".partial", "raw"), ("processed.partial", "processed")):
        if (data / aside).exists() and (data / whole).exists():
            reasons[data / aside] = f"data/{whole} is complete"
    for path in (root / ".resgrid/weights").glob("*"):
        if _age(path) > MONTH:
            reasons[path] = "no cell has started from it for a month"
    # DVC itself never looks into its cache: it would hand out what is damaged there.
    for path in sorted((cache / "files/md5").glob("??/*")):
        if re.fullmatch(r"[0-9a-f]{30}(\.dir)?", path.name):  # and not what DVC is about to rename
            with suppress(OSError), path.open("rb") as file:  # gone meanwhile
                if hashlib.file_digest(file, "md5").hexdigest() != path.parent.name + path.name[:30]:
                    reasons[path] = "it is damaged: its content is not that of its name"
    return [Leftover(path, size(path), why) for path, why in sorted(reasons.items())]


def _age(path: Path) -> float:
    """Seconds since it was written; 0 where it is gone meanwhile."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0


def delete(paths: Iterable[Path]) -> None:
    """Delete `paths`, files and folders."""
    for path in paths:
        with suppress(FileNotFoundError):  # another process was quicker
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def usage(root: Path, pipeline: Path, cache: Path) -> dict[str, int]:
    """Bytes of each place where the project keeps something, by its path; hard links count each time."""
    inside = pipeline.relative_to(root)
    names = ("mlflow.db", "mlruns", ".resgrid/checkpoints", ".resgrid/weights", ".resgrid/logs")
    places = [cache, *(root / name for name in names), *(root / inside / name for name in ("data", "runs"))]
    return {path_in(root, place): size(place) for place in places if place.exists()}


def path_in(root: Path, path: Path) -> str:
    """`path` as seen from `root`; as it is where it lies elsewhere, as DVC's cache may."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    total = 0
    for file in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):  # gone meanwhile
            total += file.lstat().st_size if file.is_file() else 0
    return total
