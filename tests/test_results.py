"""docs/results: the README's answer is what the report's findings say, and nothing else."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs/answer.py")))


def test_the_answer_in_the_readme_is_made_anew_from_the_findings_and_equal(script):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.written(readme) == readme
    assert script.written(script.ANSWER.sub("", readme)) == readme


def test_the_findings_in_the_docs_are_those_of_the_leaderboard_beside_them(script):
    """Every cell of the README's table is completed, with one seed: its accuracy in % with two digits."""
    folder = script.RESULTS / script.SHOWN
    findings = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    cells = pd.read_csv(folder / "leaderboard.csv").query("study.isna()")
    assert set(cells["status"]) == {"completed"}
    assert len(cells) == 12
    for row in cells.itertuples():
        assert findings["table"][row.architecture][row.optimizer] == f"{100 * row.test_accuracy:.2f}"


def test_the_report_in_the_docs_says_what_the_findings_say_and_its_figures_are_there(script):
    folder = script.RESULTS / script.SHOWN
    findings = json.loads((folder / "findings.json").read_text(encoding="utf-8"))
    report = (folder / "report.md").read_text(encoding="utf-8")
    for sentence in (findings["question"], findings["baseline"], *findings["answer"]):
        assert sentence in report
    figures = re.findall(r"\]\((figures/\S+?\.png)\)", report)
    assert len(figures) >= 2
    for figure in figures:
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
