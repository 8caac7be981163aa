"""One run of a pipeline's grid: its stages as Prefect tasks, packed onto the machine's slots.

Prefect's limits by tag or name leave a freed slot idle for seconds
(https://github.com/PrefectHQ/prefect/issues/23183), so the packing is done here: a cell's task starts when a
slot is free, and is given that slot. One grid a pipeline runs at a time; a second one waits, and then takes
what the first has not done.
"""

from __future__ import annotations

import fnmatch
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from resgrid import watch
from resgrid.errors import ResgridError, suggest
from resgrid.leftovers import checkpoint_files, checkpoint_folder, delete
from resgrid.progress import duration
from tasks import mps
from tasks.order import DATA_STAGES, Order
from tasks.order import remote as dvc_remote
from tasks.plan import Plan, Step, expect, longest_first, make_plan, makespan, slots_for
from tasks.pool import Ended, Moved, Pool, push_data
from tasks.publish import (
    CUT,
    FAILED,
    GRID,
    RUNNING,
    WAITING,
    Page,
    Progress,
    flow_environment,
    mlflow_address,
    mlflow_runs,
    save,
)
from tasks.reproduce import Did, Outcome, Pipeline, StageFailed, Stopped, held, reproduce, run_logged
from tasks.slots import Slot, whole_machine

EVALUATE = "evaluate"  # after them
HERE = "here"  # where cells train: on this machine; anything else names a work pool
POOL_REFRESH_SECONDS = 5.0  # of what a terminal and Prefect's page show of a pool
TRIES = 3  # of a cell whose fault can pass
PAUSE_SECONDS = 15.0  # before another try after a lost connection
REFRESH_SECONDS = 30.0  # of the time that is left, on Prefect's page
WORKER_GRACE_SECONDS = 20.0  # for this process to end its children and to say so

_DID: dict[Did, str] = {"ran": "trained", "restored": "restored", "nothing": "up to date"}
_STATE = {"ran": "Completed", "restored": "Restored", "nothing": "Up to date"}


@task(name="stage", task_run_name="{title}", cache_policy=NO_CACHE, persist_result=False)
def stage_task(title: str, slot: str, work: Callable[[], State]) -> State:
    """One stage, under the name by which a person knows it."""
    return work()


@dataclass(eq=False)
class Try:
    """A cell in the queue."""

    step: Step
    number: int = 1
    alone: bool = False  # it ran out of memory beside others: it starts when nothing else runs


@contextmanager
def grid_run(
    folder: str,
    cells: list[str] | None = None,
    slots: int | None = None,
    force: bool = False,
    where: str = HERE,
    device: str | None = None,
) -> Iterator[Grid]:
    """A run of the grid in `folder`, which has the pipeline to itself; leaving it ends all that still runs.

    Raises ResgridError for a folder that is no pipeline.
    """
    asked = time.time()
    pipeline = Pipeline.find(folder)
    if "PREFECT__WORKER_NAME" in os.environ:  # this process outlives its worker, but is not meant to
        watch.watch(watch.describe(os.getppid()), grace_seconds=WORKER_GRACE_SECONDS)
    stop = threading.Event()
    say = get_run_logger().info
    with held(pipeline.lock(GRID), "another train-all is at work in this pipeline", say, stop):
        grid = Grid(pipeline, cells, slots, force, where, device, asked, stop)
        try:
            yield grid
        finally:
            stop.set()
            grid.close()


