"""What one run of train-all keeps in mind, and each of its stages as a Prefect task.

The course itself stands in `flows/`. One grid a pipeline runs at a time; a second one waits, and then takes
what the first has not done.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State as RunState
from prefect.client.schemas.objects import TaskRun
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import Task

from resgrid import watch
from resgrid.cell_states import GRID, RESTORED, TRAINED, UNCHANGED, CellRun, GridRun
from resgrid.dvc import remote
from resgrid.dvc.ask import remote as dvc_remote
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import StageFailed, Stopped, acquire, reproduce, run_logged
from resgrid.errors import ResgridError
from resgrid.gc import checkpoint_files, checkpoint_folder, delete
from resgrid.grid import choose
from resgrid.progress import duration
from resgrid.stage_record import Fault, State, state_file
from tasks.plan import Plan, Step, await_plan, expect, finish_time, longest_first, slots_for
from tasks.pool import Pool
from tasks.publish import Page, flow_environment, mlflow_address, mlflow_run
from tasks.slots import Slot, whole_machine
from tasks.spec import DATA_STAGES, DEVICES, RunSpec
from tasks.status import time_left

EVALUATE = "evaluate"  # after them
HERE = "here"  # where cells train: on this machine; anything else names a work pool
RETRIES = 2  # of a stage whose fault is transient
PAUSE_SECONDS = 15.0  # before each
WORKER_GRACE_SECONDS = 20.0  # for this process to end its children and to say so
log = logging.getLogger(__name__)


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
    not exist, and for what a work pool needs and does not have.
    """
    for name in ("resgrid", "tasks"):  # Prefect takes their messages, and leaves the level to us
        logging.getLogger(name).setLevel(logging.INFO)
    asked, pipeline, stop = time.time(), Pipeline.find(folder), threading.Event()
    end_with_worker()
    with acquire(pipeline.lock(GRID), "another train-all, which is at work in this pipeline", stop):
        grid = Grid(pipeline, slots, force, where, device, asked, stop)
        try:
            grid.choose(cells)
            yield grid
        finally:
            grid.close()


def end_with_worker() -> None:
    """End this process when the worker that started it, if one did, is gone."""
    if runtime.deployment.id:
        watch.watch(watch.describe(os.getppid()), grace_seconds=WORKER_GRACE_SECONDS)


