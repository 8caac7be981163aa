"""The data stages alone: `prefect deployment run prepare-data`."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.grid import grid_run
from tasks.spec import DATA_STAGES


@flow(name="prepare-data", persist_result=False)
def prepare_data(pipeline: str = ".") -> State:
    """Download and preprocess, as far as that is not up to date.

    Args:
        pipeline: The folder of the pipeline, such as examples/digits.
    """
    with grid_run(pipeline, []) as grid:
        all(grid.run(name) for name in DATA_STAGES)
        return grid.verdict()
