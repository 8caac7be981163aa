"""docs/results.md: each of its tables is made of runs.csv, and each row of that belongs to a configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from resgrid.config import load_params
from resgrid.grid import expand

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


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "runs.csv")


def test_every_row_is_a_cell_of_the_pipeline_that_it_names_with_all_its_numbers(runs: pd.DataFrame) -> None:
    for pipeline, rows in runs.groupby("pipeline"):
        cells = {cell.id: cell for cell in expand(load_params(ROOT / f"examples/{pipeline}/params.yaml"))}
        for row in rows.itertuples():
            cell = cells[row.cell]
            assert row.cell_digest == cell.digest, row.cell
            assert (row.architecture, row.optimizer, row.seed) == (
                cell.architecture, cell.optimizer.name, cell.seed,
            )  # fmt: skip
            assert row.learning_rate == cell.optimizer.lr


def test_each_of_the_36_cells_has_a_figure_on_the_same_images(runs: pd.DataFrame) -> None:
    grid = runs[(runs["pipeline"] == "budget") & runs["study"].isna()]
    assert len(grid.drop_duplicates(["architecture", "optimizer"])) == len(grid) == 36
    assert grid["test_accuracy"].between(0, 1).all()
    assert grid["data_digest"].nunique() == 1
    # ResNet-20's seed 0 stands in two pipelines
    seeds = runs[(runs["pipeline"] == "budget-seeds") & (runs["seed"] == 0)]
    seeds = seeds.set_index("cell")["weights_sha256"]
    assert len(seeds) == 4
    assert seeds.equals(grid.set_index("cell")["weights_sha256"].loc[seeds.index])


def test_the_tables_on_the_page_are_made_of_the_rows(results: ModuleType, runs: pd.DataFrame) -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert page.count("<!-- end -->") == len(results.TABLES)
    assert results.written(page, runs) == page


def test_an_interval_is_the_binomials_and_one_of_paired_differences_students(results: ModuleType) -> None:
    assert results.percent(0.5) == "50.00 ± 0.98"  # 1.96 sqrt(0.25 / 10,000)
    # mean 2, deviation 1, n 3: 4.303 / sqrt(3) = 2.484
    assert results.paired(pd.Series([0.01, 0.02, 0.03])) == "+2.00 (-0.48 to +4.48)"
