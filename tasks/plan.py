"""What train-all would do, and why, how long it would take and what it needs: before anything runs.

DVC alone decides what is stale (`stages.py` asks it); here that is put into words, with the old value of a
param from dvc.lock and the new one from params.yaml, and into an order: the longest cells first, so that the
last ones to run are short and the slots end together.
"""

from __future__ import annotations

import heapq
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil

from resgrid.config import Architecture, Params, load_params
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.leftovers import cache_folder
from resgrid.progress import duration
from tasks.reproduce import Pipeline
from tasks.slots import Slot, share

# GFLOP of training with one image, forward and backward, a multiplication and an addition counted as two.
# They put the architectures in order, and carry a measured speed over to one that has not been measured.
GFLOP: dict[Architecture, float] = {
    "resnet20": 0.24, "resnet32": 0.41, "resnet44": 0.58, "resnet56": 0.75, "resnet110": 1.52,
    "resnet10": 1.52, "resnet18": 3.33, "resnet26": 5.14,
    "vgg16": 1.88,
}  # fmt: skip
# Parameters in millions, for the size of a weights file.
MILLIONS: dict[Architecture, float] = {
    "resnet20": 0.27, "resnet32": 0.47, "resnet44": 0.66, "resnet56": 0.86, "resnet110": 1.74,
    "resnet10": 4.91, "resnet18": 11.18, "resnet26": 17.46,
    "vgg16": 15.00,
}  # fmt: skip
COPIES = 4  # of a cell's weights: workspace, DVC's cache, and MLflow's artifact and model
CIFAR10_BYTES = {"download": 171_000_000, "preprocess": 185_000_000}
# Images/s grow with the threads to this power: 1,572 with two against 958.5 with one (ResNet-20).
THREADS_POWER = 0.71

WAYS_ON = {  # by what DVC says
    "not a git repository": ". A checkout that was downloaded has no .git: run `git init` there, or have DVC "
    "work without git by `dvc config --local core.no_scm true`.",
    "is git-ignored": " DVC keeps nothing in such a folder: take the rule out of .gitignore, or move it.",
    "dvc.lock' validation failed": ". Another version of DVC may have written it: `dvc --version` is "
    "this one's; `git checkout` brings back the last file that was committed.",
    "validation failed": ". `dvc stage list` in that folder shows the line.",
    "extra keys not allowed": ". Another version of DVC may have written it: `dvc --version` is this one's.",
}

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
        width = max(len(step.title) for step in self.steps)
        lines = [f"  {step.title:{width}}  {_said(step)}" for step in self.steps]
        num = Counter(step.state for step in self.steps)
        total = f"{num['stale']} of {len(self.steps)} stages would run, {num['up to date']} are up to date"
        if num["running"]:
            total += f", {num['running']} run now"
        threads = self.slots[0].threads
        each = f"{threads} thread{'s' * (threads > 1)} each"
        slots = f"{len(self.slots)} at a time ({', '.join(slot.name for slot in self.slots[:8])}; {each})"
        if len(self.slots) == 1:
            slots = f"One at a time ({self.slots[0].name}; {each})"
        takes = "unknown until a cell has been trained" if self.seconds is None else duration(self.seconds)
        elsewhere = not self.cache.is_relative_to(self.pipeline.root)
        if not num["stale"] and not num["running"]:
            return "\n".join([*lines, "", "Everything is up to date: nothing would run."])
        return "\n".join(
            [
                *lines,
                "",
                f"{total}.",
                f"{slots}. Expected time: {takes}.",
                f"Disk: {_bytes(self.disk_needed)} needed, {_bytes(self.disk_free)} free"
                + (f" (DVC's cache is {self.cache})." if elsewhere else "."),
            ]
        )


