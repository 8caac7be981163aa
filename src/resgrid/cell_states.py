"""The state of every cell in one word, with its reason: whatever shows a cell's state takes it from here.

`find_runs` says whose result lies in the cell's folder, the stage's record what became of the latest attempt,
and train-all's file, while its process lives, which cells it has queued and which run, in a pool too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from resgrid import watch
from resgrid.grid import Cell
from resgrid.progress import duration
from resgrid.run_status import STATUSES, Run, find_runs
from resgrid.stage_record import Fault, Record, State, read_record, read_state, state_file, write_state

GRID = "train-all"  # the name of train-all's file, beside the records of the stages
# How a cell became current in a run of train-all.
TRAINED, RESTORED, UNCHANGED = "trained", "restored", "up to date"
WORDS = (*STATUSES, *(state.value for state in State if state.value not in STATUSES))


@dataclass
class CellRun:
    """A cell in a run of train-all."""

    state: State | None = None  # queued or running; None when it has ended
    attempts: int = 0
    slot: str = ""  # such as `cpu 1/2`
    began: float | None = None  # the latest attempt, in seconds since the epoch
    became: str = ""  # TRAINED, RESTORED or UNCHANGED, once it is current


@dataclass
class GridRun:
    """A run of train-all, in `.resgrid/state/<pipeline>/train-all.json` while its process lives."""

    by: str  # the process, by `watch.describe`
    started: float  # seconds since the epoch
    num_slots: int = 0
    url: str | None = None  # its page in Prefect
    until: float | None = None  # when the last cell should end, as far as it is known
    cells: dict[str, CellRun] = field(default_factory=dict)  # those that were chosen, by their ids

    @property
    def is_alive(self) -> bool:
        return watch.alive(self.by)

    @property
    def time_left(self) -> str:
        left = "unknown until a cell of every architecture has been trained"
        return f"time left: {left if self.until is None else duration(max(0.0, self.until - time.time()))}"

    def save(self, root: Path, pipeline: Path) -> None:
        with suppress(OSError):  # a disk that is full or cannot be written, which others report
            write_state(state_file(root, pipeline, GRID), asdict(self))


def read_grid_run(root: Path, pipeline: Path) -> GridRun | None:
    """The run of train-all that is at work, or was killed; None if the last one has ended by itself."""
    content = read_state(state_file(root, pipeline, GRID))
    try:
        cells = {name: CellRun(**of_cell) for name, of_cell in content["cells"].items()}
        for each in cells.values():
            each.state = State(each.state) if each.state else None
        return GridRun(**content | {"cells": cells})
    except (TypeError, KeyError, ValueError, AttributeError):  # none, or an earlier version's
        return None


@dataclass(frozen=True)
class CellState:
    """A cell's result and the latest attempt at it."""

    run: Run  # what its folder holds
    record: Record | None = None  # of the latest attempt on this machine
    at_work: CellRun | None = None  # while a living train-all has it queued or running, also elsewhere

    @property
    def cell(self) -> Cell:
        return self.run.cell

    @property
    def word(self) -> str:
        """`queued` or `running`; else the result's status; without a result, how the latest attempt ended."""
        if self.record and self.record.is_running:
            return State.RUNNING
        if self.at_work and self.at_work.state:
            return self.at_work.state
        attempt = self.record if self.record and self.record.fault != Fault.NO_RESULT else None
        if attempt and self.run.status in ("missing", "failed") and attempt.state != State.DONE:
            return attempt.state
        return self.run.status

    @property
    def reason(self) -> str:
        """Why it is not completed, as far as it is known."""
        if self.word == State.FAILED and self.record and self.record.why:
            return self.record.why
        return "" if self.word in (State.QUEUED, State.RUNNING) else self.run.reason or ""

    @property
    def since(self) -> float | None:
        """When the attempt that runs began, in seconds since the epoch."""
        if self.record and self.record.is_running:
            return self.record.started
        return self.at_work.began if self.at_work and self.at_work.state == State.RUNNING else None


def cell_states(cells: Sequence[Cell], pipeline: Path, root: Path) -> list[CellState]:
    """The state of each cell of the pipeline in the folder `pipeline` of the project `root`, in order."""
    grid = read_grid_run(root, pipeline)
    at_work = grid.cells if grid and grid.is_alive else {}
    return [
        CellState(run, read_record(root, pipeline, run.cell.stage), at_work.get(run.cell.id))
        for run in find_runs(cells, pipeline)
    ]
