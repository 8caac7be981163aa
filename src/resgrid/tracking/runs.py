"""The runs of a cell: which still train, and which are superseded."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from resgrid import watch
from resgrid.tracking.mirror import this_process
from resgrid.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Run


def mark_superseded(
    store: Store, runs: list[Run], keep: str | None = None, started: int | None = None
) -> list[str]:
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
    """Whether another process may yet log to `run`.

    On this machine that is known. On another one it counts as gone once its cell has files of a training that
    `started` (ms) no earlier. A run that has ended may still get its files, from a trainer on this machine.
    """
    process, status = run.data.tags.get("process", ""), run.info.status
    is_over = status not in ("RUNNING", "FINISHED") or (status == "FINISHED" and "synced" in run.data.tags)
    if is_over or process in ("", this_process()):
        return False
    host, _, process = process.partition(" ")
    if host == platform.node():
        return watch.alive(process)
    return status == "RUNNING" and (started is None or run.info.start_time > started)


def end_killed(store: Store, run: Run) -> None:
    """SIGKILL, or the loss of the server, leaves a run RUNNING."""
    if run.info.status == "RUNNING":
        store.client.set_terminated(run.info.run_id, "KILLED")
