"""`resgrid up`: a Prefect server, an MLflow server and a worker on this machine, until they are told to end.

All of them listen on loopback alone and keep their state in the project's `.resgrid`.

How Prefect ends a worker, read in its sources and tried with 3.9.1:

- SIGTERM cancels a process worker's event loop, which kills each flow run's process at once: the flow cannot
  end its children, and its state stays "Running" for good. So runs are cancelled through the server first,
  while the worker still lives; it then sends each flow SIGTERM and records the run as cancelled.
- A worker that inherited SIGINT as ignored, as whatever a shell starts with `&` does, ignores its own signal
  and never ends. A handler, unlike "ignore", is not inherited: `up` has one set before it starts anything.

Neither `flow.serve()`, still there 20 s after SIGTERM, nor honcho, which ends the server together with the
worker, replaces this supervisor.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
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
GRACE_SECONDS = {"worker": 2.0, "mlflow": 5.0, "prefect": 8.0}  # between SIGTERM and SIGKILL, in this order
POLL_SECONDS = 0.2

log = logging.getLogger(__name__)


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


def _local_environment(root: Path, prefect: str) -> dict[str, str]:
    """That of the services of this machine, with Prefect at the address `prefect`."""
    given = ",".join(os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")).split(",")
    direct = ",".join(name for name in dict.fromkeys([*map(str.strip, given), HOST, "localhost"]) if name)
    return environment(
        root,
        # Before whatever else has a module called tasks or flows.
        PYTHONPATH=os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
        PYTHONUNBUFFERED="1",
        PREFECT_API_URL=f"{prefect}/api",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
        PREFECT_WORKER_QUERY_SECONDS="1",  # how long a run waits to be taken; 10 by default
        NO_PROXY=direct,
        no_proxy=direct,
    )


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
    try:
        only_one = FileLock(root / ".resgrid/locks/services.lock").acquire(timeout=0)
    except Timeout:
        others = running(root)
        where = f": Prefect {others.prefect}, MLflow {others.mlflow}" if others else ""
        raise ResgridError(
            f"the services of this project run already{where}. Use those, or end them with Ctrl-C where they "
            "were started."
        ) from None
    stop = threading.Event()
    stop_on_signals(stop)
    with only_one:
        services = _Services(root, stop)
        try:
            services.start(prefect_port, mlflow_port)
            while True:
                services.pause()
        except ShutdownRequested:
            log.info("\nStopping: the worker, then MLflow, then Prefect")
        finally:
            services.end()
    log.info("All ended.")
    return 0


class ShutdownRequested(Exception):
    """A signal asked for the end."""


def stop_on_signals(stop: threading.Event) -> None:
    """Have signals set `stop`: SIGINT even where it was ignored (see above), SIGHUP not there (`nohup`)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: stop.set())


