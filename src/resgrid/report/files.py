"""What `evaluate` leaves in `reports/`, all of it from the same findings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from resgrid.report import figures
from resgrid.report.findings import Findings
from resgrid.report.leaderboard import as_csv, headline
from resgrid.report.page import markdown, page

PARTS = ("answer", "differences", "rates")  # of the page, whose charts are PNGs as well


def write_report(findings: Findings, out: Path) -> None:
    """The leaderboard, metrics, findings, report.md, the page and its PNGs in the folder `out`."""
    charts = figures.charts(findings)
    contents = {
        "leaderboard.csv": as_csv(findings.frame),
        "metrics.json": json.dumps(headline(findings.frame, findings.factors), indent=2) + "\n",
        "findings.json": json.dumps(findings.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown(findings),
        "index.html": page(findings, charts),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    shutil.rmtree(out / "figures", ignore_errors=True)
    (out / "figures").mkdir()  # an output of the stage, also where nothing was trained
    for chart in (chart for part in PARTS for chart in charts.get(part, ())):
        (out / f"figures/{chart.id}.png").write_bytes(figures.png(chart))
