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
from typing import Any

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
from resgrid.cost import expect, finish_time
from resgrid.dvc.ask import push, remote_name
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import StageFailed, Stopped, acquire, reproduce, run
from resgrid.errors import ResgridError
from resgrid.gc import checkpoint_files, checkpoint_folder, delete
from resgrid.grid import choose
from resgrid.stage_record import Fault, State, state_file
from tasks.plan import Plan, Step, await_plan, longest_first, slots_for
from tasks.pool import Pool
from tasks.server import Page
from tasks.services import mlflow_address
from tasks.slots import Slot, whole_machine
from tasks.spec import DATA_STAGES, RunSpec

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
    grid = Grid(Pipeline.find(folder), slots, force, where, device)
    begin_flow()
    with acquire(grid.pipeline.lock(GRID), "another train-all, which is at work in this pipeline", grid.stop):
        try:
            grid.choose(cells)
            yield grid
        finally:
            grid.close()


def begin_flow() -> None:
    """Have Prefect take our messages, and end this process with the worker that started it, if one did.

    A trainer's run in MLflow names the flow run.
    """
    os.environ["RESGRID_FLOW_RUN_ID"] = str(runtime.flow_run.id or "")
    for name in ("resgrid", "tasks"):  # Prefect leaves the level to us
        logging.getLogger(name).setLevel(logging.INFO)
    if runtime.deployment.id:
        watch.watch(watch.describe(os.getppid()), grace_seconds=WORKER_GRACE_SECONDS)


