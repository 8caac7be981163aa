"""The worker side of a pool: `resgrid worker`, and the flow by which it trains one cell for another's grid.

The worker is Prefect's, of the type `process`, started in a clone of the project. It listens to the queues of
its commit and versions, and leaves once its checkout is another one. Each of its flow runs compares, takes a
slot, brings the data from the DVC remote, has DVC take the result from there or train, and pushes it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname

import psutil
from filelock import FileLock, Timeout
from prefect import task
from prefect.client.schemas.objects import State
from prefect.states import Completed, Crashed, Failed

from resgrid import mps, tracking, watch
from resgrid.config import load_params
from resgrid.dvc.ask import push, record, remote_name
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import StageFailed, acquire, members, reproduce
from resgrid.errors import ResgridError
from resgrid.grid import find_cell
from resgrid.stage_record import Fault
from tasks.grid import RETRIED, begin_flow
from tasks.server import BEAT_SECONDS, delete_former_queues, make_pool, prefect_client
from tasks.services import POOL, environment, running
from tasks.slots import Slot, share
from tasks.spec import DATA_STAGES, RunSpec, checkout, difference, recorded_data

SLOTS = "RESGRID_SLOTS"  # of this worker: how many cells it trains at once
SERVERS = {"PREFECT_API_URL": "http://server:4200/api", "MLFLOW_TRACKING_URI": "http://server:5000"}
COMPARE_SECONDS = 3.0  # between two looks whether the checkout is still the one that began
LEAVE_SECONDS = 15.0  # for the flows to end when the worker is to end
RESTART_SECONDS = 10.0  # before Prefect's worker is started again, if it ended by itself
POLL_SECONDS = 0.5  # between two looks for a free slot

log = logging.getLogger(__name__)


# --- one cell ---------------------------------------------------------------------------------------


def train_for(cell: str, folder: str, spec: RunSpec) -> State:
    """Train `cell` under `spec` and push the result; return the state that the flow run ends in.

    That is Crashed, by which the cell is placed again, where this clone does not match; its worker then ends.
    """
    worker = os.environ.get(watch.VARIABLE, "")
    if worker and not watch.alive(worker):  # somebody has killed it alone, and nobody compares any more
        os.kill(os.getppid(), signal.SIGKILL)  # Prefect's worker, which it would have ended
        return Crashed(message=f"{gethostname()}: its `resgrid worker` is gone, now Prefect's too.")
    pipeline = Pipeline.find(folder)
    begin_flow()
    if spec.device and not os.environ.get("RESGRID_DEVICE", "").startswith(spec.device):
        os.environ["RESGRID_DEVICE"] = spec.device  # of this process: by it the slots are cut as well
    with _slot(pipeline) as slot:
        state = _train(cell, pipeline, spec, slot, return_state=True)
    error = state.result(raise_on_failure=False)
    if isinstance(error, Mismatch):
        if worker and watch.alive(worker):  # its next cell would be no better
            os.kill(int(worker.partition(":")[0]), signal.SIGTERM)
        return Crashed(message=f"{gethostname()}: {error}")
    if isinstance(error, StageFailed):
        where = f"All of it on {gethostname()}: {error.log}"
        return Failed(message="\n".join([error.why, *error.tail, where]))
    return Completed(message=f"{gethostname()} {slot.name}") if state.is_completed() else state


class Mismatch(ResgridError):
    """This clone is not what the cell was placed for."""


@task(name="train", task_run_name="{cell}", **RETRIED)
def _train(cell: str, pipeline: Pipeline, spec: RunSpec, slot: Slot) -> None:
    """Raises Mismatch, and StageFailed, which is retried if it is transient."""
    stop = threading.Event()
    stage = find_cell(load_params(pipeline.folder / "params.yaml"), cell).stage
    _compare(pipeline, spec)
    with acquire(pipeline.lock("data"), "another run, which brings the data", stop):
        has_data = recorded_data(pipeline) == spec.data and (pipeline.folder / "data/processed").is_dir()
        if not has_data and record(pipeline, DATA_STAGES, stop) is not None:
            # They were pushed before any cell was placed, so a remote without them is away.
            why = "the DVC remote does not give the grid's data"
            raise StageFailed(DATA_STAGES[-1], why, [], pipeline.log(DATA_STAGES[0]), Fault.CONNECTION)
    if (data := recorded_data(pipeline)) != spec.data:
        raise Mismatch(f"the data here are {data}, the grid's {spec.data}")
    reproduce(pipeline, stage, slot.env, pull=True, stop=stop)
    _compare(pipeline, spec)  # or a result of other code would go out
    # All outputs that are recorded here before the run cache, of which DVC pushes all: an entry whose
    # outputs are not there would be in the way of another worker's.
    push(pipeline, [], stop, log=f"push-{stage}")
    push(pipeline, ["--run-cache", stage], stop, log=f"push-{stage}")


def _compare(pipeline: Pipeline, spec: RunSpec) -> None:
    if why := difference(pipeline, spec.commit, spec.digest):
        raise Mismatch(why)


@contextmanager
def _slot(pipeline: Pipeline) -> Iterator[Slot]:
    """One of this worker's shares of the machine that no other of its flows has."""
    slots = share(num := int(os.environ.get(SLOTS, "1")), slots=num)
    folder = pipeline.root / ".resgrid/locks/slots"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for number, slot in enumerate(slots):
            with suppress(Timeout), FileLock(folder / f"{number}.lock").acquire(timeout=0):
                yield slot
                return
        time.sleep(POLL_SECONDS)  # the one before it is about to end


