"""The charts of the page, as plotly figures without colours of ground and text: the page has two grounds.

Accuracies are shown in %, differences in percentage points. The colours of traces are those of Okabe & Ito
2008, which people with colour blindness tell apart, and which can be read on white and on black.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from resgrid.evaluation import Predictions, Result
from resgrid.models import place_of
from resgrid.optimizers import OPTIMIZERS
from resgrid.report.findings import Comparison, Findings, Group, Published, Study, points
from resgrid.report.statistics import Interval, confusion, reliability

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
GREY = "#888888"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)  # again from the first where there is more to show
OF_OPTIMIZER = dict(zip(OPTIMIZERS, cycle(COLOURS), strict=False))
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "star", "x",
    "cross", "hexagram", "bowtie", "hourglass", "diamond-tall",
)  # fmt: skip
ROW = 26  # pixels of height for a row of a chart that has one a cell
MAX_CLASSES = 40  # that a confusion matrix can show and a person can read


class Chart(NamedTuple):
    id: str
    title: str
    figure: go.Figure


def _figure(height: int, *traces: Any, **layout: Any) -> go.Figure:
    margin = {"l": 8, "r": 12, "t": 8, "b": 8}
    common = {"template": "none", "height": height, "margin": margin, "hovermode": "closest"}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "title": {"text": ""}}
    figure = go.Figure(list(traces), common | {"legend": legend} | layout)
    axis = {"automargin": True, "title": {"standoff": 10, "font": {"size": 13}}}
    return figure.update_xaxes(axis).update_yaxes(axis)


def _error(intervals: list[Interval]) -> dict[str, Any]:
    """Bars of error from the estimates to the ends of their intervals, in %."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (i.high - i.estimate) for i in intervals],
        "arrayminus": [100 * (i.estimate - i.low) for i in intervals],
        "thickness": 1.5,
    }


# --- of the whole grid ------------------------------------------------------------------------------


def differences(comparisons: list[Comparison]) -> go.Figure:
    """A row a comparison: the difference and its interval; grey where no difference can be told."""
    rows = [(c, c.difference) for c in reversed(comparisons) if c.difference is not None]
    traces = []
    for told, name, colour in ((True, "a difference", BLUE), (False, "no difference can be told", GREY)):
        held = [(c, d) for c, d in rows if c.is_told == told]
        if held:
            traces.append(
                go.Scatter(
                    x=[100 * d.estimate for _, d in held],
                    y=[f"{c.first} − {c.second}" for c, _ in held],
                    error_x=_error([d for _, d in held]),
                    text=[
                        f"{points(d)}<br>{', '.join(c.over)}<br>{d.basis}, {c.epochs} epochs" for c, d in held
                    ],
                    hovertemplate="%{y}: %{text}<extra></extra>",
                    mode="markers",
                    marker={"size": 9, "color": colour},
                    name=name,
                )
            )
    order = [f"{c.first} − {c.second}" for c, _ in rows]
    return _figure(
        90 + ROW * len(rows),
        *traces,
        xaxis={"title": {"text": "difference in test accuracy, points"}, "zeroline": True},
        yaxis={"categoryorder": "array", "categoryarray": order},
    )


def trade_off(findings: Findings, cost: str, title: str) -> go.Figure:
    """Accuracy against a cost, a point an architecture with an optimizer, and the Pareto front as a line."""
    groups, front = findings.trained, findings.front(cost)
    traces: list[Any] = [
        go.Scatter(
            x=[g.mean(cost) for g in front],
            y=[_percent(g) for g in front],
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
                y=[_percent(g) for g in own],
                error_y=_error([g.accuracy for g in own if g.accuracy]) | {"thickness": 1, "width": 2},
                text=[g.name for g in own],
                hovertemplate="%{text}: %{y:.2f} % at %{x:,.4~s}<extra></extra>",
                mode="markers",
                marker={
                    "size": 10,
                    "color": OF_OPTIMIZER[optimizer],
                    "symbol": [SYMBOLS[place_of(g.architecture) % len(SYMBOLS)] for g in own],
                },
                name=optimizer,
            )
        )
    return _figure(
        420,
        *traces,
        xaxis={"title": {"text": title}, "type": "log"},
        yaxis={"title": {"text": "test accuracy, %"}},
    )


def gap(findings: Findings) -> go.Figure:
    """A row an architecture with an optimizer: training and test accuracy, and what lies between."""
    groups = sorted(findings.trained, key=lambda g: g.mean("train_accuracy") - g.mean("test_accuracy"))
    names = [group.name for group in groups]
    train = [100 * group.mean("train_accuracy") for group in groups]
    test = [_percent(group) for group in groups]
    between = [each for a, b in zip(train, test, strict=True) for each in (a, b, None)]
    return _figure(
        90 + ROW * len(groups),
        go.Scatter(
            x=between,
            y=[name for name in names for _ in range(3)],
            mode="lines",
            line={"color": GREY, "width": 2},
            hoverinfo="skip",
            showlegend=False,
        ),
        _dots("train", train, names, ORANGE),
        _dots("test", test, names, BLUE),
        xaxis={"title": {"text": "accuracy, %"}},
        yaxis={"categoryorder": "array", "categoryarray": names},
    )


