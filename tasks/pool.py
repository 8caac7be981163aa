"""A cell on another machine: a flow run in a Prefect work pool, and its result from the DVC remote.

A worker trains the cell in a clone of its own and pushes what came of it, with DVC's run cache, to the DVC
remote. `dvc repro --pull` here then takes it from there and lists it in dvc.lock; it trains nothing, for the
stage's command refuses to (RECORD_ONLY). That alone says whether a cell is done: what Prefect says of its run
tells when to look.

The runs of a cell are numbered, and the number stands in the idempotency key: however often one is asked
for, by however many coordinators, it is the same run. The newest owns the cell; a worker with an older one
lets it go.

Who is alive, Prefect's server says: two automations declare a run lost of which nothing is heard. That is no
proof of death, for after an outage of the server they strike at once. A run that finds itself declared lost
says that it is running, so it is given the time to do so before the cell is placed again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar
from uuid import UUID

import httpx
from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException
from prefect.states import Cancelling, Crashed

from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import Outcome, StageFailed, Stopped, reproduce
from resgrid.errors import ResgridError
from resgrid.stage_record import RECORD_ONLY, Fault
from tasks.order import Order
from tasks.plan import Step

FLOW = "train-cell"
WATCHED = "resgrid-watched"  # the tag of deployments in pools of processes, where silence means an end
# names of a run's state
REFUSED = "Refused"  # by a worker whose clone is another
PASSING = "Passing"  # failed by a fault that can pass
LOST = "Lost"  # declared crashed by an automation

MAX_UNTAKEN = 100  # cells in the pool that no worker has taken yet
PAGE = 200  # flow runs that the server tells of at once
POLL_SECONDS = 2.0
BEAT_SECONDS = 30  # between two signs of life: the least that Prefect allows
SILENCE_SECONDS = 60  # without one, a run is lost
START_SECONDS = 90  # likewise, from a worker's taking of a run to its first sign of life
RETURN_SECONDS = 2.0 * BEAT_SECONDS  # for a run that was declared lost to say that it lives
LOOK_PAUSES = (0.0, 1.0, 5.0, 15.0)  # before each look for the result of a run that ended well
TRIES = 3  # of a cell whose result does not come
MAX_LOST = 10  # times that a cell's worker may go away
AWAY_SECONDS = 20.0  # between two looks while the remote is away
IDLE_SECONDS = 60.0  # without a cell at work, after which a person is told

Answer = TypeVar("Answer")
_AWAY = (httpx.HTTPError, PrefectException, OSError)


class Pool:
    """The work pool `name`, as one run of a grid uses it, with a thread for each cell."""

    def __init__(
        self,
        client: SyncPrefectClient,
        name: str,
        pipeline: Pipeline,
        order: Order,
        env: Mapping[str, str],
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """Make the pool and its deployment if need be; raises ResgridError if the server lacks ours."""
        self.name, self.pipeline, self.order, self.env = name, pipeline, order, env
        self._client, self._say, self._stop = client, say, stop
        self._asking, self._recording = threading.Lock(), threading.Lock()
        self._ended: set[str] = set()  # stages whose result is to be recorded
        self._alive: dict[UUID, State] = {}  # runs that have not ended
        self._looked = 0.0
        self._answering = self._worked = time.monotonic()  # since when the server does; when a cell last was
        self._is_away = False
        self._deployment = _deploy(client, name)

    def train(self, step: Step, say: Callable[[str], None], follow: Callable[[bool], None]) -> Outcome:
        """Have a worker train the cell; its result is here when this returns.

        `follow` is told whenever the cell begins to run, and when it waits again. Raises StageFailed, and
        Stopped, by which the run is cancelled.
        """
        began, lost, missing = time.time(), 0, 0
        run = self._ask(lambda: newest_run(self._client, self.order, step.title))
        state = run.state if run else None
        if run is None or (state and state.is_final() and not (state.is_completed() or state.name == LOST)):
            run = self._place(step, run)
        else:
            say(f"it has been placed before, as flow run {run.id}")
        while True:
            state = self._end(run.id, follow)
            if state.is_completed() or state.is_crashed():
                for pause in LOOK_PAUSES if state.is_completed() else LOOK_PAUSES[:1]:
                    self._pause(pause)
                    if self._record(step, say):
                        return Outcome(step.stage, True, time.time() - began, self.pipeline.log(step.stage))
            why, *lines = (state.message or f"ended as {state.name}").splitlines()
            is_over = state.name != REFUSED
            if state.is_completed():
                missing += 1
                why, is_over = "it was trained, but the DVC remote has no result of it", missing == TRIES
            elif state.is_crashed():
                lost += 1
                why, is_over = f"its worker went away, time {lost} ({why})", lost > MAX_LOST
            if is_over:
                why = why.removeprefix(f"{step.stage}: ")
                tail = [line.strip() for line in lines if not line.startswith("    All of it:")]
                where = f"flow run {run.name} ({run.id})"
                fault: Fault | None = Fault.CONNECTION if state.name == PASSING else None
                raise StageFailed(step.stage, why, tail, where, fault)
            say(f"{why}; it is placed again")
            follow(False)
            run = self._place(step, run)

    def _place(self, step: Step, before: FlowRun | None) -> FlowRun:
        """The cell's run after `before`: one that is there already, or a new one."""
        number = 0 if before is None else _number(before) + 1
        run = self._ask(
            lambda: run_deployment(  # in a thread without an event loop it answers at once
                self._deployment,
                parameters={
                    "cell": step.title,
                    "pipeline": self.pipeline.name,
                    "order": self.order.model_dump(),
                },
                flow_run_name=step.title,
                tags=[self.order.tag],
                idempotency_key=f"{self.order.tag} {step.title} {number}",
                work_queue_name=self.order.device or "default",
                timeout=0,
                as_subflow=False,
            )
        )
        assert isinstance(run, FlowRun)
        return run

    def _end(self, run: UUID, follow: Callable[[bool], None]) -> State:
        """The state in which a run has ended: Crashed as well if somebody has deleted it.

        It counts as lost only when it has not come back in time, of which the server's absence is no part.
        """
        runs, lost = False, None
        try:
            while True:
                state = self._ask(lambda: self._state(run))
                lost = (lost or time.monotonic()) if state.name == LOST else None
                if lost and time.monotonic() - max(lost, self._answering) > RETURN_SECONDS:
                    return state
                if state.is_final() and not lost:
                    return state
                if state.is_running() and not runs:
                    runs = True
                    follow(True)
                self._pause(POLL_SECONDS)
        except Stopped:
            with suppress(*_AWAY):  # then it goes on, and its result is kept
                self._client.set_flow_run_state(run, Cancelling())
            raise

    def _state(self, run: UUID) -> State:
        """One request to the server answers for all cells, as long as they are alive."""
        with self._asking:
            if time.monotonic() - self._looked > POLL_SECONDS:
                self._alive = self._read_alive()
                self._looked = time.monotonic()
                self._remind()
        if run in self._alive:
            return self._alive[run]
        try:
            state = self._client.read_flow_run(run).state
        except ObjectNotFound:
            return Crashed(message="Somebody has deleted its flow run.")
        assert state is not None
        return state

    def _read_alive(self) -> dict[UUID, State]:
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[self.order.tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(not_any_=list(TERMINAL_STATES))),
        )
        runs: list[FlowRun] = []
        while page := self._client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=len(runs)):
            runs += page
            if len(page) < PAGE:
                break
        return {run.id: run.state for run in runs if run.state}

    def _remind(self) -> None:
        """Say so if nobody works although cells wait."""
        now = time.monotonic()
        if not self._alive or any(state.is_running() for state in self._alive.values()):
            self._worked = now
        if now - self._worked < IDLE_SECONDS:
            return
        self._worked = now
        workers = self._client.read_workers_for_work_pool(self.name)
        online = [worker.name for worker in workers if worker.status == "ONLINE"]
        device = f" with the device {self.order.device}" if self.order.device else ""
        who = f"none of the workers {', '.join(online)} takes a cell" if online else "there is no worker"
        self._say(
            f"{who} in the pool {self.name!r}: `resgrid worker --pool {self.name}` starts one, in a clone at "
            f"commit {self.order.commit[:10]}{device}"
        )

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        """The server's answer, as soon as it is there to give one; that it is away is said once."""
        while True:
            began = time.monotonic()
            try:
                answer = question()
            except _AWAY as error:
                known = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
                if known or isinstance(error, ObjectNotFound):
                    raise
                self._answering = time.monotonic()
                if not self._is_away:
                    self._say(f"Prefect's server does not answer ({type(error).__name__}); the cells go on")
                self._is_away = True
                self._pause(POLL_SECONDS)
                continue
            if time.monotonic() - began > BEAT_SECONDS / 3:  # Prefect's client has tried it more than once
                self._answering = time.monotonic()
            self._is_away = False
            return answer

    def _record(self, step: Step, say: Callable[[str], None]) -> bool:
        """Whether the cell's result is here, as the remote gives it; waits for a remote that is away.

        One `dvc` at a time, for all that have ended since the one before it: reading dvc.lock and the
        remote's run cache takes it seconds, however many it records.
        """
        self._ended.add(step.stage)
        while True:
            with self._recording:
                if step.stage not in self._ended:
                    return True  # another one's `dvc` has recorded it
                self._pause(0.0)
                others = self._ended - {step.stage}
                if others and record(self.pipeline, step.stage, self.env, say, self._stop, others):
                    self._ended -= {step.stage, *others}
                    return True
                is_here = record(self.pipeline, step.stage, self.env, say, self._stop)
                if is_here is not None:
                    self._ended.remove(step.stage)
                    return is_here
            self._pause(AWAY_SECONDS)

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


