"""One training, mirrored into one run of MLflow: what a run holds, and how it gets there.

`mirror` makes the run if there is none and logs what it lacks, so that it may be killed anywhere and
repeated. A trainer calls it while it trains, with a snapshot from memory; `sync` with one from the files in
`runs/<cell>/`. An epoch has the same time in both (`epoch_ends`), and MLflow keeps a point of the same key,
time, step and value once.

Metrics have 15 keys in all, once an epoch at most: MLflow's charts get slow with many
(https://github.com/mlflow/mlflow/issues/24012). Times are in milliseconds since 1970, as MLflow's are.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from resgrid import watch
from resgrid.grid import Cell, flat
from resgrid.project import read_history, read_json
from resgrid.provenance import experiment
from resgrid.run_status import FILES, RUN, WEIGHTS, epoch_ends, epoch_speeds, started_at, verify_weights
from resgrid.tracking.store import Store

if TYPE_CHECKING:  # torch and mlflow take seconds to import
    from mlflow.entities import Run

FORMAT = 3  # of a complete run; a higher number makes `sync` complete all of them anew
SCORES = (
    "train_loss", "train_accuracy", "test_loss", "test_accuracy", "validation_loss", "validation_accuracy",
)  # fmt: skip
EACH_EPOCH = (*SCORES, "learning_rate", "images_per_second")
COUNTS = ("num_parameters", "num_trainable", "num_non_trainable")
BATCH = 1000  # metrics that MLflow takes at once
NOTE = "mlflow.note.content"  # the tag with the head of a run's page


class Point(NamedTuple):
    """One value of a metric."""

    key: str
    step: int
    time: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training as far as it is: its epochs and, once it has ended, the folder with its files."""

    cell: Cell
    data_digest: str
    started: int  # microseconds since 1970
    timing: Mapping[str, Any]  # timing.json; while it trains, what it says of the training's origin alone
    epochs: Sequence[Mapping[str, Any]]  # the columns of history.csv, `seconds` and `images_per_second`
    folder: Path | None = None  # of its files, and
    record: Mapping[str, Any] | None = None  # their run.json, once it has ended

    @classmethod
    def from_files(cls, cell: Cell, folder: Path) -> Self:
        """The training that a run folder holds.

        Raises ResgridError for damaged files, and ValueError for files of different runs.
        """
        record, timing = read_json(folder / RUN), read_json(folder / "timing.json")
        rows = read_history(folder / "history.csv")
        for row, seconds, speed in zip(rows, timing["epoch_seconds"], epoch_speeds(timing), strict=True):
            row |= {"seconds": seconds, "images_per_second": speed}
        verify_weights(folder, record, cell.stage)
        return cls(
            cell=cell, data_digest=record["data_digest"], started=started_at(timing), timing=timing,
            epochs=rows, folder=folder, record=record,
        )  # fmt: skip

    @property
    def key(self) -> str:
        """The identity of the training within its cell's runs."""
        return run_key(self.cell, self.started)

    @property
    def ends(self) -> list[int]:
        """When the training began, then when each epoch ended."""
        start = self.started // 1000
        return [start, *epoch_ends(self.started, [epoch["seconds"] for epoch in self.epochs])]

    def points(self) -> list[Point]:
        """Every point of its metrics, of the epochs and of the outcome."""
        start, *ends = self.ends
        rate = math.log10(self.cell.optimizer.lr)  # since MLflow's charts have no logarithmic axis
        points = [Point("log10_learning_rate", 0, start, rate)]
        points += [
            Point(key, int(epoch["epoch"]), end, epoch[key])
            for epoch, end in zip(self.epochs, ends, strict=True)
            for key in EACH_EPOCH
            if epoch.get(key) is not None
        ]
        if self.record is None:
            return points
        last = self.epochs[-1] if self.epochs else {}
        outcome = {key: self.record[key] for key in (*SCORES, *COUNTS, "best_test_accuracy")}
        outcome |= {key: self.timing[key] for key in ("train_seconds", "peak_memory_bytes")}
        # After a divergence the scores are other ones than the last epoch's, and come after them.
        return points + [
            Point(key, self.record["epochs"], self.ends[-1] + (key in last), value)
            for key, value in outcome.items()
            if value is not None and last.get(key) != value
        ]


