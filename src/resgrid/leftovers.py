"""What interrupted and former work has left on the disk, what of it may go, and what the rest takes.

Checkpoints (see `checkpoint.py`) lie in `.resgrid/checkpoints/<pipeline>` in the project's root:
`<cell>.<digest of the training>.0` and `.1`, and `.done` once its files are written. They stay until dvc.lock
lists those files.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from resgrid.config import MlflowWeights
from resgrid.grid import Cell
from resgrid.models import own_file
from resgrid.provenance import code_digest

MAX_HEAD_BYTES = 2**24  # of a checkpoint; 250 epochs take 80 kB
ABANDONED_SECONDS = 3600.0  # after which nobody goes on with a half-written file


def checkpoint_folder(root: Path, pipeline: Path) -> Path:
    """Where the checkpoints of the cells of a pipeline's folder lie; both paths are absolute."""
    return root / ".resgrid" / "checkpoints" / pipeline.relative_to(root)


def checkpoint_files(folder: Path, cell_id: str | None = None) -> list[Path]:
    """What lies in a pipeline's folder of checkpoints, of one cell or of all."""
    return sorted(path for path in folder.glob(f"{cell_id or '*'}.*") if path.is_file())


def forget_recorded(folder: Path, lock: Path) -> list[Path]:
    """Delete the checkpoints of every training whose results the dvc.lock `lock` lists; what was deleted.

    A training that DVC runs once more, as by `dvc repro -f`, then begins anew.
    """
    return delete(_recorded(folder, lock))


def delete(paths: Iterable[Path]) -> list[Path]:
    """Delete these files and folders; those that were there."""
    deleted = []
    for path in paths:
        with suppress(FileNotFoundError):  # another process was quicker
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            deleted.append(path)
    return deleted


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing needs any more."""

    path: Path
    num_bytes: int
    why: str


def find_leftovers(
    root: Path, pipeline: Path, cells: list[Cell], data_digest: str | None, cache: Path
) -> list[Leftover]:
    """What can be deleted of a pipeline in the project `root`, whose cells and data are these now.

    `cache` is DVC's.

    Nothing that a running process uses or a later one would go on from is among them.
    """
    reasons: dict[Path, str] = {}
    folder = checkpoint_folder(root, pipeline)
    for path in _recorded(folder, pipeline / "dvc.lock"):
        reasons[path] = "its training is recorded in dvc.lock"
    own = {cell.id: own_file(cell.architecture, pipeline) for cell in cells}
    code = {file: code_digest(own=file) for file in set(own.values())}
    current = {cell.id: {"cell": cell.digest, "code": code[own[cell.id]]} for cell in cells}
    for path in checkpoint_files(folder):
        if path.suffix in (".0", ".1") and (why := _useless(path, current, data_digest)):
            reasons.setdefault(path, why)
    for path in checkpoint_files(folder):
        if path.suffix == ".done" and not any(
            slot.exists() and slot not in reasons for slot in (path.with_suffix(".0"), path.with_suffix(".1"))
        ):
            reasons.setdefault(path, "its checkpoints are gone")
    for path in (*folder.glob("*.part"), *(pipeline / "runs").glob("*/*.part")):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            reasons[path] = "it was never finished"
    for aside, whole in ((".partial", "raw"), ("processed.partial", "processed")):
        if (pipeline / "data" / aside).exists() and (pipeline / "data" / whole).exists():
            reasons[pipeline / "data" / aside] = f"data/{whole} is complete"
    if not any(isinstance(cell.recipe.initial_weights, MlflowWeights) for cell in cells):
        for path in (root / ".resgrid" / "weights").glob("*"):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:  # or it has just been fetched
                reasons[path] = "no cell starts from it"
    for path in _damaged(cache / "files" / "md5"):
        reasons[path] = "it is damaged: its content is not that of its name"
    return [Leftover(path, size(path), why) for path, why in sorted(reasons.items())]


def _damaged(cache: Path) -> Iterator[Path]:
    """Files in DVC's cache whose MD5 is not their name. DVC itself never looks: it would hand them out."""
    for path in sorted(cache.glob("??/*")):
        if not re.fullmatch(r"[0-9a-f]{30}(\.dir)?", path.name):
            continue  # what DVC is about to rename
        with suppress(OSError), path.open("rb") as file:  # gone meanwhile
            if hashlib.file_digest(file, "md5").hexdigest() != path.parent.name + path.name.removesuffix(
                ".dir"
            ):
                yield path


def usage(root: Path, pipeline: Path, cache: Path) -> dict[str, int]:
    """Bytes of what the project keeps, by its path in `root`; hard links count each time."""
    inside = pipeline.relative_to(root)
    places = [
        cache.relative_to(root).as_posix() if cache.is_relative_to(root) else str(cache),
        "mlflow.db",
        "mlruns",
        ".resgrid/checkpoints",
        ".resgrid/weights",
        ".resgrid/logs",
    ]
    places += [(inside / name).as_posix() for name in ("data", "runs")]
    return {place: size(root / place) for place in places if (root / place).exists()}


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    total = 0
    for file in files:
        with suppress(OSError):  # gone meanwhile
            total += file.lstat().st_size if file.is_file() else 0
    return total


def _recorded(folder: Path, lock: Path) -> list[Path]:
    """The MD5 that dvc.lock gives a file is that of its bytes, and no two trainings have the same timing."""
    notes = [path for path in checkpoint_files(folder) if path.suffix == ".done"]
    if not notes or not lock.is_file():
        return []
    listed, found = lock.read_text(encoding="utf-8"), []
    for note in notes:
        with suppress(FileNotFoundError):
            md5 = note.read_text(encoding="utf-8")
            if len(md5) == 32 and md5 in listed:
                # The note last: where this is interrupted, it is found again.
                found += [*sorted(folder.glob(f"{note.stem}.[01]")), note]
    return found


def _useless(path: Path, current: dict[str, dict[str, str]], data_digest: str | None) -> str | None:
    """Why no training goes on from a checkpoint any more."""
    cell_id = path.name.partition(".")[0]
    if cell_id not in current:
        return f"there is no cell {cell_id} any more"
    try:
        with path.open("rb") as file:
            file.readline(MAX_HEAD_BYTES)
            owner = json.loads(file.readline(MAX_HEAD_BYTES))["owner"]
        now = {"data": data_digest or owner["data"]} | current[cell_id]
        changed = [key for key, value in now.items() if owner[key] != value]
    except (OSError, ValueError, TypeError, KeyError):
        return "it is damaged"
    words = {"cell": "params", "data": "data", "code": "code"}
    return f"it is of other {words[changed[0]]}" if changed else None