def make_plan(pipeline: Pipeline, slots: int | None = None) -> Plan:
    """Ask DVC and the machine; works while stages run. 240 cells take 5 s.

    Raises ResgridError for a params.yaml or a dvc.yaml that cannot be used.
    """
    params = load_params(pipeline.folder / "params.yaml")
    cells = {cell.stage: cell for cell in expand(params)}
    found = _ask_dvc(pipeline)
    names = {stage["name"] for stage in found}
    if missing := [cell.id for stage, cell in cells.items() if stage not in names]:
        raise ResgridError(
            f"{pipeline.folder / 'dvc.yaml'}: has no stage for {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}, which params.yaml asks for."
        )
    steps = _steps(pipeline, found, cells)
    stale = [step.cell for step in steps if step.cell and step.state == "stale"]
    shares = slots_for(pipeline, params, stale or list(cells.values()), slots)
    seconds = expect(pipeline, params, steps, shares[0])
    cache = cache_folder(pipeline.root)
    return Plan(
        pipeline=pipeline,
        params=params,
        steps=tuple(replace(step, seconds=seconds.get(step.stage)) for step in steps),
        slots=tuple(shares),
        disk_needed=sum(_needs(step, params, stage) for step, stage in zip(steps, found, strict=True)),
        disk_free=min(
            shutil.disk_usage(folder).free for folder in (pipeline.folder, cache) if folder.is_dir()
        ),
        cache=cache,
    )


def slots_for(pipeline: Pipeline, params: Params, cells: Sequence[Cell], slots: int | None) -> list[Slot]:
    """The machine's slots for these cells, by the memory that earlier runs took of a card."""
    peaks: dict[Architecture, int] = {}
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


