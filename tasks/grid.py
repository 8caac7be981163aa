"""What one run of a pipeline's grid keeps in mind, and each of its stages as a Prefect task.

The course itself stands in `flows/`. One grid a pipeline runs at a time; a second one waits, and then takes
what the first has not done.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State as RunState
from prefect.client.schemas.objects import TaskRun
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import Task

from resgrid import watch
from resgrid.dvc import remote
from resgrid.dvc.ask import Busy
from resgrid.dvc.ask import remote as dvc_remote
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import StageFailed, Stopped, acquire, repair, reproduce, run_logged
from resgrid.errors import ResgridError
from resgrid.grid import choose
from resgrid.leftovers import checkpoint_files, checkpoint_folder, delete
from resgrid.progress import amount, duration
from resgrid.stage_record import Fault, State
from tasks.plan import Plan, Step, expect, longest_first, make_plan, makespan, slots_for
from tasks.pool import Pool
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
from tasks.slots import Slot, whole_machine
from tasks.spec import DATA_STAGES, DEVICES, RunSpec

EVALUATE = "evaluate"  # after them
HERE = "here"  # where cells train: on this machine; anything else names a work pool
RETRIES = 2  # of a stage whose fault can pass
PAUSE_SECONDS = 15.0  # before each
BUSY_SECONDS = 2.0  # between two looks whether DVC answers
WORKER_GRACE_SECONDS = 20.0  # for this process to end its children and to say so

# What a cell is called by what DVC had to do for it.
TRAINED, RESTORED, FRESH = "trained", "restored", "up to date"


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

    Raises ResgridError for a folder that is no pipeline, for params that cannot be used, for cells that do
    not exist, for a disk that is too small, and for what a work pool needs and does not have.
    """
    asked = time.time()
    pipeline = Pipeline.find(folder)
    end_with_worker()
    stop = threading.Event()
    with acquire(pipeline.lock(GRID), "another train-all, which is at work in this pipeline", stop):
        grid = Grid(pipeline, slots, force, where, device, asked, stop)
        try:
            repair(pipeline, stop)
            grid.choose(cells)
            yield grid
        finally:
            grid.close()


def end_with_worker() -> None:
    """End this process when the worker that started it, if one did, is gone."""
    if runtime.deployment.id:
        watch.watch(watch.describe(os.getppid()), grace_seconds=WORKER_GRACE_SECONDS)


