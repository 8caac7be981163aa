"""The report's tables, as texts; columns in which nothing stands are left out where one is printed."""

from __future__ import annotations

import pandas as pd

from resgrid.report.findings import Findings
from resgrid.report.rates import RatePoint


def costs(findings: Findings) -> pd.DataFrame:
    """A row an architecture with an optimizer: what it reaches, at what cost, and if nothing beats it.

    Where a group has two seeds or more, also what the mean of their networks' probabilities reaches.
    """
    fronts = {
        "parameters": {group.name for group in findings.front("num_parameters")},
        "time": {group.name for group in findings.front("train_seconds")},
    }
    return pd.DataFrame(
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
        for k, interval in enumerate(each.expected_test_accuracy, start=1):
            has_ends = interval.low == interval.low
            row[f"k = {k}"] = interval.text() if has_ends else _percent(interval.estimate)
        cost = each.one_seed_cost
        rows.append(row | {"cost of one seed, points": "" if cost is None else f"{100 * cost:+.2f}"})
    return pd.DataFrame(rows).fillna("")


def studies(findings: Findings) -> pd.DataFrame:
    """A row a study, beside the grid's cell that it was made from."""
    return pd.DataFrame(
        {
            "study": study.cell,
            "differs in": study.differs,
            "test % (95 % interval)": study.accuracy.text() if study.accuracy else study.status,
            "the grid's cell": study.base or "",
            "test % of that": study.base_accuracy.text() if study.base_accuracy else "",
            "interval over": study.accuracy.basis if study.accuracy else "",
        }
        for study in findings.studies
    )