def can_pass(task: Task[..., RunState], run: TaskRun, state: RunState) -> bool:
    """Whether a stage failed by a transient fault."""
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
def stage(title: str, slot: Slot, grid: Grid) -> RunState:
    """One stage, under the name by which a person knows it, brought up to date by DVC."""
    return grid.reproduce(title, slot)


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
    """One run: its plan, and the outcome of each stage. A failure is kept for `verdict`."""

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
        self.page = Page(pipeline)
        self.env = flow_environment()
        self.plan: Plan
        self.chosen: list[str] = []
        self.failures: dict[str, StageFailed] = {}
        self.outcomes: dict[str, str] = {}  # by a stage's title: TRAINED, RESTORED or UNCHANGED
        self.oom_cells: list[str] = []  # that ran out of memory beside others
        self.slots: list[Slot] = [whole_machine()]
        self.futures: dict[str, PrefectFuture[RunState]] = {}
        self.pool: Pool | None = None
        self.state = GridRun(watch.describe(os.getpid()), asked, url=runtime.flow_run.ui_url)
        self._exits = ExitStack()
        self._lock = threading.Lock()

    # --- the steps of a run, as a flow calls them -----------------------------------------------------

    def choose(self, patterns: list[str] | None) -> None:
        """Plan, and see which cells are selected."""
        if self.device not in (None, *DEVICES):
            raise ResgridError(f"device={self.device}: must be {', '.join(DEVICES)}, or not given.")
        if self.where != HERE:
            self._check_pool()
        elif self.device:
            raise ResgridError("device: is for a work pool; here, RESGRID_DEVICE says what cells train on.")
        self.plan = await_plan(self.pipeline, self.num_slots, self.stop)
        selected = {cell.id for cell in choose(self.plan.params, ["*"] if patterns is None else patterns)}
        self.chosen = [step.title for step in self.plan.cells if step.title in selected]

    def run(self, title: str, slot: Slot | None = None) -> bool:
        """Bring one stage up to date while nothing else runs; whether it is."""
        self.failures.pop(title, None)
        self._note_if_lost(title, stage(title, slot or whole_machine(), self, return_state=True))
        return title not in self.failures

    def submit(self, title: str, slot: Slot, then: Callable[[Slot], None]) -> None:
        """Begin to bring a stage up to date on a free slot, which `then` gets back after the last retry."""
        self.futures[title] = stage.submit(title, slot, self)
        self.futures[title].add_done_callback(lambda future: then(slot))

    def wait(self) -> None:
        """Until all that was submitted has ended."""
        for title, future in self.futures.items():
            future.wait()
            self._note_if_lost(title, future.state)

    def queue(self) -> list[str]:
        """The chosen cells that are not up to date, the longest first; the others are shown as being so."""
        if any(self.outcomes.get(name, UNCHANGED) != UNCHANGED for name in DATA_STAGES):
            self.plan = await_plan(self.pipeline, self.num_slots, self.stop)
        chosen = [self.plan.by_title[title] for title in self.chosen]
        steps = longest_first(step for step in chosen if not self._is_fresh(step))
        todo = [step.title for step in steps]
        for title in self.chosen:
            self.state.cells[title] = CellRun(State.QUEUED) if title in todo else CellRun(became=UNCHANGED)
            if title not in todo:
                self.submit(title, Slot("", 1), lambda slot: None)
        if self.where == HERE:
            cells = [step.cell for step in steps if step.cell]
            self.slots = slots_for(self.pipeline, self.plan.params, cells, self.num_slots)
        elif todo:
            self._open_pool(len(todo))
        place = f"the work pool {self.where}" if self.pool else ", ".join(slot.name for slot in self.slots)
        log.info("%d of %d cells to train, on %s", len(todo), len(chosen), place)
        self._show()
        return todo

    def publish(self) -> None:
        """The leaderboard, and how far the grid came, on Prefect's page."""
        self.page.leaderboard(self.pipeline.folder / "reports/leaderboard.csv")
        self._show()

    def verdict(self) -> RunState:
        """Completed, or Failed with each failure: what, why, the end of its log and where the rest is."""
        num = Counter(each.became for each in self.state.cells.values())
        num["failed"] = sum(title in self.state.cells for title in self.failures)
        words = (TRAINED, RESTORED, UNCHANGED, "failed")
        summary = ", ".join(f"{num[word]} {word}" for word in words if num[word])
        if not self.failures:
            return Completed(message=f"{len(self.chosen)} cells: {summary}" if self.chosen else "up to date")
        reasons = "\n".join(str(failure) for failure in self.failures.values())
        missing = ", ".join(self.failures)
        return Failed(message=f"{missing} failed ({summary or 'nothing was trained'}).\n{reasons}")

    def close(self) -> None:
        """End what still runs, and forget this run: the records and results say what came of it."""
        self.stop.set()
        for future in self.futures.values():
            future.wait(timeout=15)
        self._exits.close()
        state_file(self.pipeline.root, self.pipeline.folder, GRID).unlink(missing_ok=True)

    # --- one stage, within its task -------------------------------------------------------------------

    def reproduce(self, title: str, slot: Slot) -> RunState:
        """The state that the stage's task ends in; raises StageFailed."""
        step, attempt = self.plan.by_title[title], runtime.task_run.run_count
        force = self.force and step.cell is not None
        if self._is_fresh(step) and not (title == EVALUATE and set(self.outcomes.values()) - {UNCHANGED}):
            return Completed(name="Up to date")
        if force and attempt == 1:  # or an interrupted training would go on
            delete(checkpoint_files(checkpoint_folder(self.pipeline.root, self.pipeline.folder), title))
        state, became = None, ""

        def follow(is_running: bool) -> None:
            """Take down that it has begun, or that it waits for another worker."""
            now = State.RUNNING if is_running else State.QUEUED
            self._set(title, CellRun(now, attempt, slot.name, time.time() if is_running else None))

        try:
            if self.pool and step.cell:
                outcome = self.pool.train(title, step.stage, follow)
            else:
                follow(True)
                env = {**slot.env, **self.env}
                outcome = reproduce(self.pipeline, step.stage, env, force=force, stop=self.stop)
            self.failures.pop(title, None)
            became = TRAINED if outcome.ran else RESTORED if step.state == "stale" else UNCHANGED
            self.outcomes[title] = became
        except Stopped:
            return Cancelled(message="ended together with its run")
        except StageFailed as failure:
            self.failures[title] = failure
            if failure.fault == Fault.MEMORY and self._num_running() > 1:
                state = State.QUEUED
                self.oom_cells.append(title)
            elif failure.fault and failure.fault.transient and attempt <= RETRIES:
                state = State.QUEUED
                log.info("%s: %s: a transient fault, so it is tried again", title, failure.why)
            raise
        finally:
            self._set(title, CellRun(state, attempt, became=became))
        if outcome.ran and step.cell:
            self.page.link(title, mlflow_run(self.pipeline.root, self.plan.params.name, title))
        name = "Completed" if outcome.ran else became.capitalize()
        return Completed(name=name, message=f"took {duration(outcome.seconds)}")

    def _set(self, title: str, run: CellRun) -> None:
        if title in self.state.cells:
            with self._lock:
                self.state.cells[title] = run
            self._show()

    def _num_running(self) -> int:
        return sum(each.state == State.RUNNING for each in self.state.cells.values())

    def _show(self) -> None:
        """How far the run is and how long it takes yet, in train-all's file and on Prefect's page."""
        with self._lock:
            cells = self.state.cells
            at_work = {title: each for title, each in cells.items() if each.state}
            steps = {title: self.plan.by_title[title] for title in at_work}
            seconds = expect(self.pipeline, self.plan.params, steps.values(), self.slots[0])
            self.state.num_slots = max(1, self._num_running()) if self.pool else len(self.slots)
            known = {title: seconds[step.stage] for title, step in steps.items() if step.stage in seconds}
            self.state.until = finish_time(known, at_work, self.state.num_slots)
            self.state.save(self.pipeline.root, self.pipeline.folder)
            text = f"{len(cells) - len(at_work)} of {len(cells)} cells done"
        if cells:
            text += f"; {time_left(self.state)}" if at_work else ""
            self.page.progress(100 * (1 - len(at_work) / len(cells)), text)

    def _is_fresh(self, step: Step) -> bool:
        """Whether there is nothing to do: up to date, and with `force` trained since that was asked for.

        So of two forced runs at once the second, which waited, does not train again what the first has.
        """
        if step.state != "up to date" or not self.force or not step.cell:
            return step.state == "up to date"
        record = self.pipeline.record(step.stage)
        return bool(record and record.status == State.DONE and (record.ended or 0.0) > self.asked)

    def _note_if_lost(self, title: str, state: RunState) -> None:
        """A stage that failed without a failure of its own: on a full disk, or where Prefect ran no task."""
        if not (state.is_completed() or state.is_cancelled() or title in self.failures):
            why = f"its task did not run: {state.message}"
            self.failures[title] = StageFailed(title, why, [], self.pipeline.log(title))
            self._set(title, CellRun())

    # --- a work pool ----------------------------------------------------------------------------------

    def _check_pool(self) -> None:
        if given := "force" if self.force else "slots" if self.num_slots else "":
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
