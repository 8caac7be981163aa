"""dvc.lock after a kill: the last whole one is kept, and put back. DVC's list of who is at work, likewise.

DVC writes dvc.lock in place, all stages anew for each that it records, so what a SIGKILL leaves is the
beginning of what it would have written: at any byte, also at the end of a line or of a stage's entry. What
ended well since the copy was made is then recorded from the run cache (`repair` in `process.py`).
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import psutil

from resgrid.dvc.pipeline import Pipeline
from resgrid.errors import ResgridError
from resgrid.project import write_whole
from resgrid.stage_record import Record, State

RECORDING_SECONDS = 30.0  # from the end of a stage's command until DVC has written dvc.lock


def read_lock(pipeline: Pipeline) -> str:
    """dvc.lock as it is now; empty if there is none."""
    with suppress(FileNotFoundError):
        return (pipeline.folder / "dvc.lock").read_text(encoding="utf-8", errors="replace")
    return ""


def refuse_conflict(lock: Path) -> None:
    """Raises ResgridError for a dvc.lock with conflict markers, which a merge has left to a person."""
    text = lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else ""
    if re.search(r"^(<{7}|>{7}) ", text, flags=re.MULTILINE):
        raise ResgridError(
            f"{lock}: holds git's conflict markers. Take one side, `git checkout --ours {lock.name}` or "
            f"`git checkout --theirs {lock.name}`, then `git add {lock.name}`; results that only the other "
            "side lists come back from DVC's run cache where it has them. `git merge --abort` undoes it."
        )


def keep(pipeline: Pipeline, content: str) -> None:
    """Keep what dvc.lock held while DVC answered, so that nobody wrote it."""
    kept = _kept(pipeline)
    if content and content != _read(kept) and not is_cut(pipeline):
        write_whole(kept, content.encode())


def is_cut(pipeline: Pipeline) -> bool:
    """Whether dvc.lock is what a kill has left: the beginning of what DVC was writing.

    Inside a line or an entry that shows in the file. At the end of an entry it might as well be git's or a
    hand's; then it is a cut if DVC was recording: a stage that was done since the copy was made ended just
    before the file was written.
    """
    lock, kept = pipeline.folder / "dvc.lock", _read(_kept(pipeline))
    if not lock.exists() or not kept:
        return False
    content = read_lock(pipeline)
    if content == kept:
        return False
    if not content.endswith("\n"):
        return True
    before, now = _entries(kept), _entries(content)
    if list(now)[: len(before)] != list(before)[: len(now)]:
        return False  # DVC keeps the order, and puts a new stage last
    if not now:
        return kept.startswith(content)
    last, text = list(now.items())[-1]
    kind = last.partition("@")[0]
    like = before.get(last) or next(
        (text for name, text in before.items() if name.startswith(f"{kind}@")), ""
    )
    if (shape := _shape(text)) != _shape(like) and shape == _shape(like)[: len(shape)]:
        return True
    written = lock.stat().st_mtime
    recording = any(written < (each.ended or 0.0) + RECORDING_SECONDS for each in _done_since(pipeline))
    return len(now) < len(before) and recording


def put_back(pipeline: Pipeline) -> list[str]:
    """Put the last whole dvc.lock back; returns the stages that have ended well since, to be recorded."""
    lock, ended = pipeline.folder / "dvc.lock", [each.stage for each in _done_since(pipeline)]
    kept = _read(_kept(pipeline))
    # Without their earlier entries, which DVC would take for them.
    entries = {name: text for name, text in _entries(kept).items() if name not in ended}
    lock.unlink()
    if entries:
        lock.write_text(_head(kept) + "".join(entries.values()), encoding="utf-8", newline="\n")
    return ended


def _done_since(pipeline: Pipeline) -> list[Record]:
    """The attempts that were done since the copy was made, in the order in which they ended."""
    since = _kept(pipeline).stat().st_mtime - 1.0  # which is later than DVC's answer
    records = [pipeline.record(path.stem) for path in pipeline.state("").parent.glob("*.json")]
    done = [each for each in records if each and each.status == State.DONE and (each.ended or 0.0) > since]
    return sorted(done, key=lambda each: each.ended or 0.0)


def _entries(text: str) -> dict[str, str]:
    """The part of each stage, by its name, as DVC writes them: two spaces before the name, more in it."""
    parts = re.split(r"^(?=  \S)", text, flags=re.MULTILINE)[1:]
    return {part.partition(":\n")[0].strip(): part for part in parts}


def _head(text: str) -> str:
    return re.split(r"^(?=  \S)", text, maxsplit=1, flags=re.MULTILINE)[0]


def _shape(entry: str) -> list[str]:
    """The keys of an entry's outputs, in order; empty if it has none yet. Stages of a kind share it."""
    outputs = entry.partition("\n    outs:\n")[2].splitlines()
    return [line.partition(":")[0] for line in outputs]


def _kept(pipeline: Pipeline) -> Path:
    return pipeline.state("dvc").with_suffix(".lock")


def _read(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8")
    return ""


# --- DVC's list of who is at work -----------------------------------------------------------------


def lock_holders(pipeline: Pipeline) -> dict[int, str]:
    """Processes that DVC's own list has at work on a stage of the repository: id and command.

    Raises ValueError for half a list.
    """
    try:
        found = json.loads((pipeline.root / ".dvc/tmp/rwlock").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    readers = [by for some in found.get("read", {}).values() for by in some]
    return {by["pid"]: by["cmd"] for by in (*found.get("write", {}).values(), *readers)}


def clear_stale_rwlock(pipeline: Pipeline) -> None:
    """Delete DVC's list of who is at work if a `dvc` that was killed has left half of it, or is in it still.

    Half a list stops every `dvc`, and another process may get the id of one that is gone. Left alone while
    any `dvc` runs.
    """
    try:
        is_stale = not all(psutil.pid_exists(pid) for pid in lock_holders(pipeline))
    except ValueError:
        is_stale = True
    if is_stale and not dvc_runs(pipeline.root):
        (pipeline.root / ".dvc/tmp/rwlock").unlink(missing_ok=True)


def dvc_runs(root: Path) -> bool:
    """Whether any `dvc` works in the repository."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            runs_dvc = any(Path(word).name == "dvc" for word in process.cmdline()[:5])
            if runs_dvc and Path(process.cwd()).is_relative_to(root):
                return True
    return False
