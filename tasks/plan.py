"""What train-all would do, and why, how long it would take and what it needs: before anything runs.

DVC alone decides what is stale (`dvc status`); here that is put into words, with a param's old value of
dvc.lock and its new one, and into an order: the longest cells first, so that the last ones to run are short
and the slots end together.
"""

from __future__ import annotations

import heapq
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from resgrid import mps
from resgrid.config import Params, load_params
from resgrid.dvc.ask import Answer, ask, cache_folder, runs_before
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import repair
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.progress import amount, duration
from tasks.slots import Slot, share

# GFLOP of training with one image, forward and backward, a multiplication and an addition counted as two.
# They put the architectures in order, and carry a measured speed over to one that has not been measured; one
# that is not here comes first, and its time is unknown until a cell of it has been trained.
GFLOP = {
    "resnet20": 0.24, "resnet32": 0.41, "resnet44": 0.58, "resnet56": 0.75, "resnet110": 1.52,
    "resnet10": 1.52, "resnet18": 3.33, "resnet26": 5.14,
    "vgg16": 1.88, "resnet20v1": 0.24,
}  # fmt: skip
# Parameters in millions, for the size of a weights file; one that is not here counts as the largest.
MILLIONS = {
    "resnet20": 0.27, "resnet32": 0.47, "resnet44": 0.66, "resnet56": 0.86, "resnet110": 1.74,
    "resnet10": 4.91, "resnet18": 11.18, "resnet26": 17.46,
    "vgg16": 15.00, "resnet20v1": 0.27,
}  # fmt: skip
COPIES = 4  # of a cell's weights: workspace, DVC's cache, and MLflow's artifact and model
CIFAR10_BYTES = {"download": 171_000_000, "preprocess": 185_000_000}
# Images/s grow with the threads to this power: 1,572 with two against 958.5 with one (ResNet-20).
THREADS_POWER = 0.71

State = Literal["up to date", "stale", "after", "running"]


@dataclass(frozen=True)
class Step:
    """A stage, and what would become of it."""

    stage: str
    cell: Cell | None
    state: State  # `after`: up to date as it stands, looked at again after what runs before it
    why: tuple[str, ...]
    seconds: float | None = None  # as far as it is known
    since: float | None = None  # seconds since the epoch, of one that runs

    @property
    def title(self) -> str:
        return self.cell.id if self.cell else self.stage