# --- the worker -------------------------------------------------------------------------------------


def work(root: Path, pool: str, slots: int | None, name: str | None) -> int:
    """Train cells of the work pool `pool` in the project `root`, until SIGINT or SIGTERM.

    Raises ResgridError if a service is not named or does not answer, and for a clone whose files differ from
    its commit, or that has become another one since this began.
    """
    root = root.resolve()
    if not (root / "prefect.yaml").is_file():
        raise ResgridError(f"{root}: there is no prefect.yaml here. Run this in the project's root folder.")
    pipeline = Pipeline.find(root)
    env = _environment(root)
    storage = remote_name(pipeline)
    shares = share(slots or os.cpu_count() or 1, slots=slots)
    is_coordinator = pool == POOL  # it runs train-all itself, whatever its files
    commit, digest = ("", "") if is_coordinator else checkout(pipeline)
    devices = ["cpu", *(["cuda"] if mps.cards() else []), *(["mps"] if sys.platform == "darwin" else [])]
    queues = ["default"] if is_coordinator else [digest, *(f"{digest}-{device}" for device in devices)]
    for name in ("resgrid", "tasks"):  # or Prefect, which has the root's, prints each line once more
        logging.getLogger(name).propagate = False
    if is_coordinator:
        log.info("Coordinator: it runs train-all, and trains nothing itself. Ctrl-C ends it.")
    else:
        log.info("Worker of the work pool %s, slots: %d", pool, len(shares))
        log.info("Ctrl-C ends it: its cells then go to other workers.")
    log.info("Prefect %s, MLflow %s", *(tracking.shown(env[variable]) for variable in SERVERS))
    log.info("DVC remote %s", storage)
    env |= {SLOTS: str(len(shares)), watch.VARIABLE: watch.describe(os.getpid())}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    command += ["--name", name or gethostname(), "--limit", str(len(shares))]
    for queue in queues:
        command += ["--work-queue", queue]
    with prefect_client(env["PREFECT_API_URL"]) as client:
        make_pool(client, pool, queues)  # first: a worker whose queue is not there yet takes nothing from any
        if not is_coordinator:
            delete_former_queues(client, pool, digest)
    if is_coordinator:
        deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        if subprocess.run(deploy, cwd=root, env=env, check=False).returncode:
            raise ResgridError(f"{root / 'prefect.yaml'}: its deployments cannot be registered; see above.")
    stop = watch.stop_on_signals()
    with ExitStack() as exits:
        env |= exits.enter_context(mps.shared(slot.card for slot in shares))
        while not stop.is_set():
            process = subprocess.Popen(command, cwd=root, env=env, process_group=0)
            try:
                while process.poll() is None and not stop.wait(COMPARE_SECONDS):
                    if not is_coordinator and (why := difference(pipeline, commit, digest)):
                        raise ResgridError(f"The worker leaves: {why}")
            finally:
                # Asked to end, Prefect's worker would kill its flows at once (see `tasks.services`); without
                # it they end their trainers and say so, as `begin_flow` has it.
                process.kill()
                process.wait()
                psutil.wait_procs(members(process), LEAVE_SECONDS)
                watch.end_group(process, 0.0)
            if not stop.is_set():
                log.warning("Prefect's worker has ended; it starts again in %.0f s", RESTART_SECONDS)
                stop.wait(RESTART_SECONDS)
    log.info("The worker has left.")
    return 0


def _environment(root: Path) -> dict[str, str]:
    """Of Prefect's worker, and so of its flows and trainers."""
    env = environment(
        root,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY=str(BEAT_SECONDS),
        # Without a server Prefect's worker gives up after 45 times as long, and its flows end with it.
        PREFECT_WORKER_QUERY_SECONDS=os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "5"),
    )
    if addresses := running(root):
        prefect, mlflow = addresses
        env = {"PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow} | env
    for variable, example in SERVERS.items():
        if not env.get(variable, "").startswith(("http://", "https://")):
            raise ResgridError(f"{variable} names no server: set it to an address such as {example}.")
    return env
