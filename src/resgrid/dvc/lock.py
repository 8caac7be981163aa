"""dvc.lock after a kill: the last whole one is kept, and put back. DVC's list of who is at work, likewise.

DVC writes dvc.lock in place, for 0.2 s at 46 cells, so what a SIGKILL leaves may be any part of it. What
ended well since the copy was made is then recorded from the run cache (`repair` in `process.py`).
"""

from __future__ import annotations

import io
import json
import re
from contextlib import suppress
from pathlib import Path

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from resgrid.dvc.pipeline import Pipeline
from resgrid.stage_record import State


def read_lock(pipeline: Pipeline) -> bytes:
    """dvc.lock as it is now; empty if there is none."""
    try:
        return (pipeline.folder / "dvc.lock").read_bytes()
    except FileNotFoundError:
        return b""


def keep(pipeline: Pipeline, content: bytes) -> None:
    """Keep what dvc.lock held while DVC answered, so that nobody wrote it."""
    kept = _kept(pipeline)
    if not (kept.exists() and kept.read_bytes() == content) and is_whole(content):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        part.write_bytes(content)
        part.replace(kept)


def is_whole(content: bytes) -> bool:
    """Whether DVC, git or a hand has written a dvc.lock to its end; DVC writes a buffer at a time."""
    try:
        stages = (YAML(typ="safe").load(content.decode()) or {}).get("stages")
    except (YAMLError, UnicodeDecodeError, AttributeError):
        return False
    at_a_cut = len(content) % io.DEFAULT_BUFFER_SIZE == 0
    return isinstance(stages, dict) and content.endswith(b"\n") and not at_a_cut


def must_be_repaired(pipeline: Pipeline) -> bool:
    """Whether a kill has left a part of dvc.lock, a copy is there, and no `dvc` runs."""
    lock = pipeline.folder / "dvc.lock"
    return (
        lock.exists()
        and _kept(pipeline).exists()
        and not dvc_runs(pipeline.root)
        and not is_whole(lock.read_bytes())
    )


def put_back(pipeline: Pipeline) -> list[str]:
    """Put the last whole dvc.lock back; returns the stages that have ended well since, to be recorded."""
    lock, kept = pipeline.folder / "dvc.lock", _kept(pipeline)
    since = kept.stat().st_mtime - 1.0  # which is later than DVC's answer
    found = [pipeline.record(path.stem) for path in pipeline.state("").parent.glob("*.json")]
    ended = {
        of.stage: of.ended for of in found if of and of.status == State.DONE and of.ended and of.ended > since
    }
    # Without their earlier entries, which DVC would take for them.
    entries = re.split(r"^(?=  \S)", kept.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rest = [entry for entry in entries if entry.strip().partition(":\n")[0] not in ended]
    lock.unlink()
    if rest[1:]:  # besides the head
        lock.write_text("".join(rest), encoding="utf-8", newline="\n")
    return sorted(ended, key=lambda stage: ended[stage])


def _kept(pipeline: Pipeline) -> Path:
    return pipeline.state("dvc").with_suffix(".lock")


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
