"""The whole pipeline for real, on a small grid: DVC in its own repository, a SQLite MLflow, real images."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML
from small import ALWAYS, GRID, ROOT, Project

from resgrid.config import load_params
from resgrid.grid import expand


@pytest.fixture(scope="module")
def project(small: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return small.copy(
        tmp_path_factory.mktemp("pipeline") / "a project", mirrored=True
    )  # with a space in its path


def test_a_failed_cell_does_not_end_the_grid_and_is_named_as_missing(project):
    assert project.trained.returncode != 0
    assert "absent.safetensors" in project.trained.stderr
    assert "Traceback" not in project.trained.stderr
    for cell in [*GRID, "too-fast"]:
        assert sorted(path.name for path in (project.root / "runs" / cell).iterdir()) == [
            "history.csv", "metrics.json", "run.json", "summary.txt", "timing.json", "weights.safetensors",
        ]  # fmt: skip
    assert project.evaluated.returncode == 0, project.evaluated.stderr
    assert "no-weights" in project.evaluated.stdout.split("Missing: 1 of 6 cells")[1]


def test_the_comparison_has_a_row_for_each_cell(project):
    frame = pd.read_csv(project.root / "reports/leaderboard.csv").set_index("cell")
    assert list(frame.reset_index().columns)[:11] == [
        "cell", "architecture", "optimizer", "seed", "status", "test_accuracy", "test_loss",
        "train_accuracy", "train_loss", "epochs", "num_parameters",
    ]  # fmt: skip
    assert set(frame.index) == {*GRID, "too-fast", "no-weights"}
    assert set(frame.loc[GRID, "status"]) == {"completed"}
    assert frame.loc["no-weights", "status"] == "failed"
    assert set(frame.loc[GRID, "num_parameters"]) == {271_098}
    for cell in GRID:
        metrics = json.loads((project.root / "runs" / cell / "run.json").read_text())
        assert frame.loc[cell, "test_accuracy"] == metrics["test_accuracy"]
        history = pd.read_csv(project.root / "runs" / cell / "history.csv")
        assert history["train_loss"].is_monotonic_decreasing  # it has learned something
    table = (project.root / "reports/report.md").read_text()
    assert " ± " in table


def test_a_loss_that_becomes_nan_is_a_result_and_not_an_error(project):
    metrics = json.loads((project.root / "runs/too-fast/run.json").read_text())
    assert metrics["status"] == "diverged"
    assert metrics["cause"]
    runs = project.runs()
    assert set(runs.loc[runs["tags.cell"] == "too-fast", "tags.status"]) == {"diverged"}


def test_every_trained_cell_is_one_run_with_its_parameters_and_weights(project):
    runs = project.runs()
    current = runs[runs["tags.grid"] == "current"].set_index("tags.cell")
    assert set(current.index) == {*GRID, "too-fast"}
    assert set(current["status"]) == {"FINISHED"}
    assert set(current["params.num_trainable"]) == {"269722"}
    assert current.loc["resnet20-adam-1", ["params.optimizer", "params.seed"]].tolist() == ["adam", "1"]
    run = current.loc["resnet20-sgd-0"]
    files = {item.path for item in project.mlflow.list_artifacts(run["run_id"])}
    assert {"weights.safetensors", "history.csv", "summary.txt"} <= files


def test_no_output_of_training_depends_on_mlflow(project):
    ids = project.runs()["run_id"]
    for path in (project.root / "runs").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(run_id.encode() in content for run_id in ids), path


def test_git_status_shows_only_the_lock(project):
    assert project.run("git", "status", "--porcelain").stdout.split() == ["??", "dvc.lock"]


def test_metrics_and_plots_are_known_to_dvc(project):
    shown = json.loads(project.run("dvc", "metrics", "show", "--json").stdout)
    files = shown["workspace"]["data"] if "workspace" in shown else shown[""]["data"]
    assert files["reports/metrics.json"]["data"]["completed"] == 4
    accuracy = json.loads((project.root / "runs/resnet20-sgd-0/run.json").read_text())["test_accuracy"]
    assert files["runs/resnet20-sgd-0/metrics.json"]["data"] == {"small": {"resnet20-sgd-0": accuracy}}
    plots = project.run("dvc", "plots", "show", "--out", "plots")
    assert plots.returncode == 0, plots.stderr
    page = (project.root / "plots/index.html").read_text()
    shutil.rmtree(project.root / "plots")
    assert "resnet20-adam-1" in page


TRAIN = {f"train@{cell}" for cell in GRID} | {"train-study@too-fast"}


@pytest.mark.parametrize(
    ("path", "old", "new", "stale"),
    [
        ("params.yaml", "adam: {lr: 0.001}", "adam: {lr: 0.002}", {"train@resnet20-adam-0", "train@resnet20-adam-1", "evaluate"}),
        ("params.yaml", "nesterov: true", "nesterov: false",
         {"train@resnet20-sgd-0", "train@resnet20-sgd-1", "train-study@too-fast", "evaluate"}),
        ("params.yaml", "rmsprop: {lr: 0.001}", "rmsprop: {lr: 0.002}", {"evaluate"}),
        ("params.yaml", "lr: 1.0e+9", "lr: 2.0e+9", {"train-study@too-fast", "evaluate"}),
        ("params.yaml", "name: small", "name: small # a comment", set()),
        ("params.yaml", "epochs: 2", "epochs: 3", TRAIN | {"evaluate"}),
        ("src/resgrid/report/leaderboard.py", '"""', '"""Edited. ', {"evaluate"}),
        ("src/resgrid/tracking/store.py", '"""', '"""Edited. ', set()),
        ("src/resgrid/cli.py", '"""', '"""Edited. ', set()),
        ("src/resgrid/config.py", '"""', '"""Edited. ', set()),
        ("src/resgrid/training/engine.py", '"""', '"""Edited. ', TRAIN | {"evaluate"}),
        ("src/resgrid/data/batches.py", '"""', '"""Edited. ', TRAIN | {"preprocess", "evaluate"}),
        ("src/resgrid/data/fetch.py", '"""', '"""Edited. ', {"preprocess"}),
    ],
)  # fmt: skip
def test_a_cell_is_stale_when_something_that_can_change_it_changed(project, path, old, new, stale):
    project.edit(path, old, new)
    try:
        assert project.stale() - ALWAYS == stale
    finally:
        project.edit(path, new, old)


def test_byte_code_makes_nothing_stale(project):
    cache = project.root / "src/resgrid/models/__pycache__"
    cache.mkdir()
    (cache / "vgg.cpython-311.pyc").write_bytes(b"code")
    assert project.stale() - ALWAYS == set()


def test_a_restored_cell_has_its_run_in_mlflow_again_after_sync(project):
    """DVC takes it from its run cache and runs nothing, so training cannot have logged it."""
    before = project.runs()
    cell = "train@resnet20-adam-0"
    project.set("tuning.resnet20.adam.lr=0.002")
    assert project.run("dvc", "repro", "--single-item", cell).returncode == 0
    changed = json.loads((project.root / "runs/resnet20-adam-0/run.json").read_text())
    project.set("tuning.resnet20.adam.lr=0.001")
    restored = project.run("dvc", "repro", "--single-item", cell)
    assert "skipping run" in restored.stdout
    assert project.run("resgrid", "sync").returncode == 0
    runs = project.runs()
    runs = runs[runs["tags.cell"] == "resnet20-adam-0"]
    old = before[(before["tags.cell"] == "resnet20-adam-0")]["tags.weights_sha256"].item()
    assert runs.set_index("tags.weights_sha256")["tags.grid"].to_dict() == {
        old: "current",
        changed["weights_sha256"]: "superseded",
    }


def test_a_second_repro_finds_nothing_to_do(project):
    again = project.run("dvc", "repro", "--single-item", *sorted(f"train@{cell}" for cell in GRID))
    assert again.returncode == 0
    assert "Running stage" not in again.stdout


def test_a_weights_file_that_was_changed_is_named_and_never_scored(project):
    weights = project.root / "runs/resnet20-sgd-1/weights.safetensors"
    good = weights.read_bytes()
    weights.unlink()  # it may be a link into the cache
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        refused = project.run("resgrid", "evaluate")
        assert refused.returncode == 1
        assert "runs/resnet20-sgd-1/weights.safetensors" in refused.stderr
        assert "Traceback" not in refused.stderr
    finally:
        weights.write_bytes(good)


@pytest.mark.parametrize(
    "example", sorted(path.parent for path in ROOT.glob("examples/*/dvc.yaml")), ids=lambda path: path.name
)
def test_every_example_declares_the_stages_of_the_root(example):
    yaml = YAML(typ="safe")
    root = yaml.load((ROOT / "dvc.yaml").read_text())

    def up(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: up(value) for key, value in node.items()}
        if isinstance(node, list):
            return [up(value) for value in node]
        return "../../" + node if isinstance(node, str) and node.startswith("src/") else node

    assert yaml.load((example / "dvc.yaml").read_text()) == up(root)
    assert expand(load_params(example / "params.yaml"))