def _ask_dvc(pipeline: Pipeline) -> list[dict[str, Any]]:
    # -P: or Python would find this folder's modules before all others
    command = [sys.executable, "-P", str(Path(__file__).with_name("stages.py")), str(pipeline.folder)]
    done = subprocess.run(command, cwd=pipeline.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        way_on = next((way for words, way in WAYS_ON.items() if words in said), "")
        raise ResgridError(f"{pipeline.folder / 'dvc.yaml'}: DVC cannot use it: {said}{way_on}")
    stages: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return stages


def _steps(pipeline: Pipeline, found: list[dict[str, Any]], cells: Mapping[str, Cell]) -> list[Step]:
    before = _runs_before(found)
    own: dict[str, tuple[State, tuple[str, ...], float | None]] = {}
    for stage in found:
        if stage["running"]:
            own[stage["name"]] = ("running", (), _since(pipeline, stage))
        elif reasons := _reasons(stage):
            own[stage["name"]] = ("stale", tuple(reasons), None)
        else:
            own[stage["name"]] = ("up to date", (), None)
    steps = []
    for stage in found:
        state, why, since = own[stage["name"]]
        waits = [name for name in before[stage["name"]] if own[name][0] in ("stale", "running")]
        if waits and state == "up to date":
            more = f" and {len(waits) - 1} more" if len(waits) > 1 else ""
            verb = "runs" if own[waits[0]][0] == "running" else "would run"
            state, why = "after", (f"{waits[0]}{more} {verb} before it",)
        steps.append(Step(stage["name"], cells.get(stage["name"]), state, why, since=since))
    return steps


def _runs_before(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    """For each stage the stages whose outputs it depends on, directly or through others."""
    makers = [(path, stage["name"]) for stage in found for path in stage["outs"]]
    by_path: dict[str, list[str]] = {}
    direct: dict[str, list[str]] = {}
    for stage in found:
        names: dict[str, None] = {}
        for dep in stage["deps"]:
            if dep not in by_path:  # few paths, shared by all cells
                by_path[dep] = [name for path, name in makers if _overlap(path, dep)]
            names |= dict.fromkeys(by_path[dep])
        direct[stage["name"]] = list(names)
    closed: dict[str, list[str]] = {}

    def close(name: str) -> list[str]:
        if name not in closed:
            closed[name] = []  # DVC has refused cycles already
            further = [earlier for other in direct[name] for earlier in close(other)]
            closed[name] = list(dict.fromkeys([*direct[name], *further]))
        return closed[name]

    return {name: close(name) for name in direct}


def _overlap(one: str, other: str) -> bool:
    """Whether one of two paths is, or holds, the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


_OUTS = {"deleted": "is missing", "not in cache": "is not in DVC's cache"}


def _reasons(stage: dict[str, Any]) -> list[str]:
    """Why DVC would run it, each in one phrase."""
    if not stage["recorded"] and stage["status"]:
        return ["has never run here"]
    reasons: list[str] = []
    for entry in stage["status"]:
        if isinstance(entry, str):
            reasons.append({"changed command": "its command has changed"}.get(entry, entry))
            continue
        for path, how in entry.get("changed deps", {}).items():
            if isinstance(how, dict):
                continue  # params, below
            reasons.append(f"{path} {'is missing' if how == 'deleted' else 'has changed'}")
        outs = list(entry.get("changed outs", {}).items())
        if outs:
            path, how = outs[0]
            more = f" (and {len(outs) - 1} more)" if len(outs) > 1 else ""
            reasons.append(f"{path} {_OUTS.get(how, 'is another than DVC recorded')}{more}")
    for key, old, new in stage["params"]:
        reasons += [f"{key}{leaf}: {_shown(a)} → {_shown(b)}" for leaf, a, b in _leaves(old, new)]
    return reasons


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


def _since(pipeline: Pipeline, stage: dict[str, Any]) -> float | None:
    record = pipeline.record(stage["name"])
    if record and record.running:
        return record.started
    try:
        return float(psutil.Process(stage["running"]["pid"]).create_time())
    except psutil.NoSuchProcess:
        return None


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
    goes at the speed of its architecture's other cells, or of another architecture with the same GFLOP/s.
    """
    images = _num_train(pipeline)
    speeds: dict[str, list[float]] = {}
    for cell, timing in _timings(pipeline, expand(params)):
        if (timing["device"] == "cuda") == (slot.card is not None):
            scale = 1.0 if slot.card else (slot.threads / timing["threads"]) ** THREADS_POWER
            speeds.setdefault(cell.architecture, []).append(timing["images_per_second"] * scale)
    flops = median(GFLOP[name] * median(found) for name, found in speeds.items()) if speeds else None  # type: ignore[index]
    seconds = {}
    for step in steps:
        record = pipeline.record(step.stage)
        changed = any(".epochs:" in reason or reason.startswith("data/") for reason in step.why)
        if record and record.ended and record.status == "ran" and not changed:
            seconds[step.stage] = record.ended - record.started
        elif step.cell and images and flops:
            name = step.cell.architecture
            speed = median(speeds[name]) if name in speeds else flops / GFLOP[name]
            seconds[step.stage] = step.cell.recipe.epochs * images / speed
    return seconds


def _num_train(pipeline: Pipeline) -> int | None:
    # Read here and not by resgrid.data, which imports torch and so takes 2 s.
    try:
        meta = json.loads((pipeline.folder / "data/processed/meta.json").read_text(encoding="utf-8"))
        return int(meta["num_images"]["train"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None


def _cost(step: Step) -> float:
    return GFLOP[step.cell.architecture] * step.cell.recipe.epochs if step.cell else 0.0


# --- how much disk ----------------------------------------------------------------------------------


def _needs(step: Step, params: Params, stage: dict[str, Any]) -> int:
    """Bytes that a stage that would run adds: what it made last time, or what is known of it."""
    if step.state != "stale":
        return 0
    if step.cell:
        return int(COPIES * 4e6 * MILLIONS[step.cell.architecture])
    known = CIFAR10_BYTES.get(step.stage, 0) if params.data.source == "cifar10" else 0
    return 2 * (int(stage["bytes"]) or known)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


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
