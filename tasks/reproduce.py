"""One DVC stage, reproduced as a child process that is always ended, logged and recorded.

What DVC itself leaves open is closed here. `--wait-for-lock` waits for the repository's lock but not for a
stage that is running, so every stage has a file lock of ours. A killed `dvc` leaves its command running, so
each child is the head of a process group of its own, and what remains of the group is ended with it. The
child writes straight into its log file, which is read from there: no pipe that an orphan could hold open,
and the log is whole even if this process is killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from resgrid import watch
from resgrid.errors import ResgridError

GRACE_SECONDS = 8.0  # from SIGTERM to SIGKILL; all is to be over within 10 s
PATIENCE_SECONDS = 5.0  # with a dvc that has no command running: it loads, or records a result
POLL_SECONDS = 0.1  # how often the log is read and the child looked at
BUSY_SECONDS = 120.0  # how long to try again while DVC says that another process is at this stage
LOG_BYTES = 2**23  # above which a log that is added to begins anew
TAIL = 8  # lines of the log in a message

DVC = str(Path(__file__).with_name("dvc_command.py"))
# -P: or Python would look for modules beside that file first
DVC_COMMAND = (sys.executable, "-P", DVC, "--wait-for-lock")

Did = Literal["ran", "restored", "nothing"]

# Faults that can pass by themselves.
Fault = Literal["busy", "memory", "card", "connection"]
_FAULTS: dict[Fault, re.Pattern[str]] = {
    "busy": re.compile(r"is busy, it is being blocked by|Unable to acquire lock"),
    "memory": re.compile(
        r"(out of|not enough|can't allocate) memory|OutOfMemoryError|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    ),
    "card": re.compile("Error: CUDA error: "),  # of one client of MPS, or of another beside it
    "connection": re.compile(
        r"Connection(Error|ResetError|RefusedError|AbortedError)|Connection (reset|refused|aborted|timed out)"
        r"|RemoteDisconnected|IncompleteRead|Max retries exceeded|Temporary failure in name resolution"
        r"|ReadTimeout|ConnectTimeout"
    ),
}


# What DVC says after each stage about git and remotes; it stays in the log alone.
_ADVICE = re.compile(
    r"\s*$|To track the changes with git|To enable auto staging|\s+(git add|dvc config) |Use `dvc push`"
)


class StageFailed(ResgridError):
    """The command of a stage failed; the message ends with the last lines of its log."""

    def __init__(self, stage: str, why: str, tail: list[str], log: Path | str, fault: Fault | None) -> None:
        self.stage, self.why, self.tail, self.log, self.fault = stage, why, tail, log, fault
        lines = "".join(f"\n    {line}" for line in tail)
        super().__init__(f"{stage}: {why}{lines}\n    All of it: {log}")


class Stopped(Exception):
    """The child was ended because the run is to stop."""


@dataclass(frozen=True)
class Outcome:
    """What reproducing a stage came to: its command ran, DVC restored it from its run cache, or nothing."""

    stage: str
    did: Did
    seconds: float
    log: Path


@dataclass(frozen=True)
class Record:
    """A stage's latest run by a flow, in `.resgrid/state`; `by` is the process, by `watch.describe`."""

    stage: str
    status: Literal["running", "ran", "restored", "nothing", "failed", "stopped"]
    started: float  # seconds since the epoch
    ended: float | None
    slot: str
    by: str
    why: str = ""

    @property
    def running(self) -> bool:
        return self.status == "running" and watch.alive(self.by)


@dataclass(frozen=True)
class Pipeline:
    """A folder with a dvc.yaml, and where this project keeps its own state about it."""

    folder: Path
    root: Path  # of the DVC repository

    @classmethod
    def find(cls, folder: str | Path) -> Pipeline:
        """The pipeline in `folder`; raises ResgridError if it has no dvc.yaml or is in no DVC repository."""
        path = Path(folder).resolve()
        if not (path / "dvc.yaml").is_file():
            if (path / "params.yaml").is_file():
                raise ResgridError(
                    f"{path}: there is a params.yaml but no dvc.yaml here. `git checkout dvc.yaml` brings it "
                    "back, or copy that of examples/digits; `resgrid init` makes both in a new folder."
                )
            raise ResgridError(
                f"{path}: there is no dvc.yaml here. Name a pipeline's folder, such as the project's root or "
                "examples/digits."
            )
        for root in (path, *path.parents):
            if (root / ".dvc").is_dir():
                return cls(path, root)
        raise ResgridError(f"{path}: is in no DVC repository. Clone the project with git, or run `dvc init`.")

    @property
    def name(self) -> str:
        """Its folder as seen from the repository's root; `.` for the root itself."""
        return self.folder.relative_to(self.root).as_posix()

    def log(self, stage: str) -> Path:
        return self.root / ".resgrid/logs" / self.name / f"{stage}.log"

    def state(self, name: str) -> Path:
        return self.root / ".resgrid/state" / self.name / f"{name}.json"

    def lock(self, name: str) -> FileLock:
        """A stage's lock, or of something else of this pipeline. It ends with the process that has it."""
        path = self.root / ".resgrid/locks" / self.name / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def record(self, stage: str) -> Record | None:
        found = read_state(self.state(stage))
        return Record(**found) if found else None


