"""dvc.lock after a kill: the last whole one is kept, put back, and brought up to date without training.

DVC writes the file in place, for 0.2 s at 46 cells, so what a SIGKILL leaves may be any part of it. What
ended well since the copy was made is then recorded from the run cache, whose newest entry it is, while the
commands of stages refuse to run.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from resgrid.errors import ResgridError
from tasks.stage import DVC_COMMAND, Pipeline, dvc_runs, run

RECORD_ONLY = "RESGRID_RECORD_ONLY"  # in the environment of a stage's command: it refuses to run


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


def repair(pipeline: Pipeline, say: Callable[[str], None], stop: threading.Event) -> None:
    """Put the last whole dvc.lock back if a kill has left a part of one; nothing is trained.

    Raises ResgridError, with their names, for stages that ended well and whose results DVC no longer has.
    """
    lock, kept = pipeline.folder / "dvc.lock", _kept(pipeline)
    if not lock.exists() or not kept.exists() or dvc_runs(pipeline.root) or is_whole(lock.read_bytes()):
        return
    say(f"{lock}: a dvc that was killed has left a part of it; the one before is put back")
    since = kept.stat().st_mtime - 1.0  # which is later than DVC's answer
    found = [pipeline.record(path.stem) for path in pipeline.state("").parent.glob("*.json")]
    ended = {
        of.stage: of.ended for of in found if of and of.seconds is not None and of.ended and of.ended > since
    }
    # Without their earlier entries, which DVC would take for them.
    entries = re.split(r"^(?=  \S)", kept.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rest = [entry for entry in entries if entry.strip().partition(":\n")[0] not in ended]
    lock.unlink()
    if rest[1:]:  # besides the head
        lock.write_text("".join(rest), encoding="utf-8", newline="\n")
    lost = []
    for stage in sorted(ended, key=lambda stage: ended[stage]):
        command = [*DVC_COMMAND, "repro", "--single-item", stage]
        code, _ = run(command, pipeline.folder, {RECORD_ONLY: "1"}, pipeline.log("repair"), say, stop)
        if code:
            lost.append(stage)
    if lost:
        raise ResgridError(
            f"{lock}: was damaged, and DVC no longer has the results of {', '.join(lost)}, which had ended. "
            "Run this again to train them anew."
        )


def _kept(pipeline: Pipeline) -> Path:
    return pipeline.state("dvc").with_suffix(".lock")
