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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal
from uuid import UUID, uuid4

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
from prefect.states import Cancelling, Crashed

from resgrid.errors import ResgridError
from tasks.lockfile import RECORD_ONLY
from tasks.order import DATA_STAGES, Order
from tasks.stage import DVC_COMMAND, Outcome, Pipeline, StageFailed, Stopped, run_logged

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from tasks.plan import Step

FLOW = "train-cell"
# names of a failed run's state
REFUSED = "Refused"  # by a worker whose clone is another
PASSING = "Passing"  # by a fault that can pass

MAX_WAITING = 100  # cells in the pool that no worker has taken yet
PAGE = 200  # flow runs that the server tells of at once
POLL_SECONDS = 2.0
BEAT_SECONDS = 30  # between two signs of life
SILENCE_SECONDS = 50.0  # without one, a run is lost
START_SECONDS = 90.0  # from a worker's taking of a run to its first sign of life
TRIES = 3  # of a cell that ended by a fault that can pass, or left no result
MAX_LOST = 10  # times that a cell's worker may go away
LOOKS = 4  # for a result in the remote, before it counts as missing
AWAY_SECONDS = 20.0  # between two looks while the remote is away
IDLE_SECONDS = 60.0  # without a cell at work, after which a person is told

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
    looks: int = 0  # for its result
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
        self.ended: list[Place] = []  # whose result is to be taken from the remote
        self._key = uuid4()  # of this coordinator's requests
        self._looked = self._answering = time.monotonic()  # since when the server has answered all along
        self._away = False
        self._worked = time.monotonic()  # when a cell was last at work
        self._thread = ThreadPoolExecutor(1, "record")
        self._recording: Future[Recorded] | None = None
        self._look_again = 0.0  # not before

    def train(self, queue: Sequence[Step]) -> Iterator[Moved | Ended | None]:
        """Place the cells in this order, and tell what happens to each; None from time to time.

        Runs of an earlier coordinator under the same order are taken over. On the way out by an exception all
        runs are cancelled. Raises ResgridError if the server lacks the deployments, and Stopped after `stop`.
        """
        self.waiting = deque(Place(step) for step in queue)
        with get_client(sync_client=True) as client:
            deployment = self._deployment(client)
            try:
                self._take_over(client)
                while self.waiting or self.placed or self.ended or self._recording:
                    try:
                        self._place(deployment)
                        yield from self._follow(client)
                        self._remind(client)
                        self._away = False
                    except _AWAY as error:
                        self._note_away(error)
                    yield from self._record()
                    yield None
                    if self.stop.wait(POLL_SECONDS):
                        raise Stopped
            except BaseException:
                self._cancel(client)
                raise
            finally:
                self._thread.shutdown(wait=False, cancel_futures=True)

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

    def _take_over(self, client: SyncPrefectClient) -> None:
        """Go on with the runs that an earlier coordinator has placed under this order."""
        by_cell = {place.step.title: place for place in self.waiting}
        of_order = FlowRunFilter(tags=FlowRunFilterTags(all_=[self.order.tag]))
        runs: list[FlowRun] = []
        while found := client.read_flow_runs(flow_run_filter=of_order, limit=PAGE, offset=len(runs)):
            runs += found
        ours: list[tuple[FlowRun, State, Place]] = []
        for run in runs:
            place = by_cell.get(run.parameters.get("cell", ""))
            if place and run.state and run.parameters.get("pipeline") == self.pipeline.name:
                ours.append((run, run.state, place))
        for run, state, place in ours:
            if place in self.waiting and not state.is_final() and not state.is_cancelling():
                self.placed[run.id] = place
                self.waiting.remove(place)
        for _, state, place in ours:
            if place in self.waiting and state.is_completed():
                place.state = StateType.COMPLETED
                self.waiting.remove(place)
                self.ended.append(place)
        if self.placed or self.ended:
            self.say(f"{len(self.placed)} cells are in the pool already, {len(self.ended)} have ended there")

    def _place(self, deployment: UUID) -> None:
        while self.waiting and self._num_untaken() < MAX_WAITING:
            place = self.waiting[0]
            attempt = f"{place.tries}.{place.lost}.{place.refused}"
            run = run_deployment(  # in a thread without an event loop it answers at once
                deployment,
                parameters={
                    "cell": place.step.title,
                    "pipeline": self.pipeline.name,
                    "order": self.order.model_dump(),
                },
                flow_run_name=place.step.title,
                tags=[self.order.tag],
                # One run for each try, also if the answer to the request was lost.
                idempotency_key=f"{self._key} {place.step.title} {attempt}",
                work_queue_name=self.order.device or "default",
                timeout=0,
            )
            assert isinstance(run, FlowRun)
            self.waiting.popleft()
            place.state, place.beat, place.looks = None, None, 0
            self.placed[run.id] = place

    def _num_untaken(self) -> int:
        return sum(place.state is not StateType.RUNNING for place in self.placed.values())

    def _follow(self, client: SyncPrefectClient) -> Iterator[Moved | Ended]:
        """Look at every run once; what ended well, or went away, is added to `ended`."""
        runs: dict[UUID, FlowRun] = {}
        for ids in _pages(list(self.placed), PAGE):
            some = FlowRunFilter(id=FlowRunFilterId(any_=ids))
            runs |= {run.id: run for run in client.read_flow_runs(flow_run_filter=some, limit=PAGE)}
        self._hear(client, [number for number, run in runs.items() if run.state and run.state.is_running()])
        now = time.monotonic()
        if now - self._looked > SILENCE_SECONDS / 4:  # what was said meanwhile may not have been heard
            self._answering = now
        self._looked = now
        for number, place in list(self.placed.items()):
            run = runs.get(number)
            if run is None:  # somebody has deleted it
                yield from self._lose(number, place)
                continue
            state = run.state
            if state is None:
                continue
            if state.type != place.state:
                place.state, place.since = state.type, now
                if state.is_running():
                    place.began = time.time()
                    yield Moved(place.step, "running")
            if state.is_completed():
                del self.placed[number]
                self.ended.append(place)
            elif state.is_crashed():
                yield from self._lose(number, place)
            elif self._is_lost(place, state):
                why = f"No sign of life for {SILENCE_SECONDS:.0f} s: its worker is gone, or cut off."
                with suppress(ObjectNotFound):
                    # by which a worker that comes back late lets the cell go
                    client.set_flow_run_state(number, Crashed(message=why), force=True)
                yield from self._lose(number, place)
            elif state.is_final():
                del self.placed[number]
                yield self._failed(place, run, state)
        if any(place.state is StateType.RUNNING for place in self.placed.values()):
            self._worked = now

    def _hear(self, client: SyncPrefectClient, running: list[UUID]) -> None:
        """Take in the latest heartbeat of each of these runs."""
        day = timedelta(days=1)  # by whatever a worker's clock says
        now = datetime.now(UTC)
        for ids in _pages(running, 50):  # the events that the server tells of at once
            latest = EventFilter(
                occurred=EventOccurredFilter(since=now - day, until=now + day),
                event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
                resource=EventResourceFilter(id=[f"prefect.flow-run.{run}" for run in ids], distinct=True),
            )
            for event in client.read_events(latest, limit=50).events:
                place = self.placed[UUID(event.resource.id.rpartition(".")[2])]
                if place.beat is None or event.occurred > place.beat[0]:
                    place.beat = (event.occurred, time.monotonic())

    def _is_lost(self, place: Place, state: State) -> bool:
        """Whether nothing was heard for too long, although the server was there to hear it."""
        heard = max(place.since, place.beat[1] if place.beat else 0.0, self._answering)
        limit = START_SECONDS if state.is_pending() else SILENCE_SECONDS
        is_taken = state.is_pending() or state.is_running() or state.is_cancelling()
        return is_taken and time.monotonic() - heard > limit

    def _lose(self, number: UUID, place: Place) -> Iterator[Moved | Ended]:
        del self.placed[number]
        place.lost += 1
        place.state = StateType.CRASHED
        self.say(f"{place.step.title}: its worker went away; it is placed again, unless its result is there")
        if place.lost > MAX_LOST:
            why = f"its worker went away {place.lost} times"
            yield Ended(place.step, StageFailed(place.step.stage, why, [], f"flow run {number}", None))
        else:
            self.ended.append(place)

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
        """Say so if nobody works although cells wait."""
        now = time.monotonic()
        if not self.placed or now - self._worked < IDLE_SECONDS:
            return
        self._worked = now
        workers = client.read_workers_for_work_pool(self.name)
        online = [worker.name for worker in workers if worker.status == "ONLINE"]
        device = f" with the device {self.order.device}" if self.order.device else ""
        who = f"none of the workers {', '.join(online)} takes a cell" if online else "there is no worker"
        self.say(
            f"{who} in the pool {self.name!r}: `resgrid worker --pool {self.name}` starts one, in a clone at "
            f"commit {self.order.commit[:10]}{device}"
        )

    def _note_away(self, error: Exception) -> None:
        """Raises `error` again if it is no server that is away."""
        known = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
        if known or isinstance(error, ObjectNotFound):
            raise error
        self._answering = time.monotonic()
        if not self._away:
            self.say(f"Prefect's server does not answer ({type(error).__name__}); the cells go on")
        self._away = True

    def _cancel(self, client: SyncPrefectClient) -> None:
        for number, place in self.placed.items():
            try:
                client.set_flow_run_state(number, Cancelling())
            except _AWAY as error:
                self.say(f"{place.step.title} is not cancelled ({type(error).__name__}): its result is kept")

    # --- DVC ----------------------------------------------------------------------------------------

    def _record(self) -> Iterator[Moved | Ended]:
        """Take over from the remote what has ended, beside all else; what has none there is placed again.

        As many cells as there are in one command, for each command looks through the whole run cache.
        """
        if self._recording is not None:
            if not self._recording.done():
                return
            found, self._recording = self._recording.result(), None
            ended, self.ended = self.ended, []
            for place in ended:
                yield from self._settle(place, found)
        if self.ended and time.monotonic() >= self._look_again:
            stages = [place.step.stage for place in self.ended]
            self._recording = self._thread.submit(
                record, self.pipeline, stages, self.env, self.say, self.stop
            )

    def _settle(self, place: Place, found: Recorded) -> Iterator[Moved | Ended]:
        """What is said of one cell that ended, by its looks for a result."""
        stage, log = place.step.stage, self.pipeline.log("record")
        if stage in found.here:
            yield Ended(place.step, Outcome(stage, True, time.time() - place.began, log))
            return
        if stage not in found.missing:  # it came meanwhile, or the remote is away
            if stage in found.asked:
                self._look_again = time.monotonic() + AWAY_SECONDS
            self.ended.append(place)
            return
        place.looks += 1
        if place.state is StateType.COMPLETED and place.looks < LOOKS:
            self._look_again = time.monotonic() + place.looks
            self.ended.append(place)
        elif place.state is StateType.COMPLETED and place.tries + 1 == TRIES:
            why = "a worker has trained it, but the DVC remote does not give its result"
            yield Ended(place.step, StageFailed(stage, why, [], log, None))
        else:
            place.tries += place.state is StateType.COMPLETED
            yield self._again(place)

    def _again(self, place: Place) -> Moved:
        self.waiting.append(place)
        return Moved(place.step, "waiting")


