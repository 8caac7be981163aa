"""A machine that trains cells for somebody else's grid: `resgrid worker`, and what its flows do.

The worker itself is Prefect's, of the type `process`, started in a clone of the project. Each of its flow
runs trains one cell: it checks that this clone is what the grid was planned for, takes a slot, brings the
data from the DVC remote, trains, and pushes what came of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import httpx
import psutil
from filelock import FileLock, Timeout
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectAlreadyExists, PrefectException
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Failed, Running

from resgrid import mps, tracking
from resgrid.config import load_params
from resgrid.dvc.ask import remote as dvc_remote
from resgrid.dvc.pipeline import DVC_COMMAND, Pipeline
from resgrid.dvc.process import StageFailed, Stopped, acquire, reproduce, run_logged
from resgrid.errors import ResgridError
from resgrid.grid import find_cell
from resgrid.progress import duration
from resgrid.provenance import git_commit
from resgrid.stage_record import RECORD_ONLY
from tasks import order as orders
from tasks.grid import end_with_worker
from tasks.order import Order
from tasks.pool import BEAT_SECONDS, LOST, PASSING, REFUSED, make_pool, newest_run
from tasks.publish import flow_environment
from tasks.services import POOL, environment, running
from tasks.slots import Slot, cards, share

SLOTS = "RESGRID_SLOTS"  # of this worker: how many cells it trains at once
REFUSAL = "RESGRID_REFUSAL"  # the file in which a flow tells the worker why it must not train
ASK_SECONDS = 10.0  # between two looks whether the run is still ours
LEAVE_SECONDS = 15.0  # for the flows to do so when the worker is told to end
RESTART_SECONDS = 10.0  # before Prefect's worker is started again, if it ended by itself
POLL_SECONDS = 0.5


# --- one cell ---------------------------------------------------------------------------------------


def train_for(cell: str, folder: str, order: Order) -> State:
    """Train `cell` under `order` and push the result; the state that the flow run ends in."""
    pipeline = Pipeline.find(folder)
    if refusal := order.refusal(pipeline):
        why = f"{orders.host()} refuses it: {refusal}"
        if file := os.environ.get(REFUSAL):
            Path(file).write_text(refusal, encoding="utf-8")
        return Failed(name=REFUSED, message=why)
    end_with_worker()
    stage = find_cell(load_params(pipeline.folder / "params.yaml"), cell).stage
    env = flow_environment() | {"RESGRID_SHARED_CHECKPOINTS": "1"}
    if order.device and not os.environ.get("RESGRID_DEVICE", "").startswith(order.device):
        os.environ["RESGRID_DEVICE"] = order.device  # of this process: by it the slots are cut as well
    stop = threading.Event()
    began = time.monotonic()
    try:
        with _owned(cell, order, stop) as check, _slot(pipeline, stop) as slot:
            bring_data(pipeline, order, stop)
            reproduce(pipeline, stage, {**env, **slot.env}, stop=stop, slot=slot.name)
            check()
            push(pipeline, stage, stop)
    except NotPushed as failure:
        return Failed(name=PASSING, message=str(failure))
    except StageFailed as failure:
        return Failed(name=PASSING if failure.fault else "Failed", message=str(failure))
    except Stopped:
        return Cancelled(message="It was ended, or another run has the cell: its worker has let the cell go.")
    finally:
        stop.set()
    return Completed(message=f"{orders.host()} {slot.name}: took {duration(time.monotonic() - began)}")


class NotPushed(ResgridError):
    """The DVC remote did not take a result."""


def push(pipeline: Pipeline, stage: str, stop: threading.Event) -> None:
    """The result of `stage` to the DVC remote; raises NotPushed if it does not take it.

    All outputs that are recorded here, and then the run cache, of which DVC pushes all: an entry whose
    outputs are not there would be in the way of another worker's.
    """
    for what in (("push",), ("push", "--run-cache", stage)):
        try:
            heard = run_logged(pipeline, f"push-{stage}", [*DVC_COMMAND, *what], {}, stop)
        except StageFailed as failure:
            raise NotPushed(str(failure)) from None
        for line in heard:
            if line.startswith("ERROR: "):  # with the run cache, DVC ends well all the same
                raise NotPushed(f"{stage}: {line.removeprefix('ERROR: ')}")


def bring_data(pipeline: Pipeline, order: Order, stop: threading.Event) -> None:
    """The processed data of `order` from the DVC remote, unless they are here.

    Raises StageFailed if the remote does not have them, for they are not made here.
    """
    with acquire(pipeline.lock("data"), "another run, which brings the data", stop):
        if orders.recorded_data(pipeline) == order.data and (pipeline.folder / "data/processed").is_dir():
            return
        command = [*DVC_COMMAND, "repro", "--pull", "--single-item", *orders.DATA_STAGES]
        run_logged(pipeline, "bring-data", command, {RECORD_ONLY: "1"}, stop)
        if (found := orders.recorded_data(pipeline)) != order.data:
            log = pipeline.log("bring-data")
            raise StageFailed("data", f"the data here are {found}, the grid's {order.data}", [], log, None)


@contextmanager
def _slot(pipeline: Pipeline, stop: threading.Event) -> Iterator[Slot]:
    """One of this worker's shares of the machine that no other of its flows has."""
    num = int(os.environ.get(SLOTS, "1"))
    slots = share(num, slots=num)
    folder = pipeline.root / ".resgrid/locks/slots"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for number, slot in enumerate(slots):
            lock = FileLock(folder / f"{number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield slot
            finally:
                lock.release()
            return
        if stop.wait(POLL_SECONDS):  # the one before it is about to end
            raise Stopped


@contextmanager
def _owned(cell: str, order: Order, stop: threading.Event) -> Iterator[Callable[[], None]]:
    """Set `stop` once this flow run has the cell no more: there is a newer one, or it was ended or deleted.

    If it was declared lost it says that it runs. Yields what asks at once, and raises Stopped if it is over.
    """
    own = UUID(runtime.flow_run.id)

    def ask() -> None:
        with suppress(Exception), get_client(sync_client=True) as client:  # whatever an absent server raises
            run = newest_run(client, order, cell)
            if run is None or run.id != own or run.state is None:
                stop.set()
            elif run.state.name == LOST:
                client.set_flow_run_state(own, Running(), force=True)
            elif run.state.is_final() or run.state.is_cancelling():
                stop.set()

    def check() -> None:
        ask()
        if stop.is_set():
            raise Stopped

    def keep_asking() -> None:
        while not stop.wait(ASK_SECONDS):
            ask()

    check()
    threading.Thread(target=keep_asking, name="owned", daemon=True).start()
    yield check


# --- the worker -------------------------------------------------------------------------------------


def work(root: Path, pool: str, slots: int | None, name: str | None) -> int:
    """Train cells of the work pool `pool` in the project `root`, until SIGINT or SIGTERM.

    Raises ResgridError if a service is not named or does not answer, and if this clone is not the one that a
    grid was planned for.
    """
    root = root.resolve()
    if not (root / "prefect.yaml").is_file():
        raise ResgridError(f"{root}: there is no prefect.yaml here. Run this in the project's root folder.")
    pipeline = Pipeline.find(root)
    env = _environment(root)
    remote = dvc_remote(pipeline)
    shares = share(slots or os.cpu_count() or 1, slots=slots)
    queues = ["default", *devices()]
    name = name or orders.host()
    commit, _ = git_commit()
    prefect = tracking.shown(env["PREFECT_API_URL"])
    mlflow = tracking.shown(env["MLFLOW_TRACKING_URI"])
    names = ", ".join(slot.name for slot in shares)
    print(f"Worker      {name}, at commit {commit[:10]}, in {root}")
    print(f"Slots       {len(shares)}, with {shares[0].threads} threads each: {names}")
    print(f"Cells from  the work pool {pool} (queues {', '.join(queues)}) at {prefect}")
    print(f"Results to  MLflow at {mlflow} and the DVC remote {remote}")
    print("Ctrl-C ends it: the cells that it trains then go to other workers.\n", flush=True)
    refusal = root / ".resgrid" / f"refusal-{os.getpid()}"
    env |= {SLOTS: str(len(shares)), REFUSAL: str(refusal)}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    command += ["--name", name, "--limit", str(len(shares))]
    for queue in queues:
        command += ["--work-queue", queue]
    _make_queues(pool, queues, env)
    if pool == POOL:  # of train-all itself: this worker is a coordinator
        deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        if subprocess.run(deploy, cwd=root, env=env, check=False).returncode:
            raise ResgridError(f"{root / 'prefect.yaml'}: its deployments cannot be registered; see above.")
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    process, cards_shared = None, ExitStack()
    try:
        env |= cards_shared.enter_context(mps.shared(slot.card for slot in shares))
        while not told:
            process = subprocess.Popen(command, cwd=root, env=env, process_group=0)
            while process.poll() is None and not told and not refusal.exists():
                time.sleep(POLL_SECONDS)
            if refusal.exists():
                why = refusal.read_text(encoding="utf-8")
                raise ResgridError(f"{root}: a cell came that this clone must not train: {why}.")
            if not told:
                print(
                    f"Prefect's worker ended by itself; the next starts in {RESTART_SECONDS:.0f} s",
                    flush=True,
                )
                deadline = time.monotonic() + RESTART_SECONDS
                while not told and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS)
    finally:
        if process is not None:
            _leave(process)
        cards_shared.close()
        refusal.unlink(missing_ok=True)
    print("The worker has left.", flush=True)
    return 0


