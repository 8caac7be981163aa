"""What `evaluate` leaves in `reports/`, all of it from the same findings."""

from __future__ import annotations

import json
from pathlib import Path

from resgrid.report.findings import Findings
from resgrid.report.leaderboard import as_csv, headline
from resgrid.report.page import markdown, page


def write_report(findings: Findings, out: Path) -> None:
    """`leaderboard.csv`, `metrics.json`, `report.md` and `index.html` in the folder `out`."""
    contents = {
        "leaderboard.csv": as_csv(findings.frame),
        "metrics.json": json.dumps(headline(findings.frame), indent=2) + "\n",
        "report.md": markdown(findings),
        "index.html": page(findings),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
