"""The content of the report, which `index.html` and `report.md` both show: sections of sentences and tables.

Charts are the page's alone, as are the sections that have nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import pandas as pd

from resgrid.report import figures
from resgrid.report.comparisons import Comparison, of_one_model
from resgrid.report.figures import BLUE, ORANGE, RED, SKY, Chart, Dots, by_row
from resgrid.report.findings import Findings
from resgrid.report.leaderboard import by_optimizer, missing, readable, remarks

NOTHING = ["No cell of the grid has completed."]


@dataclass(frozen=True, kw_only=True)
class Section:
    id: str
    title: str
    sentences: Iterable[str] = ()
    charts: Sequence[Chart] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # of texts, by their titles
    note: str = ""  # with `code` in backticks


def summary(findings: Findings) -> str:
    """What was compared, in two sentences."""
    meta, frame = findings.meta, findings.frame
    counts = ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())
    return (
        f"{len(frame)} cells: {counts}. {meta.num_images['train']:,} training and "
        f"{meta.num_images['test']:,} test images of {len(meta.class_names)} classes from {meta.source}."
    )


def sections(findings: Findings) -> list[Section]:
    """All of the report, in order."""
    frame, nothing = findings.frame, [] if findings.trained else NOTHING
    return [
        Section(
            id="accuracy",
            title="Test accuracy, %",
            sentences=missing(frame),
            tables={"": by_optimizer(frame).reset_index()},
            note="Weights of the last epoch, scored in fp32; the mean ± the standard deviation where there "
            "are several seeds.",
        ),
        Section(
            id="conclusions",
            title="What can be concluded",
            sentences=findings.conclusions,
            charts=[
                Chart(title, figures.differences(rows))
                for title, rows in (
                    ("Optimizers, over architectures", findings.optimizers),
                    ("Depths, over optimizers", findings.depths),
                )
                if rows
            ],
            tables={
                "Optimizers compared": comparisons(findings.optimizers),
                "Depths compared": comparisons(findings.depths),
            },
            note="Intervals of 95 %, each over what its table names: over seeds by Student's t, for one "
            "trained model over test images by Wilson's score, for two on the same images with McNemar's "
            "exact test.",
        ),
        Section(
            id="cost",
            title="Accuracy and its cost",
            sentences=nothing,
            charts=[
                Chart(title, figures.trade_off(findings, cost, axis))
                for title, cost, axis in (
                    ("Parameters", "num_parameters", "parameters"),
                    ("Training time", "train_seconds", "training time, s"),
                )
                if findings.trained
            ],
            tables={"": costs(findings)},
            note="A colour an optimizer, a shape an architecture. What lies on the Pareto front is beaten by "
            "nothing that costs as little. Times compare what was trained on one machine alone, with as many "
            "cells at once.",
        ),
        Section(
            id="curves",
            title="Learning curves",
            note="Solid: test. Dashed: training, the running mean of each epoch with augmentation and "
            "dropout on.",
        ),
        Section(
            id="trust",
            title="Generalisation gap and calibration",
            sentences=nothing,
            charts=_trust_charts(findings) if findings.trained else [],
            tables={"": trust(findings)},
            note="Training accuracy is the running mean of the last epoch, with augmentation and dropout on, "
            "so it is lower than that of the finished weights: the true gap is larger. The calibration "
            "error says by how much confidence and accuracy differ, over 15 bins of confidence.",
        ),
        Section(
            id="ensembles",
            title="Ensembles",
            sentences=findings.no_ensembles,
            tables={"": ensembles(findings)},
            note="The mean of the members' probabilities. No test image decides who is a member. "
            "Disagreement: the share of test images of which two members name different classes, the mean "
            "over pairs. `resgrid predict --model NAME` and `resgrid export NAME` take an ensemble.",
        ),
        Section(id="cell", title="One cell, closely"),
        Section(
            id="studies",
            title="Studies",
            sentences=[] if findings.studies else ["This grid has no studies."],
            charts=[
                Chart(factor.capitalize(), figures.study(list(levels)))
                for factor, levels in groupby(findings.studies, key=lambda level: level.factor)
            ],
            tables={"": studies(findings)},
            note="Each beside the grid's cell of the same architecture, optimizer and seed. What is not "
            "completed has no point.",
        ),
        Section(
            id="published",
            title="Published and measured",
            sentences=[]
            if findings.published
            else ["No completed cell has a published figure: there are some for CIFAR-10 alone."],
            charts=_published_charts(findings),
            tables={"": published(findings)},
            note="A figure stands beside the measured one where the data and every setting that its authors "
            "state agree. Published figures are of single runs, without an uncertainty of their own.",
        ),
        Section(
            id="cells",
            title="Every cell",
            tables={"": readable(frame)},
            note="Best is the highest test accuracy of any epoch: it was chosen by looking at test images, "
            "so it flatters, and nothing is ranked by it. `leaderboard.csv` has all digits and more columns.",
        ),
        Section(
            id="made",
            title="How it was made",
            sentences=[f"{heading}: {text}" for heading, text in findings.made.items()],
        ),
    ]


# --- charts of the tables below ---------------------------------------------------------------------


def _trust_charts(findings: Findings) -> list[Chart]:
    groups = findings.trained
    errors = findings.frame.set_index("cell")["calibration_error"]
    train = {group.name: group.mean("train_accuracy") for group in groups}
    test = {group.name: group.accuracy for group in groups}
    error = {group.name: float(errors[[r.cell.id for r in group.completed]].mean()) for group in groups}
    gap = sorted(train, key=lambda name: test[name].estimate - train[name])
    return [
        Chart(
            "Generalisation gap",
            by_row("accuracy, %", gap, Dots("train", ORANGE, train), Dots("test", BLUE, test)),
        ),
        Chart(
            "Calibration",
            by_row("points", sorted(error, key=lambda name: error[name]), Dots("expected error", SKY, error)),
        ),
    ]


def _published_charts(findings: Findings) -> list[Chart]:
    rows = [row for row in findings.published if not row.differences]
    if not rows:
        return []
    measured = Dots("measured", BLUE, {row.name: row.measured for row in rows})
    figures_of_others = Dots("published", RED, {row.name: row.accuracy for row in rows})
    names = [row.name for row in rows]
    return [Chart("Published and measured", by_row("test accuracy, %", names, measured, figures_of_others))]


# --- tables -----------------------------------------------------------------------------------------


def comparisons(rows: list[Comparison]) -> pd.DataFrame:
    """A row a comparison, in percentage points."""
    return pd.DataFrame(
        {
            "compared": f"{row.first} − {row.second}",
            "difference (95 % interval), points": row.difference.text("+"),
            "interval over": row.difference.basis,
            "mean of": ", ".join(row.over),
            "epochs": row.epochs,
            "p (Holm)": f"{row.p:.3f}" if row.p >= 0.001 else "< 0.001",
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
    return pd.DataFrame(
        {
            "architecture, optimizer": group.name,
            "test % (95 % interval)": group.accuracy.text(),
            "interval over": group.accuracy.basis,
            "parameters": f"{group.mean('num_parameters'):,.0f}",
            "training, s": f"{group.mean('train_seconds'):,.1f}",
            "on the front by": ", ".join(cost for cost, names in fronts.items() if group.name in names),
        }
        for group in sorted(findings.trained, key=lambda group: -group.mean("test_accuracy"))
    )


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


def ensembles(findings: Findings) -> pd.DataFrame:
    """A row an ensemble: what it reaches, beside its members' mean, and how often two of them disagree."""
    return pd.DataFrame(
        {
            "ensemble": each.name,
            "mean of": each.over,
            "members": ", ".join(f"{cell} × {n}" if n > 1 else cell for cell, n in each.members.items()),
            "test % (95 % interval)": of_one_model(each.num_correct, len(findings.test.labels)).text(),
            "members, test %": f"{100 * each.member_accuracy:.2f}",
            "calibration error, points": f"{100 * each.calibration_error:.2f}",
            "disagreement, %": f"{100 * each.disagreement:.2f}",
        }
        for each in findings.ensembles
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
    """A row a level of a study, the grid's own among them."""
    return pd.DataFrame(
        {
            "varies": level.factor,
            "in": level.series,
            "level": level.text,
            "cell": level.result.cell.id,
            "test % (95 % interval)": level.accuracy.text() if level.accuracy else level.result.status,
            "interval over": level.accuracy.basis if level.accuracy else "",
            "differs also in": level.also,
            "remark": "; ".join(remarks(level.result.cell)),
        }
        for level in findings.studies
    )