def run_key(cell: Cell, started: int) -> str:
    """The tag `key` of a run: the cell's digest alone is that of a repeated training as well."""
    return f"{cell.digest.removeprefix('sha256:')[:16]}-{started}"


def synced(key: str) -> str:
    """The tag `synced` of a complete run."""
    return f"{key}:{FORMAT}"


def this_process() -> str:
    """The tag `process`: by it others know whether the process that logs a run still lives."""
    return f"{platform.node()} {watch.describe(os.getpid())}"


def runs_of(store: Store, cell_id: str | None = None) -> list[Run]:
    """The experiment's runs, of one cell or of all; without deleted ones."""
    which = f"tags.cell = '{cell_id}'" if cell_id else "tags.cell LIKE '%'"
    runs: list[Run] = store.client.search_runs([store.experiment_id], which, max_results=50_000)  # the most
    return runs


def params_of(cell: Cell) -> dict[str, str]:
    """Every number that makes the cell, each under a key of its own, since MLflow compares single params."""
    values = flat(cell.numbers) | {"family": cell.family, "depth": cell.depth}
    values["rate_factor"] = f"{cell.rate_factor:g}"
    return {key: _text(value) for key, value in values.items()}


def mirror(store: Store, snapshot: Snapshot, files: bool = True) -> str:
    """Let a run hold all of `snapshot`; returns its id. Repeated, it changes nothing.

    It is the run of the training's key, made if there is none. A run with a point that is not the training's
    does not fit: on a GPU an epoch trained again after a kill has other figures. Of a training that has
    ended, the outcome comes first, then, unless `files` is false, files and model, and at the very end the
    tag `synced`. With 250 epochs the look at a run takes 220 ms.
    """
    from mlflow.entities import Param, RunTag

    points, client, record = snapshot.points(), store.client, snapshot.record
    while (match := _find(store, snapshot, points)) is None:
        made = experiment()  # of two processes that made a run each, both then find the same
        name = f"{made.name} {snapshot.cell.id}" if made else snapshot.cell.id
        tags = {"cell": snapshot.cell.id, "key": snapshot.key}
        client.create_run(store.experiment_id, snapshot.started // 1000, tags, run_name=name)
    run, missing = match
    run_id = str(run.info.run_id)
    log_points(store, run_id, missing)
    params = params_of(snapshot.cell) | {key: str(record[key]) for key in COUNTS if record}
    client.log_batch(
        run_id,
        params=[Param(key, value) for key, value in params.items()],
        tags=[RunTag(key, value) for key, value in _tags(snapshot).items()],
    )
    _log_inputs(store, run, snapshot.data_digest)
    if record is not None:
        client.set_terminated(run_id, "FINISHED", snapshot.ends[-1])
    if snapshot.folder is not None and files:
        for name in FILES:
            client.log_artifact(run_id, str(snapshot.folder / name))
        _log_model(store, run, snapshot, snapshot.folder / WEIGHTS)
        client.set_tag(run_id, "synced", synced(snapshot.key))
    return run_id


def _find(store: Store, snapshot: Snapshot, points: list[Point]) -> tuple[Run, list[Point]] | None:
    """The first run of the training that fits, and the points that it lacks; None if there is none."""
    sha256 = snapshot.record["weights_sha256"] if snapshot.record else None
    runs = [run for run in runs_of(store, snapshot.cell.id) if run.data.tags.get("key") == snapshot.key]
    for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)):
        if sha256 and run.data.tags.get("weights_sha256", sha256) != sha256:
            continue
        known = {
            Point(key, point.step, point.timestamp, point.value)
            for key in run.data.metrics
            if not key.startswith("system/")
            for point in store.client.get_metric_history(run.info.run_id, key)
        }
        # A training whose results DVC did not record begins at its end: its run has the outcome already.
        if known.issubset(points) or (snapshot.record is None and known.issuperset(points)):
            return run, [point for point in points if point not in known]
    return None


