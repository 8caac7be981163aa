"""dvc.lock after a kill: the last whole one is kept, and put back. DVC's list of who is at work, likewise.

DVC writes dvc.lock in place, all stages anew for each that it records, so what a SIGKILL leaves is the
beginning of what it would have written. What was recorded since the copy was made is stale then, and DVC
restores it from its run cache.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from pathlib import Path

import psutil

from resgrid.dvc.pipeline import Pipeline
from resgrid.errors import ResgridError
from resgrid.project import write_whole
from resgrid.stage_record import State

log = logging.getLogger(__name__)


def read_lock(path: Path) -> str:
    """A dvc.lock as it is now; empty if there is none."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def refuse_conflict(lock: Path) -> None:
    """Raises ResgridError for a dvc.lock with conflict markers, which a merge has left to a person."""
    if re.search(r"^(<{7}|>{7}) ", read_lock(lock), flags=re.MULTILINE):
        raise ResgridError(
            f"{lock}: holds git's conflict markers. Take one side, `git checkout --ours {lock.name}` or "
            f"`git checkout --theirs {lock.name}`, then `git add {lock.name}`; results that only the other "
            "side lists come back from DVC's run cache where it has them. `git merge --abort` undoes it."
        )


def keep(pipeline: Pipeline, content: str) -> None:
    """Keep the dvc.lock of while DVC answered, so that nobody wrote it."""
    if content != read_lock(_copy(pipeline)) and content and not is_cut(pipeline.folder / "dvc.lock"):
        write_whole(_copy(pipeline), content.encode())


def is_cut(lock: Path) -> bool:
    """Whether a dvc.lock ends within a line, or after a key without its value: DVC cannot read it.

    One that a kill has cut after a whole line DVC reads, and it restores from its run cache what is gone.
    """
    content = read_lock(lock)
    return lock.exists() and (not content.endswith("\n") or content.endswith(":\n"))


def repair(pipeline: Pipeline) -> None:
    """Put the last whole dvc.lock back if a kill has left a part of one; nothing is trained.

    Raises ResgridError for a file with conflict markers, which is a person's to resolve.
    """
    lock, copy = pipeline.folder / "dvc.lock", _copy(pipeline)
    refuse_conflict(lock)
    if not is_cut(lock) or not copy.exists() or dvc_runs(pipeline.root):
        return
    log.warning("%s: a dvc that was killed has left a part of it; the one before is put back", lock)
    head, *entries = re.split(r"^(?=  \S)", read_lock(copy), flags=re.MULTILINE)
    # Without the earlier entries of what was done since, which DVC would restore instead.
    since = copy.stat().st_mtime - 1.0  # it is written after DVC's answer
    ended = {
        f"  {each.stage}:": each.ended or 0.0 for each in pipeline.records() if each.status == State.DONE
    }
    entries = [entry for entry in entries if ended.get(entry.partition("\n")[0], 0.0) <= since]
    write_whole(lock, "".join([head, *entries]).encode() if entries else b"schema: '2.0'\n")


def _copy(pipeline: Pipeline) -> Path:
    return pipeline.state("dvc").with_suffix(".lock")


# --- DVC's list of who is at work -----------------------------------------------------------------


def lock_holders(pipeline: Pipeline) -> dict[int, str]:
    """Processes that DVC's own list has at work on a stage of the repository: id and command.

    Raises ValueError for half a list.
    """
    try:
        content = json.loads((pipeline.root / ".dvc/tmp/rwlock").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    readers = [by for each in content.get("read", {}).values() for by in each]
    return {by["pid"]: by["cmd"] for by in (*content.get("write", {}).values(), *readers)}


def clear_stale_rwlock(pipeline: Pipeline) -> None:
    """Delete DVC's list of who is at work if a `dvc` that was killed has left half of it, or is in it still.

    Half a list stops every `dvc`, and another process may get the id of one that is gone.
    """
    try:
        is_empty = not lock_holders(pipeline)
    except ValueError:
        is_empty = False
    if not is_empty and not dvc_runs(pipeline.root):
        (pipeline.root / ".dvc/tmp/rwlock").unlink(missing_ok=True)


def dvc_runs(root: Path) -> bool:
    """Whether any `dvc` works in the repository."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            runs_dvc = any(Path(word).name == "dvc" for word in process.cmdline()[:5])
            if runs_dvc and Path(process.cwd()).is_relative_to(root):
                return True
    return False
