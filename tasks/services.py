"""`resgrid up`: a Prefect server, an MLflow server and a worker on this machine, until a signal.

All of them listen on loopback alone and keep their state in the project's `.resgrid`.

How Prefect ends a worker, tried with 3.9.1: SIGTERM kills each flow run's process at once, so that it cannot
end its children, and its state stays "Running". So runs are cancelled through the server first, while the
worker still lives. A worker that inherited SIGINT as ignored, as a shell's `&` has it, never ends; a handler,
unlike "ignore", is not inherited, so `up` sets one before it starts anything.

`flow.serve()`, still there 20 s after SIGTERM, and honcho, which ends the server together with the worker, do
not replace this supervisor.
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
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
from filelock import FileLock, Timeout

from resgrid import watch
from resgrid.config import load_params
from resgrid.dvc.process import Stopped, pause
from resgrid.errors import ResgridError
from resgrid.stage_record import read_state, write_state

HOST = "127.0.0.1"
POOL = "resgrid"
STATE = ".resgrid/services.json"
START_SECONDS = 180.0  # a server takes 6 s, and 25 s where others keep the processors busy
CANCEL_SECONDS = 7.0  # for flows to end their children; with what follows, all training is over within 10 s
# Between SIGTERM and SIGKILL, in this order.
GRACE_SECONDS = {"deploy": 0.0, "worker": 2.0, "mlflow": 5.0, "prefect": 8.0}
POLL_SECONDS = 0.2

log = logging.getLogger(__name__)


def running(root: Path) -> tuple[str, str] | None:
    """The addresses of Prefect and MLflow that `up` keeps running for the project, once both answer.

    MLflow's is that of a server of ours, or of the one that MLFLOW_TRACKING_URI names.
    """
    state: Any = read_state(root / STATE)
    is_up = state and "prefect" in state and watch.alive(state["by"])
    return (state["prefect"], state["mlflow"]) if is_up else None


def environment(root: Path, **more: str) -> dict[str, str]:
    """Of every service of the project in `root`, and so of the flows and trainers that a worker starts."""
    (root / ".resgrid/prefect").mkdir(parents=True, exist_ok=True)  # Prefect makes no parents
    return os.environ | {
        # `python`, `dvc` and `resgrid` are this environment's, whether or not it is activated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(root / ".resgrid/prefect"),
        "PREFECT_WORKER_ENABLE_CANCELLATION": "true",  # of runs that are still pending as well
        "DO_NOT_TRACK": "1",  # Prefect's server, too
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        **more,
    }


def mlflow_address(root: Path) -> str | None:
    """Where MLflow's pages are served, if they are: by `resgrid up`, or by a server that serves the store."""
    addresses = running(root)
    uri = addresses[1] if addresses else os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri.rstrip("/") if uri.startswith(("http://", "https://")) else None