def write_state(path: Path, content: Mapping[str, object]) -> None:
    """Replace a JSON file at once, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(path)


def read_state(path: Path) -> Any:
    """What `write_state` wrote; None if there is nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def reproduce(
    pipeline: Pipeline,
    stage: str,
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    *,
    force: bool = False,
    stop: threading.Event | None = None,
    slot: str = "",
    busy_seconds: float = BUSY_SECONDS,
) -> Outcome:
    """Bring `stage` up to date with `dvc repro --single-item`; each line of output goes to `on_line`.

    `env` is added to this process's environment. Setting `stop` ends the child and all that it started.
    Raises StageFailed, with the end of the log, if the stage fails or stays busy for `busy_seconds`; raises
    Stopped after `stop`.
    """
    stop = stop or threading.Event()
    command = [*DVC_COMMAND, "repro", "--single-item", stage]
    if force:
        command.insert(-1, "--force")
    log = pipeline.log(stage)
    with held(pipeline.lock(stage), f"{stage} is being run by another process", on_line, stop):
        started = time.time()
        record = Record(stage, "running", started, None, slot, watch.describe(os.getpid()))
        write_state(pipeline.state(stage), asdict(record))
        status, why = "failed", ""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("", encoding="utf-8")
            did = _until_not_busy(pipeline, stage, command, env, on_line, stop, busy_seconds)
            status = did
            return Outcome(stage, did, time.time() - started, log)
        except Stopped:
            status = "stopped"
            raise
        except StageFailed as failure:
            why = failure.why
            raise
        finally:
            ended = asdict(record) | {"status": status, "ended": time.time(), "why": why}
            write_state(pipeline.state(stage), ended)


@contextmanager
def held(lock: FileLock, why: str, on_line: Callable[[str], None], stop: threading.Event) -> Iterator[None]:
    """Hold `lock`; say once that it is being waited for."""
    waiting = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if not waiting:
                on_line(f"{why}: waiting for it")
            waiting = True
            if stop.wait(POLL_SECONDS):
                raise Stopped from None
    try:
        yield
    finally:
        lock.release()


def _until_not_busy(
    pipeline: Pipeline,
    stage: str,
    command: list[str],
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    stop: threading.Event,
    busy_seconds: float,
) -> Did:
    deadline = time.monotonic() + busy_seconds
    pause = 1.0
    while True:
        try:
            lines = run_logged(pipeline, stage, command, env, on_line, stop)
        except StageFailed as failure:
            if failure.fault != "busy" or time.monotonic() + pause > deadline:
                raise
            on_line(f"another DVC process is at {stage}; trying again in {pause:.0f} s")
        else:
            if any(line.startswith(f"Running stage '{stage}'") for line in lines):
                return "ran"
            return "restored" if any("is cached - skipping run" in line for line in lines) else "nothing"
        if stop.wait(pause):
            raise Stopped
        pause = min(2 * pause, 15.0)


def run_logged(
    pipeline: Pipeline,
    name: str,
    command: list[str],
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    stop: threading.Event,
) -> list[str]:
    """Run `command` in the pipeline's folder, its output in the log `name`; the lines that DVC itself says.

    Raises StageFailed if it fails, and Stopped after `stop`.
    """
    log = pipeline.log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.unlink()
    said: list[str] = []
    tail: deque[str] = deque(maxlen=60)

    def keep(line: str) -> None:
        if not _ADVICE.match(line):
            on_line(line)
            tail.append(line)
        if line.startswith(("Running stage '", "Stage '")):
            said.append(line)

    code = run(command, pipeline.folder, env, log, keep, stop)
    if code:
        text = "\n".join(tail)
        fault = next((fault for fault, pattern in _FAULTS.items() if pattern.search(text)), None)
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise StageFailed(name, _cause(tail) or how, list(tail)[-TAIL:], log, fault)
    return said


def _cause(lines: Sequence[str]) -> str:
    """The line of the command itself that says why, rather than DVC's about it."""
    for line in reversed(lines):
        if line.startswith("resgrid: "):
            return line.removeprefix("resgrid: ")
        if re.match(r"[\w.]*(Error|Exception)\b", line):
            return line
    cause = next((line.removeprefix("ERROR: ") for line in reversed(lines) if line.startswith("ERROR: ")), "")
    if re.search(r"exited with (-9|137)$", cause):
        cause += " (killed: by somebody, or by the system for lack of memory)"
    return cause


def run(
    command: list[str],
    folder: Path,
    env: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None],
    stop: threading.Event,
) -> int:
    """Run `command` in a process group of its own, its output added to `log`; the exit status.

    Nothing of the group is left when this returns or raises. Raises Stopped after `stop`.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        watch.VARIABLE: watch.describe(os.getpid()),
        **env,
    }
    with log.open("ab") as out, log.open("rb") as written:
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
                    on_line(line.decode("utf-8", "replace"))
                if over:
                    break
                if stop.wait(POLL_SECONDS):
                    raise Stopped
        finally:
            end(child, is_dvc=DVC in command)
        if half:
            on_line(half.decode("utf-8", "replace"))
        return child.returncode


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