def can_pass(task: Task[..., RunState], run: TaskRun, state: RunState) -> bool:
    """Whether a stage failed by a transient fault."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageFailed) and error.fault is not None and error.fault.transient


RETRIED: dict[str, Any] = {
    "cache_policy": NO_CACHE, "persist_result": False,
    "retries": RETRIES, "retry_delay_seconds": PAUSE_SECONDS, "retry_condition_fn": can_pass,
}  # fmt: skip


@task(name="stage", task_run_name="{title}", **RETRIED)
def stage(title: str, slot: Slot, grid: Grid) -> RunState:
    """One stage, under the name by which a person knows it, brought up to date by DVC."""
    return grid.reproduce(title, slot)


@task(name="sync", task_run_name="sync", cache_policy=NO_CACHE, persist_result=False)
def sync(grid: Grid) -> None:
    """Give every current cell its complete run in MLflow, also those that DVC restored."""
    file = grid.pipeline.log("sync")
    code, tail = run(["resgrid", "sync"], grid.pipeline.folder, {}, file, grid.stop)
    if code:
        raise StageFailed("sync", f"it ended with status {code}", tail, file)


class Grid:
    """One run: its plan, and what became of each stage."""

    def __init__(
        self, pipeline: Pipeline, num_slots: int | None, force: bool, where: str, device: str | None
    ) -> None:
        self.pipeline, self.num_slots, self.force = pipeline, num_slots, force
        self.where, self.device, self.stop = where, device, threading.Event()
        self.page = Page(pipeline, mlflow_address(pipeline.root))
        self.plan: Plan
        self.chosen: list[str] = []
        self.has_changed = False  # whether any stage was trained or restored
        self.oom_cells: list[str] = []  # that ran out of memory beside others
        self.slots: list[Slot] = [whole_machine()]
        self.futures: dict[str, PrefectFuture[RunState]] = {}
        self.ended: dict[str, RunState] = {}  # by a stage's title
        self.pool: Pool | None = None
        self.state = GridRun(watch.describe(os.getpid()), time.time(), url=runtime.flow_run.ui_url)
        self._exits, self._lock = ExitStack(), threading.Lock()

    # --- the steps of a run, as a flow calls them -----------------------------------------------------

    def choose(self, patterns: list[str] | None) -> None:
        """Plan, and see which cells are selected."""
        if self.where != HERE:
            self._check_pool()
        elif self.device:
            raise ResgridError("device: is for a work pool; here, RESGRID_DEVICE says what cells train on.")
        self.plan = await_plan(self.pipeline, self.num_slots, self.stop)
        cells = choose(self.plan.params, ["*"] if patterns is None else patterns)
        self.chosen = [cell.id for cell in cells]

    def run(self, title: str, slot: Slot | None = None) -> bool:
        """Bring one stage up to date while nothing else runs; whether it is."""
        self.ended[title] = stage(title, slot or whole_machine(), self, return_state=True)
        return self.ended[title].is_completed()

    def submit(self, title: str, slot: Slot, then: Callable[[Slot], None]) -> None:
        """Begin to bring a stage up to date on a free slot, which `then` gets back after the last retry."""
        self.futures[title] = future = stage.submit(title, slot, self)
        future.add_done_callback(lambda _: then(slot))

    def wait(self) -> None:
        """Until all that was submitted has ended."""
        for title, future in self.futures.items():
            future.wait()
            self.ended[title] = future.state

    def sync(self) -> None:
        """Complete the runs in MLflow."""
        self.ended["sync"] = sync(self, return_state=True)

    def queue(self) -> list[str]:
        """The chosen cells that are not up to date, the longest first; the others get a task that says so."""
        if self.has_changed:  # the data
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

    def verdict(self) -> RunState:
        """Completed, or Failed with each failure: what, why, the end of its log and where the rest is."""
        failures = {
            title: state.result(raise_on_failure=False)
            for title, state in self.ended.items()
            if state.is_failed() or state.is_crashed()
        }
        num = Counter(each.became for each in self.state.cells.values())
        num["failed"] = sum(title in self.state.cells for title in failures)
        words = (TRAINED, RESTORED, UNCHANGED, "failed")
        summary = ", ".join(f"{num[word]} {word}" for word in words if num[word])
        if not failures:
            return Completed(message=f"{len(self.chosen)} cells: {summary}" if self.chosen else "up to date")
        reasons = "\n".join(str(error) for error in failures.values())
        message = f"{', '.join(failures)} failed ({summary or 'nothing was trained'}).\n{reasons}"
        return Failed(message=message)

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
        if self._is_fresh(step) and not (title == EVALUATE and self.has_changed):
            return Completed(name="Up to date")
        if force and attempt == 1:  # or an interrupted training would go on
            delete(checkpoint_files(checkpoint_folder(self.pipeline.root, self.pipeline.folder), title))
        state, became = None, ""

        def follow(is_running: bool) -> None:
            """Note that it has begun, or that it waits for another worker."""
            now = State.RUNNING if is_running else State.QUEUED
            self._set(title, CellRun(now, attempt, slot.name, time.time() if is_running else None))

        try:
            if self.pool and step.cell:
                self.pool.train(title, step.stage, follow)
                has_run = True
            else:
                follow(True)
                has_run = reproduce(self.pipeline, step.stage, slot.env, force=force, stop=self.stop)
            became = TRAINED if has_run else RESTORED if step.state == "stale" else UNCHANGED
            self.has_changed |= became != UNCHANGED
        except Stopped:
            return Cancelled(message="ended together with its run")
        except StageFailed as failure:
            if failure.fault == Fault.MEMORY and self._num_running() > 1:
                state = State.QUEUED
                self.oom_cells.append(title)
            elif failure.fault and failure.fault.transient and attempt <= RETRIES:
                state = State.QUEUED
                log.info("%s: %s: a transient fault, so it is tried again", title, failure.why)
            raise
        finally:
            self._set(title, CellRun(state, attempt, became=became))
        if has_run and step.cell:
            self.page.link(self.plan.params.name, title)
        return Completed(name="Completed" if has_run else became.capitalize())

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
            slot, pipeline = self.slots[0], self.pipeline
            seconds = expect(self.plan.params, pipeline.folder, pipeline.root, slot.threads, slot.on_card)
            known = {title: seconds.get(self.plan.by_title[title].stage) for title in at_work}
            self.state.num_slots = max(1, self._num_running()) if self.pool else len(self.slots)
            self.state.until = finish_time(known, at_work, self.state.num_slots)
            self.state.save(self.pipeline.root, self.pipeline.folder)
            text = f"{len(cells) - len(at_work)} of {len(cells)} cells done"
        if cells:
            text += f"; {self.state.time_left}" if at_work else ""
            self.page.progress(100 * (1 - len(at_work) / len(cells)), text)

    def _is_fresh(self, step: Step) -> bool:
        """Whether there is nothing to do: up to date, and with `force` trained since that was asked for.

        So of two forced runs at once the second, which waited, does not train again what the first has.
        """
        if step.state != "up to date" or not self.force or not step.cell:
            return step.state == "up to date"
        record = self.pipeline.record(step.stage)
        return bool(record and record.status == State.DONE and (record.ended or 0.0) > self.state.started)

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
        remote_name(self.pipeline)

    def _open_pool(self, num_cells: int) -> None:
        """Let the workers of a pool train the cells: these get the data, and each cell a run at once."""
        spec = RunSpec.of(self.pipeline, self.device)
        push(self.pipeline, ["--run-cache", *DATA_STAGES], self.stop)
        client = self._exits.enter_context(get_client(sync_client=True))
        self.pool = Pool(client, self.where, self.pipeline, spec, self.stop)
        self.slots = [Slot(self.where, whole_machine().threads)] * num_cells
