"""A pipeline that another version of ResGrid made, whose dvc.yaml lists code that is not there any more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import Project

from resgrid.cli import main


@pytest.fixture
def older(image_folder: Path, tmp_path: Path) -> Project:
    """A pipeline of `resgrid init` with processed images, and in its dvc.yaml a module that went since."""
    folder = tmp_path / "mine"
    assert main(["init", str(folder), "--data", str(image_folder)]) == 0
    project = Project(folder)
    done = project.run("dvc", "repro", "preprocess")
    assert done.returncode == 0, done.stderr
    stages = (folder / "dvc.yaml").read_text()
    [line] = [line for line in stages.splitlines() if line.endswith("resgrid/data/preprocess.py")]
    gone = line.replace("preprocess.py", "room.py")
    (folder / "dvc.yaml").write_text(stages.replace(line, f"{line}\n{gone}"))
    return project


def test_a_dvc_yaml_that_lists_code_of_another_version_names_the_way_out(older: Project) -> None:
    refused = older.run("resgrid", "plan")
    assert refused.returncode == 1
    [line] = refused.stderr.splitlines()
    assert f"{older.root / 'dvc.yaml'}: lists " in line
    assert f"room.py, which this version of ResGrid has not. `resgrid init {older.root}` writes" in line


def test_init_writes_it_anew_and_keeps_params_data_and_results(older: Project) -> None:
    def files() -> dict[Path, bytes]:
        folders = [older.root / name for name in ("data", "runs")]
        return {path: path.read_bytes() for each in folders for path in each.rglob("*") if path.is_file()}

    (older.root / "runs/resnet20-sgd-0").mkdir(parents=True)
    (older.root / "runs/resnet20-sgd-0/run.json").write_text(json.dumps({"architecture": "resnet20"}))
    params, before = (older.root / "params.yaml").read_bytes(), files()
    assert older.run("dvc", "repro", "preprocess").returncode != 0  # room.py is missing
    assert older.run("resgrid", "init", str(older.root)).returncode == 0
    assert older.run("dvc", "repro", "preprocess").returncode == 0
    assert ((older.root / "params.yaml").read_bytes(), files()) == (params, before)
    assert older.run("resgrid", "plan").returncode == 0


def test_init_without_images_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "new")]) == 1
    assert "--data names images for one." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
