"""Checkpoints beside a run in MLflow, so that a training goes on on another machine.

Only where RESGRID_SHARED_CHECKPOINTS is set, as for the cells that a work pool trains.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resgrid.grid import Cell
from resgrid.tracking.store import Store, open_store, reason

FOLDER = "checkpoint"  # among the artifacts of a run, until the training is done
SECONDS = 60.0  # at least, between two uploads


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
    from resgrid.tracking.from_files import runs_of

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        found: list[Path] = []
        try:
            store = open_store(name)
            for run in runs_of(store, cell.id):
                if run.data.tags.get("training") == training:
                    for file in store.client.list_artifacts(run.info.run_id, FOLDER):
                        place = Path(part, run.info.run_id)
                        place.mkdir(exist_ok=True)
                        found.append(
                            Path(store.client.download_artifacts(run.info.run_id, file.path, str(place)))
                        )
        except Exception as error:  # whatever MLflow or the network comes up with
            print(f"resgrid: no checkpoint of another machine is looked at: {reason(error)}", file=sys.stderr)
        yield found


def put(store: Store, run_id: str, path: Path) -> None:
    """Put a checkpoint beside the run; it takes the place of the one of the same name."""
    store.client.log_artifact(run_id, str(path), FOLDER)


def drop(store: Store, run_id: str) -> None:
    """Delete the checkpoints beside the run."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    run = store.client.get_run(run_id)
    if store.client.list_artifacts(run_id, FOLDER):
        repository: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=store.uri)
        repository.delete_artifacts(FOLDER)
