"""What a cell's run holds: params, tags, metrics, data, artifacts and the model.

Metrics have 14 keys in all, once an epoch at most, for MLflow's charts get slow with many
(https://github.com/mlflow/mlflow/issues/24012). Times are in milliseconds since 1970, as MLflow's are.
"""

from __future__ import annotations

import csv
import getpass
import json
import os
import platform
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resgrid import __version__, run_status, watch
from resgrid.errors import ResgridError
from resgrid.grid import Cell, flat
from resgrid.provenance import experiment, git_commit
from resgrid.run_status import FILES, WEIGHTS, epoch_ends, epoch_speeds, read_json, verify_weights
from resgrid.tracking.store import Store

if TYPE_CHECKING:  # torch and mlflow take seconds to import
    from mlflow.entities import DatasetInput, Run

FORMAT = 1  # of a complete run; a higher number makes `sync` complete all of them anew
SCORES = (
    "train_loss", "train_accuracy", "test_loss", "test_accuracy", "validation_loss", "validation_accuracy",
)  # fmt: skip
EACH_EPOCH = (*SCORES, "learning_rate", "images_per_second")
# Tags that lead back to the Prefect flow run which trains the cell; `tasks` sets the variables.
FLOW_RUN = {"flow_run_id": "RESGRID_FLOW_RUN_ID", "flow_run": "RESGRID_FLOW_RUN_URL"}
COUNTS = ("num_parameters", "num_trainable", "num_non_trainable")


def params_of(cell: Cell) -> dict[str, str]:
    """Every number that makes the cell, each under a key of its own, since MLflow compares single params."""
    values = flat(cell.numbers) | {"family": cell.family, "depth": cell.depth}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def create(store: Store, cell: Cell, data_digest: str, start_time: int, training: str | None = None) -> str:
    """A new run of `cell` with its params and what is known before training; returns its id.

    By the digest `training` the run is found again when that training goes on after an interruption.
    """
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    commit, dirty = git_commit()
    made = experiment()
    tags = {
        "cell": cell.id,
        "dvc_stage": cell.stage,
        "study": cell.study,
        "dvc_experiment": made.name if made else None,
        "training": training,
        "process": this_process(),
        "data_digest": data_digest,
        "git_commit": commit,
        "git_dirty": dirty,
        "resgrid": __version__,
        # MLflow's own, for the columns and links of its pages
        "mlflow.user": _user(),
        "mlflow.source.name": f"resgrid train {cell.id}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit if commit != "unknown" else None,
    }
    tags |= {tag: os.environ.get(variable) for tag, variable in FLOW_RUN.items()}
    run = store.client.create_run(
        store.experiment_id,
        start_time,
        {key: value for key, value in tags.items() if value},
        run_name=f"{made.name} {cell.id}" if made else cell.id,
    )
    params = [Param(key, value) for key, value in params_of(cell).items()]
    store.client.log_batch(run.info.run_id, params=params)
    inputs = _splits(store.name, data_digest)
    try:
        store.client.log_inputs(run.info.run_id, inputs)
    except MlflowException:  # of first runs at once, one makes the data sets and others are refused
        store.client.log_inputs(run.info.run_id, inputs)
    return str(run.info.run_id)


def this_process() -> str:
    """The tag by which others know whether the process that logs a run still lives."""
    return f"{platform.node()} {watch.describe(os.getpid())}"


def _user() -> str:
    with suppress(OSError, KeyError):  # a container's user may have no name
        return getpass.getuser()
    return "unknown"


