"""`resgrid up`: a Prefect server, an MLflow server and a worker on this machine, until they are told to end.

All of them listen on loopback alone and keep their state in the project's `.resgrid`.

What Prefect does with a worker that is told to end, read in the sources of 3.8.8 and tried with it and 3.9.1:

- SIGTERM makes a process worker send itself SIGINT, which cancels its event loop. That kills each flow run's
  process with SIGKILL at once (`anyio.Process.aclose`): the flow cannot end its children, and its state stays
  "Running" for good. So runs are cancelled through the server first, while the worker still lives: it then
  sends each flow's process SIGTERM, waits up to 30 s, looks every 3 s, and records the run as cancelled.
- A worker that inherited SIGINT as ignored, as whatever a shell starts with `&` does, ignores its own signal
  and never ends. A handler, unlike "ignore", is not inherited: `up` has one set before it starts anything.
- Left alone, a process worker starts a supervisor that becomes the flow's process: a second import of
  Prefect, 2 s for each run. A `command` among the job variables (see prefect.yaml) does without. The flow's
  process is then of the worker's group, so the group's SIGTERM reaches it even if the server is gone.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import psutil
from filelock import FileLock, Timeout

from resgrid import watch
from resgrid.config import load_params
from resgrid.errors import ResgridError
from resgrid.stage_record import read_state, write_state

HOST = "127.0.0.1"
POOL = "resgrid"
START_SECONDS = 180.0  # a server takes 6 s, and 25 s where others keep the processors busy
CANCEL_SECONDS = 7.0  # for flows to end their children; with what follows, all training is over within 10 s
GRACE_SECONDS = {"worker": 2.0, "mlflow": 5.0, "prefect": 8.0}  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.2

Answer = TypeVar("Answer")

# Loopback without a detour, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Addresses:
    """Where the services of a project answer."""

    prefect: str  # http://127.0.0.1:4200, its API under /api
    mlflow: str  # a server of ours, or the one that MLFLOW_TRACKING_URI names


def running(root: Path) -> Addresses | None:
    """The services that `up` keeps running for the project in `root`, if it does."""
    found: Any = read_state(_state(root))
    if not found or not watch.alive(found["by"]):
        return None
    return Addresses(found["prefect"], found["mlflow"])


def _state(root: Path) -> Path:
    return root / ".resgrid/services.json"


def up(root: Path, *, prefect_port: int = 4200, mlflow_port: int = 5000, workers: int = 1) -> int:
    """Run the services of the project in `root` until SIGINT, SIGTERM or SIGHUP, then end all of them.

    A port that is taken gives way to the next free one. Returns 0, also if stopped while starting.
    Raises ResgridError if they run already, if one of them does not start, or if one ends by itself; the
    others are ended then as well.
    """
    root = root.resolve()
    if not (root / "prefect.yaml").is_file():
        raise ResgridError(f"{root}: there is no prefect.yaml here. Run this in the project's root folder.")
    if workers < 1:
        raise ResgridError(f"--workers {workers}: flows need at least one.")
    for folder in ("logs", "locks"):
        (root / ".resgrid" / folder).mkdir(parents=True, exist_ok=True)
    with _alone(root), _signals() as stop:
        services = _Services(root, stop)
        try:
            services.start(prefect_port, mlflow_port, workers)
            services.follow()
        except _Told:
            _say("\nStopping: the worker, then MLflow, then Prefect (once more Ctrl-C kills them)")
        finally:
            services.end()
    _say("All ended.")
    return 0


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Raises ResgridError if another process is at this for the same project."""
    lock = FileLock(root / ".resgrid/locks/services.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        found = running(root)
        where = f": Prefect {found.prefect}, MLflow {found.mlflow}" if found else ""
        raise ResgridError(
            f"the services of this project run already{where}. Use those, or end them with Ctrl-C where they "
            "were started."
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Told(Exception):
    """A signal asked for the end."""


class _Stop:
    """Counts the signals that ask for the end."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1

    def pause(self, seconds: float = POLL_SECONDS) -> None:
        """Sleep; raises _Told if the end was asked for."""
        if not self.count:
            time.sleep(seconds)
        if self.count:
            raise _Told


@contextmanager
def _signals() -> Iterator[_Stop]:
    """SIGINT is taken even where it was ignored (see above), SIGHUP only where it was not (`nohup`)."""
    stop = _Stop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Child:
    """One service, the leader of a process group of its own, writing to a log of its own."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]
    lasting: bool = True  # False: it does something, and ends

    def check(self) -> None:
        """Raises ResgridError if it has ended, other than well and as it should."""
        code = self.process.poll()
        if code or (code == 0 and self.lasting):
            self.fail(f"{self.name} ended by itself ({_how(code)})")

    def fail(self, what: str) -> NoReturn:
        lines = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-12:]
        if any("Can't locate revision" in line for line in lines):
            raise ResgridError(
                ".resgrid/prefect/prefect.db: a newer version of Prefect made the database. Move prefect.db* "
                f"aside and a new one is made; no result is lost with it. All of the log: {self.log}"
            )
        shown = "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
        raise ResgridError(f"{what}. The end of its log:\n{shown}\n    All of it: {self.log}")


@dataclass
class _Services:
    root: Path
    stop: _Stop
    children: list[_Child] = field(default_factory=list)  # in the order of their start
    env: dict[str, str] = field(default_factory=dict)
    prefect: str = ""
    mlflow: str = ""
    settled: bool = False  # the server is ours and answers, and its runs are none but ours

    def start(self, prefect_port: int, mlflow_port: int, workers: int) -> None:
        """Start everything and wait until each answers. Raises ResgridError, or _Told when stopped."""
        began = time.monotonic()

        def up_now(name: str, what: str) -> None:
            _say(f"{name:12} {what}   ({time.monotonic() - began:.0f} s)")

        end_left_over(self.root)
        port = _free_port("Prefect", prefect_port)
        self.prefect = f"http://{HOST}:{port}"
        self.env = _environment(self.root, self.prefect)
        server = self._spawn("prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(port)])
        pages = self._start_mlflow(mlflow_port, port)

        self._until(server, "Prefect's server", lambda: _get(f"{self.prefect}/api/health") == b"true")
        up_now("Prefect", self.prefect)
        self._until(server, "Prefect's server", self._tidy)

        asked = time.time()
        arguments = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml"]
        deploy = self._spawn("deploy", arguments, lasting=False)
        arguments = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name"]
        names = [f"{POOL}-{i + 1}" for i in range(workers)]
        started = [self._spawn(f"worker {name}", [*arguments, name]) for name in names]
        if pages:
            self._until(pages, "MLflow's server", lambda: _get(f"{self.mlflow}/health") == b"OK")
        up_now("MLflow", self.mlflow)
        self._until(deploy, "`prefect deploy`", lambda: deploy.process.poll() == 0)
        self.children.remove(deploy)
        self._write()
        registered = self._until(server, "Prefect's server", partial(_deployments, self.prefect))
        up_now("Deployments", ", ".join(registered))
        for child, name in zip(started, names, strict=True):
            self._until(child, f"the worker {name}", partial(_has_called, self.prefect, name, asked))
        up_now("Worker", ", ".join(names))
        _say(
            "\nNow, in another terminal in this folder:  prefect deployment run train-all --watch"
            "\nCtrl-C here ends all of it."
        )
        if (url := os.environ.get("PREFECT_API_URL")) and url.rstrip("/") != f"{self.prefect}/api":
            _say(f"Mind that PREFECT_API_URL is {url} here: `prefect` in this terminal asks that server.")

    def _start_mlflow(self, port: int, taken: int) -> _Child | None:
        """A server on the pipeline's store, unless MLFLOW_TRACKING_URI names a server."""
        from resgrid import tracking
        from resgrid.tracking.store import SETTINGS, server, shown

        uri = tracking.store_uri(self.root)
        if "MLFLOW_TRACKING_URI" in self.env:
            self.env["MLFLOW_TRACKING_URI"] = uri  # a relative path would mean a store for each pipeline
        if uri.startswith(("http://", "https://", "databricks")):
            self.mlflow = shown(uri)
            return None
        port = _free_port("MLflow", port, taken)
        self.mlflow = f"http://{HOST}:{port}"
        # First of all directly: what a server makes has no place in the file system (`mlflow-artifacts:/`).
        tracking.open_store(load_params(self.root / "params.yaml").name, self.root)
        self.env = SETTINGS | self.env | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return self._spawn("mlflow", server(uri, port))

    def follow(self) -> NoReturn:
        """Until a child ends by itself (ResgridError) or the end is asked for (_Told)."""
        while True:
            for child in self.children:
                child.check()
            self.stop.pause()

    def end(self) -> None:
        """End everything: flow runs, workers, MLflow, Prefect; nothing is left when this returns."""
        workers = [child for child in self.children if child.name.startswith(("worker", "deploy"))]
        why = "The services were stopped while it ran."
        if self.settled and any(child.process.poll() is None for child in workers):
            with suppress(OSError):  # the server is gone: the workers' own signal has to do
                self._cancel_runs(why)
        _end(workers, GRACE_SECONDS["worker"], self.stop)
        if self.settled:
            with suppress(OSError):
                settle(self.prefect, self.root, why)
        for name in ("mlflow", "prefect"):
            _end([child for child in self.children if child.name == name], GRACE_SECONDS[name], self.stop)
        _state(self.root).unlink(missing_ok=True)

    def _tidy(self) -> bool:
        """Make the server ready for our worker."""
        _make_pool(self.prefect)
        if num := settle(self.prefect, self.root, "The services ended while it ran."):
            _say(f"{num} flow run{'s' * (num > 1)} of an earlier time had no end: now recorded as crashed")
        self.settled = True
        return True

    def _cancel_runs(self, why: str) -> None:
        runs = _active(self.prefect)
        for run in runs:
            _set_state(self.prefect, "flow_runs", run["id"], "CANCELLING", why)
        deadline = time.monotonic() + CANCEL_SECONDS
        while runs and time.monotonic() < deadline and self.stop.count < 2:
            time.sleep(POLL_SECONDS)
            runs = _active(self.prefect)

    def _spawn(self, name: str, arguments: list[str], lasting: bool = True) -> _Child:
        log = self.root / ".resgrid/logs" / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=self.root, env=self.env, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        child = _Child(name, log, process, lasting)
        self.children.append(child)
        self._write()
        return child

    def _write(self) -> None:
        """services.json: for `running`, and for the next start, should this one be killed."""
        children = {}
        for child in self.children:
            with suppress(ProcessLookupError):  # it ended by itself, which `check` will say
                children[child.name] = watch.describe(child.process.pid)
        by = watch.describe(os.getpid())
        content = {"by": by, "prefect": self.prefect, "mlflow": self.mlflow, "children": children}
        write_state(_state(self.root), content)

    def _until(self, child: _Child, what: str, ask: Callable[[], Answer]) -> Answer:
        """The first true answer; a server that is starting, or whose database is busy, gives none at all."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if answer := ask():
                    return answer
            except urllib.error.HTTPError as error:
                if error.code == HTTPStatus.UNAUTHORIZED:
                    raise ResgridError(
                        f"{what} was started with PREFECT_SERVER_API_AUTH_STRING and refuses requests "
                        "without it. Set PREFECT_API_AUTH_STRING to the same user:password, or unset it."
                    ) from None
            except OSError:
                pass
            child.check()
            if time.monotonic() > deadline:
                child.fail(f"{what} did not answer within {START_SECONDS:.0f} seconds")
            self.stop.pause()


def environment(root: Path, **more: str) -> dict[str, str]:
    """Of every service of the project in `root`, and so of the flows and trainers that a worker starts."""
    (root / ".resgrid/prefect").mkdir(parents=True, exist_ok=True)  # Prefect makes no parents
    return os.environ | {
        # `python`, `dvc` and `resgrid` are this environment's, whether or not it is activated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(root / ".resgrid/prefect"),
        "PREFECT_WORKER_ENABLE_CANCELLATION": "true",  # of runs that are still pending as well
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        **more,
    }


def _environment(root: Path, prefect: str) -> dict[str, str]:
    """Of those of this machine, with Prefect at the address `prefect`."""
    given = ",".join(os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")).split(",")
    names = [name for name in dict.fromkeys([*map(str.strip, given), HOST, "localhost"]) if name]
    return environment(
        root,
        # Before whatever else has a module called tasks or flows.
        PYTHONPATH=os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
        PYTHONUNBUFFERED="1",
        PREFECT_API_URL=f"{prefect}/api",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
        PREFECT_WORKER_QUERY_SECONDS="1",  # how long a run waits to be taken; 10 by default
        NO_PROXY=",".join(names),
        no_proxy=",".join(names),
    )


def _free_port(what: str, wanted: int, taken: int | None = None) -> int:
    """`wanted`, or the next port that nobody holds; says so. Raises ResgridError if there is none."""
    if not 0 < wanted < 65536:
        raise ResgridError(f"{what}: {wanted} is no port; 1024 to 65535 are.")
    for port in range(wanted, min(wanted + 50, 65536)):
        if port != taken and _is_free(port):
            if port != wanted:
                _say(f"Port {wanted} is taken: {what} takes {port}")
            return port
    raise ResgridError(
        f"{what}: port {wanted} and the 49 after it are taken. Name another one; see `resgrid up --help`."
    )


def _is_free(port: int) -> bool:
    # Asked first: macOS lets one bind 127.0.0.1 where another program (AirPlay, on 5000) has all addresses.
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((HOST, port)) == 0:
            return False
    with socket.socket() as probe:
        # As the servers do: connections that were closed a minute ago do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def end_left_over(root: Path) -> None:
    """End the services of an `up` that was killed and could not end them itself."""
    found: Any = read_state(_state(root)) or {}
    left = {name: each for name, each in found.get("children", {}).items() if watch.alive(each)}
    if left:
        _say(f"Ending what an earlier start left running: {', '.join(left)}")
        processes = []
        for each in left.values():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(each.partition(":")[0]))
                processes += [process, *process.children(recursive=True)]
        _end_processes(processes, 5.0)


def _end(children: list[_Child], grace_seconds: float, stop: _Stop) -> None:
    """End the children with all of their process groups."""
    for child in children:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while any(child.process.poll() is None for child in children):
        if time.monotonic() > deadline or stop.count > 1:
            break
        time.sleep(0.05)
    for child in children:
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()


def _end_processes(processes: list[psutil.Process], grace_seconds: float) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, grace_seconds)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, 5.0)


# --- what the server knows ---------------------------------------------------------------------------


def settle(prefect: str, root: Path, why: str) -> int:
    """End the flow runs of our pool that nobody has ended, once no worker of ours lives; how many there were.

    What is left of their processes is ended first: the flows', which Prefect's engine runs in the project's
    folder with no worker above them, and their children's, which carry the run's id in their environment. A
    run that was being cancelled becomes cancelled, any other crashed.
    Raises OSError if the server does not answer.
    """
    runs = _active(prefect)
    ids = {run["id"] for run in runs}
    if ids:
        _end_processes([process for process in psutil.process_iter() if _is_left(process, ids, root)], 1.0)
    for run in runs:
        filters = {"flow_runs": {"id": {"any_": [run["id"]]}}, "task_runs": _in_state("RUNNING", "PENDING")}
        for task in _post(prefect, "task_runs/filter", filters):
            _set_state(prefect, "task_runs", task["id"], "CRASHED", why)
        state = "CANCELLED" if run["state_type"] == "CANCELLING" else "CRASHED"
        _set_state(prefect, "flow_runs", run["id"], state, why)
    return len(runs)


def _is_left(process: psutil.Process, ids: set[str], root: Path) -> bool:
    with suppress(psutil.Error, OSError):
        if process.environ().get("RESGRID_FLOW_RUN_ID") in ids:
            return True
        if "prefect.engine" in process.cmdline() and Path(process.cwd()) == root:
            above = process.parent()
            return above is None or "worker" not in above.cmdline()
    return False


def _active(prefect: str) -> list[dict[str, Any]]:
    states = _in_state("RUNNING", "PENDING", "CANCELLING")
    filters = {"flow_runs": states, "work_pools": {"name": {"any_": [POOL]}}}
    found: list[dict[str, Any]] = _post(prefect, "flow_runs/filter", filters)
    return found


def _in_state(*types: str) -> dict[str, Any]:
    return {"state": {"type": {"any_": list(types)}}}


def _set_state(prefect: str, kind: str, run_id: str, state: str, why: str) -> None:
    content = {"state": {"type": state, "name": state.capitalize(), "message": why}, "force": True}
    _post(prefect, f"{kind}/{run_id}/set_state", content)


def _make_pool(prefect: str) -> None:
    try:
        _post(prefect, "work_pools/", {"name": POOL, "type": "process", "description": "This machine"})
    except urllib.error.HTTPError as error:
        if error.code != 409:  # it is there already
            raise


def _deployments(prefect: str) -> list[str]:
    found = _post(prefect, "deployments/filter", {"work_pools": {"name": {"any_": [POOL]}}})
    return sorted(deployment["name"] for deployment in found)


def _has_called(prefect: str, worker: str, since: float) -> bool:
    """Whether the worker has told the server of itself `since` that time (seconds since the epoch)."""
    found = _post(prefect, f"work_pools/{POOL}/workers/filter", {})
    times = [each["last_heartbeat_time"] for each in found if each["name"] == worker]
    return any(text and datetime.fromisoformat(text).timestamp() > since for text in times)


def _post(prefect: str, path: str, content: dict[str, Any]) -> Any:
    return json.loads(_get(f"{prefect}/api/{path}", json.dumps(content).encode()))


def _get(url: str, content: bytes | None = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
    request = urllib.request.Request(url, content, headers)
    with _OPENER.open(request, timeout=10) as response:
        body: bytes = response.read()
        return body


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _say(line: str) -> None:
    print(line, flush=True)