def devices() -> list[str]:
    """What this machine can train on, as a cell may ask for it."""
    found = ["cpu"]
    if cards():
        found.append("cuda")
    if sys.platform == "darwin":
        found.append("mps")
    return found


def _environment(root: Path) -> dict[str, str]:
    """Of Prefect's worker, and so of its flows and trainers."""
    found = environment(
        root,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY=str(BEAT_SECONDS),
        # Without a server Prefect's worker gives up after 45 times as long, and its flows end with it.
        PREFECT_WORKER_QUERY_SECONDS=os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "5"),
    )
    if services := running(root):
        found.setdefault("PREFECT_API_URL", f"{services.prefect}/api")
        found.setdefault("MLFLOW_TRACKING_URI", services.mlflow)
    for variable, what, example in (
        ("PREFECT_API_URL", "Prefect's server", "http://server:4200/api"),
        ("MLFLOW_TRACKING_URI", "MLflow's server", "http://server:5000"),
    ):
        if not found.get(variable, "").startswith(("http://", "https://")):
            raise ResgridError(
                f"{variable} names no server: set it to the address of {what}, such as {example}."
            )
    return found


def _make_queues(pool: str, queues: list[str], environment: Mapping[str, str]) -> None:
    """The pool and its queues; raises ResgridError if the server does not answer."""
    url = environment["PREFECT_API_URL"]
    try:
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch()
            make_pool(client, pool)
            for queue in queues:
                with suppress(ObjectAlreadyExists):
                    client.create_work_queue(queue, work_pool_name=pool)
    except (httpx.HTTPError, PrefectException, OSError, RuntimeError) as error:
        way_on = ""
        if "401" in str(error):
            way_on = " Set PREFECT_API_AUTH_STRING to the user:password that the server was started with."
        raise ResgridError(
            f"{url}: Prefect's server cannot be used ({type(error).__name__}: "
            f"{tracking.shown(str(error)).partition(' - ')[0]}).{way_on}"
        ) from None


def _leave(process: subprocess.Popen[bytes]) -> None:
    """End Prefect's worker with its flows: these first, so that each ends its trainer and says so.

    The worker's own way to end kills them at once; see `tasks.services`.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + LEAVE_SECONDS
    with suppress(psutil.NoSuchProcess):
        # More than once, for while these end it takes new ones.
        while (flows := psutil.Process(process.pid).children()) and time.monotonic() < deadline:
            for flow in flows:
                if flow.pid not in asked:
                    asked.add(flow.pid)
                    flow.terminate()
            time.sleep(0.1)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(2.0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
