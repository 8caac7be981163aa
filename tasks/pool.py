"""A grid's cells as flow runs in a Prefect work pool, each followed until its result is recorded here.

A worker trains a cell in a clone of its own and pushes what came of it, with DVC's run cache, to the DVC
remote. `dvc repro --pull` here then takes it from there and lists it in dvc.lock; it trains nothing, for the
stage's command refuses to (RECORD_ONLY). That is also how a cell is known to be done: what Prefect says of a
flow run only tells when to look. So a run whose end nobody heard of is not trained twice, and one that said
to be done and left no result is placed again.

A run shows that it lives by Prefect's heartbeats, which a worker's flows send every 30 s, the least that
Prefect allows. Times are taken here and when a beat is first seen: the machines' clocks need not agree.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.events.filters import (
    EventFilter,
    EventNameFilter,
    EventOccurredFilter,
    EventResourceFilter,
)
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling, Crashed

from resgrid.errors import ResgridError
from tasks.order import DATA_STAGES, Order
from tasks.reproduce import DVC_COMMAND, Outcome, Pipeline, StageFailed, Stopped, run_logged

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tasks.plan import Step

FLOW = "train-cell"
RECORD_ONLY = "RESGRID_RECORD_ONLY"  # in the environment of a stage's command: it refuses to run
# names of a failed run's state
REFUSED = "Refused"  # by a worker whose clone is another
PASSING = "Passing"  # by a fault that can pass

MAX_WAITING = 100  # cells in the pool that no worker has taken yet
PAGE = 200  # flow runs that the server tells of at once
POLL_SECONDS = 2.0
BEAT_SECONDS = 30  # between two signs of life
SILENCE_SECONDS = 50.0  # without one, a run is lost
START_SECONDS = 180.0  # from a worker's taking of a run to its first sign of life
TRIES = 3  # of a cell that ended by a fault that can pass, or left no result
MAX_LOST = 10  # times that a cell's worker may go away
LOOKS = 4  # for a result in the remote, before it counts as missing
LOOK_SECONDS = 20.0  # between two while the remote is away
NOBODY_SECONDS = 60.0  # between two reminders that no worker is there

_AWAY = (httpx.HTTPError, PrefectException, OSError)


@dataclass(frozen=True)
class Ended:
    """What became of a cell."""

    step: Step
    result: Outcome | StageFailed


@dataclass(frozen=True)
class Moved:
    """A cell that a worker has begun, or that waits for one again."""

    step: Step
    to: Literal["running", "waiting"]


@dataclass(eq=False)
class Place:
    """A cell in the pool, or on its way there."""

    step: Step
    tries: int = 0
    lost: int = 0
    refused: int = 0
    state: StateType | None = None
    since: float = 0.0  # when it was first seen in that state, by this process's clock
    beat: tuple[datetime, float] | None = None  # the latest, and when it was first seen
    began: float = field(default_factory=time.time)


class Pool:
    """The work pool `name`, as one run of a grid uses it."""

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        order: Order,
        env: Mapping[str, str],
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self.name, self.pipeline, self.order, self.env = name, pipeline, order, env
        self.say, self.stop = say, stop
        self.placed: dict[UUID, Place] = {}
        self.waiting: deque[Place] = deque()
        self._answering = time.monotonic()  # since when the server has answered all along
        self._looked = self._answering
        self._away = False
        self._reminded = -NOBODY_SECONDS

    def train(self, queue: Sequence[Step]) -> Iterator[Moved | Ended | None]:
        """Place the cells in this order, and tell what happens to each; None from time to time.

        Runs of an earlier coordinator under the same order are taken over. On the way out by an exception all
        runs are cancelled. Raises ResgridError if the server lacks the deployments, and Stopped after `stop`.
        """
        self.waiting = deque(Place(step) for step in queue)
        with get_client(sync_client=True) as client:
            deployment = self._deployment(client)
            done = self._take_over(client)
            try:
                while self.waiting or self.placed or done:
                    yield from self._record(done)
                    done = []
                    try:
                        self._place(deployment)
                        yield from self._follow(client, done)
                        self._remind(client)
                    except _AWAY as error:
                        self._note_away(error)
                    else:
                        self._away = False
                    yield None
                    if not done and self.stop.wait(POLL_SECONDS):
                        raise Stopped
            except BaseException:
                self._cancel(client)
                raise

    # --- the server ---------------------------------------------------------------------------------

    def _deployment(self, client: SyncPrefectClient) -> UUID:
        """That of `train-cell` in this pool; both are made if need be."""
        try:
            base = client.read_deployment_by_name(f"{FLOW}/{FLOW}")
        except ObjectNotFound:
            raise ResgridError(
                f"Prefect's server has no deployment {FLOW}: `prefect deploy --all` in the project's folder "
                "registers it."
            ) from None
        make_pool(client, self.name)
        return client.create_deployment(
            flow_id=base.flow_id,
            name=self.name,
            description=base.description,
            tags=base.tags,
            entrypoint=base.entrypoint,
            path=base.path,
            pull_steps=base.pull_steps,
            parameter_openapi_schema=base.parameter_openapi_schema,
            job_variables=base.job_variables,
            work_pool_name=self.name,
        )

    def _take_over(self, client: SyncPrefectClient) -> list[Place]:
        """The runs that an earlier coordinator has placed under this order; those that have ended well."""
        by_cell = {place.step.title: place for place in self.waiting}
        of_order = FlowRunFilter(tags=FlowRunFilterTags(all_=[self.order.tag]))
        done: dict[str, Place] = {}
        offset = 0
        while found := client.read_flow_runs(flow_run_filter=of_order, limit=PAGE, offset=offset):
            offset += len(found)
            for run in found:
                place = by_cell.get(run.parameters.get("cell", ""))
                if place is None or run.state is None or run.parameters.get("pipeline") != self.pipeline.name:
                    continue
                if run.state.is_completed():
                    place.state = StateType.COMPLETED
                    done[place.step.title] = place
                elif not run.state.is_final() and place not in self.placed.values():
                    self.placed[run.id] = place
        over = [place for place in done.values() if place not in self.placed.values()]
        taken = {*over, *self.placed.values()}
        self.waiting = deque(place for place in self.waiting if place not in taken)
        if taken:
            self.say(f"{len(self.placed)} cells are in the pool already, {len(over)} have ended there")
        return over

    def _place(self, deployment: UUID) -> None:
        while self.waiting and self._num_untaken() < MAX_WAITING:
            place = self.waiting[0]
            attempt = f"{place.tries}.{place.lost}.{place.refused}"
            run = run_deployment(
                deployment,
                parameters={
                    "cell": place.step.title,
                    "pipeline": self.pipeline.name,
                    "order": self.order.model_dump(),
                },
                flow_run_name=place.step.title,
                tags=[self.order.tag],
                # One for each try, also if the answer to the request was lost.
                idempotency_key=f"{self.env['RESGRID_FLOW_RUN_ID']} {place.step.title} {attempt}",
                work_queue_name=self.order.device or "default",
                timeout=0,
            )
            self.waiting.popleft()
            place.state, place.beat = None, None
            self.placed[run.id] = place

    def _num_untaken(self) -> int:
        return sum(place.state is not StateType.RUNNING for place in self.placed.values())

    def _follow(self, client: SyncPrefectClient, done: list[Place]) -> Iterator[Moved | Ended]:
        """Look at every run once; those that ended well, or went away, are added to `done`."""
        now = time.monotonic()
        if now - self._looked > SILENCE_SECONDS / 4:  # what was said meanwhile may not have been heard
            self._answering = now
        self._looked = now
        runs: list[FlowRun] = []
        ids = list(self.placed)
        for start in range(0, len(ids), PAGE):
            some = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))
            runs += client.read_flow_runs(flow_run_filter=some, limit=PAGE)
        self._hear(client, [run.id for run in runs if run.state and run.state.is_running()])
        for run in runs:
            place, state = self.placed[run.id], run.state
            if state is None:
                continue
            if state.type != place.state:
                place.state, place.since = state.type, time.monotonic()
                if state.is_running():
                    place.began = time.time()
                    yield Moved(place.step, "running")
            if state.is_completed():
                del self.placed[run.id]
                done.append(place)
            elif state.is_crashed() or self._is_lost(place, state):
                yield from self._lose(client, run, place, done)
            elif state.is_final():
                del self.placed[run.id]
                yield self._failed(place, run, state)

    def _hear(self, client: SyncPrefectClient, running: list[UUID]) -> None:
        """Take in the latest heartbeats of these runs."""
        if not running:
            return
        day = timedelta(days=1)  # by whatever a worker's clock says
        now = datetime.now(UTC)
        wanted = EventFilter(
            occurred=EventOccurredFilter(since=now - day, until=now + day),
            event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run}" for run in running]),
        )
        for event in client.read_events(wanted, limit=50).events:
            place = self.placed[UUID(event.resource.id.rpartition(".")[2])]
            if place.beat is None or event.occurred > place.beat[0]:
                place.beat = (event.occurred, time.monotonic())

    def _is_lost(self, place: Place, state: State) -> bool:
        """Whether nothing was heard for too long, although the server was there to hear it."""
        now = time.monotonic()
        if state.is_pending():
            return now - place.since > START_SECONDS
        heard = max(place.since, place.beat[1] if place.beat else 0.0, self._answering)
        return state.is_running() and now - heard > SILENCE_SECONDS

    def _lose(
        self, client: SyncPrefectClient, run: FlowRun, place: Place, done: list[Place]
    ) -> Iterator[Moved | Ended]:
        del self.placed[run.id]
        place.lost += 1
        place.state = StateType.CRASHED
        if run.state and not run.state.is_final():
            why = f"No sign of life for {SILENCE_SECONDS:.0f} s: its worker is gone, or cut off."
            # by which a worker that comes back late lets the cell go
            client.set_flow_run_state(run.id, Crashed(message=why), force=True)
        self.say(f"{place.step.title}: its worker went away; it is placed again, unless its result is there")
        if place.lost > MAX_LOST:
            yield Ended(place.step, self._failure(place, run, f"its worker went away {place.lost} times", []))
        else:
            done.append(place)

    def _failed(self, place: Place, run: FlowRun, state: State) -> Moved | Ended:
        why, *lines = (state.message or f"ended as {state.name}").splitlines()
        why = why.removeprefix(f"{place.step.stage}: ")
        if state.name == REFUSED:
            place.refused += 1
            self.say(f"{place.step.title}: {why}")
        elif state.name == PASSING and place.tries + 1 < TRIES:
            place.tries += 1
            self.say(f"{place.step.title}: {why}: this can pass, so it is tried again")
        else:
            return Ended(place.step, self._failure(place, run, why, lines))
        return self._again(place)

    def _failure(self, place: Place, run: FlowRun, why: str, lines: list[str]) -> StageFailed:
        tail = [line.strip() for line in lines if not line.startswith("    All of it:")]
        return StageFailed(place.step.stage, why, tail, f"flow run {run.name} ({run.id})", None)

    def _remind(self, client: SyncPrefectClient) -> None:
        now = time.monotonic()
        idle = not any(place.state is StateType.RUNNING for place in self.placed.values())
        if self.placed and idle and now - self._reminded > NOBODY_SECONDS:
            self._reminded = now
            workers = client.read_workers_for_work_pool(self.name)
            if not any(worker.status == "ONLINE" for worker in workers):
                self.say(
                    f"no worker is in the pool {self.name!r}: `resgrid worker --pool {self.name}` is one"
                )

    def _note_away(self, error: Exception) -> None:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            raise error
        self._answering = time.monotonic()
        if not self._away:
            self.say(f"Prefect's server does not answer ({type(error).__name__}); the cells go on")
        self._away = True

    def _cancel(self, client: SyncPrefectClient) -> None:
        for number, place in self.placed.items():
            started = place.state in (StateType.RUNNING, StateType.PENDING)
            state = Cancelling() if started else Cancelled()
            try:
                client.set_flow_run_state(number, state, force=True)
            except _AWAY as error:
                self.say(f"{place.step.title} is not cancelled ({type(error).__name__}): its result is kept")

    # --- DVC ----------------------------------------------------------------------------------------

    def _record(self, done: list[Place]) -> Iterator[Moved | Ended]:
        """Take over the results of these cells from the remote; what has none there is placed again.

        All in one command, for each looks through the whole run cache of the remote.
        """
        look = 0
        while done:
            stages = [place.step.stage for place in done]
            missing = record(self.pipeline, stages, self.env, self.say, self.stop)
            for place in done:
                if missing is not None and place.step.stage not in missing:
                    seconds = time.time() - place.began
                    log = self.pipeline.log("record")
                    yield Ended(place.step, Outcome(place.step.stage, "ran", seconds, log))
            if missing is not None:
                done = [place for place in done if place.step.stage in missing]
                for place in [place for place in done if place.state is not StateType.COMPLETED]:
                    done.remove(place)
                    yield self._again(place)
            look += 1
            if look == LOOKS:
                break
            if done and self.stop.wait(LOOK_SECONDS if missing is None else look):
                raise Stopped
        for place in done:
            place.tries += 1
            if place.tries == TRIES:
                why = "a worker has trained it, but the DVC remote does not give its result"
                log = self.pipeline.log("record")
                yield Ended(place.step, StageFailed(place.step.stage, why, [], log, None))
            else:
                yield self._again(place)

    def _again(self, place: Place) -> Moved:
        self.waiting.append(place)
        return Moved(place.step, "waiting")


def record(
    pipeline: Pipeline,
    stages: Sequence[str],
    env: Mapping[str, str],
    say: Callable[[str], None],
    stop: threading.Event,
) -> set[str] | None:
    """`dvc repro --pull` of these stages, none of whose commands may run; those whose result is not there.

    None if nothing was found out: the remote is away, or a dvc of somebody else is in the way.
    """
    command = [*DVC_COMMAND, "repro", "--pull", "--keep-going", "--single-item", *stages]
    heard: list[str] = []
    try:
        run_logged(pipeline, "record", command, {**env, RECORD_ONLY: "1"}, heard.append, stop)
    except StageFailed as failure:
        missing = {
            stage for stage in stages if any(line.startswith(f"Running stage '{stage}'") for line in heard)
        }
        if not missing or any("Failed to pull run cache" in line for line in heard):
            say(f"the DVC remote does not answer as it should: {failure.why}\n    All of it: {failure.log}")
            return None
        return missing
    return set()


def push_data(pipeline: Pipeline, say: Callable[[str], None], stop: threading.Event) -> None:
    """To the DVC remote, for every worker. Raises StageFailed if it cannot be written."""
    command = [*DVC_COMMAND, "push", "--run-cache", *DATA_STAGES]
    run_logged(pipeline, "push-data", command, {}, say, stop)


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """A work pool of processes, unless there is one of that name, of whatever type."""
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
