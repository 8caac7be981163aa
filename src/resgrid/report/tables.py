"""The report's tables, as texts."""

from __future__ import annotations

import pandas as pd

from resgrid.report.comparisons import Comparison
from resgrid.report.findings import Findings
from resgrid.report.leaderboard import remarks
from resgrid.report.rates import RatePoint


def comparisons(rows: list[Comparison]) -> pd.DataFrame:
    """A row a comparison, in percentage points; empty where none is significant, which a sentence says."""
    if not any(row.is_significant for row in rows):
        return pd.DataFrame()
    return pd.DataFrame(
        {
            "compared": f"{row.first} − {row.second}",
            "difference (95 % interval), points": row.difference.text("+"),
            "verdict": row.verdict,
            "p (Holm)": f"{row.p:.3f}" if row.p >= 0.001 else "< 0.001",
            "epochs": row.epochs,
            "interval over": row.difference.basis,
            "mean of": ", ".join(row.over),
        }
        for row in rows
    )


def costs(findings: Findings) -> pd.DataFrame:
    """A row an architecture with an optimizer: what it reaches, at what cost, and if nothing beats it.

    Where a group has two seeds or more, also what the mean of their networks' probabilities reaches.
    """
    fronts = {
        "parameters": {group.name for group in findings.front("num_parameters")},
        "time": {group.name for group in findings.front("train_seconds")},
    }
    table = pd.DataFrame(
        {
            "architecture, optimizer": group.name,
            "test % (95 % interval)": group.accuracy.text(),
            "interval over": group.accuracy.basis,
            "mean of its seeds, %": _percent(findings.ensembles.get(group.name)),
            "parameters": f"{group.mean('num_parameters'):,.0f}",
            "training, s": f"{group.mean('train_seconds'):,.1f}",
            "on the front by": ", ".join(cost for cost, names in fronts.items() if group.name in names),
        }
        for group in sorted(findings.trained, key=lambda group: -group.mean("test_accuracy"))
    )
    return table if findings.ensembles else table.drop(columns="mean of its seeds, %", errors="ignore")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def rates(findings: Findings) -> pd.DataFrame:
    """A row an optimizer of an architecture: the rate that it is compared at, beside its base rate."""

    def accuracy(point: RatePoint) -> str:
        diverged = f" ({point.num_diverged} diverged)" if point.num_diverged else ""
        return _percent(point.test_accuracy) + diverged

    return pd.DataFrame(
        {
            "architecture, optimizer": f"{each.architecture}-{each.optimizer}",
            "rate": f"{each.chosen.learning_rate:g}",
            "factor": f"{each.factor:g}",
            "validation %": _percent(each.chosen.validation_accuracy),
            "test %": accuracy(each.chosen),
            "within 1 point": ", ".join(f"{factor:g}" for factor in each.plateau),
            "factors tried": ", ".join(f"{point.factor:g}" for point in each.curve),
            "base rate": f"{each.base.learning_rate:g}",
            "test % there": accuracy(each.base),
        }
        for each in findings.rates
    )


def tries(findings: Findings) -> pd.DataFrame:
    """A row an optimizer of an architecture: the test accuracy that k of its rates, tried once, lead to."""
    rows = []
    for each in (choice for choice in findings.rates if choice.not_chosen is None):
        row = {"architecture, optimizer": f"{each.architecture}-{each.optimizer}"}
        for k, interval in enumerate(each.expected, start=1):
            has_ends = interval.low == interval.low
            row[f"k = {k}"] = interval.text() if has_ends else _percent(interval.estimate)
        cost = each.one_seed_cost
        row["cost of one seed, points"] = "" if cost is None else f"{100 * cost:+.2f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def trust(findings: Findings) -> pd.DataFrame:
    """A row a completed cell: how much better it is on its training images, and how far to believe it."""
    frame = findings.frame[findings.frame["status"] == "completed"]
    return pd.DataFrame(
        {
            "cell": frame["cell"],
            "train %": (100 * frame["train_accuracy"]).map("{:.2f}".format),
            "test %": (100 * frame["test_accuracy"]).map("{:.2f}".format),
            "gap, points": (100 * (frame["train_accuracy"] - frame["test_accuracy"])).map("{:+.2f}".format),
            "calibration error, points": (100 * frame["calibration_error"]).map("{:.2f}".format),
        }
    )


def published(findings: Findings) -> pd.DataFrame:
    """A row a published figure: beside the measured one where data and recipe agree, else what differs."""
    rows = []
    for row in findings.published:
        text = {
            "architecture, optimizer": row.name,
            "published %": f"{100 * row.accuracy:.2f}",
            "not comparable, for": ", ".join(row.differences),
        }
        if not row.differences:
            text |= {
                "measured % (95 % interval)": row.measured.text(),
                "interval over": row.measured.basis,
                "difference, points": f"{100 * (row.measured.estimate - row.accuracy):+.2f}",
                "within the interval": "yes" if row.measured.contains(row.accuracy) else "no",
            }
        rows.append(text)
    return pd.DataFrame(rows).fillna("")


def studies(findings: Findings) -> pd.DataFrame:
    """A row a value of a study, the grid's own among them."""
    return pd.DataFrame(
        {
            "varies": point.factor,
            "in": point.series,
            "value": point.text,
            "cell": point.result.cell.id,
            "test % (95 % interval)": point.accuracy.text() if point.accuracy else point.result.status,
            "interval over": point.accuracy.basis if point.accuracy else "",
            "differs also in": point.also,
            "remark": "; ".join(remarks(point.result.cell)),
        }
        for point in findings.studies
    )
