"""A machine with torch and five packages more: cells are trained there, copied, and taken in here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch_alone
from sleeping import wait_until
from small import Project, digits

from resgrid import offline
from resgrid.config import load_params
from resgrid.data.dataset import load_meta
from resgrid.grid import find_cell

CELLS = ["resnet20-sgd-0", "resnet20-adam-0"]
PROBE = "import importlib.util as u; print([n for n in ('torch', 'mlflow', 'dvc', 'prefect', 'rich', 'psutil', 'pandas') if u.find_spec(n)])"


class Node:
    """The machine: a copy of a project without DVC and git, and an environment of six packages."""

    def __init__(self, project: Project, folder: Path) -> None:
        ignored = shutil.ignore_patterns(".dvc", ".git", "runs")
        self.folder = shutil.copytree(project.root, folder, ignore=ignored)
        path = os.pathsep.join(map(str, (torch_alone.link(folder / "packages"), folder / "src")))
        self.env = {
            "PATH": os.environ["PATH"], "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RESGRID_DEVICE": "cpu",
        }  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Python without site-packages: `-S` leaves the standard library and PYTHONPATH."""
        return subprocess.Popen(
            [sys.executable, "-S", *arguments],
            cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def resgrid(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start("-m", "resgrid", *arguments)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The digits, preprocessed; no cell is trained."""
    made = digits(tmp_path_factory.mktemp("offline") / "project")
    done = made.run("dvc", "repro", "preprocess")
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def node(project, tmp_path_factory):
    return Node(project, tmp_path_factory.mktemp("node") / "project")


@pytest.fixture(scope="module")
def trained(node):
    """The machine's folder: both cells, trained side by side."""
    code, out, err = node.resgrid("train", *CELLS, "--slots", "2")
    assert code == 0, out + err
    assert out.splitlines()[-1] == "2 of 2 cells are trained."
    return node.folder


def test_the_machine_has_no_mlflow_no_dvc_no_prefect_and_no_second_torch(node):
    assert node.start("-c", PROBE).communicate()[0] == "['torch']\n"
    assert (node.folder / "packages/torch").is_symlink()


def test_a_training_says_in_one_line_that_it_is_not_logged(node, trained):
    log = (node.folder / ".resgrid/logs/train@resnet20-sgd-0.log").read_text()
    line = "resgrid: Logging resnet20-sgd-0 to MLflow failed: ModuleNotFoundError: No module named 'mlflow'\n"
    assert log.count(line) == 1
    assert "Traceback" not in log


@pytest.mark.parametrize("inside", ["", "runs"])
def test_results_in_a_copied_project_or_its_runs_are_taken_in_and_dvc_has_nothing_to_train(
    inside, project, trained, tmp_path
):
    here = project.copy(tmp_path / "here")
    copied = shutil.copytree(trained, tmp_path / "copied", ignore=shutil.ignore_patterns("packages"))
    done = here.run("resgrid", "take-in", str(copied / inside))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Recorded in dvc.lock: resnet20-adam-0, resnet20-sgd-0.\n`resgrid sync`")
    assert not here.stale() & {f"train@{cell}" for cell in CELLS}


def test_a_result_of_other_params_is_refused_and_nothing_is_touched(project, trained, tmp_path):
    here = project.copy(tmp_path / "here")
    here.set("recipes.resnet20.epochs=7")
    done = here.run("resgrid", "take-in", str(trained))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"resgrid: refused: {cell}: trained with epochs 1 → 7 (params.yaml now)" for cell in sorted(CELLS)
    ]
    assert not (here.root / "runs/resnet20-sgd-0").exists()
    assert f"train@{CELLS[0]}" in here.stale()


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("data_digest", "trained on other data than sha256:"),
        ("code_digest", "trained by other code in models/, optimizers.py, training/ or data/batches.py"),
        ("weights_sha256", "its weights are damaged: copy the folder once more"),
    ],
)
def test_a_result_of_other_data_or_code_and_a_damaged_one_are_refused(key, why, node, trained, tmp_path):
    cell = find_cell(load_params(node.folder / "params.yaml"), CELLS[0])
    digest = load_meta(node.folder / "data/processed").digest
    run = shutil.copytree(node.folder / "runs" / cell.id, tmp_path / cell.id)
    assert offline.refusal(run, cell, digest) is None
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {key: "sha256:0"}))
    assert str(offline.refusal(run, cell, digest)).startswith(why)
    (run / "history.csv").unlink()
    assert offline.refusal(run, cell, digest) == "its history.csv is missing: copy the folder once more"


def test_a_training_that_is_interrupted_travels_as_its_checkpoint_and_goes_on_elsewhere(project, tmp_path):
    long = project.copy(tmp_path / "long")
    long.set("recipes.resnet20.epochs=1000")
    there = Node(long, tmp_path / "there")
    process = there.start("-m", "resgrid", "train", "resnet20-sgd-*")
    log = there.folder / ".resgrid/logs/train@resnet20-sgd-0.log"
    wait_until(lambda: log.exists() and "epoch   2/1000" in log.read_text(), 300)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "resnet20-sgd-0: interrupted" in err, out + err
    for printed in ("resnet20-sgd-0: its checkpoint, from which the same training goes on\n", ""):
        done = long.run("resgrid", "take-in", str(there.folder))  # the second time it is here already
        assert (done.returncode, done.stderr) == (0, printed)
    training = subprocess.Popen(
        [str(Path(sys.executable).with_name("resgrid")), "train", "resnet20-sgd-0"],
        cwd=long.root, env=os.environ | {"RESGRID_THREADS": "1", "RESGRID_DEVICE": "cpu"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert training.stderr is not None
    assert any("goes on after epoch" in line for line in training.stderr)
    training.kill()
    training.communicate()


def test_at_the_time_limit_what_runs_is_ended(node, trained):
    code, out, err = node.resgrid("train", "*-adam-*", "--hours", "0.0002")
    assert code == 1, err
    assert "resnet20-adam-0: interrupted; the same command goes on from its last checkpoint" in err
    assert out.splitlines()[-1] == "0 of 1 cells are trained."


def test_a_cell_that_cannot_be_trained_is_reported_with_its_reason_and_the_others_go_on(node, trained):
    meta = node.folder / "data/processed/meta.json"
    content = meta.read_text()
    meta.write_text("{")
    try:
        code, out, err = node.resgrid("train", *CELLS, "--slots", "2")
    finally:
        meta.write_text(content)
    assert code == 1
    assert err.count("failed: ") == 2
    assert str(Path("data/processed/meta.json")) in err
    assert out.splitlines()[-1] == "0 of 2 cells are trained."


def test_a_folder_without_results_is_refused(project, tmp_path):
    done = project.run("resgrid", "take-in", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"resgrid: {tmp_path}: holds no results")


def test_a_command_that_needs_more_packages_names_the_first_that_is_missing(node):
    code, _, err = node.resgrid("plan")
    assert (code, err) == (1, "resgrid: this command needs the package tasks: `make install`.\n")