def record(
    pipeline: Pipeline,
    stage: str,
    env: Mapping[str, str],
    say: Callable[[str], None],
    stop: threading.Event,
    others: Collection[str] = (),
) -> bool | None:
    """Whether the DVC remote has a result of `stage`, which is then here; None if it does not answer.

    With `others` it is whether it has one of each. No command of a stage runs. Raises Stopped after `stop`.
    """
    try:
        reproduce(pipeline, stage, {**env, RECORD_ONLY: "1"}, pull=True, stop=stop, others=sorted(others))
    except StageFailed as failure:
        away = any("Failed to pull run cache" in line for line in failure.tail)
        if failure.fault == Fault.NO_RESULT and not away:
            return False  # its command was about to run
        say(f"the DVC remote does not answer as it should: {failure.why}\n    All of it: {failure.log}")
        return None
    return True


def newest_run(client: SyncPrefectClient, order: Order, cell: str) -> FlowRun | None:
    """The run that owns a cell under an order."""
    of_cell = FlowRunFilter(tags=FlowRunFilterTags(all_=[order.tag]), name=FlowRunFilterName(any_=[cell]))
    return max(client.read_flow_runs(flow_run_filter=of_cell, limit=PAGE), key=_number, default=None)


def _number(run: FlowRun) -> int:
    number = (run.idempotency_key or "").rpartition(" ")[2]
    return int(number) if number else -1  # a copy that a person made on Prefect's page


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """A work pool of processes, unless there is one of that name, of whatever type."""
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def watch_runs(client: SyncPrefectClient) -> None:
    """Have the server declare runs lost of which nothing is heard: two automations, made once.

    A worker that dies before the flow begins leaves its run Pending, or Submitting, which follows at once and
    so is no sign of life. One that dies in the moment of the beginning leaves it Running without a heartbeat.
    """

    def events(*names: str) -> set[str]:
        return {f"prefect.flow-run.{name}" for name in names}

    ended = events("Completed", "Failed", "Crashed", "Cancelled", REFUSED, PASSING, LOST)
    for name, after, expect, seconds in (
        ("no heartbeat", events("Running", "heartbeat"), events("heartbeat"), SILENCE_SECONDS),
        ("taken, but not begun", events("Pending"), events("Running"), START_SECONDS),
    ):
        title = f"ResGrid's cells: {name} for {seconds} s"
        if client.read_automations_by_name(title):
            continue
        trigger = EventTrigger(
            after=after,
            expect=expect | ended,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={
                "prefect.resource.role": "tag",
                "prefect.resource.id": f"prefect.tag.{WATCHED}",
            },
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        )
        message = f"No sign of life for {seconds} s: its worker is gone, or cut off."
        action = ChangeFlowRunState(state=StateType.CRASHED, name=LOST, message=message)
        client.create_automation(AutomationCore(name=title, trigger=trigger, actions=[action]))


def _deploy(client: SyncPrefectClient, name: str) -> UUID:
    """The deployment of `train-cell` in the pool `name`; both are made if need be."""
    try:
        base = client.read_deployment_by_name(f"{FLOW}/{FLOW}")
    except ObjectNotFound:
        raise ResgridError(
            f"Prefect's server has no deployment {FLOW}: `prefect deploy --all` in the project's folder "
            "registers it."
        ) from None
    make_pool(client, name)
    watch_runs(client)
    # Of a pod silence means less: it may be on its way, or send no heartbeats.
    tags = [WATCHED] if client.read_work_pool(name).type == "process" else []
    return client.create_deployment(
        flow_id=base.flow_id,
        name=name,
        description=base.description,
        tags=[*base.tags, *tags],
        entrypoint=base.entrypoint,
        path=base.path,
        pull_steps=base.pull_steps,
        parameter_openapi_schema=base.parameter_openapi_schema,
        job_variables=base.job_variables,
        work_pool_name=name,
    )
