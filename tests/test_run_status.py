"""Whose result a run folder holds: one answer, and everything that shows a result gives it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from small import GRID, Project

from resgrid.config import load_params
from resgrid.grid import expand
from resgrid.run_status import Run, find_runs

SGD = ("resnet20-sgd-0", "resnet20-sgd-1")


class Here(Project):
    """A copy of the trained pipeline."""

    def resgrid(self, *arguments: str) -> str:
        """What a command prints."""
        done = self.run("resgrid", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def evaluate(self) -> pd.DataFrame:
        self.resgrid("evaluate", "--device", "cpu")
        return self.leaderboard()

    def leaderboard(self) -> pd.DataFrame:
        return pd.read_csv(self.root / "reports/leaderboard.csv").set_index("cell")

    def found(self) -> dict[str, Run]:
        cells = expand(load_params(self.root / "params.yaml"))
        return {run.cell.id: run for run in find_runs(cells, self.root)}

    def champion(self, name: str = "small") -> str | None:
        model = self.mlflow.get_registered_model(name)
        if "champion" not in model.aliases:
            return None
        return str(self.mlflow.get_model_version_by_alias(name, "champion").tags["cell"])


@pytest.fixture
def project(small: Project, tmp_path: Path) -> Here:
    return Here(small.copy(tmp_path / "a project", mirrored=True).root)


def check_agreement(project: Here) -> None:
    """Report, comparison, MLflow and champion say what the one function says; no number is another's."""
    now, frame = project.found(), project.evaluate()
    project.resgrid("sync")
    assert dict(frame["status"]) == {cell: run.status for cell, run in now.items()}
    for cell, run in now.items():
        if run.record:
            assert frame.loc[cell, "learning_rate"] == run.record["learning_rate"]
            assert frame.loc[cell, "test_accuracy"] == pytest.approx(run.record["test_accuracy"])
            assert frame.loc[cell, "weights_sha256"] == run.record["weights_sha256"]
    compared = pd.DataFrame(json.loads(project.resgrid("compare", "--json"))).set_index("cell")
    assert dict(compared["status"]) == dict(frame["status"])
    table = project.runs()
    marked = table[table["tags.grid"] == "current"]
    assert sorted(marked["tags.cell"]) == sorted(cell for cell, run in now.items() if run.is_current)
    for row in marked.to_dict(orient="records"):
        record = now[row["tags.cell"]].record
        assert record is not None
        assert row["tags.weights_sha256"] == record["weights_sha256"]
        assert float(row["params.learning_rate"]) == record["learning_rate"]
    completed = {cell for cell, run in now.items() if run.status == "completed"}
    assert (project.champion() in completed) if completed else project.champion() is None
    report = (project.root / "reports/report.md").read_text()
    for cell, run in now.items():
        if run.reason and run.status in ("stale", "other data", "failed"):
            assert f"{cell} {run.status}: " in report


def test_edited_rates_leave_results_stale_with_their_own_numbers_and_back_they_are_as_before(
    project: Here,
) -> None:
    before, crowned = project.evaluate(), project.champion()
    project.set("tuning.resnet20.sgd.lr=0.7")
    assert {cell: run.status for cell, run in project.found().items() if cell in GRID} == {
        cell: "stale" if cell in SGD else "completed" for cell in GRID
    }
    why = "resnet20-sgd-0 stale: trained with learning_rate 0.05 → 0.7 (params.yaml now)"
    assert why in project.resgrid("compare")  # before evaluate has run again
    assert "6 cells: 2 completed, 1 diverged, 2 stale, 1 failed." in project.resgrid("status")

    done = project.run("dvc", "repro", "--single-item", "evaluate")
    assert done.returncode == 0, done.stderr
    after = project.leaderboard()
    for cell in SGD:
        assert after.loc[cell, ["status", "learning_rate"]].tolist() == ["stale", 0.05]
        assert after.loc[cell, "test_accuracy"] == before.loc[cell, "test_accuracy"]
    report = (project.root / "reports/report.md").read_text()
    assert "Not today's: 2 of 6 cells are left out of comparisons" in report
    assert why in report
    check_agreement(project)
    assert project.champion() in ("resnet20-adam-0", "resnet20-adam-1")
    picture = str(next((project.root / "images/test/digit 3").iterdir()))
    told = project.resgrid("predict", picture, "--model", "resnet20-sgd-0", "--device", "cpu")
    assert "resnet20-sgd-0 is stale: trained with learning_rate" in told

    project.set("tuning.resnet20.sgd.lr=0.05")
    restored = project.run("dvc", "repro", "--single-item", "evaluate")
    assert "is cached - skipping run" in restored.stdout
    pd.testing.assert_frame_equal(project.leaderboard(), before)
    check_agreement(project)
    assert project.champion() == crowned


