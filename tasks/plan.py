"""What train-all would do: which stages are stale, why, in which order, and how long it takes.

DVC alone decides what is stale; why a cell is, is the answer of `find_runs`. The longest cells come first, so
that the last ones to run are short and the slots end together.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from resgrid.cell_states import CellState, cell_states
from resgrid.config import Params, load_params
from resgrid.cost import expect, makespan, timings, work
from resgrid.dvc.ask import Answer, Busy, ask
from resgrid.dvc.lock import repair
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import pause
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.progress import duration
from resgrid.provenance import check_links
from tasks.slots import Slot, share

BUSY_SECONDS = 2.0  # between two looks whether DVC answers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A stage, and what would become of it."""

    stage: str
    cell: Cell | None
    state: Literal["up to date", "stale", "after"]  # `after`: looked at again after what runs before it
    why: tuple[str, ...] = ()
    seconds: float | None = None  # as far as it is known

    @property
    def title(self) -> str:
        return self.cell.id if self.cell else self.stage

    def __str__(self) -> str:
        if self.state == "stale":
            time = f"  ({duration(self.seconds)})" if self.seconds is not None else ""
            return f"stale: {'; '.join(self.why[:3])}{' …' * (len(self.why) > 3)}{time}"
        return "up to date" if self.state == "up to date" else f"up to date so far: {self.why[0]}"


@dataclass(frozen=True)
class Plan:
    """Every stage of a pipeline in the order of its dvc.yaml, and what the machine has for them."""

    pipeline: Pipeline
    params: Params
    steps: tuple[Step, ...]
    slots: tuple[Slot, ...]

    @cached_property
    def by_title(self) -> dict[str, Step]:
        return {step.title: step for step in self.steps}

    @property
    def cells(self) -> list[Step]:
        return [step for step in self.steps if step.cell]

    @property
    def seconds(self) -> float | None:
        """Until all that is stale has run; None while the time of any cell of it is unknown."""
        stale = [step for step in self.steps if step.state == "stale"]
        if any(step.seconds is None for step in stale if step.cell):
            return None
        cells = [step.seconds or 0.0 for step in longest_first(step for step in stale if step.cell)]
        return makespan(cells, len(self.slots)) + sum(step.seconds or 0.0 for step in stale if not step.cell)

    def as_dict(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline.name,
            "slots": [{"name": slot.name, "threads": slot.threads} for slot in self.slots],
            "seconds": self.seconds,
            "stages": [asdict(step) | {"cell": step.cell.id if step.cell else None} for step in self.steps],
        }

    def __str__(self) -> str:
        width = max(len(step.title) for step in self.steps)
        lines = [f"  {step.title:{width}}  {step}" for step in self.steps] + [""]
        num = Counter(step.state for step in self.steps)
        if not num["stale"]:
            return "\n".join([*lines, "Everything is up to date: nothing would run."])
        threads, names = self.slots[0].threads, ", ".join(slot.name for slot in self.slots[:8])
        time = "unknown until each architecture has been trained or timed (`resgrid plan --measure`)"
        if self.seconds is not None:
            time = f"{duration(self.seconds)}, less what DVC's run cache restores"
        lines += [
            f"{num['stale']} of {len(self.steps)} stages would run, {num['up to date']} are up to date, "
            f"{num['after']} depend on what runs.",
            f"By train-all: {len(self.slots)} at a time ({names}; {threads} threads each). Expected: {time}.",
        ]
        return "\n".join(lines)


