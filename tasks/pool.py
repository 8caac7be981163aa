"""A cell on another machine: a flow run in a Prefect work pool, and its result from the DVC remote.

A worker trains the cell in a clone of its own and pushes the result, with DVC's run cache, to the DVC remote.
`dvc repro --pull` here then takes it from there and lists it in dvc.lock; it trains nothing, because the
stage's command refuses to (RECORD_ONLY). That alone determines whether a cell is done; Prefect's states tell
when to look.

A cell joins the run of its own that has not ended, else it is placed. So two coordinators at once may place
one twice, and after an outage of Prefect's server, when its automations set living runs to Crashed, a cell
may be trained twice. That costs time and changes no result.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed

from resgrid.dvc.ask import record, remote_answers
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import StageFailed, Stopped, pause
from resgrid.errors import ResgridError
from resgrid.stage_record import Fault
from tasks.server import ACTIVE, AWAY, WATCHED, make_pool, named, read_runs, watch_runs
from tasks.spec import DATA_STAGES, DEVICES, RunSpec

FLOW = "train-cell"
COPIED = (  # from the flow's deployment to a pool's
    "flow_id", "description", "entrypoint", "path", "pull_steps", "parameter_openapi_schema", "job_variables",
)  # fmt: skip
FORMER_QUEUES = ("default", *DEVICES)  # where the version before placed cells
POLL_SECONDS = 2.0
MAX_PLACED = 10  # times that a cell is placed, when its runs crash or are cancelled by others
AWAY_SECONDS = 20.0  # between two looks while the remote is away
IDLE_SECONDS = 60.0  # without a cell at work, or a worker's look into a queue, after which it is logged

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class Pool:
    """The work pool `name`, as one run of a grid uses it, with a thread for each cell."""

    def __init__(
        self, client: SyncPrefectClient, name: str, pipeline: Pipeline, spec: RunSpec, stop: threading.Event
    ) -> None:
        """Make the pool and its deployment if need be; raises ResgridError if the server lacks ours."""
        self.name, self.pipeline, self.spec = name, pipeline, spec
        self._client, self._stop = client, stop
        self._asking, self._recording = threading.Lock(), threading.Lock()
        self._active: dict[UUID, FlowRun] = {}  # those of this spec, when last asked
        self._asked = 0.0
        self._reminded = time.monotonic()
        self._is_away = self._is_remote_away = False
        self._ended: set[str] = set()  # stages whose result is to be recorded
        self._deployment = _deploy(client, name, spec.queue)

    def train(self, cell: str, stage: str, follow: Callable[[bool], None]) -> None:
        """Have a worker train the cell; its result is here when this returns.

        `follow` is called with True whenever the cell begins to run, with False when it waits again.
        Raises StageFailed, and Stopped, by which its run is cancelled.
        """
        why = ""
        for _ in range(MAX_PLACED):
            run = self._ask(lambda: self._join_or_place(cell))
            state = self._wait(run.id, follow)
            if state.is_failed():
                where = f"flow run {run.name} ({run.id})"
                raise StageFailed(stage, state.message or "it failed", [], where)
            if not (state.is_cancelled() or state.is_cancelling()) and self._record(stage):
                return
            why = f"{state.name}: {state.message or 'no reason given'}"
            log.info("%s: no result in the DVC remote, so it is placed again (%s)", cell, why)
            follow(False)
        where = f"Prefect's runs with the tags {self.spec.tag} and {cell}"
        why = f"it was placed {MAX_PLACED} times; the last run ended as {why}"
        raise StageFailed(stage, why, [], where)

    def _join_or_place(self, cell: str) -> FlowRun:
        """The cell's run that has not ended, or a new one."""
        for run in self._read_active().values():
            if cell in run.tags:
                log.info("%s: joins the flow run %s, which has been placed before", cell, run.id)
                return run
        # In a thread without an event loop it answers at once.
        placed = run_deployment(
            self._deployment,
            parameters={"cell": cell, "pipeline": self.pipeline.name, "spec": self.spec.model_dump()},
            flow_run_name=cell,
            tags=[self.spec.tag, cell],
            work_queue_name=self.spec.queue,
            timeout=0,
            as_subflow=False,
        )
        assert isinstance(placed, FlowRun)
        return placed

    def _wait(self, run: UUID, follow: Callable[[bool], None]) -> State:
        """The state in which a run has ended: Crashed as well if somebody has deleted it."""
        runs = False
        try:
            while True:
                state = self._ask(lambda: self._state(run))
                if state.is_final() or state.is_cancelling():
                    return state
                if state.is_running() and not runs:
                    runs = True
                    follow(True)
                pause(self._stop, POLL_SECONDS)
        except Stopped:
            with suppress(*AWAY):  # then the run goes on
                self._client.set_flow_run_state(run, Cancelling())
            raise

    def _state(self, run: UUID) -> State:
        active = self._read_active().get(run)
        try:
            state = (active or self._client.read_flow_run(run)).state
        except ObjectNotFound:
            return Crashed(message="Somebody has deleted its flow run.")
        assert state is not None
        return state

    def _read_active(self) -> dict[UUID, FlowRun]:
        """The runs that wait or are at work: one request every POLL_SECONDS answers for all cells."""
        with self._asking:
            if time.monotonic() - self._asked > POLL_SECONDS:
                runs = read_runs(self._client, ACTIVE, tag=self.spec.tag)
                self._active = {run.id: run for run in runs}
                self._asked = time.monotonic()
                self._remind()
            return self._active

    def _remind(self) -> None:
        """Log it if cells wait and nobody listens."""
        is_at_work = any(run.state and run.state.is_running() for run in self._active.values())
        if is_at_work or not self._active or time.monotonic() - self._reminded < IDLE_SECONDS:
            return
        self._reminded = time.monotonic()
        queue = self._client.read_work_queue_by_name(self.spec.queue, work_pool_name=self.name)
        if queue.last_polled and datetime.now(UTC) - queue.last_polled < timedelta(seconds=IDLE_SECONDS):
            return  # its workers are busy
        log.info(
            "No worker of the pool %r takes these cells: `resgrid worker --pool %s` starts one, in a clone "
            "at commit %s with the same package versions (`make install`; device: %s)",
            self.name, self.name, self.spec.commit[:10], self.spec.device or "any",
        )  # fmt: skip

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The server's answer, as soon as it is there to give one; that it is away is logged once."""
        while True:
            try:
                answer = question()
                self._is_away = False
                return answer
            except AWAY as error:
                is_refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                if is_refused or isinstance(error, ObjectNotFound):
                    raise
                if not self._is_away:
                    log.warning("Prefect's server does not answer; the cells go on (%r)", error)
                self._is_away = True
                pause(self._stop, POLL_SECONDS)

    def _record(self, stage: str) -> bool:
        """Whether the cell's result is here, as the remote gives it; waits for a remote that is away.

        One `dvc` at a time, for all that have ended since the one before it: reading dvc.lock and the
        remote's run cache takes it seconds, however many it records.
        """
        self._ended.add(stage)
        while True:
            with self._recording:
                pause(self._stop, 0.0)
                if stage not in self._ended:
                    return True  # another one's `dvc` has recorded it
                for stages in dict.fromkeys([tuple(sorted(self._ended)), (stage,)]):
                    fault = record(self.pipeline, stages, self._stop)
                    if fault is None:
                        self._ended -= {*stages}
                        return True
                if fault == Fault.NO_RESULT and remote_answers(self.pipeline, DATA_STAGES[-1]):
                    self._ended.remove(stage)
                    return False
            if not self._is_remote_away:
                log.warning("The DVC remote does not answer, see %s; asking again", self.pipeline.log(stage))
            self._is_remote_away = True
            pause(self._stop, AWAY_SECONDS)


