"""MLflow for real: SQLite stores and servers in temporary folders, and runs of cells that were trained."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from ports import free_port

from resgrid import tracking, watch
from resgrid.config import Digits, MlflowWeights, Params, Preprocess, RandomWeights, parse_params
from resgrid.data.dataset import Meta, Split, content_digest, load_meta, load_split, save, split_digest
from resgrid.data.fetch import download
from resgrid.data.preprocess import preprocess
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand, find_cell
from resgrid.run_status import FILES
from resgrid.tracking import contents, shared
from resgrid.tracking.store import _is_within_reach, fetch
from resgrid.train import train_cell
from resgrid.training.engine import Epoch
from resgrid.weights import load_model

pytestmark = [
    # MLflow uses what SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    # MLflow warns of a type of its own at the import of mlflow.pyfunc, and hides that by other means.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 32,
    "schedule": {"name": "drop", "every_epochs": 1, "factor": 0.5},
    "warmup": {"steps": 0, "factor": 1.0},
    "time_decay": 0.0,
    "weight_decay": 2.0e-4,
    "decay_norm_and_bias": False,
    "dropout": 0.0,
    "augmentation": {"flip": False, "crop_padding": 0, "rotation_degrees": 0.0, "shift_fraction": 0.0},
    "normalization": {"name": "scalar"},
    "approach": "end_to_end",
    "initial_weights": {"name": "random"},
}


def make_params(lr: float = 0.01, seeds: tuple[int, ...] = (0,), **recipe: Any) -> Params:
    """A grid of ResNet-20 with SGD: one cell a seed."""
    return parse_params(
        {
            "name": "small digits",
            "data": {"source": "digits", "test_fraction": 0.2, "split_seed": 0},
            "preprocess": {
                "resize": "stretch",
                "validation_fraction": 0.0,
                "training_fraction": 1.0,
                "seed": 0,
            },
            "grid": {"architectures": ["resnet20"], "optimizers": ["sgd"], "seeds": list(seeds)},
            "recipes": {"resnet20": RECIPE | recipe},
            "tuning": {
                "resnet20": {
                    "sgd": {"lr": lr},
                    "adam": {"lr": 0.01},
                    "rmsprop": {"lr": 0.01},
                    "adagrad": {"lr": 0.01},
                }
            },
            "optimizers": {
                "sgd": {"momentum": 0.9, "nesterov": True},
                "adam": {"betas": [0.9, 0.999], "eps": 1e-8},
                "rmsprop": {"alpha": 0.99, "momentum": 0.0, "eps": 1e-8},
                "adagrad": {"lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10},
            },
            "studies": {},
            "engine": {"precision": "fp32", "compile": "never", "scored_epochs": "all"},
        }
    )


def only_cell(params: Params) -> Cell:
    [cell] = expand(params)
    return cell


@dataclass(frozen=True)
class Trained:
    folder: Path
    epochs: list[Epoch]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training and 32 test images of handwritten digits, in the processed form."""
    folder = tmp_path_factory.mktemp("digits")
    data = Digits(source="digits", test_fraction=0.2, split_seed=0)
    download(data, folder / "raw")
    settings = Preprocess(resize="stretch", validation_fraction=0.0, training_fraction=1.0, seed=0)
    meta = preprocess(data, settings, folder / "raw", folder / "all")
    splits = {}
    for name, num_images in (("train", 96), ("test", 32)):
        split = load_split(folder / "all", name)
        splits[name] = Split(images=split.images[:num_images], labels=split.labels[:num_images])
    digests = {name: split_digest(split) for name, split in splits.items()}
    update = {
        "num_images": {"train": 96, "test": 32},
        "split_digests": digests,
        "digest": content_digest(meta.class_names, digests),
    }
    save(folder / "processed", meta.model_copy(update=update), splits)
    return folder / "processed"


@pytest.fixture(scope="session")
def meta(digits: Path) -> Meta:
    return load_meta(digits)


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The cell of `make_params()`, trained."""
    folder = tmp_path_factory.mktemp("trained")
    return Trained(folder, list(train_cell(only_cell(make_params()), digits, folder, CPU)))


@pytest.fixture(scope="session")
def trained_faster(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same cell at another learning rate, so with other weights."""
    folder = tmp_path_factory.mktemp("faster")
    return Trained(folder, list(train_cell(only_cell(make_params(lr=0.05)), digits, folder, CPU)))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's file without an experiment of ours: making one takes a second, copying it none."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def pipeline(tmp_path: Path, digits: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline's folder inside a project, current, with data but no results; the store is the project's."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "my project" / ".dvc").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / "my project")
    folder = tmp_path / "my project" / "examples" / "small"
    (folder / "data").mkdir(parents=True)
    shutil.copytree(digits, folder / "data" / "processed")
    monkeypatch.chdir(folder)
    return folder


def put(trained: Trained, pipeline: Path, cell: str = "resnet20-sgd-0") -> Path:
    """The cell's files where training, or DVC, would put them."""
    folder = pipeline / "runs" / cell
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained.folder, folder)
    return folder


def log_live(trained: Trained, pipeline: Path, meta: Meta, lr: float = 0.01) -> None:
    params = make_params(lr)
    with tracking.LiveRun(params.name, only_cell(params), meta.digest) as run:
        for epoch in trained.epochs:
            run.log_epoch(epoch)
        run.complete(put(trained, pipeline))


