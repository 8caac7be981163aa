"""How long a grid will take on this machine: from a training step of each architecture, timed now."""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import torch

from resgrid import mps
from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.models import build_model
from resgrid.progress import duration
from resgrid.training.device import choose_device, choose_execution
from resgrid.training.engine import Totals, make_step
from resgrid.training.optimizers import build_optimizer

TIMED_BATCH = 32  # images: enough for a figure within a third or so, and a second at most a step on a laptop


def estimate(params: Params, num_train: int, device: torch.device) -> dict[str, float]:
    """Seconds of training for each cell of `params` with `num_train` images, without scoring and start-up."""
    per_image: dict[str, float] = {}
    seconds = {}
    for cell in expand(params):
        if cell.architecture not in per_image:
            per_image[cell.architecture] = seconds_per_image(cell, device)
        seconds[cell.id] = per_image[cell.architecture] * num_train * cell.recipe.epochs
    return seconds


def seconds_per_image(cell: Cell, device: torch.device) -> float:
    """The faster of two training steps of `cell` on noise, after one that is not counted.

    On a GPU with the recipe's batch: a step of a few images takes as long there as one of many.
    """
    model = build_model(cell.architecture, 10, cell.recipe.dropout).train()
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = cell.recipe.batch_size if device.type == "cuda" else min(cell.recipe.batch_size, TIMED_BATCH)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    totals = Totals(device)
    execution = replace(
        choose_execution(cell, batch, device), compiled=False
    )  # which takes longer than all this
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
    """Say on a machine without a GPU, before anything costly runs, what the grid would take."""
    device = choose_device()
    with suppress(ResgridError):  # a precision that this CPU has not: the cells are for another machine
        if device.type != "cpu":
            return
        print(sentence(estimate(params, num_train, device), device), file=sys.stderr, flush=True)


def sentence(seconds: dict[str, float], device: torch.device) -> str:
    """The estimate as one would say it, and what to do where it is long."""
    total = sum(seconds.values())
    threads = torch.get_num_threads()
    where = f"CPU ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else "GPU"
    text = f"The {len(seconds)} cells of this grid take about {duration(total)} of training on this {where}"
    text += ", one after another"
    if device.type == "cuda" and len(seconds) > 1 and mps.available():
        at_once = min(len(seconds), mps.MAX_SHARING)
        text += f"; {at_once} at a time under MPS, about {duration(total / mps.gain(at_once))}"
    text += "; starting, scoring and comparing come on top." if total < 3600 else "."
    if total > 24 * 3600:
        quickest = min(seconds, key=lambda cell: seconds[cell])
        longest, _ = Counter(seconds).most_common(1)[0]
        text += (
            f"\nThat is from {duration(seconds[quickest])} ({quickest}) to {duration(seconds[longest])} "
            f"({longest}) a cell. For a smaller grid, shorten the lists under `grid` in params.yaml, or its "
            f"`epochs`; for one cell: dvc repro train@{quickest}."
        )
    return text
