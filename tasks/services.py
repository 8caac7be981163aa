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

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import httpx
import psutil
from filelock import FileLock, Timeout

from resgrid import watch
from resgrid.config import load_params
from resgrid.errors import ResgridError
from resgrid.stage_record import read_state, write_state

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

HOST = "127.0.0.1"
POOL = "resgrid"
START_SECONDS = 180.0  # a server takes 6 s, and 25 s where others keep the processors busy
CANCEL_SECONDS = 7.0  # for flows to end their children; with what follows, all training is over within 10 s
GRACE_SECONDS = {"worker": 2.0, "mlflow": 5.0, "prefect": 8.0}  # between SIGTERM and SIGKILL, in this order
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Addresses:
    """Where the services of a project answer."""

    prefect: str  # http://127.0.0.1:4200, its API under /api
    mlflow: str  # a server of ours, or the one that MLFLOW_TRACKING_URI names


def running(root: Path) -> Addresses | None:
    """The services that `up` keeps running for the project in `root`, if it does."""
    state: Any = read_state(_state(root))
    if not state or not watch.alive(state["by"]):
        return None
    return Addresses(state["prefect"], state["mlflow"])


def _state(root: Path) -> Path:
    return root / ".resgrid/services.json"


def up(root: Path, *, prefect_port: int = 4200, mlflow_port: int = 5000) -> int:
    """Run the services of the project in `root` until SIGINT, SIGTERM or SIGHUP, then end all of them.

    A port that is taken gives way to the next free one. Returns 0, also if stopped while starting.
    Raises ResgridError if they run already, if one of them does not start, or if one ends by itself; the
    others are ended then as well.
    """
    root = root.resolve()
    if not (root / "prefect.yaml").is_file():
        raise ResgridError(f"{root}: there is no prefect.yaml here. Run this in the project's root folder.")
    for folder in ("logs", "locks"):
        (root / ".resgrid" / folder).mkdir(parents=True, exist_ok=True)
    with _alone(root), _signals() as stop:
        services = _Services(root, stop)
        try:
            services.start(prefect_port, mlflow_port)
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
        others = running(root)
        where = f": Prefect {others.prefect}, MLflow {others.mlflow}" if others else ""
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

    def pause(self) -> None:
        """Sleep a little; raises _Told if the end was asked for."""
        if not self.count:
            time.sleep(POLL_SECONDS)
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

    def check(self) -> None:
        """Raises ResgridError if it has ended, which no service should."""
        if (code := self.process.poll()) is not None:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            self.fail(f"{self.name} ended by itself ({how})")

    def fail(self, what: str) -> NoReturn:
        lines = self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-12:]
        shown = "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
        raise ResgridError(f"{what}. The end of its log:\n{shown}\n    All of it: {self.log}")