def no_proxy() -> dict[str, str]:
    """No proxy on the way to this machine itself."""
    given = ",".join(os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")).split(",")
    direct = ",".join(name for name in dict.fromkeys([*map(str.strip, given), HOST, "localhost"]) if name)
    return {"NO_PROXY": direct, "no_proxy": direct}


def up(root: Path, *, prefect_port: int = 4200, mlflow_port: int = 5000) -> int:
    """Run the services of the project in `root` until SIGINT, SIGTERM or SIGHUP, then end all of them.

    A port that is taken gives way to the next free one. Raises ResgridError if they run already, and if one
    of them does not start or ends by itself; the others are ended then as well.
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
        where = ": Prefect {}, MLflow {}".format(*others) if others else ""
        raise ResgridError(
            f"the services of this project run already{where}. Use those, or end them with Ctrl-C where they "
            "were started."
        ) from None
    stop = watch.stop_on_signals()
    with only_one:
        services = _Services(root, stop)
        try:
            services.start(prefect_port, mlflow_port)
            while True:
                services.pause()
        except Stopped:
            log.info("\nStopping: the worker, then MLflow, then Prefect")
        except ResgridError:
            services.check()  # that one has ended says more than that it does not answer
            raise
        finally:
            services.end()
    log.info("All ended.")
    return 0


class _Services:
    """The children of one `up`; each leads a process group of its own and writes to a log of its own."""

    def __init__(self, root: Path, stop: threading.Event) -> None:
        self.root, self.stop = root, stop
        self.children: dict[str, subprocess.Popen[bytes]] = {}  # in the order of their start
        self.env: dict[str, str] = {}
        # services.json: for `running`, and for the next start, should this one be killed.
        self.prefect = ""
        self.state: dict[str, Any] = {"by": watch.describe(os.getpid()), "children": {}}

    def start(self, prefect_port: int, mlflow_port: int) -> None:
        """Start everything and wait until each answers. Raises ResgridError, or Stopped."""
        from resgrid import tracking

        _end_left_over(self.root)
        port = _free_port("Prefect", prefect_port)
        self.prefect = f"http://{HOST}:{port}"
        self.env = environment(
            self.root,
            # Before whatever else has a module called tasks or flows.
            PYTHONPATH=os.pathsep.join(filter(None, (str(self.root), os.environ.get("PYTHONPATH")))),
            PYTHONUNBUFFERED="1",
            PREFECT_API_URL=f"{self.prefect}/api",
            PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
            PREFECT_WORKER_QUERY_SECONDS="1",  # how long a run waits to be taken; 10 by default
            **no_proxy(),
        )
        os.environ.update(self.env)  # before Prefect is imported here
        self._spawn("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(port))
        mlflow = self._start_mlflow(mlflow_port)
        self._wait_for("prefect", f"{self.prefect}/api/health")
        log.info("Prefect      %s", self.prefect)
        from tasks import server

        with server.prefect_client(f"{self.prefect}/api") as client:
            server.make_pool(client, POOL)
            if num := server.end_runs(client, POOL, "The services ended while it ran."):
                log.info("Flow runs of an earlier time that had no end, now recorded as crashed: %d", num)
            worker = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", POOL]
            self._spawn("worker", *worker)
            if self._spawn("deploy", "prefect", "--no-prompt", "deploy", "--all").wait():
                self._fail("deploy", "`prefect deploy` failed")
            del self.children["deploy"], self.state["children"]["deploy"]
            self._wait_for("mlflow", f"{mlflow}/health")
            log.info("MLflow       %s/#/experiments?%s", mlflow, tracking.WORK)  # not its home page
            log.info("Deployments  %s", ", ".join(sorted(each.name for each in client.read_deployments())))
        write_state(self.root / STATE, self.state | {"prefect": self.prefect, "mlflow": mlflow})
        log.info(
            "\nNow, in another terminal in this folder, after `source .venv/bin/activate`:"
            "\n  prefect deployment run train-all -p pipeline=examples/digits --watch"
            "\nWithout -p it trains the grid of this folder's own params.yaml. Ctrl-C here ends all of it."
        )

    def _start_mlflow(self, port: int) -> str:
        """A server on the pipeline's store, unless MLFLOW_TRACKING_URI names a server; return its address."""
        from resgrid import tracking
        from resgrid.tracking.store import SETTINGS, server, shown

        uri = tracking.store_uri(self.root)
        if "MLFLOW_TRACKING_URI" in self.env:
            self.env["MLFLOW_TRACKING_URI"] = uri  # a relative path would mean a store for each pipeline
        if uri.startswith(("http://", "https://", "databricks")):
            return shown(uri)
        port = _free_port("MLflow", port)
        # First of all directly: what a server makes has no place in the file system (`mlflow-artifacts:/`).
        tracking.open_store(load_params(self.root / "params.yaml").name, self.root)
        self.env = SETTINGS | self.env
        self._spawn("mlflow", *server(uri, port))
        return f"http://{HOST}:{port}"

    def check(self) -> None:
        """Raises ResgridError if a child has ended by itself."""
        for name, process in self.children.items():
            if (code := process.poll()) is not None:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                self._fail(name, f"{name} ended by itself ({how})")

    def pause(self) -> None:
        """Check, and sleep a little. Raises ResgridError, and Stopped."""
        self.check()
        pause(self.stop, POLL_SECONDS)

    def end(self) -> None:
        """End everything: flow runs, the worker, MLflow, Prefect; nothing is left when this returns."""
        if "worker" in self.children:
            from tasks import server

            why, url = "The services were stopped while it ran.", f"{self.prefect}/api"
            with suppress(*server.AWAY, ResgridError), server.prefect_client(url) as client:
                seconds = CANCEL_SECONDS if self.children["worker"].poll() is None else 0.0
                server.end_runs(client, POOL, why, seconds)
        for name, grace_seconds in GRACE_SECONDS.items():
            if name in self.children:
                watch.end_group(self.children[name], grace_seconds)
        (self.root / STATE).unlink(missing_ok=True)

    def _spawn(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log(name).open("wb") as out:
            self.children[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=self.root, env=self.env, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        with suppress(ProcessLookupError):  # it has ended by itself, which `pause` will say
            self.state["children"][name] = watch.describe(self.children[name].pid)
        write_state(self.root / STATE, self.state)
        return self.children[name]

    def _wait_for(self, name: str, url: str) -> None:
        """Wait for a server of ours, if there is one of that name."""
        deadline = time.monotonic() + START_SECONDS
        while name in self.children:
            with suppress(httpx.HTTPError):
                if httpx.get(url, timeout=10.0, trust_env=False).is_success:
                    return
            self.pause()
            if time.monotonic() > deadline:
                self._fail(name, f"{name} did not answer within {START_SECONDS:.0f} seconds")

    def _log(self, name: str) -> Path:
        return self.root / f".resgrid/logs/{name}.log"

    def _fail(self, name: str, what: str) -> NoReturn:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        tail = "".join(f"\n    {line}" for line in lines)
        raise ResgridError(f"{what}. The end of its log:{tail}\n    All of it: {self._log(name)}")


def _free_port(what: str, wanted: int) -> int:
    """`wanted`, or the next port that nobody holds, which is logged. Raises ResgridError if there is none."""
    for port in range(wanted, min(wanted + 50, 65536)):
        # Asked first: macOS lets one bind 127.0.0.1 where another program (AirPlay, on 5000) has them all.
        with suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
            continue
        # As the servers do, with SO_REUSEADDR: connections that were closed a minute ago do not count.
        with suppress(OSError), socket.create_server((HOST, port)):
            if port != wanted:
                log.info("Port %d is taken: %s takes %d", wanted, what, port)
            return port
    raise ResgridError(f"{what}: no port from {wanted} on is free. Name another: `resgrid up --help`.")


def _end_left_over(root: Path) -> None:
    """Kill the services that a killed `up` could not end itself, with their flows and trainers."""
    state: Any = read_state(root / STATE) or {"children": {}}
    left = {name: each for name, each in state["children"].items() if watch.alive(each)}
    if left:
        log.info("Ending what an earlier start left running: %s", ", ".join(left))
    processes = [psutil.Process(int(each.partition(":")[0])) for each in left.values()]
    processes += [child for process in processes for child in process.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 5.0)
