"""One DVC stage, reproduced as a child process that is always ended and logged.

`dvc` ends with 255 whatever was in its way; the record that the stage's command leaves determines the
outcome (`resgrid.stage_record`):

    the command began | it ended | `dvc` ended | which means
    no                |          | well        | restored from the run cache, or up to date
    no                |          | otherwise   | DVC's own: busy, a missing dependency, a broken file
    yes               | well     | well        | trained
    yes               | well     | otherwise   | it is only to be recorded, and never trained again for that
    yes               | failed   | otherwise   | the record says why, and whether it is transient

A killed `dvc` leaves its command running, so each child is the head of a process group of its own, and what
remains of the group is ended with it. The child writes straight into its log file, which is read from there:
no pipe that an orphan could hold open, and the log is whole even if this process is killed.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from resgrid import watch
from resgrid.dvc.lock import clear_stale_rwlock, dvc_runs, is_cut, put_back, refuse_conflict
from resgrid.dvc.pipeline import DVC_COMMAND, Pipeline
from resgrid.errors import ResgridError
from resgrid.stage_record import RECORD_ONLY, Fault, Record, State

log = logging.getLogger(__name__)

GRACE_SECONDS = 8.0  # from SIGTERM to SIGKILL; all is to be over within 10 s
PATIENCE_SECONDS = 5.0  # with a dvc that has no command running: it loads, or records a result
POLL_SECONDS = 0.1  # how often the log is read and the child looked at
RECORD_PAUSES = (1.0, 5.0, 15.0)  # before each further try to record what has been trained
LOG_BYTES = 2**23  # above which a log that is added to begins anew
TAIL = 8  # lines of the log in a message

# What DVC says after each stage about git and remotes; it stays in the log alone.
_ADVICE = re.compile(
    r"\s*$|To track the changes with git|To enable auto staging|\s+(git add|dvc config) |Use `dvc push`"
)


class StageFailed(ResgridError):
    """A stage could not be brought up to date; the message ends with the last lines of its log."""

    def __init__(
        self, stage: str, why: str, tail: list[str], log: Path | str, fault: Fault | None = None
    ) -> None:
        self.stage, self.why, self.tail, self.log, self.fault = stage, why, tail, log, fault
        lines = "".join(f"\n    {line}" for line in tail)
        super().__init__(f"{stage}: {why}{lines}\n    All of it: {log}")


class Stopped(Exception):
    """The child was ended because the run is to stop."""


@dataclass(frozen=True)
class Outcome:
    """A stage that is up to date."""

    stage: str
    ran: bool  # its command; or DVC had the result already
    seconds: float
    log: Path


def reproduce(
    pipeline: Pipeline,
    stage: str,
    env: Mapping[str, str],
    *,
    force: bool = False,
    pull: bool = False,
    stop: threading.Event | None = None,
    others: Sequence[str] = (),
) -> Outcome:
    """Bring `stage` up to date with `dvc repro --single-item`; each line of its output is logged.

    `env` is added to this process's environment; with `pull` the DVC remote is asked for a result. `others`
    are stages that the same command brings up to date. Setting `stop` ends the child and all that it started.
    Raises StageFailed, with the end of the log, if the stage fails, and Stopped after `stop`.
    """
    stop = stop or threading.Event()
    before = _wait_for_another(pipeline, stage, stop)
    clear_stale_rwlock(pipeline)
    file = pipeline.log(stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("", encoding="utf-8")
    options = [*(["--force"] if force else []), *(["--pull"] if pull else [])]
    command = [*DVC_COMMAND, "repro", "--single-item", *options, stage, *others]
    began = time.monotonic()
    code, tail = run(command, pipeline.folder, env, file, stop)
    now = pipeline.record(stage)
    did_begin = now is not None and now != before and not now.is_running  # else it is another process's
    if code == 0:
        return Outcome(stage, did_begin, time.monotonic() - began, file)
    why, fault = _how(code), Fault.DVC if not did_begin else None
    if now is not None and did_begin:
        if now.status == State.DONE:
            _commit(pipeline, stage, stop)
            return Outcome(stage, True, time.monotonic() - began, file)
        killed = "its process was killed: by somebody, or by the system for lack of memory"
        why, fault = {State.FAILED: now.why, State.RUNNING: killed}.get(now.status, why), now.fault
    raise StageFailed(stage, why, tail[-TAIL:], file, fault)


def _how(code: int) -> str:
    return f"dvc was ended by {signal.Signals(-code).name}" if code < 0 else f"dvc ended with status {code}"


def _wait_for_another(pipeline: Pipeline, stage: str, stop: threading.Event) -> Record | None:
    """The stage's record, once no process is at work on it: `dvc` does not wait for that."""
    waiting = False
    while (found := pipeline.record(stage)) and found.is_running:
        if not waiting:
            log.info("waiting for %s, which process %s runs", stage, found.by.partition(":")[0])
        waiting = True
        if stop.wait(POLL_SECONDS):
            raise Stopped
    return found