@dataclass(frozen=True)
class Recorded:
    """What came of taking over the results of stages; of the others that were asked for, nothing is known."""

    asked: frozenset[str]
    here: frozenset[str]  # in this checkout and its dvc.lock
    missing: frozenset[str]  # the remote has no result


def record(
    pipeline: Pipeline,
    stages: Sequence[str],
    env: Mapping[str, str],
    say: Callable[[str], None],
    stop: threading.Event,
) -> Recorded:
    """`dvc repro --pull` of these stages, none of whose commands may run.

    Raises Stopped after `stop`.
    """
    command = [*DVC_COMMAND, "repro", "--pull", "--keep-going", "--single-item", *stages]
    asked, heard = frozenset(stages), list[str]()
    try:
        run_logged(pipeline, "record", command, {**env, RECORD_ONLY: "1"}, heard.append, stop)
    except StageFailed as failure:
        errors = [line for line in heard if line.startswith("ERROR: ")]
        failed = {stage for stage in asked if any(f"'{stage}'" in line for line in errors)}
        refused = {line.split("'")[1] for line in heard if line.startswith("Running stage '")}
        settled = {line.split("'")[1] for line in heard if line.startswith("Stage '")}
        if failed - refused or not failed or any("Failed to pull run cache" in line for line in heard):
            say(f"the DVC remote does not answer as it should: {failure.why}\n    All of it: {failure.log}")
            return Recorded(asked, frozenset(settled & asked - failed), frozenset())
        return Recorded(asked, asked - failed, frozenset(failed))
    return Recorded(asked, asked, frozenset())


def _pages(ids: list[UUID], size: int) -> list[list[UUID]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def push_data(pipeline: Pipeline, say: Callable[[str], None], stop: threading.Event) -> None:
    """To the DVC remote, for every worker. Raises StageFailed if it cannot be written."""
    command = [*DVC_COMMAND, "push", "--run-cache", *DATA_STAGES]
    run_logged(pipeline, "push-data", command, {}, say, stop)


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """A work pool of processes, unless there is one of that name, of whatever type."""
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