def other_data(project: Project) -> None:
    shutil.rmtree(project.root / "images/test/digit 3")
    shutil.copytree(project.root / "images/train/digit 3", project.root / "images/test/digit 3")
    for command in (["-f", "download"], ["preprocess"]):
        assert project.run("dvc", "repro", "--single-item", *command).returncode == 0


def edited_code(project: Project) -> None:
    project.edit("src/resgrid/models/vgg.py", '"""', '"""Edited. ')


def copied_in(project: Project) -> None:
    """From a pipeline with the same cell, other numbers and other data."""
    folder = project.root / "runs/resnet20-sgd-0"
    record = json.loads((folder / "run.json").read_text())
    record["data_digest"] = "sha256:" + 64 * "0"
    (folder / "run.json").unlink()
    (folder / "run.json").write_text(json.dumps(record))


def without_a_file(project: Project) -> None:
    (project.root / "runs/resnet20-sgd-0/history.csv").unlink()


def base_of_a_study(project: Project) -> None:
    project.set("recipes.resnet20.batch_size=8")


@pytest.mark.parametrize(
    ("change", "expected", "reason"),
    [
        (other_data, dict.fromkeys([*GRID, "too-fast"], "other data"), "trained on other data than sha256:"),
        (edited_code, dict.fromkeys([*GRID, "too-fast"], "stale"), "other code in models/, optimizers.py"),
        (copied_in, {"resnet20-sgd-0": "other data"}, "sha256:000"),
        (without_a_file, {"resnet20-sgd-0": "missing"}, "history.csv is gone: `dvc checkout --force`"),
        (base_of_a_study, dict.fromkeys([*GRID, "too-fast"], "stale"), "batch_size 16 → 8"),
    ],
)
def test_what_is_not_the_cells_result_is_told_and_compared_with_nothing(
    project: Here, change: Callable[[Project], None], expected: dict[str, str], reason: str
) -> None:
    change(project)
    found = project.found()
    assert {cell: run.status for cell, run in found.items() if cell != "no-weights"} == {
        **dict.fromkeys(GRID, "completed"), "too-fast": "diverged", **expected,
    }  # fmt: skip
    assert reason in str(found["resnet20-sgd-0"].reason)
    check_agreement(project)


def walk(project: Here, steps: int, draws: random.Random) -> None:
    """Edits, their undoing, trainings, deletions and `dvc checkout`, in any order."""
    for _ in range(steps):
        match draws.choice(["edit", "edit", "undo", "train", "delete", "checkout", "code"]):
            case "edit":
                project.set(draws.choice(["tuning.resnet20.sgd.lr=0.7", "tuning.resnet20.adam.lr=0.5",
                                          "optimizers.sgd.momentum=0.5", "recipes.resnet20.epochs=1"]))  # fmt: skip
            case "undo":
                assert project.run("git", "checkout", "-q", "params.yaml", "src").returncode == 0
            case "train":
                project.run("dvc", "repro", "--single-item", f"train@{draws.choice(GRID)}")
            case "delete":
                shutil.rmtree(project.root / "runs" / draws.choice(GRID), ignore_errors=True)
            case "checkout":
                project.run("dvc", "checkout", "--force")
            case "code":
                (project.root / "src/resgrid/models/vgg.py").write_text(f"# {draws.random()}\n")
        dvc, now = project.stale(), project.found()
        for cell in GRID:
            if f"train@{cell}" not in dvc:
                assert now[cell].is_current, (cell, now[cell].status, now[cell].reason)
    check_agreement(project)


def test_after_a_walk_all_agree_and_what_dvc_calls_up_to_date_is_current(project: Here) -> None:
    walk(project, 4, random.Random(0))


@pytest.mark.long
def test_after_200_walks_all_agree(project: Here) -> None:
    for number in range(200):
        walk(project, random.Random(number).randint(1, 6), random.Random(1000 + number))
