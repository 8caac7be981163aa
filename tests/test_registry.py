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
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_tracking
import torch
from ports import free_port

from resgrid import tracking
from resgrid.cli import main
from resgrid.config import Params, parse_params
from resgrid.data.dataset import load_split
from resgrid.errors import ResgridError
from resgrid.grid import expand
from resgrid.predict import probabilities
from resgrid.train_cell import train_cell
from resgrid.weights import load_model

pytestmark = [
    # MLflow uses what SQLAlchemy 2.1 deprecates, and warns of a type of its own.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

CPU = torch.device("cpu")


def raw_params(*seeds: int) -> dict[str, Any]:
    return test_tracking.raw_params(seeds=seeds, epochs=1)


def make_params(*seeds: int) -> Params:
    return parse_params(raw_params(*seeds))


digits, empty_database, pipeline = test_tracking.digits, test_tracking.empty_database, test_tracking.pipeline


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cells of seeds 0 to 2."""
    folder = tmp_path_factory.mktemp("trained")
    for cell in expand(make_params(0, 1, 2)):
        list(train_cell(cell, digits, folder / "runs" / cell.id, CPU))
    return folder


def put(trained: Path, pipeline: Path, seed: int, **figures: Any) -> None:
    """The cell of `seed`, its metrics changed to what a test needs."""
    folder = pipeline / "runs" / f"resnet20-sgd-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained / "runs" / folder.name, folder)
    metrics = json.loads((folder / "run.json").read_text()) | figures
    (folder / "run.json").write_text(json.dumps(metrics))


def champion(name: str = "small digits") -> Any:
    return tracking.open_store("small digits").client.get_model_version_by_alias(name, "champion")


def versions(name: str = "small digits") -> list[str]:
    """The cells of all versions, the first one first."""
    found = tracking.open_store("small digits").client.search_model_versions(f"name = '{name}'")
    return [each.tags["cell"] for each in sorted(found, key=lambda each: int(each.version))]


def test_the_champion_is_the_best_of_the_last_epoch_and_carries_its_lineage(
    trained: Path, pipeline: Path
) -> None:
    put(trained, pipeline, 0, test_accuracy=0.80, best_test_accuracy=0.99)
    put(trained, pipeline, 1, test_accuracy=0.85, best_test_accuracy=0.86)
    put(trained, pipeline, 2, test_accuracy=0.95, status="diverged", cause="the test loss was not finite")
    report = tracking.sync(make_params(0, 1, 2), pipeline)
    assert report.champions == {
        "small digits": "resnet20-sgd-1",
        "small digits+resnet20": "resnet20-sgd-1",
    }
    metrics = json.loads((pipeline / "runs/resnet20-sgd-1/run.json").read_text())
    for name in ("small digits", "small digits+resnet20"):
        tags = champion(name).tags
        assert tags["cell"] == "resnet20-sgd-1"
        assert tags["data_digest"] == metrics["data_digest"]
        assert tags["weights_sha256"] == metrics["weights_sha256"]
        assert (
            tags["git_commit"]
            == json.loads((pipeline / "runs/resnet20-sgd-1/timing.json").read_text())["commit"]
        )
        assert (tags["chosen_by"], tags["accuracy"]) == ("test accuracy", "0.8500")
    assert champion().description == "resnet20-sgd-1: test accuracy 85.00% after epoch 1."

    second = tracking.sync(make_params(0, 1, 2), pipeline)
    assert second.champions == {}
    assert versions() == ["resnet20-sgd-1"]


@pytest.mark.parametrize("revision", ["451aebb31d03", "ffffffffffff"])  # older, and not known yet
def test_a_database_of_another_mlflow_is_named_and_stays_as_it_is(pipeline: Path, revision: str) -> None:
    with closing(sqlite3.connect(pipeline.parents[1] / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    with pytest.raises(ResgridError, match=r"out-of-date database schema .*mlflow db upgrade"):
        tracking.sync(make_params(0), pipeline)
    with closing(sqlite3.connect(pipeline.parents[1] / "mlflow.db")) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]


def test_the_alias_moves_only_to_something_better_and_back_without_a_new_version(
    trained: Path, pipeline: Path
) -> None:
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


def test_with_a_validation_split_that_decides_and_not_the_test_split(trained: Path, pipeline: Path) -> None:
    put(trained, pipeline, 0, test_accuracy=0.99, validation_accuracy=0.70, validation_loss=1.0)
    put(trained, pipeline, 1, test_accuracy=0.60, validation_accuracy=0.75, validation_loss=1.0)
    tracking.sync(make_params(0, 1), pipeline)
    assert champion().tags["cell"] == "resnet20-sgd-1"
    assert champion().tags["chosen_by"] == "validation accuracy"


def test_runs_of_the_former_version_get_a_new_one_each_once_and_the_champion_moves_to_it(
    trained: Path, pipeline: Path
) -> None:
    params, store = make_params(0, 1), tracking.open_store("small digits")
    for seed, accuracy in ((0, 0.80), (1, 0.90)):
        put(trained, pipeline, seed, test_accuracy=accuracy)
    tracking.sync(params, pipeline)

    def current() -> dict[str, str]:
        runs = store.client.search_runs([store.experiment_id], "tags.grid = 'current'")
        assert len(runs) == len({run.data.tags["cell"] for run in runs}) == 2
        return {run.data.tags["cell"]: run.info.run_id for run in runs}

    former = current()
    for cell, run_id in former.items():  # as it left them: another key, whole seconds, no commit
        for tag in ("key", "synced", "git_commit", "git_dirty"):
            if tag in store.client.get_run(run_id).data.tags:
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


def test_a_cell_that_was_trained_on_other_data_is_not_compared(trained: Path, pipeline: Path) -> None:
    put(trained, pipeline, 0, test_accuracy=0.99, data_digest="sha256:" + "0" * 64)
    put(trained, pipeline, 1, test_accuracy=0.50)
    tracking.sync(make_params(0, 1), pipeline)
    assert champion().tags["cell"] == "resnet20-sgd-1"


def test_predict_uses_the_champion_unless_told_otherwise(
    trained: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (pipeline / "params.yaml").write_text(json.dumps(raw_params(0, 1, 2)))
    image = load_split(pipeline / "data" / "processed", "test").images[0].numpy()
    Image.fromarray(image).save(pipeline / "digit.png")
    with pytest.raises(ResgridError, match=r"the champion, .*`resgrid sync` brings"):
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
    weights, told = tracking.find_weights("champion", pipeline / "runs")
    assert (weights.read_bytes(), told) == (best.read_bytes(), "champion (resnet20-sgd-1)")


CSV = """cell,status,test_accuracy,best_test_accuracy,train_seconds,images_per_second,cause
resnet20-sgd-1,completed,0.85,0.9,12.5,700.0,
resnet20-sgd-0,missing,,,,,
"""


def test_the_comparison_is_a_run_with_a_table_and_the_reports(trained: Path, pipeline: Path) -> None:
    put(trained, pipeline, 1)
    (pipeline / "reports").mkdir(parents=True)
    (pipeline / "reports" / "leaderboard.csv").write_text(CSV)
    (pipeline / "reports" / "index.html").write_text("<p>85.00</p>")
    (pipeline / "reports" / ".gitignore").write_text("/leaderboard.csv")
    first = tracking.sync(make_params(1), pipeline)
    store = tracking.open_store("small digits")
    run = store.client.get_run(first.comparison)
    assert (run.info.run_name, run.info.status) == ("comparison", "FINISHED")
    files = {item.path for item in store.client.list_artifacts(first.comparison)}
    assert files == {"leaderboard.csv", "index.html"}
    note = store.client.get_experiment(store.experiment_id).tags["mlflow.note.content"]
    table = f"#/experiments/{store.experiment_id}/runs/{first.comparison}/artifacts/leaderboard.csv"
    assert table in note

    assert tracking.sync(make_params(1), pipeline).comparison is None
    (pipeline / "reports" / "leaderboard.csv").write_text(CSV.replace("0.85", "0.86"))
    second = tracking.sync(make_params(1), pipeline)
    assert second.comparison not in (None, first.comparison)
    assert store.client.get_run(first.comparison).data.tags["summary"] == "superseded"
    shown = store.client.search_runs([store.experiment_id], "tags.grid = 'current'")
    assert [each.info.run_name for each in shown] == ["resnet20-sgd-1"]


def test_mlflows_own_server_answers_for_the_champion(trained: Path, pipeline: Path) -> None:
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
            try:
                with urllib.request.urlopen(f"{address}/ping", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        images = load_split(pipeline / "data" / "processed", "test").images[:3].numpy()
        scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
        body = json.dumps({"inputs": scaled.tolist()}).encode()
        request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = np.array(json.load(answer)["predictions"])
    finally:
        os.killpg(process.pid, 15)
        process.wait()
    model, info = load_model(pipeline / "runs" / "resnet20-sgd-1" / "weights.safetensors")
    np.testing.assert_allclose(found, probabilities(model, info, images, CPU).numpy(), atol=1e-5)