@dataclass(frozen=True)
class Plan:
    """Every stage of a pipeline in the order of its dvc.yaml, and what the machine has for them."""

    pipeline: Pipeline
    params: Params
    steps: tuple[Step, ...]
    slots: tuple[Slot, ...]
    disk_needed: int  # bytes
    disk_free: int  # on the fuller one of the disks that take them
    cache: Path  # DVC's
    busy: str = ""  # whose stage keeps DVC from answering; then this is what it said before
    asked: float = 0.0  # when it did, in seconds since the epoch

    @cached_property
    def by_title(self) -> dict[str, Step]:
        return {step.title: step for step in self.steps}

    @property
    def cells(self) -> list[Step]:
        return [step for step in self.steps if step.cell]

    @property
    def seconds(self) -> float | None:
        """Until all that is stale has run; None while the time of any of it is unknown."""
        stale = longest_first(step for step in self.cells if step.state == "stale")
        others = [step for step in self.steps if step.state == "stale" and not step.cell]
        if any(step.seconds is None for step in stale):
            return None
        rest = sum(step.seconds or 0.0 for step in others)
        return makespan([step.seconds or 0.0 for step in stale], len(self.slots)) + rest

    def as_dict(self) -> dict[str, Any]:
        return {
            "pipeline": self.pipeline.name,
            "slots": [{"name": slot.name, "threads": slot.threads} for slot in self.slots],
            "seconds": self.seconds,
            "disk_needed_bytes": self.disk_needed,
            "disk_free_bytes": self.disk_free,
            "busy": self.busy,
            "asked": self.asked,
            "stages": [
                {
                    "stage": step.stage,
                    "cell": step.cell.id if step.cell else None,
                    "state": step.state,
                    "why": list(step.why),
                    "seconds": step.seconds,
                    "since": step.since,
                }
                for step in self.steps
            ],
        }

    def __str__(self) -> str:
        lines = []
        if self.busy:
            ago = duration(time.time() - self.asked)
            lines += [
                f"DVC is busy: {self.busy}. This is what it said {ago} ago, and what has ended since:",
                "",
            ]
        width = max(len(step.title) for step in self.steps)
        lines += [f"  {step.title:{width}}  {_said(step)}" for step in self.steps]
        num = Counter(step.state for step in self.steps)
        total = f"{num['stale']} of {len(self.steps)} stages would run, {num['up to date']} are up to date"
        if num["running"]:
            total += f", {num['running']} run now"
        threads = self.slots[0].threads
        each = f"{threads} thread{'s' * (threads > 1)} each"
        slots = f"{len(self.slots)} at a time ({', '.join(slot.name for slot in self.slots[:8])}; {each})"
        if len(self.slots) == 1:
            is_one = sum(step.state == "stale" for step in self.cells) == 1
            slots = f"one {'cell to train' if is_one else 'at a time'} ({self.slots[0].name}; {each})"
        unknown = "unknown until a cell of every architecture has been trained (`resgrid cost` estimates it)"
        takes = (
            unknown
            if self.seconds is None
            else f"{duration(self.seconds)}, less what DVC's run cache restores"
        )
        elsewhere = not self.cache.is_relative_to(self.pipeline.root)
        if not num["stale"] and not num["running"]:
            return "\n".join([*lines, "", "Everything is up to date: nothing would run."])
        return "\n".join(
            [
                *lines,
                "",
                f"{total}.",
                f"By train-all: {slots}. Expected time: {takes}.",
                f"Disk: {amount(self.disk_needed, 'B')} needed, {amount(self.disk_free, 'B')} free"
                + (f" (DVC's cache is {self.cache})." if elsewhere else "."),
            ]
        )


def make_plan(pipeline: Pipeline, slots: int | None = None, *, now: bool = False) -> Plan:
    """Ask DVC and the machine.

    While a stage runs, DVC answers nothing; then its last answer is shown, brought up to date by the records
    of the stages. Raises Busy if there is none, or with `now`, which wants no other; raises ResgridError for
    a params.yaml or a dvc.yaml that cannot be used.
    """
    params = load_params(pipeline.folder / "params.yaml")
    repair(pipeline, threading.Event())
    cells = {cell.stage: cell for cell in expand(params)}
    answer = ask(pipeline, now)
    if missing := [cell.id for stage, cell in cells.items() if stage not in answer.needs]:
        raise ResgridError(
            f"{pipeline.folder / 'dvc.yaml'}: has no stage for {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}, which params.yaml asks for."
        )
    lock = _read_yaml(pipeline.folder / "dvc.lock").get("stages", {}) if answer.status else {}
    steps = _steps(pipeline, answer, lock, cells)
    stale = [step.cell for step in steps if step.cell and step.state == "stale"]
    shares = slots_for(pipeline, params, stale or list(cells.values()), slots)
    seconds = expect(pipeline, params, steps, shares[0])
    cache = cache_folder(pipeline.root)
    return Plan(
        pipeline=pipeline,
        params=params,
        steps=tuple(replace(step, seconds=seconds.get(step.stage)) for step in steps),
        slots=tuple(shares),
        disk_needed=sum(_needs(step, params, lock.get(step.stage, {})) for step in steps),
        disk_free=min(
            shutil.disk_usage(folder).free for folder in (pipeline.folder, cache) if folder.is_dir()
        ),
        cache=cache,
        busy=answer.busy,
        asked=answer.asked,
    )


