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
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from ports import free_port
from ruamel.yaml import YAML
from small import PARAMS, RECIPE

from resgrid import tracking, watch
from resgrid.cli import main
from resgrid.config import Digits, MlflowWeights, Params, Preprocess, RandomWeights, parse_params
from resgrid.data.dataset import load_meta, load_split
from resgrid.data.fetch import download
from resgrid.data.preprocess import preprocess
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.run_status import FILES
from resgrid.tracking.mirror import Snapshot, mirror, params_of
from resgrid.tracking.store import fetch
from resgrid.train_cell import train_cell
from resgrid.training.engine import Epoch
from resgrid.weights import load_model

pytestmark = [
    # MLflow uses what SQLAlchemy 2.1 deprecates.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    # MLflow warns of a type of its own at the import of mlflow.pyfunc, and hides that by other means.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

SYSTEM = "system/cpu_utilization_percentage"
CPU, CELL = torch.device("cpu"), "resnet20-sgd-0"


def raw_params(lr: float = 0.01, seeds: tuple[int, ...] = (0,), **recipe: Any) -> dict[str, Any]:
    """A grid of ResNet-20 with SGD: one cell a seed."""
    data = "{source: digits, test_fraction: 0.2, split_seed: 0}"
    numbers = RECIPE.format(epochs=2, batch_size=32)
    text = PARAMS.format(
        data=data, validation=0.0, training=1.0, seeds=list(seeds), recipe=numbers, studies="{}"
    )
    params: dict[str, Any] = YAML(typ="safe").load(text)
    params["name"] = "small digits"
    params["grid"]["optimizers"] = ["sgd"]
    params["tuning"]["resnet20"]["sgd"]["lr"] = lr
    params["recipes"]["resnet20"] |= recipe
    return params


def make_params(lr: float = 0.01, seeds: tuple[int, ...] = (0,), **recipe: Any) -> Params:
    return parse_params(raw_params(lr, seeds, **recipe))


def only_cell(lr: float = 0.01) -> Cell:
    [cell] = expand(make_params(lr))
    return cell


@dataclass(frozen=True)
class Trained:
    folder: Path
    epochs: list[Epoch]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Some 96 training and 36 test images of handwritten digits, in the processed form."""
    folder = tmp_path_factory.mktemp("digits")
    data = Digits(source="digits", test_fraction=0.02, split_seed=0)
    download(data, folder / "raw")
    settings = Preprocess(resize="stretch", validation_fraction=0.0, training_fraction=0.055, seed=0)
    preprocess(data, settings, folder / "raw", folder / "processed")
    return folder / "processed"


@pytest.fixture(scope="session")
def meta(digits):
    return load_meta(digits)


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """The cell of `make_params()`, trained."""
    folder = tmp_path_factory.mktemp("trained")
    return Trained(folder, list(train_cell(only_cell(), digits, folder, CPU)))


@pytest.fixture(scope="session")
def trained_faster(digits, tmp_path_factory):
    """The same cell at another learning rate, so with other weights."""
    folder = tmp_path_factory.mktemp("faster")
    return Trained(folder, list(train_cell(only_cell(lr=0.05), digits, folder, CPU)))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A store's file without an experiment of ours: making one takes a second, copying it none."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def pipeline(tmp_path, digits, empty_database, monkeypatch):
    """A pipeline's folder inside a project, current, with data but no results; the store is the project's."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "my project" / ".dvc").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / "my project")
    folder = tmp_path / "my project" / "examples" / "small"
    (folder / "data").mkdir(parents=True)
    shutil.copytree(digits, folder / "data" / "processed")
    monkeypatch.chdir(folder)
    return folder


def put(trained, pipeline, cell=CELL):
    """The cell's files where training, or DVC, would put them."""
    folder = pipeline / "runs" / cell
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained.folder, folder)
    return folder


def log_live(trained, pipeline, meta, lr=0.01, anew=False):
    """As `resgrid train` does; `anew`: a training of its own with the same result, as by `dvc repro -f`."""
    folder = put(trained, pipeline)
    started = rewrite(folder, lambda timing: {"started": timing["started"] + 10**9 * anew})["started"]
    with live(meta, started, lr=lr) as run:
        for number in range(len(trained.epochs)):
            run.log_epochs(rows(trained.epochs[: number + 1]))
        run.complete(folder)


