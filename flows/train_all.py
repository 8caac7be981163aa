"""The whole grid in parallel: `prefect deployment run train-all`."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.grid import HERE, grid_run


@flow(name="train-all", task_runner=ThreadPoolTaskRunner(max_workers=256), persist_result=False)  # type: ignore[arg-type]
def train_all(
    pipeline: str = ".",
    cells: list[str] | None = None,
    slots: int | None = None,
    force: bool = False,
    where: str = HERE,
    device: str | None = None,
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
        grid.prepare()
        grid.train()
        grid.evaluate()
        grid.sync()
        grid.publish()
        return grid.verdict()
