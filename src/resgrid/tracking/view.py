"""MLflow's pages: how its page of runs shows an experiment, and how they are served.

The page shows the current cells, the best on top, and charts of them. MLflow keeps such a view as JSON in a
tag of the experiment (its button "Share" makes them) and finds it by the key in the page's address. What a
newer MLflow does not know of it, it leaves out.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from typing import Any

from resgrid.errors import ResgridError
from resgrid.tracking.store import (
    QUIET_SERVER,
    SETTINGS,
    Store,
    is_remote,
    open_store,
    server,
    shown,
    store_uri,
)

WORK = "workflowType=machine_learning"  # without it MLflow's pages ask for the kind of work, or show another
VIEW_QUERY = f"{WORK}&viewStateShareKey=resgrid"
TAG = "mlflow.sharedViewState.resgrid"
SECTION = "grid"


def _chart(name: str, kind: str, **settings: Any) -> dict[str, Any]:
    common = {"uuid": name, "displayName": name, "type": kind, "metricSectionId": SECTION}
    return common | {"runsCountToCompare": 100, "deleted": False, "isGenerated": False} | settings


def _curves(name: str, *keys: str) -> dict[str, Any]:
    return _chart(
        name, "LINE", metricKey=keys[0], selectedMetricKeys=list(keys), xAxisKey="step", lineSmoothness=0,
        scaleType="linear", xAxisScaleType="linear", range={}, yAxisKey="metric", yAxisExpressions=[],
        selectedXAxisMetricKey="", useGlobalXaxisKey=True, useGlobalLineSmoothing=True, ignoreOutliers=False,
    )  # fmt: skip


VIEW = {
    "searchFilter": "tags.grid = 'current'",
    "orderByKey": "metrics.`test_accuracy`",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "modelVersionFilter": "All Runs",
    "datasetsFilter": [],
    "selectedColumns": [
        *(f"metrics.`{key}`" for key in ("test_accuracy", "train_accuracy", "test_loss", "train_seconds")),
        *(
            f"params.`{key}`"
            for key in ("architecture", "optimizer", "learning_rate", "seed", "num_parameters")
        ),
    ],
    "runsHiddenMode": "FIRST_20_RUNS",
    "compareRunSections": [
        {"uuid": SECTION, "name": "The grid", "display": True, "isReordered": False, "deleted": False}
    ],
    "compareRunCharts": [
        _curves("Training accuracy", "train_accuracy"),
        _curves("Test accuracy", "test_accuracy"),
        _curves("Training loss", "train_loss"),
        _chart(
            "Accuracy against training time",
            "SCATTER",
            xaxis={"key": "train_seconds", "type": "METRIC"},
            yaxis={"key": "test_accuracy", "type": "METRIC"},
        ),
        _chart(
            "Architecture, optimizer, accuracy",
            "PARALLEL",
            selectedParams=["architecture", "optimizer", "learning_rate"],
            selectedMetrics=["train_accuracy", "test_accuracy"],
            showAllRuns=True,
        ),
    ],
}


def save_default_view(store: Store) -> None:
    """Let MLflow's page of the experiment, at `VIEW_QUERY`, show what `VIEW` says."""
    view = json.dumps(VIEW)
    if store.client.get_experiment(store.experiment_id).tags.get(TAG) != view:
        store.client.set_experiment_tag(store.experiment_id, TAG, view)


def serve(port: int, name: str | None = None) -> None:
    """Run MLflow's pages for a local store until interrupted; of a server only say where they are.

    With the `name` of an experiment, that is the table of its current runs, the best on top.
    Raises ResgridError if the port is taken.
    """
    uri = store_uri()
    page = f"/#/experiments/{open_store(name).experiment_id}/runs?{VIEW_QUERY}" if name else ""
    if is_remote(uri):
        print(f"MLflow: {shown(uri)}{page}")
        return
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ResgridError(f"port {port}: {why} Take another one with --port.") from None
    print("MLflow's pages are ready in some seconds, until Ctrl-C:", flush=True)
    print(f"http://127.0.0.1:{port}{page}", flush=True)
    command = [sys.executable, "-m", *server(uri, port)]
    command += ["--uvicorn-opts", "--log-level warning --no-access-log"]
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))  # the terminal was closed
    # A group of its own: Ctrl-C would make each of its processes print a traceback.
    process = subprocess.Popen(command, env=SETTINGS | QUIET_SERVER | os.environ, process_group=0)
    try:
        with suppress(KeyboardInterrupt):  # which is how it is to end
            process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