def _commit(pipeline: Pipeline, stage: str, stop: threading.Event) -> None:
    """Let DVC record the outputs that are there, by the command that never runs a stage's own."""
    tail = list[str]()
    for pause in RECORD_PAUSES:
        log.info("%s is done, but DVC has not recorded it: trying that again", stage)
        if stop.wait(pause):
            raise Stopped
        command = [*DVC_COMMAND, "commit", "--force", stage]
        code, tail = run(command, pipeline.folder, {}, pipeline.log(stage), stop)
        if code == 0:
            return
    why = f"it is done, but DVC cannot record it. That mended, `dvc commit --force {stage}` does"
    raise StageFailed(stage, why, tail[-TAIL:], pipeline.log(stage), None)


def repair(pipeline: Pipeline, stop: threading.Event) -> None:
    """Put the last whole dvc.lock back if a kill has left a part of one; nothing is trained.

    What has ended since is recorded from the run cache, whose newest entry it is, while the commands of
    stages refuse to run. Raises ResgridError, with their names, for stages of which DVC has no result there,
    and for a file with conflict markers, which is a person's to resolve.
    """
    lock = pipeline.folder / "dvc.lock"
    refuse_conflict(lock)
    if not is_cut(pipeline) or dvc_runs(pipeline.root):
        return
    log.warning("%s: a dvc that was killed has left a part of it; the one before is put back", lock)
    lost = []
    for stage in put_back(pipeline):
        command = [*DVC_COMMAND, "repro", "--single-item", stage]
        code, _ = run(command, pipeline.folder, {RECORD_ONLY: "1"}, pipeline.log("repair"), stop)
        if code:
            lost.append(stage)
    if lost:
        raise ResgridError(
            f"{lock}: was damaged, and DVC no longer has the results of {', '.join(lost)}, which had ended. "
            "Run this again to train them anew."
        )


@contextmanager
def acquire(lock: FileLock, holder: str, stop: threading.Event) -> Iterator[None]:
    """Hold `lock`; logs once that `holder` is being waited for. Raises Stopped after `stop`."""
    waiting = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if not waiting:
                log.info("waiting for %s", holder)
            waiting = True
            if stop.wait(POLL_SECONDS):
                raise Stopped from None
    try:
        yield
    finally:
        lock.release()


def run_logged(
    pipeline: Pipeline,
    name: str,
    command: list[str],
    env: Mapping[str, str],
    stop: threading.Event,
) -> list[str]:
    """Run `command` in the pipeline's folder, its output in the log `name`; returns its last lines.

    Raises StageFailed if it fails, and Stopped after `stop`.
    """
    file = pipeline.log(name)
    if file.exists() and file.stat().st_size > LOG_BYTES:
        file.unlink()
    code, tail = run(command, pipeline.folder, env, file, stop)
    if code:
        raise StageFailed(name, f"it ended with status {code}", tail[-TAIL:], file, None)
    return tail


def run(
    command: list[str],
    folder: Path,
    env: Mapping[str, str],
    file: Path,
    stop: threading.Event,
) -> tuple[int, list[str]]:
    """Run `command` in a process group of its own, its output added to `file`; returns its status and end.

    Nothing of the group is left when this returns or raises. Raises Stopped after `stop`.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        watch.VARIABLE: watch.describe(os.getpid()),
        **env,
    }
    tail: deque[str] = deque(maxlen=60)

    def keep(line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        if not _ADVICE.match(text):
            log.info("%s", text)
            tail.append(text)

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as out, file.open("rb") as written:
        written.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        half = b""
        try:
            while True:
                over = child.poll() is not None
                *whole, half = (half + written.read()).replace(b"\r", b"\n").split(b"\n")
                for line in whole:
                    keep(line)
                if over:
                    break
                if stop.wait(POLL_SECONDS):
                    raise Stopped
        finally:
            end(child, is_dvc=command[: len(DVC_COMMAND)] == [*DVC_COMMAND])
        if half:
            keep(half)
        return child.returncode, list(tail)


def end(child: subprocess.Popen[bytes], is_dvc: bool, grace_seconds: float = GRACE_SECONDS) -> None:
    """End `child`, a leader of its process group, with all that it started: asked first, then killed.

    `dvc` itself is left alone as long as it does not take too long. When its command ends, it ends by itself,
    and takes its entries out of `.dvc/tmp/rwlock`; before and after the command it soon comes to an end or to
    the command. Interrupted while it writes that file it leaves half of it, and then no `dvc` starts again.
    """
    began = time.monotonic()
    asked: set[tuple[int, int]] = set()
    while members := _members(child):
        waited = time.monotonic() - began
        for process in members:
            if not (is_dvc and process.pid == child.pid):
                number = signal.SIGTERM if waited < grace_seconds else signal.SIGKILL
            elif waited < PATIENCE_SECONDS or (len(members) > 1 and waited < grace_seconds + 1.0):
                continue
            else:
                number = signal.SIGINT if waited < grace_seconds + 1.0 else signal.SIGKILL
            if (process.pid, number) not in asked:
                asked.add((process.pid, number))
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        time.sleep(0.05)


def _members(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What still runs of the child, its descendants and the rest of its group. Reaps the child."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        if child.poll() is None:
            head = psutil.Process(child.pid)
            found = {process.pid: process for process in (head, *head.children(recursive=True))}
    try:
        os.killpg(child.pid, 0)
    except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        return list(found.values())
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == child.pid and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
    return list(found.values())
