"""What `evaluate` leaves in `reports/`, all of it from the same findings."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from resgrid.report.findings import Findings
from resgrid.report.leaderboard import as_csv, headline, text_table
from resgrid.report.page import page
from resgrid.report.sections import Section, sections, summary


def write_report(findings: Findings, out: Path) -> None:
    """`leaderboard.csv`, `metrics.json`, `report.md` and `index.html` in the folder `out`."""
    content = sections(findings)
    contents = {
        "leaderboard.csv": as_csv(findings.frame),
        "metrics.json": json.dumps(headline(findings.frame), indent=2) + "\n",
        "report.md": markdown(findings, content),
        "index.html": page(findings, content),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")


def markdown(findings: Findings, content: list[Section]) -> str:
    """The tables and sentences of the page, for a terminal, a diff or a pull request."""
    parts = [
        f"# {findings.name}: the comparison",
        f"{summary(findings)} The charts, the confusion matrices and the mistakes stand in `index.html`.",
    ]
    for section in content:
        tables = {title: table for title, table in section.tables.items() if len(table)}
        if tables or section.sentences:
            parts += [f"## {section.title}", "\n".join(f"- {sentence}" for sentence in section.sentences)]
            for title, table in tables.items():
                parts += [title and f"### {title}", text_table(table.map(_escaped), "pipe")]
            parts.append(section.note)
    return "\n\n".join(filter(None, parts)) + "\n"


def _escaped(text: object) -> str:
    return "" if pd.isna(text) else str(text).replace("|", "\\|")  # type: ignore[call-overload]
