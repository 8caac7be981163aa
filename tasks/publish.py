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

import httpx

from resgrid import tracking
from resgrid.dvc.pipeline import Pipeline
from tasks.services import running

PAUSE_SECONDS = 60.0  # without a try after one that failed, for such a call takes up to half a minute

log = logging.getLogger(__name__)


class Page:
    """The artifacts of one flow run, published by the thread that calls. Nothing here raises."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._suffix = _key(pipeline.name) or "root"
        self._progress: UUID | None = None
        self._sending = threading.Lock()
        self._away_until = 0.0

    def progress(self, percent: float, text: str) -> None:
        """Show how far the grid is, in place of what was shown before."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        def show() -> None:
            if self._progress is None:
                created = create_progress_artifact(percent, key=f"progress-{self._suffix}", description=text)
                self._progress = cast(UUID, created)  # as in all synchronous code
            else:
                update_progress_artifact(self._progress, percent, description=text)

        with self._sending:
            self._publish(show)

    def leaderboard(self, file: Path) -> None:
        """reports/leaderboard.csv as a table, if it is there."""
        from prefect.artifacts import create_table_artifact

        if file.is_file():
            with file.open(encoding="utf-8", newline="") as lines:
                table = [{key: value or None for key, value in row.items()} for row in csv.DictReader(lines)]
            key = f"leaderboard-{self._suffix}"
            self._publish(lambda: create_table_artifact(table, key=key, description=f"`{file}`"))

    def link(self, cell: str, link: str | None) -> None:
        """To the cell's run in MLflow, if it is known; called within its task, whose page then shows it."""
        from prefect.artifacts import create_link_artifact

        if link is None:
            return
        key = f"mlflow-{_key(cell)}"
        self._publish(lambda: create_link_artifact(link, link_text=f"{cell} in MLflow", key=key))

    def _publish(self, publish: Callable[[], object]) -> None:
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


def flow_environment() -> dict[str, str]:
    """By which a trainer's run in MLflow leads back to the flow run that this is called in."""
    from prefect import runtime

    return {"RESGRID_FLOW_RUN_ID": str(runtime.flow_run.id or "")}


def mlflow_address(root: Path) -> str | None:
    """Where MLflow's pages are served, if they are: by `resgrid up`, or by a server that serves the store."""
    if services := running(root):
        return services.mlflow.rstrip("/")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri.rstrip("/") if uri.startswith(("http://", "https://")) else None


def mlflow_run(root: Path, experiment: str, cell: str) -> str | None:
    """The page of a cell's latest run in MLflow, asked of its server; None if it does not answer.

    By MLflow's REST interface, because importing mlflow takes this process 3 s and 150 MB.
    """
    address = mlflow_address(root)
    if address is None:
        return None
    user, page = os.environ.get("MLFLOW_TRACKING_USERNAME"), tracking.shown(address)
    auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    try:
        with httpx.Client(base_url=f"{address}/api/2.0/mlflow", auth=auth, timeout=5) as server:
            found = server.get("experiments/get-by-name", params={"experiment_name": experiment})
            number = found.raise_for_status().json()["experiment"]["experiment_id"]
            wanted = {
                "experiment_ids": [number],
                "filter": f"tags.cell = '{cell}'",
                "order_by": ["attributes.start_time DESC"],
                "max_results": 1,
            }
            found = server.post("runs/search", json=wanted)
            run = found.raise_for_status().json()["runs"][0]["info"]["run_id"]
    except (httpx.HTTPError, ValueError, LookupError):
        return None
    return f"{page}/#/experiments/{number}/runs/{run}?{tracking.WORK}"
