"""Checkpoints beside a run in MLflow, so that a training goes on on another machine.

Only where RESGRID_SHARED_CHECKPOINTS is set, as for the cells that a work pool trains.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.tracking.cell_runs import runs_of
from resgrid.tracking.store import Store, StoreAway, open_store, reason

if TYPE_CHECKING:
    from mlflow.entities import Run

FOLDER = "checkpoint"  # among the artifacts of a run, until the training is done
TAG = "shared_checkpoint"  # of a run that has them
SECONDS = 60.0  # at least, between two uploads
PATIENCE_SECONDS = 120.0  # with MLflow, for a checkpoint that may be there


def are_shared() -> bool:
    """Whether this process gives its checkpoints to others and takes theirs."""
    return bool(os.environ.get("RESGRID_SHARED_CHECKPOINTS"))


@contextmanager
def shared_checkpoints(name: str, cell: Cell, training: str, folder: Path) -> Iterator[list[Path]]:
    """Copies, beneath `folder`, of what other starts of the same `training`, a digest, have put beside their
    runs in the experiment `name`; deleted on leaving.

    An empty list where checkpoints are not shared, and where MLflow does not answer, which stderr then tells.
    """
    if not are_shared():
        yield []
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        yield _fetch(name, cell, training, Path(part))


def _fetch(name: str, cell: Cell, training: str, folder: Path) -> list[Path]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found: list[Path] = []
        try:
            store = open_store(name)
            for run in runs_of(store, cell.id):
                if run.data.tags.get("training") == training and TAG in run.data.tags:
                    place = folder / run.info.run_id
                    place.mkdir(exist_ok=True)
                    for file in store.client.list_artifacts(run.info.run_id, FOLDER):
                        path = store.client.download_artifacts(run.info.run_id, file.path, str(place))
                        found.append(Path(path))
            return found
        except Exception as error:  # whatever MLflow or the network comes up with
            is_for_good = isinstance(error, ResgridError) and not isinstance(error, StoreAway)
            if is_for_good or time.monotonic() > deadline:
                print(f"resgrid: without the checkpoints of others: {reason(error)}", file=sys.stderr)
                return found
            time.sleep(5.0)


def put(store: Store, run_id: str, path: Path) -> None:
    """Put a checkpoint beside the run; it takes the place of the one of the same name."""
    store.client.set_tag(run_id, TAG, "true")
    store.client.log_artifact(run_id, str(path), FOLDER)


def drop(store: Store, run: Run) -> None:
    """Delete the checkpoints beside a run whose results are in dvc.lock."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if TAG in run.data.tags:
        repository: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=store.uri)
        repository.delete_artifacts(FOLDER)
        store.client.delete_tag(run.info.run_id, TAG)
