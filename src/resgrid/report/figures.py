"""The charts of the page, as plotly figures without colours of ground and text: the page has two grounds.

Accuracies are shown in %, differences in percentage points. The colours of traces are those of Okabe & Ito
2008, which people with colour blindness tell apart, and which can be read on white and on black.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from resgrid.evaluation import Predictions, Result
from resgrid.models import place_of
from resgrid.optimizers import OPTIMIZERS
from resgrid.report.comparisons import Comparison
from resgrid.report.findings import Findings, Level
from resgrid.report.statistics import Interval, confusion, reliability

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
GREY = "#888888"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)  # again from the first where there is more to show
OF_OPTIMIZER = dict(zip(OPTIMIZERS, cycle(COLOURS), strict=False))
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "star", "x",
    "cross", "hexagram", "bowtie", "hourglass", "diamond-tall",
)  # fmt: skip
MAX_CLASSES = 40  # that a confusion matrix can show and a person can read


class Chart(NamedTuple):
    title: str
    figure: go.Figure

    @property
    def id(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


class Dots(NamedTuple):
    """One dot a row of `by_row`, of one colour."""

    name: str
    colour: str
    values: Mapping[str, Interval | float]  # by row; in 0-1


def _figure(height: int, *traces: Any, x: str, y: str = "", **layout: Any) -> go.Figure:
    """`traces` under axes with the titles `x` and `y`; other settings are those of plotly's layout."""
    margin = {"l": 8, "r": 12, "t": 8, "b": 8}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "title": {"text": ""}}
    common = {"template": "none", "height": height, "margin": margin, "hovermode": "closest"}
    figure = go.Figure(list(traces), common | {"legend": legend} | layout)
    axis = {"automargin": True, "title": {"standoff": 10, "font": {"size": 13}}}
    figure.update_xaxes(axis, title_text=x).update_yaxes(axis, title_text=y)
    return figure


def _error(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Bars of error from the estimates to the ends of their intervals, in %."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (i.high - i.estimate) for i in intervals],
        "arrayminus": [100 * (i.estimate - i.low) for i in intervals],
        "thickness": 1.5,
    }


# --- of the whole grid ------------------------------------------------------------------------------


def by_row(axis: str, rows: Sequence[str], *dots: Dots) -> go.Figure:
    """A row each of `rows`, the first on top, with the dots that have a value there and its interval."""
    traces = []
    for name, colour, values in dots:
        intervals = [each for each in values.values() if isinstance(each, Interval)]
        traces.append(
            go.Scatter(
                x=[100 * (each.estimate if isinstance(each, Interval) else each) for each in values.values()],
                y=list(values),
                error_x=_error(intervals) if intervals else None,
                mode="markers",
                marker={"size": 9, "color": colour},
                name=name,
                showlegend=True,
                hovertemplate=f"%{{y}}: %{{x:.2f}}, {name}<extra></extra>",
            )
        )
    order = {"type": "category", "categoryorder": "array", "categoryarray": list(reversed(rows))}
    return _figure(max(150, 90 + 26 * len(rows)), *traces, x=axis, yaxis=order)


def differences(comparisons: list[Comparison]) -> go.Figure:
    """A row a comparison: the difference and its interval; grey where no difference can be told."""
    rows = {f"{c.first} − {c.second}": c for c in comparisons}
    told = {row: c.difference for row, c in rows.items() if c.is_told}
    others = {row: c.difference for row, c in rows.items() if not c.is_told}
    dots = Dots("a difference", BLUE, told), Dots("no difference can be told", GREY, others)
    return by_row("difference in test accuracy, points", list(rows), *dots)


def trade_off(findings: Findings, cost: str, title: str) -> go.Figure:
    """Accuracy against a cost, a point an architecture with an optimizer, and the Pareto front as a line."""
    groups, front = findings.trained, findings.front(cost)
    traces: list[Any] = [
        go.Scatter(
            x=[g.mean(cost) for g in front],
            y=[100 * g.mean("test_accuracy") for g in front],
            mode="lines+markers",
            line={"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
            marker={"size": 20, "symbol": "circle-open", "color": GREY, "line": {"width": 1.5}},
            name="Pareto front",
            hoverinfo="skip",
        )
    ]
    for optimizer in dict.fromkeys(group.optimizer for group in groups):
        own = [group for group in groups if group.optimizer == optimizer]
        traces.append(
            go.Scatter(
                x=[g.mean(cost) for g in own],
                y=[100 * g.mean("test_accuracy") for g in own],
                error_y=_error([g.accuracy for g in own]) | {"thickness": 1, "width": 2},
                text=[g.name for g in own],
                hovertemplate="%{text}: %{y:.2f} % at %{x:,.4~s}<extra></extra>",
                mode="markers",
                marker={
                    "size": 10,
                    "color": OF_OPTIMIZER[optimizer],
                    "symbol": [_symbol(g.architecture) for g in own],
                },
                name=optimizer,
            )
        )
    for architecture in dict.fromkeys(group.architecture for group in groups):  # the legend's shapes
        marker = {"size": 10, "color": GREY, "symbol": _symbol(architecture)}
        traces.append(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=architecture))
    return _figure(420, *traces, x=title, y="test accuracy, %", xaxis={"type": "log"})


