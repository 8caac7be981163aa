"""The report's tables, as texts: the page and the Markdown show the same ones."""

from __future__ import annotations

import pandas as pd

from resgrid.report.findings import Comparison, Findings, of_one_model, points
from resgrid.report.leaderboard import remarks
from resgrid.report.statistics import Interval


def comparisons(rows: list[Comparison]) -> pd.DataFrame:
    """A row a comparison, in percentage points."""
    return pd.DataFrame(
        {
            "compared": f"{row.first} − {row.second}",
            "difference (95 % interval), points": points(row.difference) if row.difference else "",
            "interval over": row.difference.basis if row.difference else "",
            "mean of": ", ".join(row.over),
            "epochs": row.epochs,
            "p (Holm)": _p(row.p) if row.difference else "",
            "verdict": row.verdict,
        }
        for row in rows
    )


def costs(findings: Findings) -> pd.DataFrame:
    """A row an architecture with an optimizer: what it reaches, at what cost, and if nothing beats it."""
    fronts = {
        "parameters": {group.name for group in findings.front("num_parameters")},
        "time": {group.name for group in findings.front("train_seconds")},
    }
    groups = sorted(findings.trained, key=lambda group: -group.mean("test_accuracy"))
    return pd.DataFrame(
        {
            "architecture, optimizer": group.name,
            "test % (95 % interval)": accuracy(group.accuracy),
            "interval over": group.accuracy.basis if group.accuracy else "",
            "parameters": f"{group.mean('num_parameters'):,.0f}",
            "training, s": f"{group.mean('train_seconds'):,.1f}",
            "on the front by": ", ".join(cost for cost, names in fronts.items() if group.name in names),
        }
        for group in groups
    )


def trust(findings: Findings) -> pd.DataFrame:
    """A row a completed cell: how much better it is on its training images, and how far to believe it."""
    frame = findings.frame[findings.frame["status"] == "completed"]
    between = frame["train_accuracy"] - frame["test_accuracy"]
    return pd.DataFrame(
        {
            "cell": frame["cell"],
            "train %": (100 * frame["train_accuracy"]).map("{:.2f}".format),
            "test %": (100 * frame["test_accuracy"]).map("{:.2f}".format),
            "gap, points": (100 * between).map("{:+.2f}".format),
            "calibration error, points": (100 * frame["calibration_error"]).map("{:.2f}".format),
        }
    )


def ensembles(findings: Findings) -> pd.DataFrame:
    """A row an ensemble: what it reaches, beside its members' mean, and how often two of them disagree."""
    return pd.DataFrame(
        {
            "ensemble": each.name,
            "mean of": each.over,
            "members": ", ".join(f"{cell} × {n}" if n > 1 else cell for cell, n in each.members.items()),
            "test % (95 % interval)": accuracy(of_one_model(each.num_correct, len(findings.test.labels))),
            "members, test %": f"{100 * each.member_accuracy:.2f}",
            "calibration error, points": f"{100 * each.calibration_error:.2f}",
            "disagreement, %": f"{100 * each.disagreement:.2f}",
        }
        for each in findings.ensembles
    )


def published(findings: Findings) -> pd.DataFrame:
    """A row a published figure: beside the measured one where data and recipe agree, else what differs."""
    return pd.DataFrame(
        {
            "architecture, optimizer": row.group.name,
            "published %": f"{100 * row.accuracy:.2f}",
            "measured % (95 % interval)": "" if row.differences else accuracy(row.measured),
            "interval over": "" if row.differences else row.measured.basis,
            "difference, points": "" if row.differences else f"{100 * row.difference:+.2f}",
            "within the interval": "" if row.differences else "yes" if row.within else "no",
            "not comparable, for": ", ".join(row.differences),
        }
        for row in findings.published
    )


def studies(findings: Findings) -> pd.DataFrame:
    """A row a level of a study, the grid's own among them."""
    return pd.DataFrame(
        {
            "varies": study.factor,
            "in": series.name,
            "level": level.text,
            "cell": level.result.cell.id,
            "test % (95 % interval)": accuracy(level.accuracy) or level.result.status,
            "interval over": level.accuracy.basis if level.accuracy else "",
            "differs also in": "; ".join(level.also),
            "remark": "; ".join(remarks(level.result.cell)),
        }
        for study in findings.studies
        for series in study.series
        for level in series.levels
    )


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def accuracy(interval: Interval | None) -> str:
    """`97.77 (96.10 to 99.16)`, in %."""
    if interval is None:
        return ""
    estimate, low, high = (f"{100 * value:.2f}" for value in interval[:3])
    return f"{estimate} ({low} to {high})"