def rewrite(folder, changes):
    """Change what the timing.json of a run's folder says; returns all of it."""
    path = folder / "timing.json"
    timing = json.loads(path.read_text())
    timing |= changes(timing)
    path.write_text(json.dumps({key: value for key, value in timing.items() if value is not None}))
    return timing


def live(meta, started, epochs=(), lr=0.01):
    return tracking.LiveRun("small digits", only_cell(lr), meta.digest, started, rows(epochs))


def started_in(folder):
    return json.loads((folder / "timing.json").read_text())["started"]


def rows(epochs):
    return [asdict(epoch) for epoch in epochs]


def history(run, key):
    client = tracking.open_store("small digits").client
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]


def all_runs():
    """Newest first."""
    store = tracking.open_store("small digits")
    return list(store.client.search_runs([store.experiment_id], order_by=["attributes.start_time DESC"]))


def the_run():
    [run] = all_runs()
    return run


def grid():
    """The tag `grid` of every run, by its id."""
    return {run.info.run_id: run.data.tags.get("grid") for run in all_runs()}


def synced(pipeline, **params):
    """What `sync` did with each cell."""
    return tracking.sync(make_params(**params), pipeline).cells


def snapshot():
    """All that a store holds of the experiment."""
    store = tracking.open_store("small digits")
    client = store.client
    return {
        run.info.run_id: (
            run.to_dictionary(),
            {
                key: [(p.step, p.timestamp, p.value) for p in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
            [(file.path, file.file_size) for file in client.list_artifacts(run.info.run_id)],
        )
        for run in all_runs()
    } | {"models": [m.model_id for m in client.search_logged_models([store.experiment_id])]}


# --- the store --------------------------------------------------------------------------------------


def test_importing_it_imports_neither_mlflow_nor_torch():
    code = "import sys, resgrid.tracking; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_store_and_artifacts_lie_in_the_root_or_where_the_variable_says_each_at_an_absolute_place(
    pipeline, monkeypatch
):
    root = pipeline.parents[1]
    assert tracking.store_uri() == tracking.store_uri(root) == f"sqlite:///{root}/mlflow.db"
    (root / "mlflow.db").unlink()
    store = tracking.open_store("small digits")
    place = store.client.get_experiment(store.experiment_id).artifact_location
    assert place == (root / "mlruns" / "small digits").as_uri()
    assert (root / "mlflow.db").is_file()
    assert not (pipeline / "mlruns").exists()
    for variable, uri in (
        ("http://tracking:5000", "http://tracking:5000"),
        ("sqlite:///mine.db", f"sqlite:///{pipeline}/mine.db"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        assert tracking.store_uri() == uri


def test_a_deleted_experiment_is_named_with_the_way_back(pipeline):
    store = tracking.open_store("small digits")
    store.client.delete_experiment(store.experiment_id)
    way_back = f"'small digits' was deleted.*--experiment-id {store.experiment_id}`"
    with pytest.raises(ResgridError, match=way_back):
        tracking.open_store("small digits")


def test_an_experiment_is_one_pipelines_in_clones_and_moved_checkouts_too(pipeline, tmp_path, monkeypatch):
    def git(folder, *arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True)

    root = pipeline.parents[1]
    git(root, "init", "-q")
    git(root, "add", "examples/small/data/processed/meta.json")
    git(root, "commit", "-qm", "first")
    store = tracking.open_store("pets", pipeline)
    shutil.copytree(pipeline, root / "examples" / "copied")
    way_out = "'pets' belongs to another pipeline, in the folder examples/small .* another `name` in params"
    with pytest.raises(ResgridError, match=way_out):
        tracking.open_store("pets", root / "examples" / "copied")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.store_uri(pipeline))
    git(tmp_path, "clone", "-q", str(root), "clone")
    git(root, "commit", "-qm", "second", "--allow-empty")
    clone = tracking.open_store("pets", tmp_path / "clone" / "examples" / "small")
    assert clone.experiment_id == store.experiment_id
    root.joinpath("examples/small").rename(root / "examples" / "renamed")
    with pytest.raises(ResgridError, match=f"experiments rename --experiment-id {store.experiment_id} "):
        tracking.open_store("pets", root / "examples" / "renamed")

    elsewhere = tmp_path / "another" / "examples" / "small"
    elsewhere.mkdir(parents=True)
    git(tmp_path / "another", "init", "-q")
    git(tmp_path / "another", "commit", "-qm", "other", "--allow-empty")
    with pytest.raises(ResgridError, match="belongs to another pipeline"):
        tracking.open_store("pets", elsewhere)


def test_a_store_lies_in_a_project_of_any_name_and_nothing_outside(pipeline, trained, tmp_path, monkeypatch):
    name = "a%20b what? ä #1"
    root = pipeline.parents[1].rename(tmp_path / name)
    (root / "mlflow.db").unlink()
    folder = root / "examples" / "small"
    monkeypatch.chdir(folder)
    put(trained, folder)
    assert [synced(folder), synced(folder)] == [{CELL: "created"}, {CELL: "unchanged"}]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (root / "mlflow.db").is_file()
    assert tracking.fetch_weights(MlflowWeights(name="mlflow", uri=f"runs:/{the_run().info.run_id}"))


def test_an_error_names_whom_it_asked_and_keeps_the_remedy(pipeline, trained, monkeypatch):
    put(trained, pipeline)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", away)
    with pytest.raises(ResgridError, match=f"^{away}: MLflow does not answer.*Connection refused"):
        synced(pipeline)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ResgridError, match=r"^\./mlruns: .*set `MLFLOW_ALLOW_FILE_STORE=true`"):
        synced(pipeline)


@pytest.fixture(scope="session")
def processes():
    """Real processes, from a server that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "resgrid.tracking", __name__])
    return context


def live_snapshot(meta, started):
    return Snapshot(cell=only_cell(), data_digest=meta.digest, started=started, timing={}, epochs=())


def _open_and_log(root, meta, together, number):
    os.chdir(root)
    together.wait()
    store = tracking.open_store("small digits")
    together.wait()
    run_id = mirror(store, live_snapshot(meta, number))  # with the data set, which is not there yet
    for step in range(20):
        store.client.log_metric(run_id, "step", step, step=step)


def test_eight_processes_make_one_store_at_once_and_log_into_it(pipeline, meta, processes):
    (pipeline.parents[1] / "mlflow.db").unlink()
    together = processes.Barrier(8)
    started = [
        processes.Process(target=_open_and_log, args=(pipeline, meta, together, number))
        for number in range(8)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 8
    store = tracking.open_store("small digits")
    assert [e.name for e in store.client.search_experiments()] == ["small digits", "Default"]
    assert [len(history(run, "step")) for run in all_runs()] == [20] * 8
    with sqlite3.connect(pipeline.parents[1] / "mlflow.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


# --- live -------------------------------------------------------------------------------------------


def test_a_trained_cell_is_one_complete_run(pipeline, trained, meta, capfd):
    log_live(trained, pipeline, meta)
    assert capfd.readouterr() == ("", "")  # no link, no bar, no warning of MLflow's

    run, client = the_run(), tracking.open_store("small digits").client
    assert (run.info.run_name, run.info.status) == (CELL, "FINISHED")
    assert run.data.params.keys() >= params_of(only_cell()).keys()
    assert run.data.params.items() >= {
        "architecture": "resnet20", "depth": "20", "optimizer": "sgd", "learning_rate": "0.01",
        "nesterov": "true", "schedule": "constant", "augmentation.flip": "false", "num_trainable": "269722",
    }.items()  # fmt: skip
    files = pipeline / "runs" / CELL
    metrics, timing = (json.loads((files / f"{name}.json").read_text()) for name in ("run", "timing"))
    assert run.data.tags.items() >= {
        "cell": CELL, "data_digest": meta.digest, "weights_sha256": metrics["weights_sha256"],
        "status": "completed", "grid": "current", "threads": str(torch.get_num_threads()), "device": "cpu",
        "device_name": timing["device_name"], "precision": "fp32", "compiled": "false", "resgrid": "0.1.0",
    }.items()  # fmt: skip
    assert f"Test accuracy **{100 * metrics['test_accuracy']:.2f}%**" in run.data.tags["mlflow.note.content"]
    assert "271,098 parameters" in run.data.tags["mlflow.note.content"]

    losses = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    for key in (*losses, "learning_rate", "images_per_second"):
        assert history(run, key) == [(epoch.epoch, getattr(epoch, key)) for epoch in trained.epochs]
    assert history(run, "log10_learning_rate") == [(0, -2.0)]
    assert history(run, "num_trainable") == [(2, 269722)]
    for key in ("test_accuracy", "best_test_accuracy", "train_seconds"):
        assert run.data.metrics[key] == (metrics | timing)[key]
    assert len(run.data.metrics) == 13  # and two more with a validation split; 15 are allowed

    assert [file.path for file in client.list_artifacts(run.info.run_id)] == sorted(FILES)
    for name in FILES:
        artifact = Path(client.download_artifacts(run.info.run_id, name))
        assert artifact.read_bytes() == (files / name).read_bytes()
    inputs = [(each.dataset, each.tags[0].value) for each in run.inputs.dataset_inputs]
    assert [(data.name, context) for data, context in inputs] == [
        ("small digits-train", "training"), ("small digits-test", "testing"),
    ]  # fmt: skip
    assert all(meta.digest.startswith(f"sha256:{data.digest}") for data, _ in inputs)

    before = snapshot()
    assert synced(pipeline) == {CELL: "unchanged"}
    assert snapshot() == before


def test_the_logged_model_predicts_probabilities_for_any_number_of_raw_images(
    pipeline, trained, meta, digits, monkeypatch
):
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
    scores = {each.key: each.value for each in logged.metrics}
    assert scores["test_accuracy"] == trained.epochs[-1].test_accuracy


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED"), (ValueError("broken"), "FAILED")],
)
def test_a_training_that_is_cut_off_ends_its_run(pipeline, trained, meta, error, status):
    with pytest.raises(type(error)):
        cut_off(meta, trained.epochs[:1], 1_700_000_000_000_000, error)
    tags = the_run().data.tags
    assert the_run().info.status == status
    assert tags.get("mlflow.note.content") == (
        "**Failed**: ValueError: broken" if status == "FAILED" else None
    )
    assert the_run().data.metrics["test_accuracy"] == trained.epochs[0].test_accuracy
    assert "grid" not in tags


def cut_off(meta, epochs, started, error):
    """A training that `error` ends once a run has its epochs: the end of a stopped one waits for little."""
    with live(meta, started) as live_run:
        live_run.log_epochs(rows(epochs))
        for _ in range(600):
            runs = [run for run in all_runs() if run.info.start_time == started // 1000]
            if any(len(history(run, "train_loss")) == len(epochs) for run in runs):
                raise error
            time.sleep(0.1)
        raise TimeoutError("no run has them")


def interrupted(meta, epochs, started):
    with suppress(KeyboardInterrupt):
        cut_off(meta, epochs, started, KeyboardInterrupt())


def _terminated(signum, frame):
    raise SystemExit(128 + signum)


def _train_forever(folder, meta, epoch):
    signal.signal(signal.SIGTERM, _terminated)  # as the command line does
    os.chdir(folder)
    os.environ["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "1"
    with live(meta, time.time_ns() // 1000) as run:
        run.log_epochs(rows([epoch]))
        while True:
            time.sleep(0.05)


def test_sigterm_ends_the_run_as_killed_and_after_sigkill_sync_does(pipeline, trained, meta, processes):
    def begin(num_runs):
        process = processes.Process(target=_train_forever, args=(pipeline, meta, trained.epochs[0]))
        process.start()
        while True:
            assert process.is_alive()
            runs = all_runs()
            if len(runs) == num_runs and {"test_accuracy", SYSTEM} <= runs[0].data.metrics.keys():
                return process
            time.sleep(0.1)

    process = begin(num_runs=1)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    assert the_run().info.status == "KILLED"

    process = begin(num_runs=2)
    synced(pipeline)
    left = all_runs()[0]
    alive = (left.data.tags.get("process"), watch.describe(process.pid or 0), process.is_alive())
    assert left.info.status == "RUNNING", alive  # sync leaves a run alone whose process lives
    process.kill()
    process.join()
    assert all_runs()[0].info.status == "RUNNING"
    assert synced(pipeline) == {CELL: "missing"}
    assert [run.info.status for run in all_runs()] == ["KILLED", "KILLED"]


def test_a_diverged_cell_is_a_finished_run_that_says_so(pipeline, digits, meta):
    folder = pipeline / "runs" / CELL
    list(train_cell(only_cell(lr=1e30), digits, folder, CPU))
    with live(meta, started_in(folder), lr=1e30) as run:
        run.complete(folder)
    logged = the_run()
    assert (logged.info.status, logged.data.tags["status"]) == ("FINISHED", "diverged")
    assert logged.data.tags["grid"] == "current"
    assert "**Diverged**: the " in logged.data.tags["mlflow.note.content"]
    assert "train_loss" not in logged.data.metrics  # not one epoch was whole
    record = json.loads((folder / "run.json").read_text())
    assert logged.data.metrics["test_accuracy"] == record["test_accuracy"]
    assert synced(pipeline, lr=1e30) == {CELL: "unchanged"}


def test_a_run_made_by_sync_names_the_commit_that_trained_and_leaves_out_what_is_not_known(pipeline, trained):
    folder, known = put(trained, pipeline), {"git_commit": "abc", "git_dirty": "true", "flow_run_id": "7"}
    rewrite(folder, lambda _: {"commit": "abc", "dirty": True, "flow_run_id": "7"})
    synced(pipeline)
    assert the_run().data.tags.items() >= (known | {"mlflow.source.git.commit": "abc"}).items()

    tracking.open_store("small digits").client.delete_run(the_run().info.run_id)
    of_older_version = {"started": "2026-11-01T00:00:00+00:00", "commit": None, "dirty": None}
    rewrite(folder, lambda _: of_older_version | {"flow_run_id": None})
    synced(pipeline)
    assert not known.keys() & the_run().data.tags.keys()
    assert the_run().info.start_time == 1793491200000


# --- when MLflow is broken or away ------------------------------------------------------------------


def test_training_outlives_a_damaged_store_and_says_so_once(pipeline, trained, meta, caplog):
    database = pipeline.parents[1] / "mlflow.db"
    database.write_bytes(b"this is no database" * 100)
    log_live(trained, pipeline, meta)
    [error] = caplog.messages
    assert error.startswith("Logging resnet20-sgd-0 to MLflow failed")
    assert str(database) in error
    with pytest.raises(
        ResgridError, match=r"mlflow.db: MLflow does not answer as it should: .*not a database"
    ):
        synced(pipeline)


def test_training_outlives_a_server_that_is_away_and_no_secret_is_shown(
    pipeline, trained, meta, monkeypatch, caplog
):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://anna:hunter2@{address}?token=hunter3")
    log_live(trained, pipeline, meta)
    [error] = caplog.messages
    assert f"http://{address}: MLflow does not answer" in error
    assert "Connection refused" in error
    assert "hunter" not in error
    assert "anna" not in error

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert synced(pipeline) == {CELL: "created"}


@pytest.mark.parametrize(("error", "seconds"), [(None, 5), (SystemExit(143), 2)])
def test_no_epoch_and_no_end_waits_for_a_server_that_never_answers(
    pipeline, trained, meta, monkeypatch, caplog, error, seconds
):
    folder = put(trained, pipeline)
    with socket.create_server(("127.0.0.1", 0)) as hangs, suppress(SystemExit):  # takes connections, no more
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hangs.getsockname()[1]}")
        with live(meta, started_in(folder)) as run:
            for number in (1, 2):
                began = time.monotonic()
                run.log_epochs(rows(trained.epochs[:number]))
                assert time.monotonic() - began < 0.2
                time.sleep(0.5)
            run.complete(folder)
            began = time.monotonic()
            if error is not None:
                raise error
    assert time.monotonic() - began < seconds + 0.7
    [message] = caplog.messages
    assert message.startswith("Logging resnet20-sgd-0 to MLflow failed: ")
    assert "`resgrid sync` completes the run later" in message
    for thread in threading.enumerate():  # a process that ends leaves it behind
        if thread.name == "mlflow":
            thread.join()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert synced(pipeline) == {CELL: "created"}


# --- a training that goes on --------------------------------------------------------------------------


def test_a_training_that_goes_on_does_so_in_its_run_and_no_epoch_is_logged_twice(pipeline, trained, meta):
    folder = put(trained, pipeline)
    started = started_in(folder)
    interrupted(meta, trained.epochs[:1], started)
    first = the_run()
    assert first.info.status == "KILLED"
    with live(meta, started, trained.epochs[:1]) as run:
        run.log_epochs(rows(trained.epochs))
        while len(history(first, "test_loss")) < 2 or the_run().info.status != "RUNNING":
            time.sleep(0.1)
        run.complete(folder)
    whole = the_run()
    assert (whole.info.run_id, whole.info.status) == (first.info.run_id, "FINISHED")
    assert whole.data.tags["grid"] == "current"
    for key in {key for key in whole.data.metrics if not key.startswith("system/")}:
        steps = [step for step, _ in history(whole, key)]
        assert len(steps) == len(set(steps)), key
    assert synced(pipeline) == {CELL: "unchanged"}


def test_a_training_that_begins_anew_gets_a_run_of_its_own(pipeline, trained, meta):
    for started in (1_000_000, 2_000_000):  # the checkpoint of the first is gone
        interrupted(meta, trained.epochs[:1], started)
    assert len(all_runs()) == 2


def test_an_epoch_with_other_figures_than_the_result_makes_a_new_run_and_supersedes_the_old(
    pipeline, trained, meta
):
    """As on a GPU, where an epoch that a kill has lost is trained again."""
    folder, first = put(trained, pipeline), trained.epochs[0]
    interrupted(meta, [replace(first, train_loss=first.train_loss + 1)], started_in(folder))
    other = the_run().info.run_id
    assert synced(pipeline) == {CELL: "created"}
    [current] = [run for run in all_runs() if run.info.run_id != other]
    assert grid() == {other: "superseded", current.info.run_id: "current"}
    assert history(current, "train_loss") == [(epoch.epoch, epoch.train_loss) for epoch in trained.epochs]
    before = snapshot()
    assert synced(pipeline) == {CELL: "unchanged"}
    assert snapshot() == before


def test_two_processes_that_both_made_a_run_of_one_training_go_on_with_the_same(pipeline, trained, meta):
    store, started = tracking.open_store("small digits"), started_in(put(trained, pipeline))
    tags = {"cell": CELL, "key": live_snapshot(meta, started).key, "data_digest": meta.digest}
    ids = [store.client.create_run(store.experiment_id, started // 1000, tags).info.run_id for _ in range(2)]
    assert mirror(store, live_snapshot(meta, started)) == min(ids)
    report = tracking.sync(make_params(), pipeline)
    assert (report.cells, report.superseded) == ({CELL: "completed"}, [max(ids)])


def test_of_two_trainings_at_once_the_one_that_wrote_the_folder_last_is_current(
    pipeline, trained, trained_faster, meta
):
    folder = put(trained, pipeline)
    started = started_in(folder)
    with live(meta, started - 1) as earlier:
        earlier.log_epochs(rows(trained_faster.epochs))
        earlier.complete(folder)  # where by now the other one's files lie
    log_live(trained, pipeline, meta)
    synced(pipeline)
    assert {int(run.data.tags["key"].split("-")[1]): run.data.tags["grid"] for run in all_runs()} == {
        started - 1: "superseded", started: "current",
    }  # fmt: skip


# --- from the files ---------------------------------------------------------------------------------


def test_a_cell_that_dvc_restored_gets_the_run_that_training_would_have_logged(
    pipeline, trained, meta, capfd
):
    log_live(trained, pipeline, meta)
    live, client = the_run(), tracking.open_store("small digits").client
    client.delete_run(live.info.run_id)
    assert synced(pipeline) == {CELL: "created"}
    assert capfd.readouterr() == ("", "")

    restored = the_run()
    assert restored.data.params == live.data.params
    git = {"git_commit", "git_dirty", "mlflow.source.git.commit"}  # the files were made in another folder
    assert {key: restored.data.tags[key] for key in restored.data.tags.keys() - git} == {
        key: live.data.tags[key] for key in live.data.tags.keys() - git - {"process"}
    }
    assert restored.data.metrics.keys() == {k for k in live.data.metrics if not k.startswith("system/")}
    assert restored.data.metrics.items() <= live.data.metrics.items()
    timing = json.loads((trained.folder / "timing.json").read_text())
    duration = (restored.info.end_time - restored.info.start_time) / 1000
    assert duration == pytest.approx(timing["train_seconds"], abs=0.002)
    first, second = client.get_metric_history(restored.info.run_id, "test_loss")
    assert (second.timestamp - first.timestamp) / 1000 == pytest.approx(timing["epoch_seconds"][1], abs=0.002)


def test_a_second_sync_changes_nothing(pipeline, trained):
    put(trained, pipeline)
    params = make_params(seeds=(0, 1))
    heard = []
    first = tracking.sync(params, pipeline, lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]
    assert first.cells == {CELL: "created", "resnet20-sgd-1": "missing"}
    before = snapshot()
    started = time.monotonic()
    second = tracking.sync(params, pipeline)
    assert time.monotonic() - started < 1
    assert snapshot() == before
    uri = f"sqlite:///{pipeline.parents[1]}/mlflow.db"
    assert asdict(second) == {
        "experiment": "small digits", "store": uri, "reasons": {}, "superseded": [], "champions": {},
        "comparison": None, "cells": {CELL: "unchanged", "resnet20-sgd-1": "missing"},
    }  # fmt: skip
    assert str(second) == f"MLflow: 1 unchanged, 1 missing, in 'small digits' of {uri}"


def test_sync_finishes_a_completion_that_was_interrupted(pipeline, trained):
    put(trained, pipeline)
    synced(pipeline)
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
    assert synced(pipeline) == {CELL: "completed"}
    assert snapshot() == whole
    [model] = store.client.search_logged_models([store.experiment_id])
    assert model.status == "READY"


def test_replaced_weights_are_superseded_and_restored_ones_are_current_again(
    pipeline, trained, trained_faster, meta
):
    log_live(trained, pipeline, meta)
    first = the_run().info.run_id
    log_live(trained_faster, pipeline, meta, lr=0.05)
    second = all_runs()[0].info.run_id
    assert grid() == {first: "superseded", second: "current"}  # already, without a sync
    assert synced(pipeline, lr=0.05) == {CELL: "unchanged"}

    put(trained, pipeline)  # the params go back, and DVC restores the files from its run cache
    report = tracking.sync(make_params(), pipeline)
    assert (report.cells, report.superseded) == ({CELL: "unchanged"}, [second])
    assert grid() == {first: "current", second: "superseded"}


def test_a_result_of_other_params_is_stale_and_makes_no_run_and_one_that_left_the_grid_is_superseded(
    pipeline, trained
):
    put(trained, pipeline)
    report = tracking.sync(make_params(lr=0.05), pipeline)
    why = "stale: trained with learning_rate 0.01 → 0.05 (params.yaml now)"
    assert (report.cells, report.reasons, all_runs()) == ({CELL: "stale"}, {CELL: why}, [])

    synced(pipeline)
    run_id = the_run().info.run_id
    assert synced(pipeline, lr=0.05) == {CELL: "stale"}
    assert grid() == {run_id: "stale"}
    assert tracking.sync(make_params(seeds=(1,)), pipeline).superseded == [run_id]
    assert grid() == {run_id: "superseded"}


def test_an_altered_weights_file_is_reported_and_the_other_cells_are_done(pipeline, digits, capsys):
    raw = raw_params(seeds=(0, 1), epochs=1)
    (pipeline / "params.yaml").write_text(json.dumps(raw))
    params = parse_params(raw)
    for cell in expand(params):
        list(train_cell(cell, digits, pipeline / "runs" / cell.id, CPU))
    weights = pipeline / "runs" / CELL / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    report = tracking.sync(params, pipeline)
    assert report.cells == {CELL: "damaged", "resnet20-sgd-1": "created"}
    assert "weights.safetensors: the file has changed since it was trained" in report.reasons[CELL]
    assert "`dvc repro train@resnet20-sgd-0`" in report.reasons[CELL]
    assert the_run().info.run_name == "resnet20-sgd-1"
    assert main(["sync"]) == 1
    assert "1 damaged, 1 unchanged" in capsys.readouterr().out


def test_more_figures_than_mlflow_takes_at_once_all_arrive_also_where_the_data_are_gone(
    pipeline, trained, meta
):
    shutil.rmtree(pipeline / "data")
    folder = put(trained, pipeline)
    head, first, *_ = (folder / "history.csv").read_text().splitlines()
    rows = [f"{epoch},{first.partition(',')[2]}" for epoch in range(1, 251)]  # of 6 figures; 1,000 are taken
    (folder / "history.csv").write_text("\n".join([head, *rows, ""]))
    rewrite(folder, lambda timing: {key: [0.1] * 250 for key in timing if key.startswith("epoch_")})
    assert synced(pipeline) == {CELL: "created"}
    for key in ("train_loss", "test_accuracy", "images_per_second"):
        assert sorted({step for step, _ in history(the_run(), key)}) == list(range(1, 251))
    [train, _] = the_run().inputs.dataset_inputs
    assert meta.digest.startswith(f"sha256:{train.dataset.digest}")


# --- weights from MLflow ----------------------------------------------------------------------------


def test_initial_weights_come_from_a_run_or_from_the_run_behind_a_model(pipeline, trained):
    put(trained, pipeline)
    synced(pipeline)
    run = the_run()
    [model] = run.outputs.model_outputs
    for uri in (
        f"runs:/{run.info.run_id}",
        f"runs:/{run.info.run_id}/model",
        f"models:/{model.model_id}",
        "models:/small digits/1",
        "models:/small digits@champion",
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


def test_unknown_weights_are_named(pipeline):
    store = tracking.open_store("small digits")
    bare = store.client.create_run(store.experiment_id).info.run_id
    for uri in ("runs:/0123456789abcdef0123456789abcdef", "models:/nothing/3", f"runs:/{bare}"):
        with pytest.raises(ResgridError, match=f"^initial_weights: {uri} gives no weights.safetensors"):
            tracking.fetch_weights(MlflowWeights(name="mlflow", uri=uri))


# --- a server ---------------------------------------------------------------------------------------


def _serve(folder, port):
    signal.signal(signal.SIGTERM, _terminated)
    os.chdir(folder)
    tracking.serve(port, "small digits")


def _wait_until_healthy(address, is_alive):
    while True:
        assert is_alive()
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            assert answer.read() == b"OK"
            return
        time.sleep(0.2)


@pytest.fixture
def server(pipeline, processes):
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
    pipeline, server, trained, meta, monkeypatch, capsys
):
    put(trained, pipeline)
    synced(pipeline)
    client = tracking.open_store("small digits").client
    client.create_experiment("far", artifact_location="file:///on/another%20machine/mlruns/1")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    with pytest.raises(ResgridError, match=f"^{server}: the server keeps the files of 'far' in file:///on/a"):
        tracking.open_store("far")
    assert synced(pipeline) == {CELL: "unchanged"}
    log_live(trained, pipeline, meta, anew=True)
    newer, older = all_runs()
    assert synced(pipeline) == {CELL: "completed"}  # files, model
    assert grid() == {older.info.run_id: "superseded", newer.info.run_id: "current"}
    assert newer.data.params == older.data.params
    assert synced(pipeline) == {CELL: "unchanged"}
    path = tracking.fetch_weights(MlflowWeights(name="mlflow", uri=f"runs:/{newer.info.run_id}"))
    assert path.read_bytes() == (trained.folder / "weights.safetensors").read_bytes()

    capsys.readouterr()
    (pipeline / "params.yaml").write_text(json.dumps(raw_params()))
    rewrite(pipeline / "runs" / CELL, lambda timing: {"started": timing["started"] + 10**6})
    assert main(["sync", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == {CELL: "created"}

    through_server = snapshot()
    tracking.serve(5000, "small digits")  # starts nothing
    page = f"{server}/#/experiments/{newer.info.experiment_id}/runs?workflowType=machine_learning&"
    assert capsys.readouterr().out.startswith(f"MLflow: {page}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert snapshot() == through_server


@pytest.mark.long
def test_a_server_with_a_store_of_its_own_takes_artifacts_and_models_as_well(
    pipeline, tmp_path, trained, meta, monkeypatch
):
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
        assert synced(pipeline) == {CELL: "completed"}  # files, model
        run, before = the_run(), snapshot()
        assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        assert synced(pipeline) == {CELL: "unchanged"}
        assert snapshot() == before
        model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
        assert model.predict(np.zeros((3, 3, 32, 32), np.float32)).shape == (3, 10)
        path = tracking.fetch_weights(MlflowWeights(name="mlflow", uri=f"runs:/{run.info.run_id}"))
        assert path.read_bytes() == (trained.folder / "weights.safetensors").read_bytes()
        assert not list(pipeline.parents[1].glob("mlruns*"))
    finally:
        process.terminate()
        process.wait()


def test_a_taken_port_is_named(pipeline, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResgridError, match=f"port {port}: .*--port"):
            tracking.serve(port, "small digits")
    assert "already in use" in "".join(capfd.readouterr())