def _symbol(architecture: str) -> str:
    return SYMBOLS[place_of(architecture) % len(SYMBOLS)]


def study(levels: list[Level]) -> go.Figure:
    """Accuracy by the levels of one factor, a line each for otherwise equal cells."""
    values = [level.value for level in levels if level.value is not None]
    is_number = len(values) == len(levels)
    traces = []
    for (name, series), colour in zip(
        groupby(levels, key=lambda level: level.series), cycle(COLOURS), strict=False
    ):
        completed = [(level, level.accuracy) for level in series if level.accuracy is not None]
        traces.append(
            go.Scatter(
                x=[level.value if is_number else level.text for level, _ in completed],
                y=[100 * accuracy.estimate for _, accuracy in completed],
                error_y=_error([accuracy for _, accuracy in completed]),
                text=[level.result.cell.id for level, _ in completed],
                hovertemplate="%{text}: %{y:.2f} %<extra></extra>",
                mode="lines+markers" if is_number else "markers",
                marker={"size": 10, "color": colour},
                name=name,
                showlegend=True,
            )
        )
    ticks: dict[str, Any] = {"type": "category"}
    if is_number:
        is_log = min(values) > 0 and max(values) / min(values) >= 8
        texts = [level.text for level in levels]
        ticks = {"type": "log" if is_log else "linear", "tickvals": values, "ticktext": texts}
    return _figure(340, *traces, x=levels[0].factor, y="test accuracy, %", xaxis=ticks)


def charts(findings: Findings) -> dict[str, list[Chart]]:
    """Those of the whole grid, by the slot of the report; none of what there is nothing of."""
    by_slot = {
        "conclusions": [
            Chart(title, differences(rows))
            for title, rows in (
                ("Optimizers, over architectures", findings.optimizers),
                ("Depths, over optimizers", findings.depths),
            )
            if rows
        ],
        "studies": [
            Chart(factor.capitalize(), study(list(levels)))
            for factor, levels in groupby(findings.studies, key=lambda level: level.factor)
        ],
    }
    if findings.trained:
        by_slot["cost"] = [
            Chart("Parameters", trade_off(findings, "num_parameters", "parameters")),
            Chart("Training time", trade_off(findings, "train_seconds", "training time, s")),
        ]
        by_slot["trust"] = _trust(findings)
    if rows := [row for row in findings.published if not row.differences]:
        measured = Dots("measured", BLUE, {row.name: row.measured for row in rows})
        others = Dots("published", RED, {row.name: row.accuracy for row in rows})
        figure = by_row("test accuracy, %", [row.name for row in rows], measured, others)
        by_slot["published"] = [Chart("Published and measured", figure)]
    return by_slot


def _trust(findings: Findings) -> list[Chart]:
    groups = findings.trained
    errors = findings.frame.set_index("cell")["calibration_error"]
    train = {group.name: group.mean("train_accuracy") for group in groups}
    test = {group.name: group.accuracy for group in groups}
    error = {group.name: float(errors[[r.cell.id for r in group.completed]].mean()) for group in groups}
    gap = sorted(train, key=lambda name: test[name].estimate - train[name])
    dots = Dots("train", ORANGE, train), Dots("test", BLUE, test)
    expected = Dots("expected calibration error", SKY, error)
    return [
        Chart("Generalisation gap", by_row("accuracy, %", gap, *dots)),
        Chart("Calibration", by_row("points", sorted(error, key=lambda name: error[name]), expected)),
    ]


# --- of chosen cells --------------------------------------------------------------------------------