def slots_for(pipeline: Pipeline, params: Params, cells: Sequence[Cell], slots: int | None) -> list[Slot]:
    """The machine's slots for these cells, by the memory that earlier runs took of a card."""
    peaks: dict[str, int] = {}
    for cell, timing in _timings(pipeline, expand(params)):
        if timing.get("device") == "cuda":
            peaks[cell.architecture] = max(peaks.get(cell.architecture, 0), timing["peak_memory_bytes"])
    return share(len(cells), peaks, [cell.architecture for cell in cells], slots)


def longest_first(steps: Iterable[Step]) -> list[Step]:
    """By expected time, or as long as there is none by arithmetic: GFLOP x epochs."""
    steps = list(steps)
    known = all(step.seconds is not None for step in steps)
    return sorted(steps, key=lambda step: (step.seconds or 0.0) if known else _cost(step), reverse=True)


def makespan(seconds: Iterable[float], num_slots: int) -> float:
    """When the last of these ends, each started in turn on the slot that is free first."""
    ends = [0.0] * num_slots
    for taken in seconds:
        heapq.heapreplace(ends, ends[0] + taken)
    return max(ends)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        return YAML(typ="safe").load(file) or {}
    except FileNotFoundError:
        return {}
    except YAMLError as error:
        raise ResgridError(f"{file}: cannot be read: {error}") from None


def _steps(
    pipeline: Pipeline, answer: Answer, lock: Mapping[str, Any], cells: Mapping[str, Cell]
) -> list[Step]:
    before = runs_before(answer.needs)
    values = _read_yaml(pipeline.folder / "params.yaml")
    own: dict[str, Step] = {}
    for stage in answer.needs:
        record = pipeline.record(stage)
        step = Step(stage, cells.get(stage), "up to date", ())
        if record and record.is_running:
            step = replace(step, state="running", since=record.started)
        elif reasons := _reasons(answer.status.get(stage, []), lock.get(stage), values):
            step = replace(step, state="stale", why=tuple(reasons))
        own[stage] = step
    steps = []
    for stage, step in own.items():
        waits = [name for name in before[stage] if own[name].state in ("stale", "running")]
        if waits and step.state == "up to date":
            more = f" and {len(waits) - 1} more" if len(waits) > 1 else ""
            verb = "runs" if own[waits[0]].state == "running" else "would run"
            step = replace(step, state="after", why=(f"{waits[0]}{more} {verb} before it",))
        steps.append(step)
    return steps


_OUTS = {"deleted": "is missing", "not in cache": "is not in DVC's cache"}


def _reasons(status: list[Any], recorded: Mapping[str, Any] | None, values: Mapping[str, Any]) -> list[str]:
    """Why DVC would run a stage, each in one phrase; `recorded` is its part of dvc.lock."""
    if status and not recorded:
        return ["has never run here"]
    reasons, params = list[str](), list[str]()
    for entry in status:
        if isinstance(entry, str):
            reasons.append({"changed command": "its command has changed"}.get(entry, entry))
            continue
        for path, how in entry.get("changed deps", {}).items():
            if isinstance(how, dict):  # the params of a file
                old = (recorded or {}).get("params", {}).get(path, {})
                for key in how:
                    now = _at(values, key)
                    params += [
                        f"{key}{leaf}: {_shown(a)} → {_shown(b)}" for leaf, a, b in _leaves(old.get(key), now)
                    ]
            else:
                reasons.append(f"{path} {'is missing' if how == 'deleted' else 'has changed'}")
        outs = list(entry.get("changed outs", {}).items())
        if outs:
            path, how = outs[0]
            more = f" (and {len(outs) - 1} more)" if len(outs) > 1 else ""
            reasons.append(f"{path} {_OUTS.get(how, 'is another than DVC recorded')}{more}")
    return reasons + params


