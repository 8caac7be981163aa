"""The runs of a cell: which there are, which still train, and which are superseded."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from resgrid import watch
from resgrid.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Run


def runs_of(store: Store, cell_id: str | None = None) -> list[Run]:
    """The experiment's runs, of one cell or of all; without deleted ones."""
    which = f"tags.cell = '{cell_id}'" if cell_id else "tags.cell LIKE '%'"
    runs: list[Run] = []
    token = None
    while True:
        page = store.client.search_runs([store.experiment_id], which, max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def retire(store: Store, runs: list[Run], keep: str | None = None, started: int | None = None) -> list[str]:
    """Mark `runs` as superseded, but not `keep` nor what still trains; the ids of those that were not."""
    changed = []
    for run in runs:
        is_experiment = "dvc_experiment" in run.data.tags and run.data.tags.get("grid") != "current"
        if run.info.run_id == keep or is_experiment or is_live(run, started):
            continue
        end_killed(store, run)
        if mark(store, run, "superseded"):
            changed.append(run.info.run_id)
    return changed


def mark(store: Store, run: Run, grid: str) -> bool:
    """Set the tag `grid` of a run; whether it was another one."""
    if run.data.tags.get("grid") == grid:
        return False
    store.client.set_tag(run.info.run_id, "grid", grid)
    return True


def is_live(run: Run, started: int | None = None) -> bool:
    """Whether a process may yet log to `run`.

    On this machine that is known. On another one it counts as gone once its cell has files of a training that
    `started` (ms) no earlier.
    """
    if run.info.status != "RUNNING":
        return False
    host, _, process = run.data.tags.get("process", "").partition(" ")
    if host == platform.node():
        return watch.alive(process)
    return started is None or start_second(run) > started


def end_killed(store: Store, run: Run) -> None:
    """SIGKILL, or the loss of the server, leaves a run RUNNING."""
    if run.info.status == "RUNNING":
        store.client.set_terminated(run.info.run_id, "KILLED")


def start_second(run: Run) -> int:
    """In milliseconds, but whole seconds: timing.json counts in those."""
    milliseconds: int = run.info.start_time
    return milliseconds // 1000 * 1000