class _Services:
    """The children of one `up`; each leads a process group of its own and writes to a log of its own."""

    def __init__(self, root: Path, stop: threading.Event) -> None:
        self.root, self.stop = root, stop
        self.children: dict[str, subprocess.Popen[bytes]] = {}  # in the order of their start
        self.env: dict[str, str] = {}
        self.prefect = self.mlflow = ""

    def start(self, prefect_port: int, mlflow_port: int) -> None:
        """Start everything and wait until each answers. Raises ResgridError, or ShutdownRequested."""
        from resgrid import tracking

        began = time.monotonic()

        def log_up(name: str, what: str) -> None:
            log.info("%-12s %s   (%.0f s)", name, what, time.monotonic() - began)

        _end_left_over(self.root)
        port = _free_port("Prefect", prefect_port)
        self.prefect = f"http://{HOST}:{port}"
        given_url = os.environ.get("PREFECT_API_URL", f"{self.prefect}/api")
        self.env = _local_environment(self.root, self.prefect)
        os.environ.update(self.env)  # before Prefect is imported here
        self._spawn("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(port))
        self._start_mlflow(mlflow_port, port)
        self._wait_for("prefect", lambda: _answers(f"{self.prefect}/api/health"))
        log_up("Prefect", self.prefect)
        from tasks import server

        with server.prefect_client(f"{self.prefect}/api") as client:
            server.make_pool(client, POOL)
            if num := server.finalize_orphans(client, POOL, "The services ended while it ran."):
                log.info("Flow runs of an earlier time that had no end, now recorded as crashed: %d", num)
            self._spawn(
                "worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", POOL
            )
            with self._log("deploy").open("wb") as out:
                deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
                options: dict[str, Any] = {"stdout": out, "stderr": out, "start_new_session": True}
                if subprocess.run(deploy, cwd=self.root, env=self.env, check=False, **options).returncode:
                    self._fail("deploy", "`prefect deploy` failed")
            self._wait_for("mlflow", lambda: _answers(f"{self.mlflow}/health"))
            log_up("MLflow", f"{self.mlflow}/#/experiments?{tracking.WORK}")  # not its home page
            names = ", ".join(sorted(each.name for each in client.read_deployments()))
        self._write()
        log_up("Deployments", names)
        log.info(
            "\nNow, in another terminal in this folder, after `source .venv/bin/activate`:"
            "\n  prefect deployment run train-all -p pipeline=examples/digits --watch"
            "\nWithout -p it trains the grid of this folder's own params.yaml. Ctrl-C here ends all of it."
        )
        if given_url.rstrip("/") != f"{self.prefect}/api":
            log.info("PREFECT_API_URL is %s here: `prefect` in this terminal asks that server.", given_url)

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
        self._spawn("mlflow", *server(uri, port))

    def pause(self) -> None:
        """Sleep a little. Raises ResgridError if a child has ended by itself, and ShutdownRequested."""
        for name, process in self.children.items():
            if (code := process.poll()) is not None:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                self._fail(name, f"{name} ended by itself ({how})")
        if self.stop.wait(POLL_SECONDS):
            raise ShutdownRequested

    def end(self) -> None:
        """End everything: flow runs, the worker, MLflow, Prefect; nothing is left when this returns."""
        if "worker" in self.children:
            from tasks import server

            why = "The services were stopped while it ran."
            with suppress(*server.AWAY, ResgridError), server.prefect_client(f"{self.prefect}/api") as client:
                if self.children["worker"].poll() is None:
                    server.cancel_runs(client, POOL, why, CANCEL_SECONDS)
                self._end("worker")
                server.finalize_orphans(client, POOL, why)
        for name in GRACE_SECONDS:
            self._end(name)
        _state(self.root).unlink(missing_ok=True)

    def _end(self, name: str) -> None:
        if (process := self.children.pop(name, None)) is not None:
            end_group(process, GRACE_SECONDS[name])

    def _spawn(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log(name).open("wb") as out:
            self.children[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=self.root, env=self.env, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._write()
        return self.children[name]

    def _write(self) -> None:
        """services.json: for `running`, and for the next start, should this one be killed."""
        children = {}
        for name, process in self.children.items():
            with suppress(ProcessLookupError):  # it ended by itself, which `pause` will say
                children[name] = watch.describe(process.pid)
        by = watch.describe(os.getpid())
        content = {"by": by, "prefect": self.prefect, "mlflow": self.mlflow, "children": children}
        write_state(_state(self.root), content)

    def _wait_for(self, name: str, answers: Callable[[], bool]) -> None:
        """Wait for a server of ours, if there is one of that name."""
        deadline = time.monotonic() + START_SECONDS
        while name in self.children and not answers():
            self.pause()
            if time.monotonic() > deadline:
                self._fail(name, f"{name} did not answer within {START_SECONDS:.0f} seconds")

    def _log(self, name: str) -> Path:
        return self.root / f".resgrid/logs/{name}.log"

    def _fail(self, name: str, what: str) -> NoReturn:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-12:]
        tail = "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
        raise ResgridError(f"{what}. The end of its log:\n{tail}\n    All of it: {self._log(name)}")


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


def _state(root: Path) -> Path:
    return root / ".resgrid/services.json"


def _free_port(what: str, wanted: int, taken: int | None = None) -> int:
    """`wanted`, or the next port that nobody holds, which is logged. Raises ResgridError if there is none."""
    if not 0 < wanted < 65536:
        raise ResgridError(f"{what}: {wanted} is no port; 1024 to 65535 are.")
    for port in range(wanted, min(wanted + 50, 65536)):
        if port != taken and _is_free(port):
            if port != wanted:
                log.info("Port %d is taken: %s takes %d", wanted, what, port)
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


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _end_left_over(root: Path) -> None:
    """End the services of an `up` that was killed and could not end them itself, with their flows."""
    state: Any = read_state(_state(root)) or {}
    left = {name: each for name, each in state.get("children", {}).items() if watch.alive(each)}
    if not left:
        return
    log.info("Ending what an earlier start left running: %s", ", ".join(left))
    processes = []
    for each in left.values():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(each.partition(":")[0]))
            processes += [process, *process.children(recursive=True)]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, 5.0)
