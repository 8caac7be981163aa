"""What Prefect's page shows of a grid besides its tasks: progress, a link a cell to MLflow, the leaderboard.

A server that is away is no reason to stop training, so what cannot be published is left out.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from resgrid.dvc.pipeline import Pipeline
from resgrid.tracking.view import run_page
from tasks.services import running

PAUSE_SECONDS = 60.0  # without a try after one that failed, for such a call takes up to half a minute

log = logging.getLogger(__name__)


class Page:
    """The artifacts of one flow run, published by the thread that calls. Nothing here raises."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._root = pipeline.root
        self._board = pipeline.folder / "reports/leaderboard.csv"
        self._suffix = _key(pipeline.name) or "root"
        self._progress: UUID | None = None
        self._sending = threading.Lock()
        self._away_until = 0.0

    def progress(self, percent: float, text: str) -> None:
        """Show how far the grid is, in place of the figure before."""

        def show() -> None:
            if self._progress is None:
                created = create_progress_artifact(percent, key=f"progress-{self._suffix}", description=text)
                self._progress = cast(UUID, created)  # as in all synchronous code
            else:
                update_progress_artifact(self._progress, percent, description=text)

        self._publish(show)

    def leaderboard(self) -> None:
        """reports/leaderboard.csv as a table, if it is there."""
        if self._board.is_file():
            with self._board.open(encoding="utf-8", newline="") as lines:
                table = [{key: value or None for key, value in row.items()} for row in csv.DictReader(lines)]
            key, text = f"leaderboard-{self._suffix}", f"`{self._board}`"
            self._publish(lambda: create_table_artifact(table, key=key, description=text))

    def link(self, experiment: str, cell: str) -> None:
        """To the cell's run in MLflow, if it answers; called within its task, whose page then shows it."""
        address = mlflow_address(self._root)
        if page := address and run_page(address, experiment, cell):
            key, text = f"mlflow-{_key(cell)}", f"{cell} in MLflow"
            self._publish(lambda: create_link_artifact(page, link_text=text, key=key))

    def _publish(self, publish: Callable[[], object]) -> None:
        with self._sending:
            if time.monotonic() < self._away_until:
                return
            try:
                publish()
            except Exception as error:  # whatever a server that is away may raise
                self._away_until = time.monotonic() + PAUSE_SECONDS
                log.warning("Prefect's page is not up to date: %s", error)


def _key(name: str) -> str:
    """As keys of artifacts are: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def mlflow_address(root: Path) -> str | None:
    """Where MLflow's pages are served, if they are: by `resgrid up`, or by a server that serves the store."""
    services = running(root)
    uri = services.mlflow if services else os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri.rstrip("/") if uri.startswith(("http://", "https://")) else None
