"""Ends this process when the one it works for is gone.

Between a flow and its trainers stands DVC, which survives the flow, and whose command then belongs to
process 1. So a trainer cannot go by its own parent; it is given whom to watch: RESGRID_WATCH=<pid>:<start>.
The start time is there because process ids are used again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

from resgrid.errors import ResgridError

VARIABLE = "RESGRID_WATCH"


def describe(pid: int) -> str:
    """The value of RESGRID_WATCH for the running process `pid`; raises ProcessLookupError if it is gone."""
    started = _started(pid)
    if started is None:
        raise ProcessLookupError(f"process {pid} is gone")
    return f"{pid}:{started}"


def alive(watched: str) -> bool:
    """Whether the very process that `describe` described still runs; a zombie does not."""
    pid, _, started = watched.partition(":")
    if not pid.isdecimal() or not started:
        raise ResgridError(f"{VARIABLE}={watched}: must be <process id>:<its start time>, or not set at all.")
    return _started(int(pid)) == started


def watch(watched: str | None = None, poll_seconds: float = 1.0, grace_seconds: float = 8.0) -> None:
    """Send this process SIGTERM as soon as `watched` (by default: RESGRID_WATCH) is gone, once.

    So all that is open is closed, and MLflow records the run as KILLED. What has not ended `grace_seconds`
    later is killed. Does nothing where nobody is to be watched. Call it in the main thread, after the
    handler of SIGTERM is set.
    """
    watched = watched or os.environ.get(VARIABLE)
    if watched:
        alive(watched)  # refuses a malformed value here, where somebody sees it
        settings = (watched, poll_seconds, grace_seconds)
        threading.Thread(target=_wait, args=settings, name="watch", daemon=True).start()


def stop_on_signals() -> threading.Event:
    """An event that signals set: SIGINT even where it was ignored, SIGHUP only where it was not (`nohup`).

    A process that a shell starts with `&` has SIGINT ignored, and hands that on to those that it starts.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: stop.set())
    return stop


def end_group(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """End a process with all of its group: SIGTERM, and SIGKILL `grace_seconds` later."""
    # PermissionError: macOS's answer for a group of zombies.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(watched: str, poll_seconds: float, grace_seconds: float) -> None:
    while alive(watched):
        time.sleep(poll_seconds)
    # To the main thread and not to the process, so that a blocking call there is interrupted.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _started(pid: int) -> str | None:
    """When a process started, in the system's own terms; None if it is gone or a zombie."""
    if Path("/proc/self/stat").exists():  # Linux; elsewhere `ps` knows it, at 5 ms a look
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces; see proc(5)
        return None if fields[0] in "ZX" else fields[19]  # clock ticks since the machine started
    fields = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return None if len(fields) < 2 or fields[0].startswith("Z") else fields[1].strip()
