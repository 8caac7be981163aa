"""The charts of the page and of its PNGs, as Vega-Lite made by altair.

A chart is a specification without data and its data as columns, which become rows where it is drawn: a point
in long form costs 90 bytes, and altair refuses more than 5,000 of them. Ground and text take their colours
from a theme, for the page has a light and a dark one. Accuracies are shown in %, differences in percentage
points. Marks have the colours of Okabe & Ito 2008, which people with colour blindness tell apart, and which
can be read on white and on black.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, groupby
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from resgrid.evaluation import Predictions, Result
from resgrid.models import place_of
from resgrid.optimizers import OPTIMIZERS
from resgrid.report.comparisons import Comparison
from resgrid.report.findings import Findings, StudyPoint
from resgrid.report.rates import RateChoice
from resgrid.report.statistics import Interval, confusion, reliability

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
GREY = "#888888"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)  # again from the first where there is more to show
OF_OPTIMIZER = dict(zip(OPTIMIZERS, cycle(COLOURS), strict=False))
SHAPES = (
    "circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left",
    "M-1,-1L1,1M1,-1L-1,1", "M0,-1L0.6,0.8L-0.95,-0.3L0.95,-0.3L-0.6,0.8Z",
)  # fmt: skip
MAX_CLASSES = 40  # that a confusion matrix can show and a person can read
ROWS = "rows"  # the name under which a chart's data are put into its specification
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _theme(ink: str, soft: str, line: str) -> dict[str, Any]:
    return {
        "background": "transparent",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "font": "system-ui, Liberation Sans, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": ink, "titleColor": soft, "gridColor": line, "domainColor": line, "tickColor": line,
            "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 240,
        },
        "legend": {
            "labelColor": ink, "orient": "bottom", "columns": 4, "title": None, "labelFontSize": 12,
            "labelLimit": 170, "symbolStrokeWidth": 2,
        },
        "point": {"filled": True, "size": 90, "opacity": 1},
        "rule": {"color": GREY},
        "text": {"color": ink},
        "range": {"category": list(COLOURS)},
    }  # fmt: skip


THEMES = {
    "light": _theme("#1b1f24", "#59636e", "#d9dee3"),
    "dark": _theme("#e6eaee", "#9aa5b1", "#333b44"),
}


Dots = Mapping[str, tuple[str, Mapping[str, Any]]]  # of a series: its colour, and its values in 0–1 by row


class Chart(NamedTuple):
    """A Vega-Lite specification as wide as its place, and its data: a list a column."""

    title: str
    spec: dict[str, Any]
    columns: dict[str, list[Any]]

    @property
    def id(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def png(chart: Chart, width: int = 720) -> bytes:
    """A chart on white, the same bytes each time.

    vl-convert is 84 MB, with a JavaScript engine, so nothing but `evaluate` may import it.
    """
    import vl_convert

    rows = [dict(zip(chart.columns, row, strict=True)) for row in zip(*chart.columns.values(), strict=True)]
    spec = chart.spec | {"width": width, "datasets": {ROWS: rows}, "padding": 12}
    config = THEMES["light"] | {"background": "white", "font": "Liberation Sans, sans-serif"}
    image: bytes = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, config=config, scale=1.5)
    return image


def _spec(*layers: alt.Chart, height: int) -> dict[str, Any]:
    chart = alt.layer(*layers, data=alt.NamedData(name=ROWS)).properties(width="container", height=height)
    spec: dict[str, Any] = chart.to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


def _columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    rows = list(rows)
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _percent(value: Interval | float) -> dict[str, float]:
    ends = value[:3] if isinstance(value, Interval) else (value, value, value)
    return {key: round(100 * each, 3) for key, each in zip(("value", "low", "high"), ends, strict=True)}


def _tip(*fields: str) -> list[alt.Tooltip]:
    formats = {
        "value": ".2f",
        "low": ".2f",
        "high": ".2f",
        "share": ".1f",
        "accuracy": ".2f",
        "cost": ",.4~s",
    }
    return [
        alt.Tooltip(f"{name}:{'Q' if name in formats else 'N'}", format=formats.get(name, ""))
        for name in fields
    ]


# --- of the whole grid ------------------------------------------------------------------------------


def by_row(title: str, axis: str, rows: Sequence[str], dots: Dots) -> Chart:
    """A row each of `rows`, the first on top; `dots` are colours and values in 0–1 by row, of each series.

    Values are intervals, or floats.
    """
    data: list[dict[str, Any]] = [
        {"row": row, "series": name} | _percent(value)
        for name, (_, values) in dots.items()
        for row, value in values.items()
    ]
    y = alt.Y("row:N", sort=list(rows), title=None)
    x = alt.X("value:Q", title=axis, scale=alt.Scale(zero=False))
    colours = alt.Scale(domain=list(dots), range=[colour for colour, _ in dots.values()])
    colour = alt.Color("series:N", scale=colours)
    layers = [
        alt.Chart().mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q", y=y, color=colour),
        alt.Chart().mark_point().encode(
            x=x, y=y, color=colour, tooltip=_tip("row", "series", "value", "low", "high")
        ),
    ]  # fmt: skip
    if any(each["low"] < 0 < each["high"] for each in data):
        layers.insert(0, alt.Chart().mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0)))
    return Chart(title, _spec(*layers, height=24 * max(2, len(rows))), _columns(data))


def accuracies(findings: Findings) -> Chart:
    """The mean accuracy of each architecture with an optimizer, with its interval, the highest on top."""
    groups = sorted(findings.trained, key=lambda group: -group.accuracy.estimate)
    dots = {
        optimizer: (OF_OPTIMIZER[optimizer], {g.name: g.accuracy for g in groups if g.optimizer == optimizer})
        for optimizer in dict.fromkeys(group.optimizer for group in findings.trained)
    }
    return by_row("Test accuracy", "test accuracy, %", [group.name for group in groups], dots)


def differences(title: str, comparisons: Sequence[Comparison]) -> Chart:
    """A row a comparison: the difference and its interval; grey where it is not significant."""
    rows = {f"{c.first} − {c.second}": c for c in comparisons}
    dots = {
        "significant": (BLUE, {row: c.difference for row, c in rows.items() if c.is_significant}),
        "not significant": (GREY, {row: c.difference for row, c in rows.items() if not c.is_significant}),
    }
    return by_row(title, "difference in test accuracy, points", list(rows), dots)


def trade_off(title: str, findings: Findings, cost: str, axis: str) -> Chart:
    """Accuracy against a cost, a point an architecture with an optimizer, and the Pareto front as a line."""
    groups, front = findings.trained, {group.name for group in findings.front(cost)}
    data: list[dict[str, Any]] = [
        {"name": g.name, "architecture": g.architecture, "optimizer": g.optimizer, "front": g.name in front}
        | {"cost": g.mean(cost)}
        | _percent(g.accuracy)
        for g in groups
    ]
    optimizers, architectures = ({row[key]: None for row in data} for key in ("optimizer", "architecture"))
    shapes = [SHAPES[place_of(name) % len(SHAPES)] for name in architectures]
    colours = alt.Scale(domain=list(optimizers), range=[OF_OPTIMIZER[name] for name in optimizers])
    x = alt.X("cost:Q", title=axis, scale=alt.Scale(type="log"), axis=alt.Axis(format="~s"))
    y = alt.Y("value:Q", title="test accuracy, %", scale=alt.Scale(zero=False))
    line = alt.Chart().mark_line(color=GREY, strokeDash=[3, 3], strokeWidth=1.5, interpolate="step-after")
    layers = [
        line.transform_filter("datum.front").encode(x=x, y=y),
        alt.Chart().mark_rule(strokeWidth=1).encode(x=x, y="low:Q", y2="high:Q"),
        alt.Chart()
        .mark_point()
        .encode(
            x=x,
            y=y,
            color=alt.Color("optimizer:N", scale=colours),
            shape=alt.Shape("architecture:N", scale=alt.Scale(domain=list(architectures), range=shapes)),
            tooltip=_tip("name", "value", "cost"),
        ),
    ]
    return Chart(title, _spec(*layers, height=320), _columns(data))


def study(points: Sequence[StudyPoint]) -> Chart:
    """Accuracy by the values of one factor, a line each for otherwise equal cells."""
    numbers = [point.value for point in points if point.value is not None]
    is_number = len(numbers) == len(points)
    data: list[dict[str, Any]] = [
        {"series": p.series, "cell": p.result.cell.id, "level": p.value if is_number else p.text}
        | _percent(p.accuracy)
        for p in points
        if p.accuracy is not None
    ]
    x = alt.X("level:N", title=points[0].factor, axis=alt.Axis(labelAngle=0))
    if is_number:
        is_log = min(numbers) > 0 and max(numbers) / min(numbers) >= 8
        scale = alt.Scale(type="log", padding=12) if is_log else alt.Scale(zero=False, padding=12)
        axis = alt.Axis(values=sorted(set(numbers)), format="~g")
        x = alt.X("level:Q", title=points[0].factor, scale=scale, axis=axis)
    y = alt.Y("value:Q", title="test accuracy, %", scale=alt.Scale(zero=False))
    colour, tip = alt.Color("series:N"), _tip("cell", "value", "low", "high")
    layers = [
        alt.Chart().mark_rule().encode(x=x, y="low:Q", y2="high:Q", color=colour),
        alt.Chart().mark_point().encode(x=x, y=y, color=colour, tooltip=tip),
    ]
    if is_number:
        layers.append(alt.Chart().mark_line().encode(x=x, y=y, color=colour))
    return Chart(points[0].factor.capitalize(), _spec(*layers, height=280), _columns(data))


def rates(choices: Sequence[RateChoice]) -> Chart:
    """An architecture's accuracy by rate: a line an optimizer, a dot a seed, a ring at the chosen rate.

    It is of validation images, as the choice is, and of test images where there are none.
    """
    split = "validation" if any(v is not None for v in choices[0].base.validation) else "test"
    data: list[dict[str, Any]] = [
        {"optimizer": choice.optimizer, "rate": point.learning_rate, "seed": seed}
        | {"accuracy": None if value is None else round(100 * value, 3)}
        | {"chosen": choice.not_chosen is None and point.factor == choice.factor}
        for choice in choices
        for point in choice.curve
        for seed, value in zip(choice.seeds, getattr(point, split), strict=True)
    ]
    names = [choice.optimizer for choice in choices]
    colours = alt.Scale(domain=names, range=[OF_OPTIMIZER[name] for name in names])
    title = f"{split} accuracy, %"
    x = alt.X("rate:Q", title="learning rate", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g"))
    y = alt.Y("accuracy:Q", title=title, scale=alt.Scale(zero=False))
    mean = alt.Y("mean(accuracy):Q", title=title, scale=alt.Scale(zero=False))
    colour = alt.Color("optimizer:N", scale=colours)
    known = alt.Chart().transform_filter("isValid(datum.accuracy)")
    layers = [
        known.mark_line(strokeWidth=2).encode(x=x, y=mean, color=colour),
        known.mark_point(size=40).encode(
            x=x, y=y, color=colour, tooltip=_tip("optimizer", "rate", "seed", "accuracy")
        ),
        known.transform_filter("datum.chosen")
        .mark_point(size=300, filled=False, strokeWidth=2)
        .encode(x=x, y=mean, color=colour),
    ]
    return Chart(f"Accuracy by rate, {choices[0].architecture}", _spec(*layers, height=320), _columns(data))


def charts(findings: Findings) -> dict[str, list[Chart]]:
    """The charts of each part of the page; a part without data has none."""
    parts: dict[str, list[Chart]] = {
        "differences": [
            differences(f"Differences between {what.lower()}", family)
            for what, family in findings.families.items()
            if family
        ],
        "studies": [
            study(list(points)) for _, points in groupby(findings.studies, key=lambda point: point.factor)
        ],
        "rates": [
            rates(list(choices)) for _, choices in groupby(findings.rates, key=lambda each: each.architecture)
        ],
    }  # fmt: skip
    if findings.trained:
        parts["answer"] = [accuracies(findings)]
        parts["cost"] = [
            trade_off("Parameters", findings, "num_parameters", "parameters"),
            trade_off("Training time", findings, "train_seconds", "training time, s"),
        ]
        parts["trust"] = _trust(findings)
    if rows := [row for row in findings.published if not row.differences]:
        dots: Dots = {
            "measured": (BLUE, {row.name: row.measured for row in rows}),
            "published": (RED, {row.name: row.accuracy for row in rows}),
        }
        parts["published"] = [
            by_row("Published and measured", "test accuracy, %", [row.name for row in rows], dots)
        ]
    return parts


def _trust(findings: Findings) -> list[Chart]:
    groups = findings.trained
    errors = findings.frame.set_index("cell")["calibration_error"]
    train = {group.name: group.mean("train_accuracy") for group in groups}
    test = {group.name: group.accuracy for group in groups}
    error = {group.name: float(errors[[r.cell.id for r in group.completed]].mean()) for group in groups}
    gap = sorted(train, key=lambda name: test[name].estimate - train[name])
    dots: Dots = {"train": (ORANGE, train), "test": (BLUE, test)}
    expected = {"expected calibration error": (SKY, error)}
    return [
        by_row("Generalisation gap", "accuracy, %", gap, dots),
        by_row("Calibration", "points", sorted(error, key=lambda name: error[name]), expected),
    ]


# --- of chosen cells --------------------------------------------------------------------------------


def curves(results: Sequence[Result]) -> tuple[dict[str, Any], dict[str, dict[str, list[Any]]]]:
    """Test (solid) and training (dashed) accuracy by epoch: a specification, and the columns of each cell."""
    columns = {}
    for result in results:
        assert result.history is not None
        accuracy = {
            split: [None if np.isnan(v) else round(100 * v, 3) for v in result.history[f"{split}_accuracy"]]
            for split in ("test", "train")
        }
        columns[result.cell.id] = {"epoch": result.history["epoch"].tolist()} | accuracy
    few = max((len(each["epoch"]) for each in columns.values()), default=0) <= 10
    x = alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, format="d"))
    y = alt.Y("accuracy:Q", title="accuracy, %", scale=alt.Scale(zero=False))
    colour = alt.Color("cell:N")
    dash = alt.StrokeDash("split:N", scale=alt.Scale(domain=["test", "train"], range=[[1, 0], [5, 4]]))
    base = alt.Chart().transform_fold(["test", "train"], as_=["split", "accuracy"])
    base = base.transform_filter("isValid(datum.accuracy)")
    spec = _spec(
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash),
        # Of a long training the points are there to be hovered over alone.
        base.mark_point(size=40 if few else 60, opacity=1 if few else 0).encode(
            x=x, y=y, color=colour, tooltip=_tip("cell", "split", "epoch", "accuracy")
        ),
        height=360,
    )
    return spec, columns


def reliability_diagram(predictions: Predictions) -> Chart:
    """Accuracy by confidence in bins, beside the diagonal of a model that is as right as it is confident."""
    bins = reliability(predictions.confidence, predictions.correct)
    columns = {
        "confidence": (100 * bins.confidence).round(2).tolist(),
        "accuracy": (100 * bins.accuracy).round(2).tolist(),
        "images": bins.num_images.tolist(),
    }
    scale = alt.Scale(domain=[0, 100])
    x = alt.X("confidence:Q", title="confidence, %", scale=scale)
    y = alt.Y("accuracy:Q", title="accuracy, %", scale=scale)
    # The area stands for the number of images, of which almost all are in the last bin.
    size = alt.Size("images:Q", scale=alt.Scale(range=[30, 500]), legend=None)
    diagonal = alt.Chart().mark_rule(color=GREY, strokeDash=[3, 3])
    spec = _spec(
        diagonal.encode(x=alt.datum(0), y=alt.datum(0), x2=alt.datum(100), y2=alt.datum(100)),
        alt.Chart().mark_line(color=BLUE, strokeWidth=1.5).encode(x=x, y=y),
        alt.Chart().mark_point(color=BLUE).encode(
            x=x, y=y, size=size, tooltip=_tip("images", "confidence", "accuracy")
        ),
        height=320,
    )  # fmt: skip
    return Chart("Reliability", spec, columns)


def confusion_matrix(predictions: Predictions, labels: Any, class_names: tuple[str, ...]) -> Chart:
    """A row a true class, a column a predicted one, in % of the row; of many classes the worst alone."""
    counts = confusion(labels, predictions.classes, len(class_names))
    shown = worst_classes(counts)
    rows = [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "images": int(counts[true, predicted]),
            "share": round(100 * counts[true, predicted] / max(counts[true].sum(), 1), 2),
        }
        # The diagonal first: the axes have the classes in the order in which they come.
        for true, predicted in [
            *((place, place) for place in shown),
            *((one, other) for one in shown for other in shown if one != other and counts[one, other]),
        ]
    ]
    names = [class_names[place] for place in shown]
    axis = alt.Axis(grid=False, labelLimit=110)
    x = alt.X("predicted:N", sort=None, title="predicted", scale=alt.Scale(paddingInner=0.04), axis=axis)
    y = alt.Y("true:N", sort=None, title="true", scale=alt.Scale(paddingInner=0.04), axis=axis)
    opacity = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 100], range=[0.08, 0.8]), legend=None)
    tip = _tip("true", "predicted", "images", "share")
    layers = [alt.Chart().mark_rect(color=BLUE).encode(x=x, y=y, opacity=opacity, tooltip=tip)]
    if len(names) <= 15:
        layers.append(alt.Chart().mark_text(fontSize=12).encode(x=x, y=y, text="images:Q", tooltip=tip))
    return Chart("Confusion matrix", _spec(*layers, height=max(240, 24 * len(names))), _columns(rows))


def class_accuracy(predictions: Predictions, labels: Any, class_names: tuple[str, ...]) -> Chart:
    """A bar a class: how many of its images were classified rightly; of many classes the worst alone."""
    counts = confusion(labels, predictions.classes, len(class_names))
    shown = worst_classes(counts)
    num_images, right = counts.sum(1)[shown], np.diag(counts)[shown]
    columns = {
        "class": [class_names[place] for place in shown],
        "accuracy": (100 * right / np.maximum(num_images, 1)).round(2).tolist(),
        "right": right.tolist(),
        "images": num_images.tolist(),
    }
    x = alt.X("accuracy:Q", title="accuracy, %", scale=alt.Scale(domain=[0, 100]))
    bar = alt.Chart().mark_bar(color=SKY).encode(
        x=x, y=alt.Y("class:N", sort=None, title=None), tooltip=_tip("class", "accuracy", "right", "images")
    )  # fmt: skip
    return Chart("Accuracy by class", _spec(bar, height=max(240, 22 * len(shown))), columns)


def worst_classes(counts: Any) -> list[int]:
    """The classes to show of a confusion matrix: all, or the `MAX_CLASSES` of lowest accuracy, in order."""
    accuracy = np.diag(counts) / np.maximum(counts.sum(1), 1)
    return sorted(np.argsort(accuracy, kind="stable")[:MAX_CLASSES].tolist())
