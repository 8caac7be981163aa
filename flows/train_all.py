"""The whole grid in parallel: `prefect deployment run train-all`."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from resgrid import mps
from tasks.grid import EVALUATE, HERE, grid_run
from tasks.slots import Slot
from tasks.spec import DATA_STAGES


@flow(name="train-all", task_runner=ThreadPoolTaskRunner(max_workers=1024), persist_result=False)  # type: ignore[arg-type]
def train_all(
    pipeline: str = ".",
    cells: list[str] | None = None,
    slots: int | None = None,
    force: bool = False,
    where: str = HERE,
    device: Literal["cpu", "cuda", "mps"] | None = None,
) -> State:
    """Bring a pipeline's grid up to date: download, preprocess, every stale cell in parallel, evaluate.

    Args:
        pipeline: The folder of the pipeline, such as examples/digits.
        cells: Only the cells that one of these patterns matches, such as ["resnet20-*"].
        slots: How many cells train at once; without it, as many as the machine is good for.
        force: Train the chosen cells afresh, also those that are up to date.
        where: The work pool whose workers train the cells, such as pool; "here" is this machine.
        device: In a pool, only workers with such a device take the cells: cpu, cuda or mps.
    """
    with grid_run(pipeline, cells, slots, force, where, device) as grid:
        if not all(grid.run(name) for name in DATA_STAGES):
            return grid.verdict()
        queue = grid.queue()  # the longest first
        free: SimpleQueue[Slot] = SimpleQueue()
        for slot in grid.slots:  # shares of this machine, or places in the queue of a pool
            free.put(slot)
        with mps.shared(slot.card for slot in grid.slots):
            for cell in queue:
                grid.submit(cell, free.get(), then=free.put)
            grid.wait()
        for cell in grid.oom_cells:  # too little memory beside others
            grid.run(cell, grid.slots[0])
        grid.run(EVALUATE)  # what there is, whether or not cells failed
        grid.sync()  # after it, for the comparison goes to MLflow as well
        grid.page.leaderboard()
        return grid.verdict()
