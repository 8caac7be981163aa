"""The registry and the comparison's run, in a real SQLite store; the champion served over real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import test_tracking
import torch
from PIL import Image
from ports import free_port

from resgrid import tracking
from resgrid.cli import main
from resgrid.config import parse_params
from resgrid.data.dataset import load_split
from resgrid.errors import ResgridError
from resgrid.grid import expand
from resgrid.predict import probabilities
from resgrid.train_cell import train_cell
from resgrid.weights import load_model

pytestmark = test_tracking.pytestmark
digits, empty_database, pipeline = test_tracking.digits, test_tracking.empty_database, test_tracking.pipeline
CPU = torch.device("cpu")


def raw_params(*seeds):
    return test_tracking.raw_params(seeds=seeds, epochs=1)


def make_params(*seeds):
    return parse_params(raw_params(*seeds))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The cells of seeds 0 to 2."""
    folder = tmp_path_factory.mktemp("trained")
    for cell in expand(make_params(0, 1, 2)):
        list(train_cell(cell, digits, folder / "runs" / cell.id, CPU))
    return folder


def put(trained, pipeline, seed, **figures):
    """The cell of `seed`, its metrics changed to what a test needs."""
    folder = pipeline / "runs" / f"resnet20-sgd-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained / "runs" / folder.name, folder)
    metrics = json.loads((folder / "run.json").read_text()) | figures
    (folder / "run.json").write_text(json.dumps(metrics))
    return metrics


def champion(name="small digits"):
    return tracking.open_store("small digits").client.get_model_version_by_alias(name, "champion")


def versions(name="small digits"):
    """The cells of all versions, the first one first."""
    of_model = tracking.open_store("small digits").client.search_model_versions(f"name = '{name}'")
    return [each.tags["cell"] for each in sorted(of_model, key=lambda each: int(each.version))]


def test_the_champion_is_the_best_of_the_last_epoch_and_carries_its_lineage(trained, pipeline):
    put(trained, pipeline, 0, test_accuracy=0.80, best_test_accuracy=0.99)
    metrics = put(trained, pipeline, 1, test_accuracy=0.85, best_test_accuracy=0.86)
    put(trained, pipeline, 2, test_accuracy=0.95, status="diverged", cause="the test loss was not finite")
    both = ("small digits", "small digits+resnet20")
    report = tracking.sync(make_params(0, 1, 2), pipeline)
    assert report.champions == dict.fromkeys(both, "resnet20-sgd-1")
    timing = json.loads((pipeline / "runs/resnet20-sgd-1/timing.json").read_text())
    for name in both:
        assert champion(name).tags.items() >= {
            "cell": "resnet20-sgd-1", "data_digest": metrics["data_digest"], "git_commit": timing["commit"],
            "weights_sha256": metrics["weights_sha256"], "chosen_by": "test accuracy", "accuracy": "0.8500",
        }.items()  # fmt: skip
    assert champion().description == "resnet20-sgd-1: test accuracy 85.00% after epoch 1."
    assert tracking.sync(make_params(0, 1, 2), pipeline).champions == {}
    assert versions() == ["resnet20-sgd-1"]


