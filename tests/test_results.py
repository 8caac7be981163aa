"""docs/results: the page is what its program makes of the rows, and each row belongs to a training."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", RESULTS / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(accuracies: dict[str, list[float]], pipeline: str = "optimizers") -> pd.DataFrame:
    common = {"pipeline": pipeline, "status": "completed", "epochs": 6, "batch_size": 128, "architecture": "resnet20",
              "data_digest": "d", "code_digest": "c", "train_accuracy": 0.8, "commit": "0123456789ab", "device": "a CPU",
              "train_seconds": 3600.0, "torch": "2"}  # fmt: skip
    return pd.DataFrame(
        {"cell": f"resnet20-{name}-{seed}", "optimizer": name, "seed": seed, "test_accuracy": value} | common
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    )


def test_the_page_is_what_the_program_makes_of_the_rows(results: ModuleType) -> None:
    runs = pd.read_csv(results.RUNS) if results.RUNS.exists() else pd.DataFrame(columns=results.COLUMNS)
    assert results.PAGE.read_text(encoding="utf-8") == results.page(runs)
    for digest in runs["weights_sha256"] if len(runs) else ():
        assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert not runs.duplicated(["pipeline", "epochs", "cell"]).any()
    start, end = results.ANSWER
    front = results.FRONT.read_text(encoding="utf-8")
    assert front.partition(start)[2].partition(end)[0] == f"\n{results.answer(runs)}\n"


def test_a_difference_is_told_only_where_its_interval_and_holm_allow_it(results: ModuleType) -> None:
    runs = rows({"sgd": [0.80, 0.81, 0.82], "adam": [0.70, 0.715, 0.715], "rmsprop": [0.71, 0.69, 0.73]})
    groups = results.groups_of(runs, "optimizers", "optimizer")
    assert list(groups) == ["sgd", "adam", "rmsprop"]
    told = list(results.sentences(groups, "optimizer"))
    assert told[0].startswith("**sgd** is ahead of adam by 10.00 points")
    assert "No difference can be told between adam and rmsprop." in told
    assert "3 seeds, Student's t; the 3 comparisons are tested together (Holm)" in told[-1]


def test_an_interval_over_three_seeds_is_students(results: ModuleType) -> None:
    """Mean 81, deviation 1, three seeds: 4.303 / sqrt(3) = 2.484."""
    found = results.mean(rows({"sgd": [0.80, 0.81, 0.82]})["test_accuracy"].to_numpy())
    assert (found.low, found.estimate, found.high) == pytest.approx(
        (0.81 - 0.02484, 0.81, 0.81 + 0.02484), abs=1e-5
    )


def test_with_one_seed_nothing_is_ranked(results: ModuleType) -> None:
    groups = results.groups_of(rows({"sgd": [0.9], "adam": [0.1]}), "optimizers", "optimizer")
    assert list(results.sentences(groups, "optimizer")) == [
        "With fewer than two seeds in common, nothing can be said about training by other seeds: no optimizer is ranked."
    ]


def test_rows_of_other_code_or_epochs_are_not_compared(results: ModuleType) -> None:
    runs = rows({"sgd": [0.8, 0.81], "adam": [0.7, 0.71]})
    runs.loc[runs["cell"] == "resnet20-adam-1", "code_digest"] = "other"
    groups = results.groups_of(runs, "optimizers", "optimizer")
    assert {name: len(group) for name, group in groups.items()} == {"sgd": 2, "adam": 1}
    longer = runs[runs["optimizer"] == "adam"].assign(epochs=70, code_digest="c")
    both = pd.concat([runs, longer])
    assert {name: len(rows) for name, rows in results.groups_of(both, "optimizers", "optimizer").items()} == {
        "adam": 2
    }
    assert set(results.groups_of(both, "optimizers", "optimizer", epochs=6)) == {"sgd", "adam"}


def test_a_cell_that_was_cut_off_is_said_to_be(results: ModuleType) -> None:
    card = results.h100()
    assert len(card) == 6
    assert "| resnet32-sgd-0 | 194 of 250 (cut off; scored in bf16) | 87.85 |" in results.h100_table(card)