def _splits(experiment: str, data_digest: str) -> list[DatasetInput]:
    """The two splits as a run's inputs, by digest alone."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = CodeDatasetSource({"data_digest": data_digest})
    digest = data_digest.removeprefix("sha256:")[:36]  # MLflow's limit
    inputs = []
    for split, context in (("train", "training"), ("test", "testing")):
        dataset = MetaDataset(source, f"{experiment}-{split}", digest).to_dict()  # type: ignore[abstract]
        inputs.append(DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", context)]))
    return inputs


def complete(
    store: Store,
    run_id: str | None,
    cell: Cell,
    run_folder: Path,
    end_time: int | None = None,
) -> str:
    """Give a run, or a new one, all that its cell's files hold, end it, and mark it as the current one.

    A run of a DVC experiment is marked as such instead: the workspace has another result of the cell.

    What the run has already stays as it is, so that this may be interrupted and repeated. It ends when
    training did, unless `end_time` says otherwise.
    Returns the run's id. Raises ResgridError for files that are damaged or do not belong together.
    """
    from mlflow.entities import Metric, Param, RunTag

    client = store.client
    metrics, timing = read_json(run_folder / "run.json"), read_json(run_folder / "timing.json")
    epochs = _read_history(run_folder / "history.csv", timing)
    verify_weights(run_folder, metrics, cell.stage)
    weights_sha256 = metrics["weights_sha256"]
    started = started_at(timing)
    end_time = end_time or started + round(1000 * timing["train_seconds"])
    run_id = run_id or create(store, cell, metrics["data_digest"], started)
    client.set_tag(run_id, "weights_sha256", weights_sha256)  # first: by it `sync` finds an interrupted run
    run = client.get_run(run_id)

    params = params_of(cell) | {key: str(metrics[key]) for key in COUNTS}
    new_params = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    known = {point.step: point.value for point in client.get_metric_history(run_id, "train_loss")}
    # On a GPU an epoch that was trained again after a kill has other figures than those logged before it.
    new_epochs = [row for row in epochs if known.get(int(row["epoch"])) != row["train_loss"]]
    points = [
        Metric(key, row[key], int(row["time"]), int(row["epoch"]))
        for row in new_epochs
        for key in EACH_EPOCH
        if key in row
    ]
    # A killed process may have lost an epoch in the middle, and the run have the last one already.
    latest = run.data.metrics | (epochs[-1] if new_epochs and new_epochs[-1] is epochs[-1] else {})
    outcome = {key: metrics[key] for key in (*SCORES, *COUNTS, "best_test_accuracy")}
    outcome |= {key: timing[key] for key in ("train_seconds", "peak_memory_bytes")}
    points += [
        Metric(key, value, end_time, metrics["epochs"])
        for key, value in outcome.items()
        if value is not None and latest.get(key) != value
    ]
    client.log_batch(run_id, params=new_params)
    for start in range(0, len(points), 1000):  # MLflow's limit
        client.log_batch(run_id, metrics=points[start : start + 1000])

    for name in FILES:
        client.log_artifact(run_id, str(run_folder / name))
    _log_model(store, client.get_run(run_id), run_folder / WEIGHTS, metrics["epochs"])

    tags = {
        "status": metrics["status"],
        "threads": str(timing["threads"]),
        "device": timing["device"],
        "device_name": timing["device_name"],
        "precision": timing["precision"],
        "compiled": str(timing["compiled"]).lower(),
        "mlflow.note.content": _description(metrics, timing),
        "grid": "experiment" if experiment() else "current",
        "synced": f"{weights_sha256}:{FORMAT}",
    }
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    if run.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED", end_time)
    return run_id


def _read_history(path: Path, timing: dict[str, Any]) -> list[dict[str, float]]:
    """The rows of history.csv, with images/s and the `time` at which each epoch's training ended."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    if len(rows) != len(timing["epoch_seconds"]):
        raise ResgridError(
            f"{path}: it has {len(rows)} epochs, but timing.json {len(timing['epoch_seconds'])}: they are of "
            "different runs. `dvc checkout --force` restores them."
        )
    ends = epoch_ends(run_status.started_at(timing), timing["epoch_seconds"])
    for row, speed, end in zip(rows, epoch_speeds(timing), ends, strict=True):
        row |= {"images_per_second": speed, "time": float(end)}
    return rows


def started_at(timing: dict[str, Any]) -> int:
    """The second in which training began, in milliseconds."""
    return run_status.started_at(timing) // 1_000_000 * 1000


def _description(metrics: dict[str, Any], timing: dict[str, Any]) -> str:
    """What stands at the head of the run's page."""
    diverged = f"**Diverged**: {metrics['cause']}\n\n" if metrics["status"] == "diverged" else ""
    return (
        f"{diverged}Test accuracy **{metrics['test_accuracy']:.2%}** after epoch {metrics['epochs']}; "
        f"{metrics['num_parameters']:,} parameters; trained in {timing['train_seconds']:,.0f} s on "
        f"{timing['device_name']} ({timing['precision']})."
    )


def _log_model(store: Store, run: Run, weights: Path, step: int) -> None:
    """The model in MLflow's own format, with the scores of its weights, unless the run has it.

    What `mlflow.pytorch.log_model` does, less its global tracking URI and its trial of the model as a server
    would use it: 2 s for a process's first, then half a second, where it took 3.
    """
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from resgrid.predict import Predictor
    from resgrid.weights import load_model

    client, run_id = store.client, run.info.run_id
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client.get_logged_model(output.model_id) for output in outputs]
    if any(model.status == "READY" for model in models):
        return
    if models:  # an interruption left it unfinished
        logged = models[0]
    else:
        logged = client.create_logged_model(store.experiment_id, "model", run_id, params=run.data.params)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])

    classifier, info = load_model(weights)
    model = Model(logged.artifact_location, run_id, model_id=logged.model_id)
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pytorch.save_model(
            Predictor(classifier, info),
            f"{folder}/model",
            mlflow_model=model,
            signature=ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3, 32, 32))]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, len(info.class_names)))]),
            ),
            input_example=np.random.default_rng(0).random(
                (2, 3, 32, 32), np.float32
            ),  # of one: fixes the batch
            serialization_format="pt2",  # an exported graph, no pickle
            pip_requirements=[  # inferred, they would cost a third loading
                f"mlflow=={metadata.version('mlflow')}",
                f"numpy=={np.__version__}",
                f"torch=={torch.__version__.partition('+')[0]}",
            ],
            metadata=info.model_dump(mode="json"),
        )
        # Without this, MLflow wants an exported graph to be on CUDA wherever there is CUDA, and refuses it.
        model.flavors["python_function"]["config"] = {"device": "cpu"}
        model.save(f"{folder}/model/MLmodel")
        client.log_model_artifacts(logged.model_id, f"{folder}/model")
    points = [client.get_metric_history(run_id, key) for key in SCORES]
    scores = [max(each, key=lambda point: (point.step, point.timestamp)) for each in points if each]
    client.log_batch(  # the run has these points already, and MLflow adds them to the model alone
        run_id, [Metric(each.key, each.value, each.timestamp, each.step, logged.model_id) for each in scores]
    )
    client.finalize_logged_model(logged.model_id, "READY")