def _at(values: Any, key: str) -> Any:
    """The value at `a.b.c`; None where there is none."""
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _leaves(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(path below, old, new) wherever two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*new, *old])
        return [
            (f".{key}{path}", a, b)
            for key in keys
            for path, a, b in _leaves(old.get(key), new.get(key))
            if a != b
        ]
    return [("", old, new)] if old != new else []


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- how long ---------------------------------------------------------------------------------------


def _timings(pipeline: Pipeline, cells: Iterable[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    """What earlier runs took, whichever door they came through."""
    runs = pipeline.folder / "runs"
    found = []
    for cell in cells:
        try:
            timing = json.loads((runs / cell.id / "timing.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if isinstance(timing, dict) and timing.get("images_per_second"):
            found.append((cell, timing))
    return found


def expect(pipeline: Pipeline, params: Params, steps: Iterable[Step], slot: Slot) -> dict[str, float]:
    """Seconds for each stage of which anything is known.

    A stage that ran here before takes as long again, unless its epochs or its data changed. A cell otherwise
    goes at the speed of its architecture's other cells, or of another architecture with the same GFLOP/s:
    on a CPU by the threads that it has here, on a card by how many share it here.
    """
    images = _num_train(pipeline)
    speeds: dict[str, list[float]] = {}
    for cell, timing in _timings(pipeline, expand(params)):
        if (timing["device"] == "cuda") == (slot.card is not None):
            if slot.card:
                before = timing.get("sharing") or 1
                scale = mps.gain(slot.sharing) / slot.sharing / (mps.gain(before) / before)
            else:
                scale = (slot.threads / timing["threads"]) ** THREADS_POWER
            speeds.setdefault(cell.architecture, []).append(timing["images_per_second"] * scale)
    known = [GFLOP[name] * median(found) for name, found in speeds.items() if name in GFLOP]
    flops = median(known) if known else None
    seconds = {}
    for step in steps:
        record = pipeline.record(step.stage)
        changed = any(".epochs:" in reason or reason.startswith("data/") for reason in step.why)
        if record and record.seconds and not changed:
            seconds[step.stage] = record.seconds
        elif step.cell and images:
            name = step.cell.architecture
            if name in speeds:
                seconds[step.stage] = step.cell.recipe.epochs * images / median(speeds[name])
            elif flops and name in GFLOP:
                seconds[step.stage] = step.cell.recipe.epochs * images * GFLOP[name] / flops
    return seconds


def _num_train(pipeline: Pipeline) -> int | None:
    # Read here and not by resgrid.data, which imports torch and so takes 2 s.
    try:
        meta = json.loads((pipeline.folder / "data/processed/meta.json").read_text(encoding="utf-8"))
        return int(meta["num_images"]["train"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None


def _cost(step: Step) -> float:
    if step.cell is None:
        return 0.0
    return GFLOP.get(step.cell.architecture, max(GFLOP.values())) * step.cell.recipe.epochs


# --- how much disk ----------------------------------------------------------------------------------


def _needs(step: Step, params: Params, recorded: Mapping[str, Any]) -> int:
    """Bytes that a stage that would run adds: what it made last time, or what is known of it."""
    if step.state != "stale":
        return 0
    if step.cell:
        return int(COPIES * 4e6 * MILLIONS.get(step.cell.architecture, max(MILLIONS.values())))
    known = CIFAR10_BYTES.get(step.stage, 0) if params.data.source == "cifar10" else 0
    return 2 * (sum(out.get("size", 0) for out in recorded.get("outs", ())) or known)


def _said(step: Step) -> str:
    time_left = f"  ({duration(step.seconds)})" if step.seconds is not None and step.state == "stale" else ""
    match step.state:
        case "running":
            since = f" for {duration(time.time() - step.since)}" if step.since else ""
            return f"running{since}"
        case "stale":
            return f"would run: {'; '.join(step.why[:3])}{' …' * (len(step.why) > 3)}{time_left}"
        case "after":
            return f"up to date so far: {step.why[0]}"
        case "up to date":
            return "up to date"