def make_plan(pipeline: Pipeline, slots: int | None = None, *, measure: bool = False) -> Plan:
    """Ask DVC and the machine; a dvc.lock that a kill has cut is put back first.

    With `measure` a training step of each stale architecture is timed. Raises Busy while a `dvc` runs a
    stage, and ResgridError for a params.yaml, dvc.yaml or dvc.lock that cannot be used.
    """
    params = load_params(pipeline.folder / "params.yaml")
    check_links(pipeline.folder)
    repair(pipeline)
    cells, answer = expand(params), ask(pipeline)
    if missing := [cell.id for cell in cells if cell.stage not in answer.needs]:
        raise ResgridError(
            f"{pipeline.folder / 'dvc.yaml'}: has no stage for {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}, which params.yaml asks for."
        )
    states = {each.cell.stage: each for each in cell_states(cells, pipeline.folder, pipeline.root)}
    steps = list(_steps(answer, states))
    stale = [step.cell for step in steps if step.cell and step.state == "stale"]
    shares = slots_for(pipeline, params, stale or cells, slots)
    threads, on_card = shares[0].threads, shares[0].on_card
    seconds = expect(params, pipeline.folder, pipeline.root, threads, on_card, measure=measure)
    timed = tuple(replace(step, seconds=seconds.get(step.stage)) for step in steps)
    return Plan(pipeline, params, timed, tuple(shares))


def await_plan(pipeline: Pipeline, slots: int | None, stop: threading.Event) -> Plan:
    """The plan as DVC sees it now; a `dvc` that runs a stage is waited for. Raises Stopped after `stop`."""
    waiting = False
    while True:
        try:
            return make_plan(pipeline, slots)
        except Busy as busy:
            if not waiting:
                log.info("%s Waiting for it.", busy)
            waiting = True
            pause(stop, BUSY_SECONDS)


def slots_for(pipeline: Pipeline, params: Params, cells: Sequence[Cell], slots: int | None) -> list[Slot]:
    """The machine's slots for these cells, by the memory that earlier runs took of a card."""
    peaks: dict[str, int] = {}
    for cell, timing in timings(expand(params), pipeline.folder):
        if timing.get("device") == "cuda":
            peaks[cell.architecture] = max(peaks.get(cell.architecture, 0), timing["peak_memory_bytes"])
    return share(len(cells), peaks, [cell.architecture for cell in cells], slots)


def longest_first(steps: Iterable[Step]) -> list[Step]:
    """By expected time, or as long as there is none by arithmetic: GFLOP x epochs."""
    steps = list(steps)
    if all(step.seconds is not None for step in steps):
        return sorted(steps, key=lambda step: step.seconds or 0.0, reverse=True)
    return sorted(steps, key=lambda step: work(step.cell) if step.cell else 0.0, reverse=True)


def _steps(answer: Answer, states: Mapping[str, CellState]) -> Iterator[Step]:
    def upstream(stage: str) -> list[str]:
        return [name for each in answer.needs[stage] for name in (each, *upstream(each))]

    for stage in answer.needs:
        state = states.get(stage)
        cell = state.cell if state else None
        if stage in answer.status:
            yield Step(stage, cell, "stale", tuple(_reasons(answer.status[stage], state)))
        elif waits := [name for name in dict.fromkeys(upstream(stage)) if name in answer.status]:
            more = f" and {len(waits) - 1} more" if len(waits) > 1 else ""
            yield Step(stage, cell, "after", (f"after {waits[0]}{more}",))
        else:
            yield Step(stage, cell, "up to date")


def _reasons(status: list[Any], state: CellState | None) -> list[str]:
    """Why a stage is stale: a cell's own reason, else what DVC names."""
    if state and state.reason:
        return [state.reason]
    words = {"deleted": "is missing", "not in cache": "is not in DVC's cache"}
    reasons = []
    for entry in status:
        if isinstance(entry, str):
            reasons.append("its command has changed" if entry == "changed command" else entry)
            continue
        for path, how in (item for kind in entry.values() for item in kind.items()):
            if how == "new":  # a dependency that dvc.lock does not have
                return ["has never run here"]
            keys = how if isinstance(how, dict) else {path: how}  # the params of a file
            reasons += [f"{key} {words.get(value, 'has changed')}" for key, value in keys.items()]
    return reasons
