"""`report.md`: the tables and sentences of the page, for a terminal, a diff or a pull request."""

from __future__ import annotations

import pandas as pd

from resgrid.report import tables
from resgrid.report.findings import Findings, conclusions
from resgrid.report.leaderboard import by_optimizer, missing, readable, text_table

BEST = (
    "*Best* is the highest test accuracy of any epoch: it was chosen by looking at test images, so it "
    "flatters, and nothing is ranked by it. Training figures are running means over the last epoch, with "
    "augmentation and dropout on."
)


def markdown(findings: Findings) -> str:
    """The whole report as Markdown."""
    meta, frame = findings.meta, findings.frame
    seeds = frame.loc[frame["study"].isna(), "seed"].nunique()
    parts = [
        f"# {findings.name}: the comparison",
        f"{meta.num_images['train']:,} training and {meta.num_images['test']:,} test images of "
        f"{len(meta.class_names)} classes from `{meta.source}` ({meta.digest[:19]}…). "
        "Test accuracy in % with the weights of the last epoch, scored in fp32"
        + (f"; mean ± standard deviation over {seeds} seeds." if seeds > 1 else "; one seed.")
        + " The charts, the confusion matrices and the mistakes stand in `index.html`.",
        _table(by_optimizer(frame).reset_index()),
        "\n".join(f"- {_escaped(line)}" for line in missing(frame)),
        "## What can be concluded",
        "\n".join(f"- {sentence}" for sentence in conclusions(findings)),
    ]
    sections = {
        "Optimizers compared": tables.comparisons(findings.optimizers),
        "Depths compared": tables.comparisons(findings.depths),
        "Accuracy and its cost": tables.costs(findings),
        "Generalisation and calibration": tables.trust(findings),
        "Ensembles": tables.ensembles(findings),
        "Studies": tables.studies(findings),
        "Published and measured": tables.published(findings),
        "Every cell": readable(frame),
    }
    for title, table in sections.items():
        notes = findings.no_ensembles if title == "Ensembles" else []
        if not table.empty or notes:
            parts += [
                f"## {title}",
                _table(table) if len(table) else "",
                "\n".join(f"- {note}" for note in notes),
            ]
    parts += [BEST, "## How it was made"]
    parts.append("\n".join(f"- {key}: {_escaped(value)}" for key, value in findings.made.items()))
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(frame: pd.DataFrame) -> str:
    return text_table(frame.map(_escaped), "pipe")


def _escaped(text: object) -> str:
    return "" if pd.isna(text) else str(text).replace("|", "\\|")  # type: ignore[call-overload]