def can_pass(task: Task[..., RunState], run: TaskRun, state: RunState) -> bool:
    """Whether a stage failed by what can pass by itself: a lost connection, for instance."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageFailed) and error.fault is not None and error.fault.transient


@task(
    name="stage",
    task_run_name="{title}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=PAUSE_SECONDS,
    retry_condition_fn=can_pass,
)
def stage(title: str, slot: str, grid: Grid, env: dict[str, str]) -> RunState:
    """One stage, under the name by which a person knows it, brought up to date by DVC."""
    return grid.reproduce(title, slot, env)


@task(name="sync", task_run_name="sync", cache_policy=NO_CACHE, persist_result=False)
def sync(grid: Grid) -> RunState:
    """Give every current cell its complete run in MLflow, also those that DVC restored."""
    try:
        run_logged(grid.pipeline, "sync", ["resgrid", "sync"], grid.env, grid.stop)
    except StageFailed as failure:
        grid.failures["sync"] = failure
        return Failed(message=str(failure))
    return Completed()


class Grid:
    """One run: its plan, and what came of each stage. A failure is kept, and told by `verdict`."""

    def __init__(
        self,
        pipeline: Pipeline,
        num_slots: int | None,
        force: bool,
        where: str,
        device: str | None,
        asked: float,
        stop: threading.Event,
    ) -> None:
        self.pipeline, self.num_slots, self.force = pipeline, num_slots, force
        self.where, self.device, self.asked, self.stop = where, device, asked, stop
        self.say = get_run_logger().info
        self.page = Page(pipeline, self.say)
        self.env = flow_environment()
        self.plan: Plan
        self.chosen: list[str] = []
        self.failures: dict[str, StageFailed] = {}
        self.did: dict[str, str] = {}  # by the title of a stage: TRAINED, RESTORED or FRESH
        self.took: dict[str, float] = {}  # seconds
        self.running: dict[str, float] = {}  # since when
        self.crowded: list[str] = []  # cells that ran out of memory beside others
        self.seconds: dict[str, float] = {}  # expected, by stage
        self.slots: list[Slot] = [whole_machine()]
        self.futures: dict[str, PrefectFuture[RunState]] = {}
        self.pool: Pool | None = None
        self._held: dict[str, Callable[[], None]] = {}  # by cell: what gives its slot back
        self._exits = ExitStack()
        self.progress = Progress(asked, watch.describe(os.getpid()), 0, self.env.get("RESGRID_FLOW_RUN_URL"))
        self._lock = threading.Lock()

    # --- the steps of a run, as a flow calls them -----------------------------------------------------

    def choose(self, patterns: list[str] | None) -> None:
        """Plan, and see which cells are meant."""
        if self.device not in (None, *DEVICES):
            raise ResgridError(f"device={self.device}: must be {', '.join(DEVICES)}, or not given.")
        if self.where != HERE:
            self._check_pool()
        elif self.device:
            raise ResgridError("device: is for a work pool; here, RESGRID_DEVICE says what cells train on.")
        self.plan = self._ask()
        meant = {cell.id for cell in choose(self.plan.params, ["*"] if patterns is None else patterns)}
        self.chosen = [step.title for step in self.plan.cells if step.title in meant]
        if self.plan.disk_needed > self.plan.disk_free:
            raise ResgridError(
                f"{self.pipeline.folder}: the grid takes about {amount(self.plan.disk_needed, 'B')} of disk; "
                f"{amount(self.plan.disk_free, 'B')} are free. Free some, or choose fewer cells."
            )

    def run(self, title: str, slot: Slot | None = None) -> bool:
        """Bring one stage up to date while nothing else runs; whether it is."""
        slot = slot or whole_machine()
        self.failures.pop(title, None)
        self._note_if_lost(title, stage(title, slot.name, self, slot.env, return_state=True))
        return title not in self.failures

    def submit(self, title: str, slot: Slot, then: Callable[[Slot], None]) -> None:
        """Begin to bring a stage up to date on a free slot, which `then` gets back.

        That is after the last retry; of a pool it is a place in the queue, free when a worker takes the cell.
        """
        self._held[title] = partial(then, slot)
        self.futures[title] = stage.submit(title, slot.name, self, slot.env)
        self.futures[title].add_done_callback(lambda future: self._free(title))

    def _free(self, title: str) -> None:
        if give_back := self._held.pop(title, None):
            give_back()

    def wait(self) -> None:
        """Until all that was submitted has ended."""
        for title, future in self.futures.items():
            future.wait()
            self._note_if_lost(title, future.state)

    def queue(self) -> list[str]:
        """The chosen cells that are not up to date, the longest first; the others are shown as being so."""
        if any(self.did.get(name, FRESH) != FRESH for name in DATA_STAGES):
            self.plan = self._ask()
        chosen = [self.plan.by_title[title] for title in self.chosen]
        steps = longest_first(step for step in chosen if not self._is_fresh(step))
        todo = [step.title for step in steps]
        self.progress.cells = {title: WAITING if title in todo else FRESH for title in self.chosen}
        for title in self.chosen:
            if title not in todo:
                self.submit(title, Slot("", 1), lambda slot: None)
        if self.where == HERE:
            cells = [step.cell for step in steps if step.cell]
            self.slots = slots_for(self.pipeline, self.plan.params, cells, self.num_slots)
        elif todo:
            self._open_pool(len(todo))
        place = f"in the work pool {self.where}" if self.pool else _said(self.slots)
        self.say(f"{len(todo)} of {len(chosen)} cells to train, {place}")
        self.show()
        return todo

    def publish(self) -> None:
        """The leaderboard, and each cell with the way to its run in MLflow, on Prefect's page."""
        links = mlflow_runs(self.pipeline.root, self.plan.params.name, self.chosen)
        self.page.cells(((t, self.progress.cells.get(t, ""), self.took.get(t)) for t in self.chosen), links)
        self.page.leaderboard(self.pipeline.folder / "reports/leaderboard.csv")
        self.page.progress(self.progress)
        self.page.flush()

    def verdict(self) -> RunState:
        """Completed, or Failed with each failure: what, why, the end of its log and where the rest is."""
        num = Counter(self.progress.cells.values())
        summary = ", ".join(f"{num[each]} {each}" for each in (TRAINED, RESTORED, FRESH, FAILED) if num[each])
        if not self.failures:
            return Completed(message=f"{len(self.chosen)} cells: {summary}" if self.chosen else "up to date")
        told = "\n".join(str(failure) for failure in self.failures.values())
        missing = ", ".join(self.failures)
        return Failed(message=f"{missing} failed ({summary or 'nothing was trained'}).\n{told}")

    def close(self) -> None:
        """End what still runs; leave what the terminal shows of a run that has ended, in whatever way."""
        self.stop.set()
        for future in self.futures.values():
            future.wait(timeout=15)
        self._exits.close()
        if self.progress.cells:
            self.progress.ended, self.progress.until = time.time(), None
            for cell, status in self.progress.cells.items():
                if status in (RUNNING, WAITING):
                    self.progress.cells[cell] = CUT
            save(self.pipeline, self.progress)

    # --- one stage, within its task -------------------------------------------------------------------

    def reproduce(self, title: str, slot: str, env: dict[str, str]) -> RunState:
        """The state that the stage's task ends in; raises StageFailed."""
        step, tries = self.plan.by_title[title], runtime.task_run.run_count
        force = self.force and step.cell is not None
        if self._is_fresh(step) and not (title == EVALUATE and set(self.did.values()) - {FRESH}):
            return Completed(name="Up to date")
        if force and tries == 1:  # or an interrupted training would go on
            delete(checkpoint_files(checkpoint_folder(self.pipeline.root, self.pipeline.folder), title))
        say = get_run_logger().info
        status = CUT
        try:
            if self.pool and step.cell:
                outcome = self.pool.train(title, step.stage, partial(self._follow, title))
            else:
                self._follow(title, True)
                outcome = reproduce(
                    self.pipeline,
                    step.stage,
                    {**env, **self.env},
                    force=force,
                    stop=self.stop,
                    slot=slot,
                )
            self.failures.pop(title, None)
            status = TRAINED if outcome.ran else RESTORED if step.state == "stale" else FRESH
            self.did[title], self.took[title] = status, outcome.seconds
        except Stopped:
            return Cancelled(message="ended together with its run")
        except StageFailed as failure:
            status = FAILED
            self.failures[title] = failure
            if failure.fault == Fault.MEMORY and len(self.running) > 1:
                status = WAITING
                self.crowded.append(title)
            elif failure.fault and failure.fault.transient and tries <= RETRIES:
                status = WAITING
                say(f"{title}: {failure.why}: this can pass, so it is tried again")
            raise
        except OSError as error:  # a full disk, for instance
            status = FAILED
            log = self.pipeline.log(step.stage)
            self.failures[title] = StageFailed(step.stage, str(error), [], log, None)
            raise
        finally:
            self.running.pop(title, None)
            self._set(title, status)
        if outcome.ran and step.cell:
            for cell, link in mlflow_runs(self.pipeline.root, self.plan.params.name, [title]).items():
                self.page.link(cell, link)
        name = "Completed" if outcome.ran else status.capitalize()
        return Completed(name=name, message=f"took {duration(outcome.seconds)}")

    def _follow(self, title: str, is_running: bool) -> None:
        """Take down that a stage has begun, or that it waits for another worker."""
        if is_running:
            self.running[title] = time.time()
        else:
            self.running.pop(title, None)
        self._set(title, RUNNING if is_running else WAITING)

    def show(self) -> None:
        """How far the run is and how long it takes yet, in the terminal and on Prefect's page."""
        by_title = self.plan.by_title
        running = dict(self.running)
        num_slots = max(1, len(running)) if self.pool else len(self.slots)
        waiting = [title for title, status in self.progress.cells.items() if status == WAITING]
        steps = [by_title[title] for title in (*running, *waiting)]
        # A stage that runs has lost the record of its earlier time: what was known once stays.
        self.seconds |= expect(self.pipeline, self.plan.params, steps, self.slots[0])
        self.progress.until = None
        if all(step.stage in self.seconds for step in steps):
            now = time.time()
            left = [max(0.0, self.seconds[by_title[t].stage] - now + since) for t, since in running.items()]
            left += [self.seconds[step.stage] for step in longest_first(by_title[title] for title in waiting)]
            self.progress.until = now + makespan(left, num_slots)
        self.progress.slots = num_slots
        save(self.pipeline, self.progress)
        self.page.progress(self.progress)

    def _set(self, title: str, status: str) -> None:
        with self._lock:
            if title in self.progress.cells:
                self.progress.cells[title] = status
                self.show()

    def _ask(self) -> Plan:
        """The plan as DVC sees it now: while it runs a stage, by whichever hand, that is waited for."""
        said = ""
        while True:
            try:
                return make_plan(self.pipeline, self.num_slots, now=True)
            except Busy as busy:
                if said != (said := str(busy)):
                    self.say(f"{said.removesuffix(' Ask again when that has ended.')} Waiting for it.")
                if self.stop.wait(BUSY_SECONDS):
                    raise Stopped from None

    def _is_fresh(self, step: Step) -> bool:
        """Whether there is nothing to do: up to date, and with `force` trained since that was asked for.

        So of two forced runs at once the second, which waited, does not train again what the first has.
        """
        if step.state != "up to date" or not self.force or not step.cell:
            return step.state == "up to date"
        record = self.pipeline.record(step.stage)
        return bool(record and record.status == State.DONE and record.ended and record.ended > self.asked)

    def _note_if_lost(self, title: str, state: RunState) -> None:
        """A stage that failed without a failure of its own: Prefect could not run its task."""
        if not (state.is_completed() or state.is_cancelled() or title in self.failures):
            why = f"its task did not run: {state.message}"
            self.failures[title] = StageFailed(title, why, [], self.pipeline.log(title), None)
            self._set(title, FAILED)

    # --- a work pool ----------------------------------------------------------------------------------

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

    def _open_pool(self, num_cells: int) -> None:
        """Let the workers of a pool train the cells: these get the data, and each cell a run at once."""
        spec = RunSpec.of(self.pipeline, self.device)
        remote.push(self.pipeline, ["--run-cache", *DATA_STAGES], self.stop)
        client = self._exits.enter_context(get_client(sync_client=True))
        self.pool = Pool(client, self.where, self.pipeline, spec, self.env, self.stop)
        self.slots = [Slot(self.where, whole_machine().threads)] * num_cells


def _said(slots: list[Slot]) -> str:
    threads = f"{slots[0].threads} thread{'s' * (slots[0].threads > 1)}"
    return f"{len(slots)} at a time with {threads} each: {', '.join(slot.name for slot in slots)}"
