"""The Python way to results: `resgrid.load`, and the notebook that shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small import GRID, ROOT, Project

import resgrid
from resgrid.cli import main
from resgrid.errors import ResgridError

NOTEBOOK = json.loads((ROOT / "examples/analysis.ipynb").read_text())


def test_results_have_a_row_a_cell_with_its_numbers_figures_digests_and_folder(small: Project) -> None:
    results = resgrid.load(small.root).results.set_index("cell")
    assert set(results.index) == {*GRID, "too-fast", "no-weights"}
    for cell in GRID:
        record = json.loads((small.root / "runs" / cell / "run.json").read_text())
        row = results.loc[cell]
        for key in ("test_accuracy", "validation_accuracy", "data_digest", "code_digest", "weights_sha256"):
            assert row[key] == record[key]
        assert row["learning_rate"] == record["numbers"]["optimizer"]["lr"]
        assert (row["augmentation.rotation_degrees"], row["normalization"]) == (5.0, "scalar")
        assert row["folder"] == str(small.root / "runs" / cell)
        assert 0 <= row["calibration_error"] <= 1
    assert results.loc["no-weights", "status"] == "failed"


def test_compare_prints_the_same_as_json(
    small: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small.root)
    assert main(["compare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(resgrid.load().results.to_json(orient="records"))


def test_results_are_there_where_nothing_was_trained_yet(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    results = resgrid.load(tmp_path).results
    assert len(results) == 46
    assert set(results["status"]) == {"missing"}
    assert results.set_index("cell").loc["vgg16-sgd-0", "momentum"] == 0.9


def test_what_was_trained_and_not_compared_has_the_figures_of_its_training(
    small: Project, tmp_path: Path
) -> None:
    copy = small.copy(tmp_path / "project")
    (copy.root / "reports/leaderboard.csv").unlink()
    row = resgrid.load(copy.root).results.set_index("cell").loc["resnet20-sgd-0"]
    record = json.loads((copy.root / "runs/resnet20-sgd-0/run.json").read_text())
    assert (row["status"], row["test_accuracy"]) == ("completed", record["test_accuracy"])
    assert "`dvc repro -s evaluate` compares it" in row["remark"]


def test_history_model_and_predictions_are_those_of_the_cell(small: Project) -> None:
    pipeline = resgrid.load(str(small.root))
    history = pipeline.history("resnet20-adam-1")
    pd.testing.assert_frame_equal(history, pd.read_csv(small.root / "runs/resnet20-adam-1/history.csv"))
    accuracy = pipeline.results.set_index("cell").loc["resnet20-adam-1", "test_accuracy"]
    predictions = pipeline.predictions("resnet20-adam-1")
    assert (predictions["label"] == predictions["predicted"]).mean() == accuracy
    assert len(pipeline.predictions("resnet20-adam-1", "validation")) == 19

    from resgrid.data.dataset import load_split

    images = load_split(small.root / "data/processed", "test").images.permute(0, 3, 1, 2) / 255
    given = pipeline.model("resnet20-adam-1")(images)
    expected = torch.from_numpy(predictions.filter(like="probability.").to_numpy(copy=True)).float()
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.history("resnet20-sdg-0"), "did you mean resnet20-sgd-0"),
        (lambda p: p.model("no-weights"), "no-weights: this cell has no result"),
        (lambda p: p.predictions("resnet20-sgd-0", "train"), "does not contain tensor train"),
    ],
)
def test_what_is_not_there_is_named(small: Project, call: Any, message: str) -> None:
    with pytest.raises(ResgridError, match=message):
        call(resgrid.load(small.root))
    with pytest.raises(ResgridError, match="no such file here"):
        resgrid.load(small.root / "runs")


def test_importing_it_takes_no_pandas_torch_mlflow_or_prefect() -> None:
    code = "import resgrid, sys; print([n for n in ('pandas', 'torch', 'mlflow', 'prefect') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_notebook_runs_and_is_stored_without_its_outputs(
    small: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").symlink_to(small.root)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec("".join(cell["source"]), names)
    assert names["best"] in GRID
    assert len(cells) > 3