class Grid:
    """The steps of one run, in the order of the methods. A failure is kept, and told by `verdict`."""

    def __init__(
        self,
        pipeline: Pipeline,
        patterns: list[str] | None,
        slots: int | None,
        force: bool,
        where: str,
        device: str | None,
        asked: float,
        stop: threading.Event,
    ) -> None:
        self.pipeline, self.patterns, self.num_slots, self.force = pipeline, patterns, slots, force
        self.where, self.device = where, device
        self.asked, self.stop = asked, stop
        self.say = get_run_logger().info
        self.page = Page(pipeline, self.say)
        self.env = flow_environment()
        self.failures: dict[str, StageFailed] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.plan: Plan
        self.chosen: list[Step] = []
        self.running: dict[str, float] = {}  # since when, by cell
        self.seconds: dict[str, float] = {}  # expected, by stage
        self.progress = Progress(asked, watch.describe(os.getpid()), 0, self.env.get("RESGRID_FLOW_RUN_URL"))

    # --- the steps of the run -----------------------------------------------------------------------

    def prepare(self) -> None:
        """Plan, choose, and bring the data up to date.

        Raises ResgridError for params that cannot be used, for cells that do not exist, for a disk that is
        too small, and for what a work pool needs and does not have.
        """
        if self.device not in (None, "cpu", "cuda", "mps"):
            raise ResgridError(f"device={self.device}: must be cpu, cuda or mps, or not given.")
        if self.where != HERE:
            self._check_pool()
        elif self.device:
            raise ResgridError("device: is for a work pool; here, RESGRID_DEVICE says what cells train on.")
        self.plan = make_plan(self.pipeline, self.num_slots)
        chosen = choose(self.plan, self.patterns)
        if self.plan.disk_needed > self.plan.disk_free:
            raise ResgridError(
                f"{self.pipeline.folder}: the grid takes about {self.plan.disk_needed / 1e9:.1f} GB of disk; "
                f"{self.plan.disk_free / 1e9:.1f} GB are free. Free some, or choose fewer cells."
            )
        changed = False
        for name in DATA_STAGES:
            if not self.failures:
                changed |= self._alone(name, changed)
        if changed and not self.failures:
            self.plan = make_plan(self.pipeline, self.num_slots)
        self.chosen = [self.plan.by_title[title] for title in chosen]

    def train(self) -> None:
        """Every chosen cell that is not up to date, the longest first, one on each slot."""
        if self.failures:
            return
        fresh = [step for step in self.chosen if self._is_fresh(step)]
        todo = [step for step in self.chosen if step not in fresh]
        # What somebody else runs already comes last: by then it is likely done.
        elsewhere = [step for step in todo if step.state == "running"]
        queue = longest_first(step for step in todo if step.state != "running") + elsewhere
        self.progress.cells = {s.title: WAITING if s in todo else "up to date" for s in self.chosen}
        shown = [self._submit(step.title, "", lambda: Completed(name="Up to date")) for step in fresh]
        if self.where == HERE:
            cells = [step.cell for step in queue if step.cell]
            slots = slots_for(self.pipeline, self.plan.params, cells, self.num_slots)
            self.progress.slots = len(slots)
            self.say(f"{len(queue)} of {len(self.chosen)} cells to train, {_said(slots)}")
            self._show(queue, slots)
            with mps.shared(slots, self.say):
                self._pack(queue, slots)
        elif queue:
            self.say(f"{len(queue)} of {len(self.chosen)} cells to train, in the work pool {self.where}")
            self._place(queue)
        for future in shown:
            future.wait()

    def evaluate(self) -> None:
        """Compare what there is, whether or not cells failed."""
        if not set(self.failures) & set(DATA_STAGES):
            self._alone(EVALUATE, any(outcome.did != "nothing" for outcome in self.outcomes.values()))

    def sync(self) -> None:
        """Give every current cell its complete run in MLflow, also those that DVC restored.

        After `evaluate`, and not beside it, for the comparison goes there as well.
        """
        if not set(self.failures) & set(DATA_STAGES):
            self._submit("sync", "", self._sync).wait()

    def publish(self) -> None:
        """The leaderboard, and each cell with the way to its run in MLflow, on Prefect's page."""
        titles = [step.title for step in self.chosen]
        seconds = {title: self.outcomes[title].seconds for title in titles if title in self.outcomes}
        links = mlflow_runs(self.pipeline.root, self.plan.params.name, titles)
        self.page.cells(((t, self.progress.cells.get(t, ""), seconds.get(t)) for t in titles), links)
        self.page.leaderboard(self.pipeline.folder / "reports/leaderboard.csv")
        self.page.progress(self.progress)
        self.page.flush()

    def verdict(self) -> State:
        """Completed, or Failed with each failure: what, why, the end of its log and where the rest is."""
        num = Counter(self.progress.cells.values())
        summary = ", ".join(f"{num[status]} {status}" for status in (*_DID.values(), FAILED) if num[status])
        if not self.failures:
            return Completed(message=f"{len(self.chosen)} cells: {summary}" if self.chosen else "up to date")
        told = "\n".join(str(failure) for failure in self.failures.values())
        missing = ", ".join(self.failures)
        return Failed(message=f"{missing} failed ({summary or 'nothing was trained'}).\n{told}")

    def close(self) -> None:
        """What the terminal shows of a run that has ended, in whatever way."""
        if self.progress.cells:
            self.progress.ended, self.progress.remaining = time.time(), None
            for cell, status in self.progress.cells.items():
                if status in (RUNNING, WAITING):
                    self.progress.cells[cell] = CUT
            save(self.pipeline, self.progress)

    # --- packing ------------------------------------------------------------------------------------

    def _pack(self, queue: list[Step], slots: list[Slot]) -> None:
        """Keep every slot busy until the queue is empty; on the way out by an exception, end what runs."""
        waiting, free = deque(Try(step) for step in queue), deque(slots)
        ended: SimpleQueue[Try] = SimpleQueue()
        running: dict[Try, Slot] = {}
        futures: list[PrefectFuture[State]] = []
        try:
            while waiting or running:
                while waiting and free and not (waiting[0].alone and running):
                    attempt = waiting.popleft()
                    running[attempt] = free.popleft()
                    futures.append(self._start(attempt, running[attempt], ended))
                self._show([other.step for other in waiting], slots)
                try:
                    attempt = ended.get(timeout=REFRESH_SECONDS)
                except Empty:
                    continue
                if attempt in running:
                    free.append(running.pop(attempt))
                    del self.running[attempt.step.title]
                    if again := self._settle(attempt, neighbours=len(running)):
                        waiting.append(again)
            for future in futures:
                future.wait()
        except BaseException:
            self.stop.set()
            for future in futures:
                future.wait(timeout=15)
            raise

    def _start(self, attempt: Try, slot: Slot, ended: SimpleQueue[Try]) -> PrefectFuture[State]:
        """Told to `ended` as soon as the cell has, before Prefect records it (0.3 s): the slot is free then.

        And once more when the task has, since one that Prefect cannot even begin ends as well.
        """
        title = attempt.step.title
        self.failures.pop(title, None)
        self.running[title] = time.time()
        self.progress.cells[title] = RUNNING

        def train() -> State:
            try:
                state = self._train(attempt, slot)
            finally:
                ended.put(attempt)
            self._link(title)
            return state

        future = self._submit(title, slot.name, train)
        future.add_done_callback(lambda future: ended.put(attempt))
        return future

    def _settle(self, attempt: Try, neighbours: int) -> Try | None:
        """What the cell came to; another try at the end of the queue, if its fault is one that can pass."""
        title = attempt.step.title
        self._note_if_lost(title, attempt.step.stage)
        failure = self.failures.get(title)
        if failure is None:
            self.progress.cells[title] = _DID[self.outcomes[title].did]
            return None
        # Memory is only a fault that can pass if somebody else had it.
        passing = failure.fault not in (None, "memory") or (failure.fault == "memory" and neighbours > 0)
        if passing and attempt.number < TRIES:
            self.progress.cells[title] = WAITING
            self.say(f"{title}: {failure.why}: this can pass, so it is tried again at the end")
            return Try(attempt.step, attempt.number + 1, alone=failure.fault == "memory")
        self.progress.cells[title] = FAILED
        return None

    def _show(self, waiting: list[Step], slots: list[Slot]) -> None:
        steps = [self.plan.by_title[title] for title in self.running] + waiting
        # A stage that runs has lost the record of its earlier time: what was known once stays.
        self.seconds |= expect(self.pipeline, self.plan.params, steps, slots[0])
        seconds = self.seconds
        if all(step.stage in seconds for step in steps):
            now = time.time()
            left = [
                max(0.0, seconds[self.plan.by_title[title].stage] - (now - since))
                for title, since in self.running.items()
            ]
            left += [seconds[step.stage] for step in waiting]
            self.progress.remaining = makespan(left, len(slots))
        else:
            self.progress.remaining = None
        save(self.pipeline, self.progress)
        self.page.progress(self.progress)

    # --- placing ------------------------------------------------------------------------------------

    def _check_pool(self) -> None:
        if self.force or self.num_slots:
            given = "force" if self.force else "slots"
            raise ResgridError(
                f"where={self.where}: {given} cannot be given. Results come back through DVC's run cache, "
                "which hands out the earlier one; and each worker has its own slots."
            )
        if mlflow_address(self.pipeline.root) is None:
            raise ResgridError(
                f"where={self.where}: there is no MLflow server to which all workers could record. Start "
                "`make up`, or let MLFLOW_TRACKING_URI name one."
            )
        dvc_remote(self.pipeline)

    def _place(self, queue: list[Step]) -> None:
        """Let the workers of a pool train these cells; what came of each is here when this returns."""
        order = Order.of(self.pipeline, self.device)
        push_data(self.pipeline, self.say, self.stop)
        pool = Pool(self.where, self.pipeline, order, self.env, self.say, self.stop)
        waiting = {step.title: step for step in queue}
        shown = 0.0
        for event in pool.train(queue):
            match event:
                case Moved(step, "running"):
                    self.running[step.title] = time.time()
                    self.progress.cells[step.title] = RUNNING
                    waiting.pop(step.title, None)
                case Moved(step, "waiting"):
                    self.running.pop(step.title, None)
                    self.progress.cells[step.title] = WAITING
                    waiting[step.title] = step
                case Ended(step, result):
                    self.running.pop(step.title, None)
                    waiting.pop(step.title, None)
                    if isinstance(result, Outcome):
                        self.outcomes[step.title] = result
                        self.progress.cells[step.title] = _DID[result.did]
                    else:
                        self.failures[step.title] = result
                        self.progress.cells[step.title] = FAILED
            if time.monotonic() - shown > POOL_REFRESH_SECONDS:
                shown = time.monotonic()
                self.progress.slots = max(1, len(self.running))
                self._show(list(waiting.values()), [whole_machine()] * self.progress.slots)
        for step in queue:
            self._note_if_lost(step.title, step.stage)

    # --- one stage ----------------------------------------------------------------------------------

    def _train(self, attempt: Try, slot: Slot) -> State:
        title = attempt.step.title
        if attempt.number > 1 and self.stop.wait(0 if attempt.alone else PAUSE_SECONDS):
            return Cancelled(message="not begun again")
        if self.force and attempt.number == 1:  # or an interrupted training would go on
            kept = checkpoint_folder(self.pipeline.root, self.pipeline.folder)
            delete(checkpoint_files(kept, title))
        return self._reproduce(title, attempt.step.stage, slot.name, slot.env, self.force)

    def _link(self, title: str) -> None:
        outcome = self.outcomes.get(title)
        if outcome and outcome.did == "ran":
            for cell, link in mlflow_runs(self.pipeline.root, self.plan.params.name, [title]).items():
                self.page.link(cell, link)

    def _alone(self, name: str, anyway: bool) -> bool:
        """Bring one stage up to date that has the machine to itself; whether there was anything to do."""
        if self.plan.by_title[name].state == "up to date" and not anyway:
            self._call(name, "", lambda: Completed(name="Up to date"))
            return False
        slot = whole_machine()
        self._call(name, slot.name, lambda: self._reproduce(name, name, slot.name, slot.env, False))
        self._note_if_lost(name, name)
        return name in self.failures or self.outcomes[name].did != "nothing"

    def _reproduce(self, title: str, stage: str, slot: str, env: Mapping[str, str], force: bool) -> State:
        say = get_run_logger().info
        try:
            outcome = reproduce(
                self.pipeline, stage, {**env, **self.env}, say, force=force, stop=self.stop, slot=slot
            )
        except Stopped:
            return Cancelled(message="ended together with its run")
        except StageFailed as failure:
            self.failures[title] = failure
            return Failed(message=str(failure))
        except OSError as error:  # a full disk, for instance
            self.failures[title] = StageFailed(stage, str(error), [], self.pipeline.log(stage), None)
            raise
        self.outcomes[title] = outcome
        return Completed(name=_STATE[outcome.did], message=f"took {duration(outcome.seconds)}")

    def _sync(self) -> State:
        try:
            run_logged(self.pipeline, "sync", ["resgrid", "sync"], self.env, get_run_logger().info, self.stop)
        except StageFailed as failure:
            self.failures["sync"] = failure
            return Failed(message=str(failure))
        return Completed()

    def _is_fresh(self, step: Step) -> bool:
        """Whether there is nothing to do: up to date, and with `force` trained since that was asked for.

        So of two forced runs at once the second, which waited, does not train again what the first has.
        """
        if step.state != "up to date" or not self.force:
            return step.state == "up to date"
        record = self.pipeline.record(step.stage)
        return bool(record and record.status == "ran" and record.ended and record.ended > self.asked)

    def _submit(self, title: str, slot: str, work: Callable[[], State]) -> PrefectFuture[State]:
        return stage_task.submit(title, slot, work)

    def _call(self, title: str, slot: str, work: Callable[[], State]) -> State:
        return stage_task(title, slot, work, return_state=True)

    def _note_if_lost(self, title: str, stage: str) -> None:
        """A stage without an outcome and without a failure of its own: Prefect could not run its task."""
        if title not in self.outcomes and title not in self.failures:
            log = self.pipeline.log(stage)
            self.failures[title] = StageFailed(
                stage, "its task did not run: see Prefect's log", [], log, None
            )


def choose(plan: Plan, patterns: list[str] | None) -> list[str]:
    """The ids of the cells that any of `patterns` matches, in the plan's order; all of them without patterns.

    Raises ResgridError for a pattern that matches none.
    """
    ids = [step.title for step in plan.cells]
    if patterns is None:
        return ids
    for pattern in patterns:
        if not fnmatch.filter(ids, pattern):
            raise ResgridError(
                f"cells: no cell is called {pattern!r}{suggest(pattern, ids)} `resgrid cells` lists all of "
                "them; resnet20-* and *-adam-? are patterns."
            )
    return [cell for cell in ids if any(fnmatch.fnmatchcase(cell, pattern) for pattern in patterns)]


def _said(slots: list[Slot]) -> str:
    threads = f"{slots[0].threads} thread{'s' * (slots[0].threads > 1)}"
    return f"{len(slots)} at a time with {threads} each: {', '.join(slot.name for slot in slots)}"
