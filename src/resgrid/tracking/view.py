"""MLflow's pages: how its page of runs shows an experiment, how they are served, and where a cell's run is.

The page shows the current cells, the best on top, and MLflow's own charts of them. MLflow keeps such a view
as JSON in a tag of the experiment (its button "Share" makes them) and finds it by the key in the page's
address. What a newer MLflow does not know of it, it leaves out.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress

from resgrid import watch
from resgrid.errors import ResgridError
from resgrid.tracking.store import SETTINGS, Store, is_local, open_store, server, shown, store_uri

WORK = "workflowType=machine_learning"  # without it MLflow's pages ask for the kind of work, or show another
VIEW_QUERY = f"{WORK}&viewStateShareKey=resgrid"
TAG = "mlflow.sharedViewState.resgrid"
METRICS = ("test_accuracy", "train_accuracy", "test_loss", "train_seconds")
PARAMS = ("architecture", "optimizer", "learning_rate", "seed", "num_parameters")
VIEW = {
    "searchFilter": "tags.grid = 'current'",
    "orderByKey": "metrics.`test_accuracy`",
    "orderByAsc": False,
    "selectedColumns": [f"metrics.`{key}`" for key in METRICS] + [f"params.`{key}`" for key in PARAMS],
    "runsHiddenMode": "FIRST_20_RUNS",
}

log = logging.getLogger(__name__)


def save_default_view(store: Store) -> None:
    """Let MLflow's page of the experiment, at `VIEW_QUERY`, show what `VIEW` says."""
    from mlflow.exceptions import MlflowException

    try:
        store.client.set_experiment_tag(store.experiment_id, TAG, json.dumps(VIEW))
    except MlflowException as error:
        log.debug("%s: the default view of the page of runs: %s", shown(store.uri), error)


def serve(port: int, name: str) -> None:
    """Run MLflow's pages for a local store until interrupted; of a server only say where they are.

    The page is the table of the current runs of the experiment `name`, the best on top.
    Raises ResgridError if the server ends by itself, as where the port is taken.
    """
    uri = store_uri()
    page = f"/#/experiments/{open_store(name).experiment_id}/runs?{VIEW_QUERY}"
    if not is_local(uri):
        print(f"MLflow: {shown(uri)}{page}")
        return
    print(f"MLflow's pages, in some seconds, until Ctrl-C:\nhttp://127.0.0.1:{port}{page}", flush=True)
    command = [sys.executable, "-m", *server(uri, port)]
    command += ["--uvicorn-opts", "--log-level warning --no-access-log"]
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))  # the terminal was closed
    # A group of its own: Ctrl-C would make each of its processes print a traceback.
    process = subprocess.Popen(command, env=SETTINGS | os.environ, process_group=0)
    try:
        with suppress(KeyboardInterrupt):  # which is how it is to end
            status = process.wait()
            raise ResgridError(
                f"port {port}: MLflow's server ended with status {status}, and says why above. "
                "Where the port is taken, take another one with --port."
            )
    finally:
        watch.end_group(process, grace_seconds=10)


def run_page(address: str, experiment: str, cell: str) -> str | None:
    """The page of a cell's latest run at the server at `address`; None if it does not answer.

    By the REST interface: to import mlflow would take a process of Prefect's 3 s and 150 MB.
    """
    import httpx  # which is not where there is torch alone

    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    try:
        with httpx.Client(base_url=f"{address}/api/2.0/mlflow", auth=auth, timeout=5) as client:
            answer = client.get("experiments/get-by-name", params={"experiment_name": experiment})
            number = answer.raise_for_status().json()["experiment"]["experiment_id"]
            latest = {"order_by": ["attributes.start_time DESC"], "max_results": 1}
            query = {"experiment_ids": [number], "filter": f"tags.cell = '{cell}'", **latest}
            answer = client.post("runs/search", json=query)
            run = answer.raise_for_status().json()["runs"][0]["info"]["run_id"]
    except (httpx.HTTPError, ValueError, LookupError):
        return None
    return f"{shown(address)}/#/experiments/{number}/runs/{run}?{WORK}"
