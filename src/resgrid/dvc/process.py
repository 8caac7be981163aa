"""One DVC stage, reproduced as a child process that is always ended and logged.

`dvc` ends with 255 whatever was in its way; the record that the stage's command leaves determines the
outcome (`resgrid.stage_record`):

    the command began | it ended | `dvc` ended | which means
    no                |          | well        | restored from the run cache, or up to date
    no                |          | otherwise   | DVC's own: busy, a missing dependency, a broken file
    yes               | well     | well        | trained
    yes               | well     | otherwise   | tried again, and taken from the training's last checkpoint
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
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from resgrid import watch
from resgrid.dvc.lock import clear_stale_rwlock
from resgrid.dvc.pipeline import DVC_COMMAND, Pipeline
from resgrid.errors import ResgridError
from resgrid.stage_record import Fault, State

log = logging.getLogger(__name__)

GRACE_SECONDS = 8.0  # from SIGTERM to SIGKILL; all is to be over within 10 s
POLL_SECONDS = 0.1  # how often the log is read and the child looked at
TAIL = 8  # lines of the log in a message
LAST_LINES = 60  # that `run` returns

# What DVC says after each stage about git and remotes; it stays in the log alone.
_ADVICE = re.compile(
    r"\s*$|To track the changes with git|To enable auto staging|\s+(git add|dvc config) |Use `dvc push`"
)


class StageFailed(ResgridError):
    """A stage could not be brought up to date; the message ends with the last lines of its log."""

    def __init__(
        self, stage: str, why: str, tail: list[str], log: Path | str, fault: Fault | None = None
    ) -> None:
        self.stage, self.why, self.tail, self.log, self.fault = stage, why, tail[-TAIL:], log, fault
        lines = "".join(f"\n    {line}" for line in self.tail)
        super().__init__(f"{stage}: {why}{lines}\n    All of it: {log}")


class Stopped(Exception):
    """The child was ended because the run is to stop."""


def reproduce(
    pipeline: Pipeline,
    stage: str,
    env: Mapping[str, str],
    *,
    force: bool = False,
    pull: bool = False,
    stop: threading.Event | None = None,
    others: Sequence[str] = (),
) -> bool:
    """Bring `stage` up to date with `dvc repro --single-item`; return whether its command has run.

    Each line of its output is logged. `env` is added to this process's environment; with `pull` the DVC
    remote is asked for a result. `others` are stages that the same command brings up to date. Setting `stop`
    ends the child and all that it started.

    Raises StageFailed, with the end of the log, if the stage fails, and Stopped after `stop`.
    """
    stop = stop or threading.Event()
    if (before := pipeline.record(stage)) and before.is_running:  # `dvc` does not wait for that
        log.info("waiting for %s, which process %s runs", stage, before.by.partition(":")[0])
        while before and before.is_running:
            pause(stop)
            before = pipeline.record(stage)
    clear_stale_rwlock(pipeline)
    options = [*(["--force"] if force else []), *(["--pull"] if pull else [])]
    command = [*DVC_COMMAND, "repro", "--single-item", *options, stage, *others]
    code, tail = run(command, pipeline.folder, env, pipeline.log(stage), stop)
    now = pipeline.record(stage)
    has_run = now is not None and now != before and not now.is_running  # else it is another process's
    if code == 0:
        return has_run
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    why = f"dvc {how}"
    fault: Fault | None = Fault.DVC
    if now and has_run:
        match now.status:
            case State.DONE:
                why = f"it is done, but DVC has not recorded it: {why}"
            case State.FAILED:
                why, fault = now.why, now.fault
            case State.RUNNING:
                why, fault = "its process was killed: by somebody, or by the system for lack of memory", None
            case _:
                fault = None
    raise StageFailed(stage, why, tail, pipeline.log(stage), fault)


def pause(stop: threading.Event, seconds: float = POLL_SECONDS) -> None:
    """Sleep; raises Stopped as soon as `stop` is set."""
    if stop.wait(seconds):
        raise Stopped


@contextmanager
def acquire(lock: FileLock, holder: str, stop: threading.Event) -> Iterator[None]:
    """Hold `lock`; logs once that `holder` is being waited for. Raises Stopped after `stop`."""
    with suppress(Timeout):
        lock.acquire(timeout=0)
    if not lock.is_locked:
        log.info("waiting for %s", holder)
    while not lock.is_locked:
        pause(stop)
        with suppress(Timeout):
            lock.acquire(timeout=0)
    try:
        yield
    finally:
        lock.release()


def run(
    command: list[str], folder: Path, env: Mapping[str, str], file: Path, stop: threading.Event
) -> tuple[int, list[str]]:
    """Run `command` in a process group of its own, its output in `file`; returns its status and last lines.

    Nothing of the group is left when this returns or raises. Raises Stopped after `stop`.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        watch.VARIABLE: watch.describe(os.getpid()),
        **env,
    }
    tail: deque[str] = deque(maxlen=LAST_LINES)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out, file.open("rb") as written:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        half, is_over = b"", False
        try:
            while not is_over:
                is_over = child.poll() is not None
                *lines, half = (half + written.read()).replace(b"\r", b"\n").split(b"\n")
                for line in [*lines, half] if is_over else lines:
                    text = line.decode("utf-8", "replace")
                    if not _ADVICE.match(text):
                        log.info("%s", text)
                        tail.append(text)
                if not is_over:
                    pause(stop)
        finally:
            end(child, spares_head="dvc" in command)
    return child.returncode, list(tail)


def end(child: subprocess.Popen[bytes], spares_head: bool) -> None:
    """End `child`, the leader of its process group, with all of the group: asked first, then killed.

    `spares_head`: it is a `dvc`, which is not asked, and killed a second later. It ends with its command,
    whose end it has to see: interrupted while it writes dvc.lock or .dvc/tmp/rwlock it leaves half of it.
    """
    deadline, asked = time.monotonic() + GRACE_SECONDS, set[int]()
    while left := members(child):
        for process in left:
            is_spared = spares_head and process.pid == child.pid
            with suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline + is_spared:
                    process.kill()
                elif not is_spared and process.pid not in asked:
                    process.terminate()
                    asked.add(process.pid)
        time.sleep(0.05)


def members(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """What still runs of the child's process group. Reaps the child."""
    child.poll()
    left = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.NoSuchProcess):  # gone meanwhile, or another user's
            if os.getpgid(pid) == child.pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                left.append(psutil.Process(pid))
    return left