def curves(result: Result) -> go.Figure:
    """Test (solid) and training (dashed) accuracy by epoch; the page gives each chosen cell its colour."""
    assert result.history is not None
    few = len(result.history) <= 10
    traces = [
        go.Scatter(
            x=result.history["epoch"].tolist(),
            y=(100 * result.history[f"{split}_accuracy"]).round(3).tolist(),
            mode="lines+markers" if few else "lines",  # only the last epoch may have been scored
            line={"dash": dash, "width": 2},
            name=result.cell.id,
            legendgroup=result.cell.id,
            showlegend=split == "test",
            hovertemplate=f"{result.cell.id}, {split}: %{{y:.2f}} % after epoch %{{x}}<extra></extra>",
        )
        for split, dash in (("test", "solid"), ("train", "dash"))
    ]
    return _figure(440, *traces, x="epoch", y="accuracy, %", xaxis={"dtick": 1} if few else {})


def reliability_diagram(said: Predictions) -> go.Figure:
    """Accuracy by confidence in bins, beside the diagonal of a model that is as right as it says."""
    bins = reliability(said.confidence, said.correct)
    diagonal = go.Scatter(
        x=[0, 100],
        y=[0, 100],
        mode="lines",
        line={"color": GREY, "dash": "dot", "width": 1.5},
        name="as right as confident",
        hoverinfo="skip",
    )
    measured = go.Scatter(
        x=(100 * bins.confidence).round(3).tolist(),
        y=(100 * bins.accuracy).round(3).tolist(),
        customdata=bins.num_images.tolist(),
        mode="lines+markers",
        cliponaxis=False,
        # The area stands for the number of images, of which almost all are in the last bin.
        marker={
            "size": (5 + 20 * np.sqrt(bins.num_images / bins.num_images.sum())).round(1).tolist(),
            "color": BLUE,
        },
        line={"color": BLUE, "width": 1.5},
        name="measured",
        hovertemplate="%{customdata:,} images: %{x:.1f} % confident, %{y:.1f} % right<extra></extra>",
    )
    span = {"range": [0, 103]}
    return _figure(380, diagonal, measured, x="confidence, %", y="accuracy, %", xaxis=span, yaxis=span)


def confusion_matrix(said: Predictions, labels: Any, class_names: tuple[str, ...]) -> go.Figure:
    """A row a true class, a column a predicted one, in % of the row; of many classes the worst alone."""
    counts = confusion(labels, said.classes, len(class_names))
    shown = worst_classes(counts)
    part = counts[np.ix_(shown, shown)]
    share = 100 * part / np.maximum(counts.sum(1), 1)[shown, None]
    names = [class_names[place] for place in shown]
    heat = go.Heatmap(
        z=share.round(2).tolist(),
        x=names,
        y=names,
        text=np.where(part > 0, part, "").tolist(),
        texttemplate="%{text}" if len(names) <= 15 else "",
        colorscale=[[0, "rgba(0,114,178,0)"], [0.02, "rgba(0,114,178,0.18)"], [1, "rgba(0,114,178,0.75)"]],
        zmin=0,
        zmax=100,
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="%{y} taken for %{x}: %{z:.1f} % of its images<extra></extra>",
    )
    axis = {"type": "category", "showgrid": False}
    down = axis | {"autorange": "reversed"}
    return _figure(max(380, 120 + 22 * len(names)), heat, x="predicted", y="true", xaxis=axis, yaxis=down)


def class_accuracy(said: Predictions, labels: Any, class_names: tuple[str, ...]) -> go.Figure:
    """A bar a class: how many of its images were classified rightly; of many classes the worst alone."""
    counts = confusion(labels, said.classes, len(class_names))
    shown = worst_classes(counts)
    num_images, right = counts.sum(1)[shown], np.diag(counts)[shown]
    bar = go.Bar(
        x=(100 * right / np.maximum(num_images, 1)).round(3).tolist(),
        y=[class_names[place] for place in shown],
        customdata=np.stack([right, num_images], 1).tolist(),
        orientation="h",
        marker={"color": SKY},
        hovertemplate="%{y}: %{x:.2f} %, %{customdata[0]} of %{customdata[1]}<extra></extra>",
    )
    down = {"type": "category", "autorange": "reversed"}
    height = max(380, 90 + 22 * len(shown))
    return _figure(height, bar, x="accuracy, %", xaxis={"range": [0, 101]}, yaxis=down)


def worst_classes(counts: Any) -> list[int]:
    """The classes to show of a confusion matrix: all, or the `MAX_CLASSES` of lowest accuracy, in order."""
    accuracy = np.diag(counts) / np.maximum(counts.sum(1), 1)
    return sorted(np.argsort(accuracy, kind="stable")[:MAX_CLASSES].tolist())