@dataclass
class _Services:
    root: Path
    stop: _Stop
    children: dict[str, _Child] = field(default_factory=dict)  # in the order of their start
    env: dict[str, str] = field(default_factory=dict)
    prefect: str = ""
    mlflow: str = ""
    settled: bool = False  # the server is ours and answers, and its runs are none but ours

    def start(self, prefect_port: int, mlflow_port: int) -> None:
        """Start everything and wait until each answers. Raises ResgridError, or _Told when stopped."""
        began = time.monotonic()

        def up_now(name: str, what: str) -> None:
            _say(f"{name:12} {what}   ({time.monotonic() - began:.0f} s)")

        end_left_over(self.root)
        port = _free_port("Prefect", prefect_port)
        self.prefect = f"http://{HOST}:{port}"
        given_url = os.environ.get("PREFECT_API_URL", "")
        self.env = _environment(self.root, self.prefect)
        os.environ.update(self.env)  # before Prefect is imported here
        self._spawn("prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(port)])
        self._start_mlflow(mlflow_port, port)
        self._until("prefect", lambda: _answers(f"{self.prefect}/api/health"))
        up_now("Prefect", self.prefect)

        with self._asking() as client:
            from resgrid import tracking
            from tasks.pool import make_pool

            make_pool(client, POOL)
            if num := settle(client, "The services ended while it ran."):
                _say(
                    f"{num} flow run{'s' * (num > 1)} of an earlier time had no end: now recorded as crashed"
                )
            self.settled = True
            deploy = self._spawn("deploy", ["prefect", "--no-prompt", "deploy", "--all"])
            self._spawn(
                "worker", ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", POOL]
            )
            self._until("mlflow", lambda: _answers(f"{self.mlflow}/health"))
            up_now("MLflow", f"{self.mlflow}/#/experiments?{tracking.WORK}")  # not its home page
            while deploy.process.poll() is None:
                self.stop.pause()
            if deploy.process.returncode:
                deploy.fail("`prefect deploy` failed")
            del self.children["deploy"]
            names = ", ".join(sorted(each.name for each in client.read_deployments()))
        self._write()
        up_now("Deployments", names)
        _say(
            "\nNow, in another terminal in this folder, after `source .venv/bin/activate`:"
            "\n  prefect deployment run train-all -p pipeline=examples/digits --watch"
            "\nWithout -p it trains the grid of this folder's own params.yaml. Ctrl-C here ends all of it."
        )
        if given_url and given_url.rstrip("/") != f"{self.prefect}/api":
            _say(
                f"Mind that PREFECT_API_URL is {given_url} here: `prefect` in this terminal asks that server."
            )

    def _start_mlflow(self, port: int, taken: int) -> None:
        """A server on the pipeline's store, unless MLFLOW_TRACKING_URI names a server."""
        from resgrid import tracking
        from resgrid.tracking.store import SETTINGS, server, shown

        uri = tracking.store_uri(self.root)
        if "MLFLOW_TRACKING_URI" in self.env:
            self.env["MLFLOW_TRACKING_URI"] = uri  # a relative path would mean a store for each pipeline
        if uri.startswith(("http://", "https://", "databricks")):
            self.mlflow = shown(uri)
            return
        port = _free_port("MLflow", port, taken)
        self.mlflow = f"http://{HOST}:{port}"
        # First of all directly: what a server makes has no place in the file system (`mlflow-artifacts:/`).
        tracking.open_store(load_params(self.root / "params.yaml").name, self.root)
        self.env = SETTINGS | self.env | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._spawn("mlflow", server(uri, port))

    def follow(self) -> NoReturn:
        """Until a child ends by itself (ResgridError) or the end is asked for (_Told)."""
        while True:
            for child in self.children.values():
                child.check()
            self.stop.pause()

    def end(self) -> None:
        """End everything: flow runs, the worker, MLflow, Prefect; nothing is left when this returns."""
        self._end("deploy", 0.0)
        with suppress(*_silent()):  # the server is gone: the worker's own signal has to do
            if self.settled:
                with self._asking() as client:
                    self._cancel_runs(client)
                    self._end("worker", GRACE_SECONDS["worker"])
                    settle(client, "The services were stopped while it ran.")
        for name, grace_seconds in GRACE_SECONDS.items():
            self._end(name, grace_seconds)
        _state(self.root).unlink(missing_ok=True)

    def _cancel_runs(self, client: SyncPrefectClient) -> None:
        from prefect.states import Cancelling

        if "worker" not in self.children or self.children["worker"].process.poll() is not None:
            return
        for run in _active(client):
            why = "The services were stopped while it ran."
            client.set_flow_run_state(run.id, Cancelling(message=why), force=True)
        deadline = time.monotonic() + CANCEL_SECONDS
        while _active(client) and time.monotonic() < deadline and self.stop.count < 2:
            time.sleep(POLL_SECONDS)

    def _end(self, name: str, grace_seconds: float) -> None:
        """End a child with all of its process group."""
        if (child := self.children.pop(name, None)) is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while child.process.poll() is None and time.monotonic() < deadline and self.stop.count < 2:
            time.sleep(0.05)
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()

    def _spawn(self, name: str, arguments: list[str]) -> _Child:
        log = self.root / f".resgrid/logs/{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=self.root, env=self.env, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.children[name] = _Child(name, log, process)
        self._write()
        return self.children[name]

    def _write(self) -> None:
        """services.json: for `running`, and for the next start, should this one be killed."""
        children = {}
        for name, child in self.children.items():
            with suppress(ProcessLookupError):  # it ended by itself, which `check` will say
                children[name] = watch.describe(child.process.pid)
        by = watch.describe(os.getpid())
        content = {"by": by, "prefect": self.prefect, "mlflow": self.mlflow, "children": children}
        write_state(_state(self.root), content)

    def _until(self, name: str, answers: Callable[[], bool]) -> None:
        """Wait for a server of ours, if there is one of that name."""
        deadline = time.monotonic() + START_SECONDS
        while name in self.children and not answers():
            self.children[name].check()
            if time.monotonic() > deadline:
                self.children[name].fail(f"{name} did not answer within {START_SECONDS:.0f} seconds")
            self.stop.pause()

    @contextmanager
    def _asking(self) -> Iterator[SyncPrefectClient]:
        """A client of our Prefect server; raises ResgridError for what it refuses."""
        from prefect.client.orchestration import get_client
        from prefect.exceptions import PrefectHTTPStatusError

        try:
            with get_client(sync_client=True) as client:
                yield client
        except PrefectHTTPStatusError as error:
            raise ResgridError(
                f"{self.prefect}: Prefect's server refuses a request: {str(error).splitlines()[0]}. If "
                "PREFECT_SERVER_API_AUTH_STRING is set, set PREFECT_API_AUTH_STRING to the same."
            ) from None


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
    with suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
        return False
    # As the servers do, with SO_REUSEADDR: connections that were closed a minute ago do not count.
    with suppress(OSError), socket.create_server((HOST, port)):
        return True
    return False


def end_left_over(root: Path) -> None:
    """End the services of an `up` that was killed and could not end them itself, with their flows."""
    state: Any = read_state(_state(root)) or {}
    left = {name: each for name, each in state.get("children", {}).items() if watch.alive(each)}
    if not left:
        return
    _say(f"Ending what an earlier start left running: {', '.join(left)}")
    processes = []
    for each in left.values():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(each.partition(":")[0]))
            processes += [process, *process.children(recursive=True)]
    for grace_seconds, end in ((5.0, psutil.Process.terminate), (5.0, psutil.Process.kill)):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, grace_seconds)


# --- what the server knows ---------------------------------------------------------------------------


def settle(client: SyncPrefectClient, why: str) -> int:
    """End the flow runs of our pool that nobody has ended, once no worker of ours lives; how many there were.

    A run that was being cancelled becomes cancelled, any other crashed.
    """
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter
    from prefect.states import Cancelled, Crashed

    runs = _active(client)
    for run in runs:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        unended = TaskRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}})
        for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=unended):
            client.set_task_run_state(task.id, Crashed(message=why), force=True)
        was_cancelled = run.state is not None and run.state.is_cancelling()
        end = Cancelled if was_cancelled else Crashed
        client.set_flow_run_state(run.id, end(message=why), force=True)
    return len(runs)


def _active(client: SyncPrefectClient) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter, WorkPoolFilterName

    types = ["RUNNING", "PENDING", "CANCELLING"]
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": types}}}),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _silent() -> tuple[type[Exception], ...]:
    """What asking a server raises that is gone."""
    from prefect.exceptions import PrefectException

    return (httpx.HTTPError, PrefectException, OSError, ResgridError)


def _say(line: str) -> None:
    print(line, flush=True)
