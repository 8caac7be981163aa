"""How long cells take on this machine: by what others took here before, or by training steps timed now.

The only estimate of time: `resgrid plan`, `resgrid status`, train-all's progress and the line before a
download all come from here.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from resgrid import mps
from resgrid.cell_states import CellRun
from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.models import ARCHITECTURES, gflop_of
from resgrid.progress import duration
from resgrid.project import read_json
from resgrid.stage_record import read_records

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Peak of what torch reserves in a training of 50,000 images at the recipes' own batch sizes, graphed: 1.3 GiB
# of ResNet-20 (seen on an H100 and an H200) and 3.8 of ResNet-10 (H100); of the others three times what their
# steps alone took, as it is with these two. Used until a cell's timing.json has a measured
# `peak_memory_bytes`; an architecture that is not here counts as the largest.
CUDA_GIB = {
    "resnet20": 1.3, "resnet32": 1.9, "resnet44": 2.5, "resnet56": 3.1, "resnet110": 4.7,
    "resnet10": 3.8, "resnet18": 4.4, "resnet26": 5.6,
    "vgg16": 5.3,
}  # fmt: skip
# Images/s grow with the threads to this power: 1,572 with two against 958.5 with one (ResNet-20).
THREADS_POWER = 0.71
TIMED_BATCH = 32  # images: enough for a figure within a third or so, and a second at most a step on a laptop


def timings(cells: Iterable[Cell], pipeline: Path) -> list[tuple[Cell, dict[str, Any]]]:
    """The timing.json of each cell that has one, of whatever training."""
    timed = []
    for cell in cells:
        with suppress(ResgridError):
            timing = read_json(pipeline / "runs" / cell.id / "timing.json")
            if timing.get("images_per_second"):
                timed.append((cell, timing))
    return timed


def recorded_speeds(
    cells: Iterable[Cell], pipeline: Path, threads: int, sharing: int | None
) -> dict[str, float]:
    """Images/s by architecture, by the timing of earlier trainings here on such a device.

    With so many threads on a CPU, where `sharing` is None, or with so many cells that share a card.
    """
    speeds: dict[str, list[float]] = {}
    for cell, timing in timings(cells, pipeline):
        if (timing["device"] == "cuda") != (sharing is not None):
            continue  # a card says nothing of a CPU
        if sharing:
            before = timing.get("sharing") or 1
            scale = mps.gain(sharing) / sharing / (mps.gain(before) / before)
        else:
            scale = (threads / timing["threads"]) ** THREADS_POWER
        speeds.setdefault(cell.architecture, []).append(timing["images_per_second"] * scale)
    return {name: median(each) for name, each in speeds.items()}


def measured_speeds(cells: Iterable[Cell], device: torch.device) -> dict[str, float]:
    """Images/s by architecture, by a training step of each on `device` as it is now."""
    first = {cell.architecture: cell for cell in reversed(list(cells))}
    return {name: 1 / seconds_per_image(cell, device) for name, cell in first.items()}


def estimate_durations(
    cells: Iterable[Cell], num_images: int, speeds: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of training with `num_images` images for each cell of which anything is known, by its id.

    At the speed of its architecture, else at the GFLOP/s of the others.
    """
    known = [gflop * speed for name, speed in speeds.items() if (gflop := gflop_of(name))]
    seconds = {}
    for cell in cells:
        gflop = gflop_of(cell.architecture)
        by_gflop = median(known) / gflop if known and gflop else None
        if speed := speeds.get(cell.architecture, by_gflop):
            seconds[cell.id] = cell.recipe.epochs * num_images / speed
    return seconds