def _dots(name: str, x: list[float], y: list[str], colour: str) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        marker={"size": 9, "color": colour},
        name=name,
        hovertemplate=f"%{{y}}: {name} %{{x:.2f}} %<extra></extra>",
    )


def calibration(findings: Findings) -> go.Figure:
    """A bar an architecture with an optimizer: the expected calibration error, the mean over seeds."""
    held = findings.frame[findings.frame["status"] == "completed"].set_index("cell")["calibration_error"]
    errors = {
        group.name: 100 * float(np.mean([held[result.cell.id] for result in group.completed]))
        for group in findings.trained
    }
    ordered = sorted(errors.items(), key=lambda pair: -pair[1])
    bar = go.Bar(
        x=[error for _, error in ordered],
        y=[name for name, _ in ordered],
        orientation="h",
        marker={"color": SKY},
        hovertemplate="%{y}: %{x:.2f} points<extra></extra>",
    )
    return _figure(
        70 + ROW * len(ordered), bar, xaxis={"title": {"text": "expected calibration error, points"}}
    )


def published(rows: list[Published]) -> go.Figure:
    """A row a published figure: measured with its interval, and what was published, where they agree."""
    rows = [row for row in reversed(rows) if not row.differences]
    names = [row.group.name for row in rows]
    measured = go.Scatter(
        x=[100 * row.measured.estimate for row in rows],
        y=names,
        error_x=_error([row.measured for row in rows]),
        mode="markers",
        marker={"size": 9, "color": BLUE},
        name="measured",
        hovertemplate="%{y}: measured %{x:.2f} %<extra></extra>",
    )
    others = go.Scatter(
        x=[100 * row.accuracy for row in rows],
        y=names,
        mode="markers",
        marker={"size": 11, "color": RED, "symbol": "diamond-open", "line": {"width": 2}},
        name="published",
        hovertemplate="%{y}: published %{x:.2f} %<extra></extra>",
    )
    return _figure(90 + ROW * len(rows), measured, others, xaxis={"title": {"text": "test accuracy, %"}})


def study(found: Study) -> go.Figure:
    """Accuracy by the level of what varies, a line each for otherwise equal cells."""
    levels = [level for series in found.series for level in series.levels]
    values = [level.value for level in levels if level.value is not None]
    is_number = len(values) == len(levels)
    is_log = is_number and min(values) > 0 and max(values) / min(values) >= 8
    traces = []
    for series, colour in zip(found.series, cycle(COLOURS), strict=False):
        held = [(level, level.accuracy) for level in series.levels if level.accuracy is not None]
        if not held:
            continue
        traces.append(
            go.Scatter(
                x=[level.value if is_number else level.text for level, _ in held],
                y=[100 * accuracy.estimate for _, accuracy in held],
                error_y=_error([accuracy for _, accuracy in held]),
                text=[level.result.cell.id for level, _ in held],
                hovertemplate="%{text}: %{y:.2f} %<extra></extra>",
                mode="lines+markers" if is_number else "markers",
                marker={"size": 10, "color": colour},
                name=series.name,
                showlegend=True,
            )
        )
    ticks: dict[str, Any] = {"type": "category"}
    if is_number:
        ticks = {
            "type": "log" if is_log else "linear",
            "tickvals": values,
            "ticktext": [v.text for v in levels],
        }
    return _figure(
        340,
        *traces,
        xaxis={"title": {"text": found.factor}} | ticks,
        yaxis={"title": {"text": "test accuracy, %"}},
    )


def _percent(group: Group) -> float:
    return 100 * group.mean("test_accuracy")


# --- of chosen cells --------------------------------------------------------------------------------


def curves(result: Result) -> go.Figure:
    """Test (solid) and training (dashed) accuracy by epoch; the page gives each chosen cell its colour."""
    assert result.history is not None
    few = len(result.history) <= 10
    ticks = {"dtick": 1} if few else {}
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
    return _figure(
        440, *traces, xaxis={"title": {"text": "epoch"}} | ticks, yaxis={"title": {"text": "accuracy, %"}}
    )


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
    held = go.Scatter(
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
    return _figure(
        380,
        diagonal,
        held,
        xaxis={"title": {"text": "confidence, %"}, "range": [0, 103]},
        yaxis={"title": {"text": "accuracy, %"}, "range": [0, 103]},
    )


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
    return _figure(
        max(380, 120 + 22 * len(names)),
        heat,
        xaxis={"title": {"text": "predicted"}, "type": "category", "showgrid": False},
        yaxis={"title": {"text": "true"}, "type": "category", "autorange": "reversed", "showgrid": False},
    )


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
    return _figure(
        max(380, 90 + 22 * len(shown)),
        bar,
        xaxis={"title": {"text": "accuracy, %"}, "range": [0, 101]},
        yaxis={"type": "category", "autorange": "reversed"},
    )


def worst_classes(counts: Any) -> list[int]:
    """The classes to show of a confusion matrix: all, or the `MAX_CLASSES` of lowest accuracy, in order."""
    if len(counts) <= MAX_CLASSES:
        return list(range(len(counts)))
    accuracy = np.diag(counts) / np.maximum(counts.sum(1), 1)
    return sorted(np.argsort(accuracy, kind="stable")[:MAX_CLASSES].tolist())
