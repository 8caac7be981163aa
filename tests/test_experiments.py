"""`dvc exp` does with the pipeline what its documentation says: with the real `dvc`, on a trained pipeline."""

from __future__ import annotations

import json

import pytest
from small import CELL, GRID, Project

STAGE = f"train@{CELL}"


@pytest.fixture(scope="module")
def committed(small, tmp_path_factory):
    """A copy in which dvc.lock is committed."""
    copy = small.copy(tmp_path_factory.mktemp("committed") / "a project")
    # Of a stage that was never run DVC's `apply` misses the outputs, and says that it failed.
    copy.set("studies={too-fast: {architecture: resnet20, optimizer: sgd, seed: 0, lr: 1.0e+9}}")
    assert copy.run("dvc", "repro", "--single-item", "evaluate").returncode == 0
    for command in (["add", "dvc.lock", "params.yaml"], ["commit", "-qm", "record"]):
        assert copy.run("git", *command).returncode == 0
    return copy


@pytest.fixture
def project(committed, tmp_path):
    return committed.copy(tmp_path / "a project")


def queue(project: Project, rate: str) -> None:
    done = project.run("dvc", "exp", "run", "--queue", "-S", f"tuning.resnet20.sgd.lr={rate}", STAGE)
    assert done.returncode == 0, done.stderr


def test_a_number_set_in_the_workspace_changes_one_line_and_retrains_one_cell(project):
    assert project.run("resgrid", "sync", "--rebuild").returncode == 0
    done = project.run("dvc", "exp", "run", "-S", "recipes.resnet20.epochs=1", STAGE)
    assert done.returncode == 0, done.stderr
    stat = project.run("git", "diff", "--stat", "params.yaml").stdout
    assert "1 insertion(+), 1 deletion(-)" in stat, stat
    assert json.loads((project.root / f"runs/{CELL}/run.json").read_text())["epochs"] == 1
    others = {f"train@{cell}" for cell in GRID if cell != CELL} | {"train-study@too-fast"}
    assert project.stale() - {"evaluate"} == others
    runs = project.runs().set_index("tags.cell").loc[CELL]
    assert sorted(runs["tags.grid"]) == ["current", "superseded"]
    assert "tags.dvc_experiment" not in runs  # what runs in the workspace is the workspace's


def test_an_experiment_in_a_copy_has_its_run_and_leaves_the_workspaces_until_it_is_applied(project):
    assert project.run("resgrid", "sync", "--rebuild").returncode == 0
    cell = "resnet20-adam-0"  # whose accuracies after one and two epochs differ
    before = project.runs().set_index("run_id")["tags.grid"]
    done = project.run("dvc", "exp", "run", "--temp", "-S", "recipes.resnet20.epochs=1", f"train@{cell}")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = project.runs().set_index("run_id")
    [made] = set(runs.index) - set(before.index)
    assert runs.loc[made, ["tags.grid", "params.epochs"]].tolist() == ["experiment", "1"]
    name = runs.loc[made, "tags.dvc_experiment"]
    assert runs.loc[made, "tags.mlflow.runName"] == f"{name} {cell}"
    assert runs.loc[before.index, "tags.grid"].equals(before)
    assert project.run("git", "status", "--porcelain", "--untracked-files=no").stdout == ""

    assert project.run("resgrid", "sync").returncode == 0
    assert project.runs().set_index("run_id").loc[made, "tags.grid"] == "experiment"
    shown = project.run("dvc", "exp", "show", "--only-changed", "--no-pager").stdout
    assert name in shown
    assert max(map(len, shown.splitlines())) <= 160
    compared = project.run("dvc", "metrics", "diff", name).stdout
    assert f"small.{cell}" in compared
    assert max(map(len, compared.splitlines())) <= 160

    lock = (project.root / "dvc.lock").read_text()
    assert project.run("dvc", "exp", "apply", name).returncode == 0
    assert len((project.root / "dvc.lock").read_text().splitlines()) == len(lock.splitlines())
    assert project.run("resgrid", "sync").returncode == 0
    of_cell = project.runs().set_index("run_id")
    of_cell = of_cell[of_cell["tags.cell"] == cell]
    assert of_cell.loc[made, ["tags.grid", "tags.mlflow.runName"]].tolist() == ["current", cell]
    assert (of_cell["tags.grid"] == "current").sum() == 1