def all_runs() -> list[Any]:
    """Newest first."""
    store = tracking.open_store("small digits")
    return list(store.client.search_runs([store.experiment_id], order_by=["attributes.start_time DESC"]))


def the_run() -> Any:
    [run] = all_runs()
    return run


def snapshot() -> dict[str, Any]:
    """All that a store holds of the experiment."""
    store = tracking.open_store("small digits")
    client = store.client
    return {
        run.info.run_id: {
            "info": (run.info.status, run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": run.data.tags,
            "points": {
                key: [(p.step, p.timestamp, p.value) for p in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
            "artifacts": [(file.path, file.file_size) for file in client.list_artifacts(run.info.run_id)],
            "inputs": [each.dataset.name for each in run.inputs.dataset_inputs],
            "models": [each.model_id for each in run.outputs.model_outputs],
        }
        for run in all_runs()
    } | {"models": [m.model_id for m in client.search_logged_models([store.experiment_id])]}


# --- the store --------------------------------------------------------------------------------------


def test_importing_it_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, resgrid.tracking; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_folder_of_a_project_has_the_store_in_its_root(pipeline: Path) -> None:
    root = pipeline.parents[1]
    assert tracking.store_uri() == f"sqlite:///{root}/mlflow.db"
    assert tracking.store_uri(root) == f"sqlite:///{root}/mlflow.db"


def test_git_marks_a_root_and_without_any_it_is_the_folder_itself(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert tracking.project_root(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "a" / ".git").mkdir()
    assert tracking.project_root(tmp_path / "a" / "b") == tmp_path / "a"


def test_the_variable_names_another_store_and_a_relative_path_becomes_absolute(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.store_uri() == "http://tracking:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert tracking.store_uri() == f"sqlite:///{pipeline}/mine.db"


def test_store_and_artifacts_lie_in_the_root_the_latter_at_an_absolute_place(pipeline: Path) -> None:
    (pipeline.parents[1] / "mlflow.db").unlink()
    store = tracking.open_store("small digits")
    place = store.client.get_experiment(store.experiment_id).artifact_location
    assert place == (pipeline.parents[1] / "mlruns" / "small digits").as_uri()
    assert (pipeline.parents[1] / "mlflow.db").is_file()
    assert not (pipeline / "mlruns").exists()


def test_a_deleted_experiment_is_named_with_the_way_back(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tracking.open_store("small digits")
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(
        ResgridError, match=f"'small digits' was deleted.*--experiment-id {store.experiment_id}`"
    ):
        tracking.open_store("small digits")

    # A cell that would take others' checkpoints goes on without, and does not wait for what cannot pass.
    monkeypatch.setenv("RESGRID_SHARED_CHECKPOINTS", "1")
    monkeypatch.setattr(shared.time, "sleep", lambda seconds: pytest.fail("waits"))
    cell = find_cell(make_params(), "resnet20-sgd-0")
    with tracking.shared_checkpoints("small digits", cell, "digest", pipeline / "kept") as others:
        assert others == []
    assert "without the checkpoints of others" in capfd.readouterr().err


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Real processes, from a server that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "resgrid.tracking", __name__])
    return context


def _open_and_log(root: Path, cell: Cell, meta: Meta, together: Barrier) -> None:
    os.chdir(root)
    together.wait()
    store = tracking.open_store("small digits")
    together.wait()
    run_id = contents.create(store, cell, meta.digest, 0)  # with the data set, which is not there yet
    for step in range(20):
        store.client.log_metric(run_id, "step", step, step=step)


def test_eight_processes_make_one_store_at_once_and_log_into_it(
    pipeline: Path, meta: Meta, processes: ForkServerContext
) -> None:
    (pipeline.parents[1] / "mlflow.db").unlink()
    together = processes.Barrier(8)
    cell = only_cell(make_params())
    started = [
        processes.Process(target=_open_and_log, args=(pipeline, cell, meta, together)) for _ in range(8)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 8
    store = tracking.open_store("small digits")
    assert [e.name for e in store.client.search_experiments()] == ["small digits", "Default"]
    runs = all_runs()
    assert len(runs) == 8
    assert all(len(store.client.get_metric_history(r.info.run_id, "step")) == 20 for r in runs)
    with sqlite3.connect(pipeline.parents[1] / "mlflow.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


# --- live -------------------------------------------------------------------------------------------


def test_a_run_leads_back_to_the_flow_that_it_belongs_to(
    pipeline: Path, trained: Trained, meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESGRID_FLOW_RUN_ID", "0123-4567")
    log_live(trained, pipeline, meta)
    assert the_run().data.tags["flow_run_id"] == "0123-4567"


def test_a_trained_cell_is_one_complete_run(
    pipeline: Path, trained: Trained, meta: Meta, capfd: pytest.CaptureFixture[str]
) -> None:
    log_live(trained, pipeline, meta)
    assert capfd.readouterr() == ("", "")  # no link, no bar, no warning of MLflow's

    run, client = the_run(), tracking.open_store("small digits").client
    assert (run.info.run_name, run.info.status) == ("resnet20-sgd-0", "FINISHED")
    assert run.data.params == {
        "architecture": "resnet20",
        "family": "cifar_resnet",
        "depth": "20",
        "optimizer": "sgd",
        "learning_rate": "0.01",
        "momentum": "0.9",
        "nesterov": "true",
        "seed": "0",
        "epochs": "2",
        "batch_size": "32",
        "schedule": "drop",
        "schedule.every_epochs": "1",
        "schedule.factor": "0.5",
        "warmup.steps": "0",
        "warmup.factor": "1.0",
        "time_decay": "0.0",
        "weight_decay": "0.0002",
        "decay_norm_and_bias": "false",
        "dropout": "0.0",
        "augmentation.flip": "false",
        "augmentation.crop_padding": "0",
        "augmentation.rotation_degrees": "0.0",
        "augmentation.shift_fraction": "0.0",
        "normalization": "scalar",
        "approach": "end_to_end",
        "initial_weights": "random",
        "precision": "fp32",
        "compile": "never",
        "scored_epochs": "all",
        "num_parameters": "271098",
        "num_trainable": "269722",
        "num_non_trainable": "1376",
    }

    files = pipeline / "runs" / "resnet20-sgd-0"
    metrics, timing = (json.loads((files / f"{name}.json").read_text()) for name in ("run", "timing"))
    expected_tags = {
        "cell": "resnet20-sgd-0",
        "dvc_stage": "train@resnet20-sgd-0",
        "data_digest": meta.digest,
        "weights_sha256": metrics["weights_sha256"],
        "status": "completed",
        "grid": "current",
        "git_commit": "unknown",  # the temporary project is no git repository
        "git_dirty": "unknown",
        "threads": str(torch.get_num_threads()),
        "device": "cpu",
        "device_name": timing["device_name"],
        "precision": "fp32",
        "compiled": "false",
        "resgrid": "0.1.0",
    }
    assert {key: run.data.tags.get(key) for key in expected_tags} == expected_tags
    assert f"Test accuracy **{100 * metrics['test_accuracy']:.2f}%**" in run.data.tags["mlflow.note.content"]
    assert "271,098 parameters" in run.data.tags["mlflow.note.content"]

    def points(key: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]

    for key in (
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "learning_rate",
        "images_per_second",
    ):
        assert points(key) == [(1, getattr(trained.epochs[0], key)), (2, getattr(trained.epochs[1], key))]
    assert points("num_trainable") == [(2, 269722)]
    assert run.data.metrics["test_accuracy"] == metrics["test_accuracy"]
    assert run.data.metrics["best_test_accuracy"] == metrics["best_test_accuracy"]
    assert run.data.metrics["train_seconds"] == timing["train_seconds"]

    system = {key for key in run.data.metrics if key.startswith("system/")}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= system
    assert len(run.data.metrics.keys() - system) == 12  # and two more with a validation split; 15 are allowed

    assert [file.path for file in client.list_artifacts(run.info.run_id)] == sorted(FILES)
    for name in FILES:
        assert (
            Path(client.download_artifacts(run.info.run_id, name)).read_bytes() == (files / name).read_bytes()
        )
    inputs = [(each.dataset, each.tags[0].value) for each in run.inputs.dataset_inputs]
    assert [(data.name, context) for data, context in inputs] == [
        ("small digits-train", "training"),
        ("small digits-test", "testing"),
    ]
    assert all(meta.digest.startswith(f"sha256:{data.digest}") for data, _ in inputs)


def test_the_logged_model_predicts_probabilities_for_any_number_of_raw_images(
    pipeline: Path, trained: Trained, meta: Meta, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_live(trained, pipeline, meta)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.store_uri())  # as a user would say it
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cuda")  # as it is where there is CUDA
    run = the_run()
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    assert model.metadata.metadata["class_names"] == list("0123456789")
    assert model.metadata.run_id == run.info.run_id

    classifier, info = load_model(trained.folder / "weights.safetensors")
    images = load_split(digits, "test").images.permute(0, 3, 1, 2).float() / 255  # (N, 3, 32, 32)
    for num_images in (1, 2, 5):
        batch = images[:num_images]
        with torch.inference_mode():  # every channel has the scalar statistics
            expected = torch.softmax(classifier((batch - info.mean[0]) / info.std[0]), dim=1)
        np.testing.assert_allclose(model.predict(batch.numpy()), expected.numpy(), rtol=1e-4, atol=1e-6)

    with pytest.raises(mlflow.exceptions.MlflowException, match="expected shape"):  # the signature
        model.predict(np.zeros((1, 32, 32, 3), np.float32))
    [logged] = tracking.open_store("small digits").client.search_logged_models([run.info.experiment_id])
    assert {each.key: each.value for each in logged.metrics}["test_accuracy"] == trained.epochs[
        -1
    ].test_accuracy


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED"), (ValueError("broken"), "FAILED")],
)
def test_a_training_that_is_cut_off_ends_its_run(
    pipeline: Path, trained: Trained, meta: Meta, error: BaseException, status: str
) -> None:
    params = make_params()

    def train() -> None:
        with tracking.LiveRun(params.name, only_cell(params), meta.digest) as run:
            run.log_epoch(trained.epochs[0])
            raise error

    with pytest.raises(type(error)):
        train()
    assert the_run().info.status == status
    said = the_run().data.tags.get("mlflow.note.content")
    assert said == (f"**Failed**: {type(error).__name__}: {error}" if status == "FAILED" else None)
    assert the_run().data.metrics["test_accuracy"] == trained.epochs[0].test_accuracy
    assert "grid" not in the_run().data.tags


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def _train_forever(folder: Path, cell: Cell, meta: Meta, epoch: Epoch) -> None:
    signal.signal(signal.SIGTERM, _terminated)  # as the command line does
    os.chdir(folder)
    with tracking.LiveRun("small digits", cell, meta.digest) as run:
        run.log_epoch(epoch)
        while True:
            time.sleep(0.05)


def _wait_for_first_epoch(process: ForkServerProcess) -> Any:
    while True:
        assert process.is_alive()
        if (runs := all_runs()) and "test_accuracy" in runs[0].data.metrics:
            return runs[0]
        time.sleep(0.1)


def test_sigterm_ends_the_run_as_killed_and_after_sigkill_sync_does(
    pipeline: Path, trained: Trained, meta: Meta, processes: ForkServerContext
) -> None:
    params = make_params()
    arguments = (pipeline, only_cell(params), meta, trained.epochs[0])
    process = processes.Process(target=_train_forever, args=arguments)
    process.start()
    first = _wait_for_first_epoch(process)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    assert the_run().info.status == "KILLED"

    process = processes.Process(target=_train_forever, args=arguments)
    process.start()
    while len(all_runs()) == 1:
        time.sleep(0.1)
    second = _wait_for_first_epoch(process)
    assert second.info.run_id != first.info.run_id
    tracking.sync(params, pipeline)
    left = all_runs()[0]
    alive = (left.data.tags.get("process"), watch.describe(process.pid or 0), process.is_alive())
    assert left.info.status == "RUNNING", alive  # sync leaves a run alone whose process lives
    process.kill()
    process.join()
    assert all_runs()[0].info.status == "RUNNING"
    report = tracking.sync(params, pipeline)
    assert report.missing == ["resnet20-sgd-0"]
    assert [run.info.status for run in all_runs()] == ["KILLED", "KILLED"]


def test_a_diverged_cell_is_a_finished_run_that_says_so(pipeline: Path, digits: Path, meta: Meta) -> None:
    params = make_params(lr=1e30)
    cell, folder = only_cell(params), pipeline / "runs" / "resnet20-sgd-0"
    with tracking.LiveRun(params.name, cell, meta.digest) as run:
        for epoch in train_cell(cell, digits, folder, CPU):
            run.log_epoch(epoch)
        run.complete(folder)
    logged = the_run()
    assert (logged.info.status, logged.data.tags["status"]) == ("FINISHED", "diverged")
    assert logged.data.tags["grid"] == "current"
    assert "**Diverged**: the " in logged.data.tags["mlflow.note.content"]
    assert "train_loss" not in logged.data.metrics  # not one epoch was whole
    assert (
        logged.data.metrics["test_accuracy"] == json.loads((folder / "run.json").read_text())["test_accuracy"]
    )
    assert tracking.sync(params, pipeline).unchanged == ["resnet20-sgd-0"]


def test_a_run_names_the_commit_and_whether_tracked_files_differ_from_it(
    pipeline: Path, trained: Trained
) -> None:
    root = pipeline.parents[1]

    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(root)]
        return subprocess.run(
            ["git", *settings, *arguments], check=True, capture_output=True, text=True
        ).stdout

    def dirty_after_sync() -> str:
        tracking.sync(make_params(), pipeline)
        run = the_run()
        assert run.data.tags["git_commit"] == run.data.tags["mlflow.source.git.commit"] == commit
        tracking.open_store("small digits").client.delete_run(run.info.run_id)
        return str(run.data.tags["git_dirty"])

    git("init", "-q")
    (root / "code.py").write_text("1")
    (pipeline / "dvc.lock").write_text("1")
    git("add", "code.py", "examples/small/dvc.lock")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    put(trained, pipeline)
    assert dirty_after_sync() == "false"
    (pipeline / "dvc.lock").write_text("2")
    assert dirty_after_sync() == "false"
    (root / "code.py").write_text("2")
    assert dirty_after_sync() == "true"


# --- when MLflow is broken or away ------------------------------------------------------------------


def test_training_outlives_a_damaged_store_and_says_so_once(
    pipeline: Path, trained: Trained, meta: Meta, capfd: pytest.CaptureFixture[str]
) -> None:
    database = pipeline.parents[1] / "mlflow.db"
    database.write_bytes(b"this is no database" * 100)
    log_live(trained, pipeline, meta)
    out, error = capfd.readouterr()
    assert out == ""
    assert error.count("MLflow does not get all of resnet20-sgd-0") == 1
    assert str(database) in error
    assert len(error.splitlines()) == 2
    with pytest.raises(ResgridError, match=r"mlflow.db: MLflow's store cannot be used .*not a database"):
        tracking.sync(make_params(), pipeline)


def test_training_outlives_a_server_that_is_away_and_no_secret_is_shown(
    pipeline: Path,
    trained: Trained,
    meta: Meta,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://anna:hunter2@{address}?token=hunter3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log_live(trained, pipeline, meta)
    error = capfd.readouterr().err
    assert f"http://{address}: MLflow's store cannot be used" in error
    assert "hunter" not in error
    assert "anna" not in error
    assert len(error.splitlines()) == 2

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.sync(make_params(), pipeline).created == ["resnet20-sgd-0"]


def test_logging_an_epoch_does_not_wait_for_a_server_that_hangs(
    pipeline: Path, trained: Trained, meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    params = make_params()
    with socket.create_server(("127.0.0.1", 0)) as hangs:  # takes connections and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hangs.getsockname()[1]}")
        with tracking.LiveRun(params.name, only_cell(params), meta.digest) as run:
            started = time.monotonic()
            run.log_epoch(trained.epochs[0])
            run.log_epoch(trained.epochs[1])
            assert time.monotonic() - started < 0.2


def test_a_server_that_hangs_does_not_keep_a_stopped_training_from_ending(
    pipeline: Path, meta: Meta, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    params = make_params()
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hangs.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(SystemExit), tracking.LiveRun(params.name, only_cell(params), meta.digest):
            raise SystemExit(143)
        assert time.monotonic() - started < 9
    assert "MLflow does not get all of resnet20-sgd-0: it did not answer in time" in capfd.readouterr().err


# --- a training that goes on --------------------------------------------------------------------------


def _cut_off(meta: Meta, epochs: list[Epoch], **training: Any) -> None:
    params = make_params()
    with (
        suppress(KeyboardInterrupt),
        tracking.LiveRun(params.name, only_cell(params), meta.digest, **training) as run,
    ):
        for epoch in epochs:
            run.log_epoch(epoch)
        raise KeyboardInterrupt


def test_a_training_that_goes_on_does_so_in_its_run_and_no_epoch_is_logged_twice(
    pipeline: Path, trained: Trained, meta: Meta
) -> None:
    params = make_params()
    _cut_off(meta, trained.epochs[:1], training="sha256:a", resumed_epochs=0)
    first = the_run()
    assert first.info.status == "KILLED"
    with tracking.LiveRun(
        params.name, only_cell(params), meta.digest, training="sha256:a", resumed_epochs=1
    ) as run:
        for epoch in trained.epochs:  # the first one again, as after a kill before its checkpoint
            run.log_epoch(epoch)
        while (
            len(tracking.open_store(params.name).client.get_metric_history(first.info.run_id, "test_loss"))
            < 2
        ):
            time.sleep(0.1)
        assert the_run().info.status == "RUNNING"
        run.complete(put(trained, pipeline))
    run = the_run()
    assert (run.info.run_id, run.info.status) == (first.info.run_id, "FINISHED")
    assert run.data.tags["grid"] == "current"
    client = tracking.open_store(params.name).client
    for key in run.data.metrics:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, key)]
        assert len(steps) == len(set(steps)), key
    assert tracking.sync(params, pipeline).unchanged == ["resnet20-sgd-0"]


def test_another_training_and_one_that_begins_anew_get_runs_of_their_own(
    pipeline: Path, trained: Trained, meta: Meta
) -> None:
    _cut_off(meta, trained.epochs[:1], training="sha256:a", resumed_epochs=0)
    _cut_off(meta, trained.epochs[:1], training="sha256:b", resumed_epochs=1)
    _cut_off(meta, trained.epochs[:1], training="sha256:a", resumed_epochs=0)  # its checkpoint is gone
    assert [run.data.tags["training"] for run in all_runs()] == ["sha256:a", "sha256:b", "sha256:a"]


def _log_while_the_server_goes(
    trained: Trained, pipeline: Path, meta: Meta, address: str, gone: Event
) -> None:
    os.chdir(pipeline)
    os.environ |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with tracking.LiveRun("small digits", only_cell(make_params()), meta.digest) as run:
        run.log_epoch(trained.epochs[0])
        gone.wait()
        run.log_epoch(trained.epochs[1])
        folder = put(trained, pipeline)
        timing = json.loads((folder / "timing.json").read_text())
        timing["started"] = datetime.now(UTC).isoformat(timespec="seconds")  # and not before the run
        (folder / "timing.json").write_text(json.dumps(timing))
        run.complete(folder)


def test_what_a_server_that_went_away_did_not_get_is_brought_once_when_it_is_back(
    pipeline: Path,
    trained: Trained,
    meta: Meta,
    processes: ForkServerContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, port = make_params(), free_port()
    address = f"http://127.0.0.1:{port}"

    def begin() -> ForkServerProcess:
        process = processes.Process(target=_serve, args=(pipeline, port))
        process.start()
        _wait_until_healthy(address, process.is_alive)
        return process

    def end(process: ForkServerProcess) -> None:
        process.terminate()
        process.join()

    server, gone = begin(), processes.Event()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    trainer = processes.Process(
        target=_log_while_the_server_goes, args=(trained, pipeline, meta, address, gone)
    )
    trainer.start()
    _wait_for_first_epoch(trainer)
    end(server)
    gone.set()
    trainer.join()
    assert trainer.exitcode == 0

    server = begin()
    report = tracking.sync(params, pipeline)
    assert report.completed == ["resnet20-sgd-0"], report
    assert tracking.sync(params, pipeline).unchanged == ["resnet20-sgd-0"]
    history = tracking.open_store(params.name).client.get_metric_history(the_run().info.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [
        (epoch.epoch, epoch.train_loss) for epoch in trained.epochs
    ]
    end(server)


def test_artifacts_go_to_a_server_or_to_a_folder_that_is_here(tmp_path: Path) -> None:
    for address in ("mlflow-artifacts:/1", "s3://bucket/1", (tmp_path / "1").as_uri(), str(tmp_path / "1")):
        assert _is_within_reach(address), address
    for address in ("file:///nobody%20has/this/1", "/nobody/has/this/1"):
        assert not _is_within_reach(address), address


# --- from the files ---------------------------------------------------------------------------------


def test_a_cell_that_dvc_restored_gets_the_run_that_training_would_have_logged(
    pipeline: Path, trained: Trained, meta: Meta, capfd: pytest.CaptureFixture[str]
) -> None:
    log_live(trained, pipeline, meta)
    live = the_run()
    tracking.open_store("small digits").client.delete_run(live.info.run_id)
    report = tracking.sync(make_params(), pipeline)
    assert report.created == ["resnet20-sgd-0"]
    assert capfd.readouterr() == ("", "")

    restored, client = the_run(), tracking.open_store("small digits").client
    assert restored.data.params == live.data.params
    assert restored.data.tags == live.data.tags
    assert restored.data.metrics.keys() == {k for k in live.data.metrics if not k.startswith("system/")}
    for key, value in restored.data.metrics.items():
        assert value == pytest.approx(live.data.metrics[key], rel=1e-12)
    assert len(client.get_metric_history(restored.info.run_id, "test_loss")) == 2
    timing = json.loads((trained.folder / "timing.json").read_text())
    duration = (restored.info.end_time - restored.info.start_time) / 1000
    assert duration == pytest.approx(timing["train_seconds"], abs=0.002)
    first, second = client.get_metric_history(restored.info.run_id, "test_loss")
    assert (second.timestamp - first.timestamp) / 1000 == pytest.approx(timing["epoch_seconds"][1], abs=0.002)


def test_a_second_sync_changes_nothing(pipeline: Path, trained: Trained, meta: Meta) -> None:
    put(trained, pipeline)
    params = make_params(seeds=(0, 1))
    heard: list[tuple[int, int]] = []
    first = tracking.sync(params, pipeline, lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]
    assert (first.created, first.missing) == (["resnet20-sgd-0"], ["resnet20-sgd-1"])
    before = snapshot()
    started = time.monotonic()
    second = tracking.sync(params, pipeline)
    assert time.monotonic() - started < 1
    assert snapshot() == before
    assert second.as_dict() == {
        "experiment": "small digits",
        "store": f"sqlite:///{pipeline.parents[1]}/mlflow.db",
        "unchanged": ["resnet20-sgd-0"],
        "completed": [],
        "created": [],
        "superseded": [],
        "training": [],
        "missing": ["resnet20-sgd-1"],
        "stale": {},
        "failed": {},
        "champions": {},
        "accuracies": {},
        "summary": None,
    }
    assert str(second) == (
        "MLflow: 1 cells of 'small digits' have their complete run in "
        f"sqlite:///{pipeline.parents[1]}/mlflow.db (nothing to add)\n"
        "  without a result yet: resnet20-sgd-1"
    )


def test_sync_writes_the_way_from_the_report_to_each_run_and_a_second_time_leaves_it(
    pipeline: Path, trained: Trained
) -> None:
    put(trained, pipeline)
    tracking.sync(make_params(), pipeline)
    links = pipeline / "reports" / "runs.html"
    run = the_run().info
    address = f"http://127.0.0.1:5000/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert f'<a id="resnet20-sgd-0" href="{address}?workflowType=machine_learning">' in links.read_text()
    before = links.stat()
    tracking.sync(make_params(), pipeline)
    assert (links.stat().st_mtime_ns, links.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_sync_leaves_a_run_alone_that_training_completed(
    pipeline: Path, trained: Trained, meta: Meta
) -> None:
    log_live(trained, pipeline, meta)
    before = snapshot()
    assert tracking.sync(make_params(), pipeline).unchanged == ["resnet20-sgd-0"]
    assert snapshot() == before


@pytest.mark.parametrize("arrived", [0, 1])
def test_sync_completes_the_run_of_a_training_that_lost_the_server(
    pipeline: Path, trained: Trained, meta: Meta, digits: Path, arrived: int
) -> None:
    params = make_params()
    with tracking.LiveRun(params.name, only_cell(params), meta.digest) as run:  # one of two epochs arrives
        epochs = list(train_cell(only_cell(params), digits, pipeline / "runs" / "resnet20-sgd-0", CPU))
        run.log_epoch(epochs[arrived])
    partial = the_run()
    report = tracking.sync(params, pipeline)
    assert (report.completed, report.created) == (["resnet20-sgd-0"], [])
    complete = the_run()
    assert complete.info.run_id == partial.info.run_id
    client = tracking.open_store("small digits").client
    history = client.get_metric_history(complete.info.run_id, "train_loss")
    assert sorted((p.step, p.value) for p in history) == [(e.epoch, e.train_loss) for e in epochs]
    assert [file.path for file in client.list_artifacts(complete.info.run_id)] == sorted(FILES)
    assert complete.data.tags["grid"] == "current"
    before = snapshot()
    assert tracking.sync(params, pipeline).unchanged == ["resnet20-sgd-0"]
    assert snapshot() == before


def test_sync_finishes_a_completion_that_was_interrupted(
    pipeline: Path, trained: Trained, meta: Meta
) -> None:
    put(trained, pipeline)
    tracking.sync(make_params(), pipeline)
    store, run_id = tracking.open_store("small digits"), the_run().info.run_id
    whole = snapshot()
    # As it is when the model was being written: no tag, no end, half an artifact, a model that is pending.
    with sqlite3.connect(pipeline.parents[1] / "mlflow.db") as database:
        database.execute("UPDATE logged_models SET status = 1")
    database.close()
    for tag in ("synced", "grid", "status"):
        store.client.delete_tag(run_id, tag)
    store.client.update_run(run_id, status="KILLED")
    artifact = Path(store.client.download_artifacts(run_id, "weights.safetensors"))
    artifact.write_bytes(artifact.read_bytes()[:1000])
    assert tracking.sync(make_params(), pipeline).completed == ["resnet20-sgd-0"]
    assert snapshot() == whole
    [model] = store.client.search_logged_models([store.experiment_id])
    assert model.status == "READY"


def test_replaced_weights_are_superseded_and_restored_ones_are_current_again(
    pipeline: Path, trained: Trained, trained_faster: Trained, meta: Meta
) -> None:
    log_live(trained, pipeline, meta)
    first = the_run().info.run_id
    log_live(trained_faster, pipeline, meta, lr=0.05)
    second = all_runs()[0].info.run_id

    def grid() -> dict[str, str]:
        return {run.info.run_id: run.data.tags["grid"] for run in all_runs()}

    assert grid() == {first: "superseded", second: "current"}  # already, without a sync
    assert tracking.sync(make_params(lr=0.05), pipeline).unchanged == ["resnet20-sgd-0"]

    put(trained, pipeline)  # the params go back, and DVC restores the files from its run cache
    report = tracking.sync(make_params(), pipeline)
    assert (report.unchanged, report.superseded) == (["resnet20-sgd-0"], [second])
    assert grid() == {first: "current", second: "superseded"}


def test_of_two_runs_with_the_same_weights_the_newer_is_current(
    pipeline: Path, trained: Trained, meta: Meta
) -> None:
    log_live(trained, pipeline, meta)
    log_live(trained, pipeline, meta)
    newer, older = all_runs()
    assert (newer.data.tags["grid"], older.data.tags["grid"]) == ("current", "superseded")
    before = snapshot()
    tracking.sync(make_params(), pipeline)
    assert snapshot() == before


def test_the_run_of_a_cell_that_left_the_grid_is_superseded(
    pipeline: Path, trained: Trained, meta: Meta
) -> None:
    put(trained, pipeline)
    tracking.sync(make_params(), pipeline)
    report = tracking.sync(make_params(seeds=(1,)), pipeline)
    assert report.superseded == [the_run().info.run_id]
    assert the_run().data.tags["grid"] == "superseded"


def test_files_of_other_params_make_no_run(pipeline: Path, trained: Trained) -> None:
    put(trained, pipeline)
    report = tracking.sync(make_params(lr=0.05), pipeline)
    why = "stale: trained with learning_rate 0.01 → 0.05 (params.yaml now)"
    assert report.stale == {"resnet20-sgd-0": why}
    assert all_runs() == []


def test_an_altered_weights_file_is_reported_and_the_other_cells_are_done(
    pipeline: Path, trained: Trained, digits: Path
) -> None:
    params = make_params(seeds=(0, 1), epochs=1)
    for cell in expand(params):
        list(train_cell(cell, digits, pipeline / "runs" / cell.id, CPU))
    weights = pipeline / "runs" / "resnet20-sgd-0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    report = tracking.sync(params, pipeline)
    assert report.created == ["resnet20-sgd-1"]
    assert "weights.safetensors: the file has changed since it was trained" in report.failed["resnet20-sgd-0"]
    assert "`dvc repro train@resnet20-sgd-0`" in report.failed["resnet20-sgd-0"]
    assert the_run().info.run_name == "resnet20-sgd-1"


def test_more_figures_than_mlflow_takes_at_once_all_arrive(pipeline: Path, trained: Trained) -> None:
    folder = put(trained, pipeline)
    lines = (folder / "history.csv").read_text().splitlines()
    values = lines[1].partition(",")[2]
    rows = [f"{epoch},{values}" for epoch in range(1, 251)]  # 250 epochs of 6 figures; the limit is 1,000
    (folder / "history.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    timing = json.loads((folder / "timing.json").read_text())
    timing["epoch_seconds"] = [timing["train_seconds"] / 250] * 250
    timing["epoch_images_per_second"] = [timing["images_per_second"]] * 250
    (folder / "timing.json").write_text(json.dumps(timing))
    tracking.sync(make_params(), pipeline)
    client, run_id = tracking.open_store("small digits").client, the_run().info.run_id
    for key in ("train_loss", "test_accuracy", "images_per_second"):
        steps = [point.step for point in client.get_metric_history(run_id, key)]
        assert sorted(set(steps)) == list(range(1, 251))


def test_results_without_their_data_get_a_run_as_well(pipeline: Path, trained: Trained, meta: Meta) -> None:
    shutil.rmtree(pipeline / "data")
    put(trained, pipeline)
    assert tracking.sync(make_params(), pipeline).created == ["resnet20-sgd-0"]
    [train, _] = the_run().inputs.dataset_inputs
    assert meta.digest.startswith(f"sha256:{train.dataset.digest}")


# --- weights from MLflow ----------------------------------------------------------------------------


def test_initial_weights_come_from_a_run_or_from_the_run_behind_a_model(
    pipeline: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(trained, pipeline)
    tracking.sync(make_params(), pipeline)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.store_uri())  # which registering a model goes by
    run, client = the_run(), tracking.open_store("small digits").client
    [model] = run.outputs.model_outputs
    client.create_registered_model("digits-classifier")
    client.create_model_version(
        "digits-classifier", f"models:/{model.model_id}", run.info.run_id, model_id=model.model_id
    )
    client.set_registered_model_alias("digits-classifier", "best", "1")
    for uri in (
        f"runs:/{run.info.run_id}",
        f"runs:/{run.info.run_id}/model",
        f"models:/{model.model_id}",
        "models:/digits-classifier/1",
        "models:/digits-classifier@best",
    ):
        if "@" in uri:  # for `--model` alone: what a cell begins with must not move
            path = fetch(uri, "--model")
        else:
            path = tracking.fetch_weights(MlflowWeights(name="mlflow", uri=uri))
        assert path.parent == pipeline.parents[1] / ".resgrid" / "weights"
        assert path.name == f"resnet20-sgd-0-{run.info.run_id}.safetensors"
        assert path.read_bytes() == (trained.folder / "weights.safetensors").read_bytes()
        path.unlink()
    assert tracking.fetch_weights(RandomWeights(name="random")) is None


def test_unknown_weights_are_named(pipeline: Path) -> None:
    store = tracking.open_store("small digits")
    bare = store.client.create_run(store.experiment_id).info.run_id
    for uri in ("runs:/0123456789abcdef0123456789abcdef", "models:/nothing/3", f"runs:/{bare}"):
        with pytest.raises(ResgridError, match=f"^initial_weights: {uri} gives no weights.safetensors"):
            tracking.fetch_weights(MlflowWeights(name="mlflow", uri=uri))


# --- a server ---------------------------------------------------------------------------------------


def _serve(folder: Path, port: int) -> None:
    signal.signal(signal.SIGTERM, _terminated)
    os.chdir(folder)
    tracking.serve(port, "small digits")


def _wait_until_healthy(address: str, is_alive: Callable[[], bool]) -> None:
    while True:
        assert is_alive()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                assert answer.read() == b"OK"
            return
        except OSError:
            time.sleep(0.2)


@pytest.fixture
def server(pipeline: Path, processes: ForkServerContext) -> Iterator[str]:
    """`resgrid ui` on the project's store."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = processes.Process(target=_serve, args=(pipeline, port))
    process.start()
    _wait_until_healthy(address, process.is_alive)
    yield address
    process.terminate()
    process.join()
    with pytest.raises(OSError, match="refused"):  # MLflow's own processes are gone as well
        urllib.request.urlopen(f"{address}/health", timeout=5)


def test_all_of_it_works_through_a_server_on_the_same_store(
    pipeline: Path,
    server: str,
    trained: Trained,
    meta: Meta,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(trained, pipeline)
    tracking.sync(make_params(), pipeline)
    before = snapshot()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert tracking.sync(make_params(), pipeline).unchanged == ["resnet20-sgd-0"]
    log_live(trained, pipeline, meta)
    newer, older = all_runs()
    assert older.data.tags["grid"] == "superseded"
    assert newer.data.tags["grid"] == "current"
    assert newer.data.params == before[older.info.run_id]["params"]
    assert tracking.sync(make_params(), pipeline).unchanged == ["resnet20-sgd-0"]
    path = tracking.fetch_weights(MlflowWeights(name="mlflow", uri=f"runs:/{newer.info.run_id}"))
    assert path is not None
    assert path.read_bytes() == (trained.folder / "weights.safetensors").read_bytes()

    through_server = snapshot()
    capsys.readouterr()
    tracking.serve(5000, "small digits")  # starts nothing
    page = f"{server}/#/experiments/{newer.info.experiment_id}/runs?workflowType=machine_learning&"
    assert capsys.readouterr().out.startswith(f"MLflow: {page}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert snapshot() == through_server


@pytest.mark.long
def test_a_server_with_a_store_of_its_own_takes_artifacts_and_models_as_well(
    pipeline: Path, tmp_path: Path, trained: Trained, meta: Meta, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/elsewhere/their.db"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(command, cwd=tmp_path / "elsewhere", env=environment)
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}", lambda: process.poll() is None)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        log_live(trained, pipeline, meta)
        run = the_run()
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        before = snapshot()
        assert tracking.sync(make_params(), pipeline).unchanged == ["resnet20-sgd-0"]
        assert snapshot() == before
        model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
        assert model.predict(np.zeros((3, 3, 32, 32), np.float32)).shape == (3, 10)
        path = tracking.fetch_weights(MlflowWeights(name="mlflow", uri=f"runs:/{run.info.run_id}"))
        assert path is not None
        assert path.read_bytes() == (trained.folder / "weights.safetensors").read_bytes()
        assert not list(pipeline.parents[1].glob("mlruns*"))
    finally:
        process.terminate()
        process.wait()


def test_a_taken_port_is_named(pipeline: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResgridError, match=f"port {port}: .*--port"):
            tracking.serve(port)
    with pytest.raises(ResgridError, match=r"port 70000: .*0-65535.*--port"):
        tracking.serve(70_000)