def _deploy(client: SyncPrefectClient, name: str, queue: str) -> UUID:
    """The deployment of `train-cell` in the pool `name`; both are made if need be, and the queue."""
    try:
        base = client.read_deployment_by_name(f"{FLOW}/{FLOW}")
    except ObjectNotFound:
        raise ResgridError(
            f"Prefect's server has no deployment {FLOW}: `prefect deploy --all` in the project's folder "
            "registers it."
        ) from None
    # The queue too: made by the first cells that are placed in it at once, all but one get a conflict.
    make_pool(client, name, [queue])
    watch_runs(client)
    # Of a pod silence means less: it may be on its way, or send no heartbeats.
    watched = [WATCHED] if client.read_work_pool(name).type == "process" else []
    copied: dict[str, Any] = {key: getattr(base, key) for key in COPIED}
    deployment = client.create_deployment(
        name=name, tags=[*base.tags, *watched], work_pool_name=name, **copied
    )
    of_former: dict[str, Any] = {
        "deployments": {"id": {"any_": [str(deployment)]}}, "work_pool_queues": named(*FORMER_QUEUES),
    }  # fmt: skip
    for run in read_runs(client, ["SCHEDULED"], **of_former):
        why = "Placed by an earlier version, in a queue that no worker asks any more."
        client.set_flow_run_state(run.id, Cancelled(message=why), force=True)
        log.info("Cancelled %s, which an earlier version has placed", run.name)
    return deployment