def test_without_a_committed_lock_a_copy_trains_nothing_and_says_what_to_do(small, tmp_path):
    project = small.copy(tmp_path / "a project")
    lock, runs = (project.root / "dvc.lock").read_text(), len(project.runs())
    done = project.run("dvc", "exp", "run", "--temp", "-S", "tuning.resnet20.sgd.lr=0.02", STAGE)
    assert done.returncode != 0
    assert "dvc.lock is in no commit" in done.stdout + done.stderr
    assert "git add dvc.lock" in done.stdout + done.stderr
    assert (project.root / "dvc.lock").read_text() == lock
    assert len(project.runs()) == runs


def test_in_a_shallow_clone_an_experiment_trains_nothing_and_says_what_to_do(project, tmp_path):
    """DVC would train it, end with 0, and record nothing."""
    clone = Project(tmp_path / "clone")
    done = project.run("git", "clone", "-q", "--depth", "1", f"file://{project.root}", str(clone.root))
    assert done.returncode == 0, done.stderr
    (clone.root / ".dvc/config.local").write_text(f"[cache]\n    dir = {project.root}/.dvc/cache\n")
    assert clone.run("dvc", "checkout").returncode == 0
    for command in (["git", "config", "user.name", "t"], ["git", "config", "user.email", "t@t.invalid"]):
        assert clone.run(*command).returncode == 0
    done = clone.run("dvc", "exp", "run", "--temp", "-S", "tuning.resnet20.sgd.lr=0.02", STAGE)
    assert done.returncode != 0
    assert "git fetch --unshallow" in done.stdout + done.stderr
    assert not (clone.root / "mlflow.db").exists()  # nothing began to train


def test_a_folder_of_results_that_is_a_link_is_refused_before_anything_trains(project, tmp_path):
    """DVC would refuse its outputs after the training."""
    (project.root / "runs").rename(tmp_path / "other disk")
    (project.root / "runs").symlink_to(tmp_path / "other disk")
    project.set("tuning.resnet20.sgd.lr=0.02")
    trained = (tmp_path / "other disk" / CELL / "run.json").read_text()
    for command in (["dvc", "repro", "--single-item", STAGE], ["resgrid", "plan"]):
        done = project.run(*command)
        assert done.returncode != 0
        assert "runs: is a link to" in done.stdout + done.stderr
        assert "cache.type symlink" in done.stdout + done.stderr
    record = tmp_path / "other disk" / CELL / "run.json"
    assert not record.exists() or record.read_text() == trained


@pytest.mark.long
def test_queued_experiments_are_kept_apart_and_none_runs_other_code_than_dvc_records(project):
    assert project.run("resgrid", "sync", "--rebuild").returncode == 0
    code = {"PYTHONPATH": str(project.root / "src")}  # the workspace's is the installed one
    for rate in ("0.01", "0.02", "0.03"):
        queue(project, rate)
    done = project.run("dvc", "exp", "run", "--run-all", **code)
    assert done.returncode == 0, done.stderr
    runs = project.runs()
    made = runs[runs["tags.grid"] == "experiment"]
    assert sorted(made["params.learning_rate"]) == ["0.01", "0.02", "0.03"]
    lines = project.run("dvc", "exp", "list").stdout.splitlines()
    names = {line.split()[1].strip("[]") for line in lines if line.startswith("\t")}
    assert set(made["tags.dvc_experiment"]) == names

    queue(project, "0.04")
    project.edit("src/resgrid/training/optimizers.py", '"""', '"""Edited. ')
    project.run("dvc", "exp", "run", "--run-all", **code)
    said = project.run("dvc", "queue", "status").stdout
    assert "Failed" in said
    assert len(project.runs()) == len(runs)
