"""How MLflow's page of runs shows an experiment: the current cells, the best on top, and charts of them.

MLflow keeps such a view as JSON in a tag of the experiment (its button "Share" makes them) and finds it by
the key in the page's address. What a newer MLflow does not know of it, it leaves out.
"""

from __future__ import annotations

import json
from typing import Any

from resgrid.tracking.store import Store

VIEW_QUERY = "workflowType=machine_learning&viewStateShareKey=resgrid"
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


def arrange(store: Store) -> None:
    """Let MLflow's page of the experiment, at `VIEW_QUERY`, show what `VIEW` says."""
    view = json.dumps(VIEW)
    if store.client.get_experiment(store.experiment_id).tags.get(TAG) != view:
        store.client.set_experiment_tag(store.experiment_id, TAG, view)