def expect(
    params: Params, pipeline: Path, root: Path, threads: int, sharing: int | None, *, measure: bool = False
) -> dict[str, float]:
    """Seconds for each stage of a pipeline of which anything is known, by its name.

    A cell goes at the speed that `recorded_speeds` or, with `measure`, a step timed now gives; without any,
    and for the other stages, it takes as long as the latest attempt that was done.
    """
    records = read_records(root, pipeline)
    lasted = {each.stage: each.seconds for each in records if each.seconds}
    cells, meta = expand(params), pipeline / "data/processed/meta.json"
    num_train: int | None = read_json(meta)["num_images"]["train"] if meta.exists() else None
    speeds = recorded_speeds(cells, pipeline, threads, sharing)
    if measure:
        from resgrid.data.fetch import known_num_train  # not above: it imports torch, which takes 2 s
        from resgrid.training.device import choose_device

        num_train = num_train or known_num_train(params.data)
        speeds |= measured_speeds(cells, choose_device())
    seconds = estimate_durations(cells, num_train, speeds) if num_train else {}
    return lasted | {cell.stage: seconds[cell.id] for cell in cells if cell.id in seconds}


def makespan(seconds: Iterable[float], num_slots: int) -> float:
    """When the last of these ends, each started in turn on the slot that is free first."""
    ends = [0.0] * num_slots
    for taken in seconds:
        heapq.heapreplace(ends, ends[0] + taken)
    return max(ends)


def finish_time(
    seconds: Mapping[str, float | None], at_work: Mapping[str, CellRun], num_slots: int
) -> float | None:
    """When the last of the cells at work should end, which take so long; None while any is unknown.

    Those that run first, then the longest.
    """
    now, left = time.time(), []
    for title, each in at_work.items():
        if (lasts := seconds[title]) is None:
            return None
        left.append((each.began is None, min(0.0, now - (each.began or now) - lasts)))
    return now + makespan([-negative for _, negative in sorted(left)], num_slots)


def work(cell: Cell) -> float:
    """GFLOP an image x epochs, by which cells are put in order while their times are unknown.

    An architecture from elsewhere comes first: its time is unknown until a cell of it has been trained.
    """
    largest = max(entry.gflop for entry in ARCHITECTURES.values())
    return (gflop_of(cell.architecture) or largest) * cell.recipe.epochs


def seconds_per_image(cell: Cell, device: torch.device) -> float:
    """The faster of two training steps of `cell` on noise, after one that is not counted.

    On a GPU with the recipe's batch: a step of a few images takes as long there as one of many.
    """
    import torch

    from resgrid.models import build_model
    from resgrid.training.device import choose_execution
    from resgrid.training.engine import Totals, make_step
    from resgrid.training.optimizers import build_optimizer

    model = build_model(cell.architecture, 10, cell.recipe.dropout).train()
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = cell.recipe.batch_size if device.type == "cuda" else min(cell.recipe.batch_size, TIMED_BATCH)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    totals = Totals(device)
    # Compiling takes longer than all this.
    execution = replace(choose_execution(cell, batch, device), compiled=False)
    step = make_step(cell, model, build_optimizer(cell, model), totals, execution)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):  # as in training
            step(images, labels)
        totals.read(1, batch)  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:]) / batch


def announce(params: Params, num_train: int) -> None:
    """Log on a machine without a GPU, before anything costly runs, what the grid would take."""
    from resgrid.training.device import choose_device

    device = choose_device()
    with suppress(ResgridError):  # a precision that this CPU has not: the cells are for another machine
        if device.type == "cpu":
            cells = expand(params)
            seconds = estimate_durations(cells, num_train, measured_speeds(cells, device))
            log.info("%s", sentence(cells, seconds))


def sentence(cells: Sequence[Cell], seconds: Mapping[str, float]) -> str:
    """The time of cells on this CPU as one would say it, and what to do where it is long."""
    total = sum(seconds.values())
    text = f"The {len(cells)} cells of this grid take about {duration(total)} of training on this CPU, one "
    text += "after another" + ("; starting, scoring and comparing come on top." if total < 3600 else ".")
    if total > 24 * 3600:
        quickest, *_, longest = sorted(cells, key=lambda cell: seconds[cell.id])
        text += (
            f"\nThat is from {duration(seconds[quickest.id])} ({quickest.id}) to "
            f"{duration(seconds[longest.id])} ({longest.id}) a cell. For a smaller grid, shorten the lists "
            f"under `grid` in params.yaml, or its `epochs`; for one cell: dvc repro {quickest.stage}."
        )
    return text