@pytest.mark.parametrize("revision", ["451aebb31d03", "ffffffffffff"])  # older, and not known yet
def test_a_database_of_another_mlflow_is_named_and_stays_as_it_is(pipeline, revision):
    with closing(sqlite3.connect(pipeline.parents[1] / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    with pytest.raises(ResgridError, match=r"out-of-date database schema .*mlflow db upgrade"):
        tracking.sync(make_params(0), pipeline)
    with closing(sqlite3.connect(pipeline.parents[1] / "mlflow.db")) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]


def test_the_alias_moves_only_to_something_better_and_back_without_a_new_version(trained, pipeline):
    put(trained, pipeline, 1, test_accuracy=0.85)
    tracking.sync(make_params(1), pipeline)
    put(trained, pipeline, 0, test_accuracy=0.85, test_loss=0.001)  # no better, though its loss is lower
    assert tracking.sync(make_params(0, 1), pipeline).champions == {}
    assert champion().tags["cell"] == "resnet20-sgd-1"
    put(trained, pipeline, 2, test_accuracy=0.90)
    assert set(tracking.sync(make_params(0, 1, 2), pipeline).champions.values()) == {"resnet20-sgd-2"}
    assert champion().tags["cell"] == "resnet20-sgd-2"
    # The best cell is taken out of the grid: the best of the current ones is the champion, as it was before.
    tracking.sync(make_params(1), pipeline)
    assert champion().tags["cell"] == "resnet20-sgd-1"
    assert versions() == ["resnet20-sgd-1", "resnet20-sgd-2"]
    # There is none any more: the alias goes.
    shutil.rmtree(pipeline / "runs")
    assert set(tracking.sync(make_params(1), pipeline).champions.values()) == {None}


@pytest.mark.parametrize(
    ("first", "second", "split"),
    [
        # with a validation split that decides, and not the test split
        ({"test_accuracy": 0.99, "validation_accuracy": 0.70, "validation_loss": 1.0},
         {"test_accuracy": 0.60, "validation_accuracy": 0.75, "validation_loss": 1.0}, "validation"),
        # a cell that was trained on other data is not compared
        ({"test_accuracy": 0.99, "data_digest": "sha256:" + "0" * 64}, {"test_accuracy": 0.50}, "test"),
    ],
)  # fmt: skip
def test_the_champion_is_the_better_one_on_the_split_that_decides(trained, pipeline, first, second, split):
    put(trained, pipeline, 0, **first)
    put(trained, pipeline, 1, **second)
    tracking.sync(make_params(0, 1), pipeline)
    assert (champion().tags["cell"], champion().tags["chosen_by"]) == ("resnet20-sgd-1", f"{split} accuracy")


def test_runs_of_the_former_version_get_a_new_one_each_once_and_the_champion_moves_to_it(trained, pipeline):
    params, store = make_params(0, 1), tracking.open_store("small digits")
    for seed, accuracy in ((0, 0.80), (1, 0.90)):
        put(trained, pipeline, seed, test_accuracy=accuracy)
    tracking.sync(params, pipeline)

    def current():
        runs = store.client.search_runs([store.experiment_id], "tags.grid = 'current'")
        assert len(runs) == len({run.data.tags["cell"] for run in runs}) == 2
        return {run.data.tags["cell"]: run.info.run_id for run in runs}

    former = current()
    for cell, run_id in former.items():  # as it left them: another key, whole seconds, no commit
        for tag in {"key", "synced", "git_commit", "git_dirty"} & store.client.get_run(
            run_id
        ).data.tags.keys():
            store.client.delete_tag(run_id, tag)
        store.client.set_tag(run_id, "synced", "sha256:0123:2")
        path = pipeline / "runs" / cell / "timing.json"
        timing = json.loads(path.read_text()) | {"started": "2026-11-01T00:00:00+00:00"}
        for key in ("commit", "dirty", "flow_run_id", "epoch_images_per_second"):
            timing.pop(key, None)
        path.write_text(json.dumps(timing))

    report = tracking.sync(params, pipeline)
    assert report.cells == dict.fromkeys(former, "created")
    assert set(report.superseded) == set(former.values())
    now = current()
    assert not set(now.values()) & set(former.values())
    assert report.champions == dict.fromkeys(("small digits", "small digits+resnet20"), "resnet20-sgd-1")
    assert champion().run_id == now["resnet20-sgd-1"]
    assert "git_commit" not in champion().tags
    assert tracking.sync(params, pipeline).cells == dict.fromkeys(former, "unchanged")
    assert (current(), champion().run_id) == (now, now["resnet20-sgd-1"])


def test_predict_uses_the_champion_unless_told_otherwise(trained, pipeline, capsys):
    (pipeline / "params.yaml").write_text(json.dumps(raw_params(0, 1, 2)))
    image = load_split(pipeline / "data" / "processed", "test").images[0].numpy()
    Image.fromarray(image).save(pipeline / "digit.png")
    with pytest.raises(ResgridError, match=r"--model champion gives no .*`resgrid sync` brings"):
        tracking.find_weights("champion", pipeline / "runs")
    put(trained, pipeline, 0, test_accuracy=0.10)
    put(trained, pipeline, 1, test_accuracy=0.20)
    tracking.sync(make_params(0, 1), pipeline)
    best = pipeline / "runs" / "resnet20-sgd-1" / "weights.safetensors"
    model, info = load_model(best)
    label = info.class_names[int(probabilities(model, info, image[None], CPU).argmax())]
    capsys.readouterr()
    for arguments in ([], ["--model", "models:/small digits+resnet20@champion"]):
        assert main(["predict", "digit.png", *arguments]) == 0
        assert capsys.readouterr().out.startswith(f"digit.png: {label} ")
    weights, name = tracking.find_weights("champion", pipeline / "runs")
    assert (weights.read_bytes(), name) == (best.read_bytes(), "champion (resnet20-sgd-1)")


def test_the_comparison_is_one_run_with_a_table_and_the_latest_reports(trained, pipeline):
    put(trained, pipeline, 1)
    reports = pipeline / "reports"
    (reports / "figures").mkdir(parents=True)
    for name in ("leaderboard.csv", "index.html", "findings.json", ".gitignore"):
        (reports / name).write_text("{}")
    first = tracking.sync(make_params(1), pipeline).comparison
    store = tracking.open_store("small digits")
    run = store.client.get_run(first)
    assert (run.info.run_name, run.info.status) == ("comparison", "FINISHED")
    files = {item.path for item in store.client.list_artifacts(first)}
    assert files == {"leaderboard.csv", "index.html", "findings.json"}
    note = store.client.get_experiment(store.experiment_id).tags["mlflow.note.content"]
    assert f"#/experiments/{store.experiment_id}/runs/{first}/artifacts/leaderboard.csv" in note

    assert tracking.sync(make_params(1), pipeline).comparison is None
    (reports / "findings.json").write_text('{"name": "another"}')
    assert tracking.sync(make_params(1), pipeline).comparison == first
    assert "another" in Path(store.client.download_artifacts(first, "findings.json")).read_text()
    current = store.client.search_runs([store.experiment_id], "tags.grid = 'current'")
    assert [each.info.run_name for each in current] == ["resnet20-sgd-1"]


def test_mlflows_own_server_answers_for_the_champion(trained, pipeline):
    put(trained, pipeline, 1)
    tracking.sync(make_params(1), pipeline)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", "models:/small digits@champion", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": tracking.store_uri(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (pipeline / "serve.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0)
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, (pipeline / "serve.log").read_text()
            with suppress(OSError), urllib.request.urlopen(f"{address}/ping", timeout=5):
                break
            time.sleep(0.2)
        images = load_split(pipeline / "data" / "processed", "test").images[:3].numpy()
        scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
        body = json.dumps({"inputs": scaled.tolist()}).encode()
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            served = np.array(json.load(answer)["predictions"])
    finally:
        os.killpg(process.pid, 15)
        process.wait()
    model, info = load_model(pipeline / "runs" / "resnet20-sgd-1" / "weights.safetensors")
    np.testing.assert_allclose(served, probabilities(model, info, images, CPU).numpy(), atol=1e-5)
