"""Where people find a run in MLflow, asked of its server by the REST interface.

Importing mlflow would take a process of Prefect's 3 s and 150 MB.
"""

from __future__ import annotations

import os

import httpx

from resgrid.tracking.store import shown
from resgrid.tracking.view import WORK


def run_page(server: str, experiment: str, cell: str) -> str | None:
    """The page of a cell's latest run at the address `server`; None if it does not answer."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    try:
        with httpx.Client(base_url=f"{server}/api/2.0/mlflow", auth=auth, timeout=5) as client:
            answer = client.get("experiments/get-by-name", params={"experiment_name": experiment})
            number = answer.raise_for_status().json()["experiment"]["experiment_id"]
            latest = {"order_by": ["attributes.start_time DESC"], "max_results": 1}
            query = {"experiment_ids": [number], "filter": f"tags.cell = '{cell}'", **latest}
            answer = client.post("runs/search", json=query)
            run = answer.raise_for_status().json()["runs"][0]["info"]["run_id"]
    except (httpx.HTTPError, ValueError, LookupError):
        return None
    return f"{shown(server)}/#/experiments/{number}/runs/{run}?{WORK}"
