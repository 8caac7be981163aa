"""dvc.lock after a kill: the last whole one is kept, and put back. DVC's list of who is at work, likewise.

DVC writes dvc.lock in place, all stages anew for each that it records, so what a SIGKILL leaves is the
beginning of what it would have written: at any byte, also at the end of a line or of a stage's entry. What
was recorded since the copy was made is stale then, and DVC restores it from its run cache.
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

RECORDING_SECONDS = 30.0  # from the end of a stage's command until DVC has written dvc.lock

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
    if content and content != read_lock(_copy(pipeline)) and not is_cut(pipeline):
        write_whole(_copy(pipeline), content.encode())


def is_cut(pipeline: Pipeline) -> bool:
    """Whether dvc.lock is what a kill has left: the beginning of what DVC was writing.

    In the middle of a line, or after a key without its value, no other hand would have left it. Elsewhere it
    might as well be git's, with fewer stages; it is a cut if a stage ended just before the file was written.
    """
    lock, copy = pipeline.folder / "dvc.lock", _copy(pipeline)
    content, before = read_lock(lock), read_lock(copy)
    if not lock.exists() or content == before or not before:
        return False
    stages, former = (re.findall(r"^  (\S.*):$", text, flags=re.MULTILINE) for text in (content, before))
    if not stages or not content.endswith("\n") or content.endswith(":\n"):
        return before.startswith(content) or bool(stages)
    written = lock.stat().st_mtime
    was_recording = any(written < ended + RECORDING_SECONDS for ended in _done_since(pipeline).values())
    return len(stages) < len(former) and stages == former[: len(stages)] and was_recording


def repair(pipeline: Pipeline) -> None:
    """Put the last whole dvc.lock back if a kill has left a part of one; nothing is trained.

    Raises ResgridError for a file with conflict markers, which is a person's to resolve.
    """
    lock = pipeline.folder / "dvc.lock"
    refuse_conflict(lock)
    if is_cut(pipeline) and not dvc_runs(pipeline.root):
        log.warning("%s: a dvc that was killed has left a part of it; the one before is put back", lock)
        head, *entries = re.split(r"^(?=  \S)", read_lock(_copy(pipeline)), flags=re.MULTILINE)
        # Without the earlier entries of what was done since, which DVC would restore instead.
        done = {f"  {stage}:" for stage in _done_since(pipeline)}
        entries = [entry for entry in entries if entry.partition("\n")[0] not in done]
        write_whole(lock, "".join([head, *entries]).encode() if entries else b"schema: '2.0'\n")


def _done_since(pipeline: Pipeline) -> dict[str, float]:
    """When each attempt ended that was done since the copy was made, by its stage."""
    since = _copy(pipeline).stat().st_mtime - 1.0  # which is later than DVC's answer
    records = (pipeline.record(path.stem) for path in pipeline.state("").parent.glob("*.json"))
    done = {each.stage: each.ended or 0.0 for each in records if each and each.status == State.DONE}
    return {stage: ended for stage, ended in done.items() if ended > since}


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
