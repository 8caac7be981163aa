"""Write the README's answer anew from the findings of a report: `python docs/answer.py [PIPELINE NAME]`.

With a pipeline's folder and a name its report is copied to docs/results/NAME first. Every figure and sentence
of the answer is one of `findings.json`: what the report does not say, the README does not say.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
SHOWN = "digits-5"  # whose findings the README shows
ANSWER = re.compile(r"(?<=<!-- answer -->\n).*(?=<!-- /answer -->)", re.DOTALL)


def copy(pipeline: Path, name: str) -> None:
    """Copy what `evaluate` wrote for a pipeline, but for the page and the predictions."""
    shutil.rmtree(RESULTS / name, ignore_errors=True)
    shutil.copytree(pipeline / "reports/figures", RESULTS / name / "figures")
    for file in ("report.md", "findings.json", "leaderboard.csv"):
        shutil.copy(pipeline / "reports" / file, RESULTS / name / file)


def answer(findings: dict[str, Any], name: str) -> str:
    """The question, the table, the figure and the sentences of `findings`, in Markdown."""
    table = findings["table"]
    optimizers = list(next(iter(table.values())))
    lines = [findings["question"], "", f"| test accuracy, % | {' | '.join(optimizers)} |"]
    lines.append("|:--|" + "--:|" * len(optimizers))
    lines += [f"| {row} | {' | '.join(cells[each] for each in optimizers)} |" for row, cells in table.items()]
    lines += ["", f"![Test accuracy and 95 % intervals](docs/results/{name}/figures/test-accuracy.png)", ""]
    sentences = " ".join([*findings["answer"], findings["baseline"]])
    return "\n".join([*lines, f"{sentences} [The report](docs/results/{name}/report.md)", ""])


def written(readme: str) -> str:
    """The README with its answer made anew."""
    findings = json.loads((RESULTS / SHOWN / "findings.json").read_text(encoding="utf-8"))
    return ANSWER.sub(lambda _: answer(findings, SHOWN), readme)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        copy(Path(sys.argv[1]), sys.argv[2])
    page = ROOT / "README.md"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
