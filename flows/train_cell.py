"""One cell: `prefect deployment run train-cell -p cell=resnet20-adam-0`."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.grid import grid_run
from tasks.spec import DATA_STAGES, RunSpec
from tasks.worker import train_for


@flow(name="train-cell", persist_result=False)
def train_cell(cell: str, pipeline: str = ".", force: bool = False, spec: RunSpec | None = None) -> State:
    """Bring one cell up to date, and the data that it needs; the comparison is left as it is.

    Args:
        cell: Its id, such as resnet20-adam-0.
        pipeline: The folder of the pipeline, such as examples/digits.
        force: Train it afresh, also if it is up to date.
        spec: Given by train-all to the workers of a pool, which hand the result to the DVC remote.
    """
    if spec is not None:
        return train_for(cell, pipeline, spec)
    with grid_run(pipeline, [cell], slots=1, force=force) as grid:
        if all(grid.run(name) for name in DATA_STAGES):
            for stale in grid.queue():
                grid.run(stale, grid.slots[0])
            grid.sync()
        return grid.verdict()