def _tags(snapshot: Snapshot) -> dict[str, str]:
    """Where a training comes from and, once it has ended, what `run.json` and `timing.json` say of it."""
    made, timing, record = experiment(), snapshot.timing, snapshot.record
    tags: dict[str, Any] = {
        "study": snapshot.cell.study,
        "dvc_experiment": made.name if made else None,
        "data_digest": snapshot.data_digest,
        "git_commit": timing.get("commit"),
        "git_dirty": timing.get("dirty"),
        # MLflow's own, for the columns and links of its pages
        "mlflow.source.name": f"resgrid train {snapshot.cell.id}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": timing.get("commit"),
    }
    of_timing = ("flow_run_id", "resgrid", "threads", "device", "device_name", "precision", "compiled")
    tags |= {key: timing.get(key) for key in of_timing}
    if record is not None:
        diverged = f"**Diverged**: {record['cause']}\n\n" if record["status"] == "diverged" else ""
        tags |= {key: record[key] for key in ("weights_sha256", "status")}
        tags["grid"] = "experiment" if made else "current"
        tags[NOTE] = (
            f"{diverged}Test accuracy **{record['test_accuracy']:.2%}** after epoch {record['epochs']}; "
            f"{record['num_parameters']:,} parameters; trained in {timing['train_seconds']:,.0f} s on "
            f"{timing['device_name']} ({timing['precision']})."
        )
    return {key: _text(value) for key, value in tags.items() if value is not None}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _log_inputs(store: Store, run: Run, data_digest: str) -> None:
    """The data's splits, by digest alone, unless the run has them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    if run.inputs and run.inputs.dataset_inputs:
        return
    digest = data_digest.removeprefix("sha256:")[:36]  # MLflow's limit
    source = json.dumps({"data_digest": data_digest})
    inputs = [
        DatasetInput(
            Dataset(f"{store.name}-{split}", digest, "code", source), [InputTag("mlflow.data.context", what)]
        )
        for split, what in (("train", "training"), ("test", "testing"))
    ]
    try:
        store.client.log_inputs(run.info.run_id, inputs)
    except MlflowException:  # of first runs at once, one makes the data sets and others are refused
        store.client.log_inputs(run.info.run_id, inputs)


def log_points(store: Store, run_id: str, points: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(key, value, time, step) for key, step, time, value in points]
    for start in range(0, len(metrics), BATCH):
        store.client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _log_model(store: Store, run: Run, snapshot: Snapshot, weights: Path) -> None:
    """The model in MLflow's own format, with the scores of its weights, unless the run has it.

    What `mlflow.pytorch.log_model` does, less its global tracking URI and its trial of the model as a server
    would use it: 2 s for a process's first, then half a second, where it took 3.
    """
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model, infer_signature

    from resgrid.predict import Predictor
    from resgrid.weights import load_model

    client, run_id, number = store.client, run.info.run_id, store.experiment_id
    # An interruption may have left one that is unfinished.
    models = client.search_logged_models([number], f"source_run_id = '{run_id}'", max_results=1)
    params = params_of(snapshot.cell)
    logged = models[0] if models else client.create_logged_model(number, "model", run_id, params=params)
    if not (run.outputs and run.outputs.model_outputs):
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, len(snapshot.epochs))])
    if logged.status == "READY":
        return
    classifier, info = load_model(weights)
    model = Model(logged.artifact_location, run_id, model_id=logged.model_id)
    images = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)  # one would fix the batch
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pytorch.save_model(
            Predictor(classifier, info),
            f"{folder}/model",
            mlflow_model=model,
            signature=infer_signature(images, np.zeros((2, len(info.class_names)), np.float32)),
            input_example=images,
            serialization_format="pt2",  # an exported graph, no pickle
            pip_requirements=[  # inferred, they would cost a third loading
                f"{each.__name__}=={each.__version__.partition('+')[0]}" for each in (mlflow, np, torch)
            ],
            metadata=info.model_dump(mode="json"),
        )
        # Without this, MLflow wants an exported graph to be on CUDA wherever there is CUDA, and refuses it.
        model.flavors["python_function"]["config"] = {"device": "cpu"}
        model.save(f"{folder}/model/MLmodel")
        client.log_model_artifacts(logged.model_id, f"{folder}/model")
    last = {point.key: point for point in snapshot.points() if point.key in SCORES}
    client.log_batch(  # the run has these points already, and MLflow adds them to the model alone
        run_id,
        [Metric(key, value, time, step, logged.model_id) for key, step, time, value in last.values()],
    )
    client.finalize_logged_model(logged.model_id, "READY")
