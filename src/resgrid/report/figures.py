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
from resgrid.optimizers import OPTIMIZERS
from resgrid.report.comparisons import Comparison
from resgrid.report.findings import Findings
from resgrid.report.rates import RateChoice
from resgrid.report.statistics import Interval, confusion, reliability

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
GREY = "#888888"
COLOURS = [BLUE, ORANGE, GREEN, PINK, SKY, RED]  # again from the first where there is more to show
OF_OPTIMIZER = dict(zip(OPTIMIZERS, cycle(COLOURS), strict=False))
SHAPES = [
    "circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left",
    "M-1,-1L1,1M1,-1L-1,1", "M0,-1L0.6,0.8L-0.95,-0.3L0.95,-0.3L-0.6,0.8Z",
]  # fmt: skip
MAX_CLASSES = 40  # that a confusion matrix can show and a person can read
ROWS = "rows"  # the name under which a chart's data are put into its specification
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
FORMATS = {"value": ".2f", "low": ".2f", "high": ".2f", "share": ".1f", "accuracy": ".2f", "seconds": ",.1f"}


def _theme(ink: str, soft: str, line: str) -> dict[str, Any]:
    return {
        "background": "transparent",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "font": "system-ui, Liberation Sans, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": ink, "titleColor": soft, "gridColor": line, "domainColor": line, "tickColor": line,
            "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 240,
            "labelFlush": False, "labelOverlap": True,
        },
        "legend": {
            "labelColor": ink, "orient": "bottom", "columns": 4, "title": None, "labelFontSize": 12,
            "labelLimit": 170, "symbolStrokeWidth": 2,
            "symbolBaseFillColor": ink, "symbolBaseStrokeColor": ink,
        },
        "point": {"filled": True, "size": 90, "opacity": 1},
        "rule": {"color": GREY},
        "text": {"color": ink},
        "range": {"category": COLOURS, "symbol": SHAPES},
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


def _chart(title: str, height: int, rows: Iterable[Mapping[str, Any]], *layers: alt.Chart) -> Chart:
    chart = alt.layer(*layers, data=alt.NamedData(name=ROWS)).properties(width="container", height=height)
    spec = {key: value for key, value in chart.to_dict().items() if key not in ("$schema", "config")}
    rows = list(rows)
    return Chart(title, spec, {name: [row[name] for row in rows] for name in (rows[0] if rows else ())})


def _number(channel: type[Any], field: str, title: str, log: bool = False, **more: Any) -> Any:
    """The axis of a number: it need not begin at 0, nor does a logarithmic one."""
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    return channel(f"{field}:Q", title=title, **{"scale": scale} | more)


def _series(field: str, colours: Mapping[str, str]) -> alt.Color:
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())))


def _tip(*fields: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{name}:{'Q' if name in FORMATS else 'N'}", format=FORMATS.get(name, ""))
        for name in fields
    ]


def _percent(value: Interval | float) -> dict[str, float]:
    ends = value[:3] if isinstance(value, Interval) else (value, value, value)
    return {key: round(100 * each, 3) for key, each in zip(("value", "low", "high"), ends, strict=True)}


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
    of_all = {
        "y": alt.Y("row:N", sort=list(rows), title=None),
        "color": _series("series", {name: colour for name, (colour, _) in dots.items()}),
    }
    layers = [
        alt.Chart().mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q", **of_all),
        alt.Chart()
        .mark_point()
        .encode(
            x=_number(alt.X, "value", axis), tooltip=_tip("row", "series", "value", "low", "high"), **of_all
        ),
    ]
    if any(each["low"] < 0 < each["high"] for each in data):
        layers.insert(0, alt.Chart().mark_rule(strokeDash=[3, 3]).encode(x=alt.datum(0)))
    return _chart(title, 24 * max(2, len(rows)), data, *layers)


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


def cost(findings: Findings) -> Chart:
    """Accuracy by training time, a point an architecture with an optimizer; the Pareto front is a line."""
    groups, front = findings.trained, {group.name for group in findings.front("train_seconds")}
    data: list[dict[str, Any]] = [
        {"name": g.name, "architecture": g.architecture, "optimizer": g.optimizer, "front": g.name in front}
        | {"seconds": g.mean("train_seconds")}
        | _percent(g.accuracy)
        for g in groups
    ]
    colour = _series("optimizer", {g.optimizer: OF_OPTIMIZER[g.optimizer] for g in groups})
    x = _number(alt.X, "seconds", "training time, s", log=True, axis=alt.Axis(format="~s"))
    y = _number(alt.Y, "value", "test accuracy, %")
    line = alt.Chart().mark_line(color=GREY, strokeDash=[3, 3], strokeWidth=1.5, interpolate="step-after")
    return _chart(
        "Accuracy by training time", 320, data,
        line.transform_filter("datum.front").encode(x=x, y=y),
        alt.Chart().mark_rule(strokeWidth=1).encode(x=x, y="low:Q", y2="high:Q"),
        alt.Chart().mark_point().encode(
            x=x, y=y, shape=alt.Shape("architecture:N", sort=None), color=colour,
            tooltip=_tip("name", "value", "seconds"),
        ),
    )  # fmt: skip


def studies(findings: Findings) -> Chart:
    """A row a study, with the accuracy of the grid's cell that it was made from."""
    own = {study.cell: study.accuracy for study in findings.studies if study.accuracy}
    base = {study.cell: study.base_accuracy for study in findings.studies if study.base_accuracy}
    dots: Dots = {"the grid's cell": (GREY, base), "study": (BLUE, own)}
    return by_row("Studies", "test accuracy, %", [study.cell for study in findings.studies], dots)


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
    x = _number(alt.X, "rate", "learning rate", log=True, axis=alt.Axis(format="~g"))
    y, mean = (_number(alt.Y, field, f"{split} accuracy, %") for field in ("accuracy", "mean(accuracy)"))
    colour = _series("optimizer", {each.optimizer: OF_OPTIMIZER[each.optimizer] for each in choices})
    known = alt.Chart().transform_filter("isValid(datum.accuracy)")
    ring = known.transform_filter("datum.chosen").mark_point(size=300, filled=False, strokeWidth=2)
    tip = _tip("optimizer", "rate", "seed", "accuracy")
    return _chart(
        f"Accuracy by rate, {choices[0].architecture}", 320, data,
        known.mark_line(strokeWidth=2).encode(x=x, y=mean, color=colour),
        known.mark_point(size=40).encode(x=x, y=y, color=colour, tooltip=tip),
        ring.encode(x=x, y=mean, color=colour),
    )  # fmt: skip


def charts(findings: Findings) -> dict[str, list[Chart]]:
    """The charts of each part of the page; a part without data has none."""
    parts: dict[str, list[Chart]] = {
        "differences": [
            differences(f"Differences between {what.lower()}", family)
            for what, family in findings.families.items()
            if family
        ],
        "rates": [rates(list(of)) for _, of in groupby(findings.rates, key=lambda each: each.architecture)],
        "studies": [studies(findings)] if findings.studies else [],
    }
    if findings.trained:
        parts["answer"] = [accuracies(findings)]
        parts["cost"] = [cost(findings)]
    return parts


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
    y, colour = _number(alt.Y, "accuracy", "accuracy, %"), alt.Color("cell:N")
    dash = alt.StrokeDash("split:N", scale=alt.Scale(domain=["test", "train"], range=[[1, 0], [5, 4]]))
    base = alt.Chart().transform_fold(["test", "train"], as_=["split", "accuracy"])
    base = base.transform_filter("isValid(datum.accuracy)")
    # Of a long training the points are there to be hovered over alone.
    points = base.mark_point(size=40 if few else 60, opacity=1 if few else 0)
    chart = _chart(
        "Learning curves", 360, (),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash),
        points.encode(x=x, y=y, color=colour, tooltip=_tip("cell", "split", "epoch", "accuracy")),
    )  # fmt: skip
    return chart.spec, columns


def reliability_diagram(predictions: Predictions) -> Chart:
    """Accuracy by confidence in bins, beside the diagonal of a model that is as right as it is confident."""
    bins = reliability(predictions.confidence, predictions.correct)
    rows = [
        {"confidence": round(100 * confidence, 2), "accuracy": round(100 * accuracy, 2), "images": count}
        for confidence, accuracy, count in zip(*(each.tolist() for each in bins), strict=True)
    ]
    scale = alt.Scale(domain=[0, 100])
    x = _number(alt.X, "confidence", "confidence, %", scale=scale)
    y = _number(alt.Y, "accuracy", "accuracy, %", scale=scale)
    # The area stands for the number of images, of which almost all are in the last bin.
    size = alt.Size("images:Q", scale=alt.Scale(range=[30, 500]), legend=None)
    tip = _tip("images", "confidence", "accuracy")
    diagonal = alt.Chart().mark_rule(color=GREY, strokeDash=[3, 3])
    return _chart(
        "Reliability", 320, rows,
        diagonal.encode(x=alt.datum(0), y=alt.datum(0), x2=alt.datum(100), y2=alt.datum(100)),
        alt.Chart().mark_line(color=BLUE, strokeWidth=1.5).encode(x=x, y=y),
        alt.Chart().mark_point(color=BLUE).encode(x=x, y=y, size=size, tooltip=tip),
    )  # fmt: skip


def confusion_matrix(predictions: Predictions, labels: Any, class_names: tuple[str, ...]) -> Chart:
    """A row a true class, a column a predicted one, in % of the row; of many classes the worst alone."""
    counts = confusion(labels, predictions.classes, len(class_names))
    accuracy = np.diag(counts) / np.maximum(counts.sum(1), 1)
    places = sorted(np.argsort(accuracy, kind="stable")[:MAX_CLASSES].tolist())
    rows = [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "images": int(counts[true, predicted]),
            "share": round(100 * counts[true, predicted] / max(counts[true].sum(), 1), 2),
        }
        # The diagonal first: the axes have the classes in the order in which they come.
        for true, predicted in [
            *((place, place) for place in places),
            *((one, other) for one in places for other in places if one != other and counts[one, other]),
        ]
    ]
    gap = alt.Scale(paddingInner=0.04)
    x, y = (
        channel(f"{field}:N", sort=None, title=field, scale=gap, axis=alt.Axis(grid=False, labelLimit=110))
        for channel, field in ((alt.X, "predicted"), (alt.Y, "true"))
    )
    opacity = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 100], range=[0.08, 0.8]), legend=None)
    tip = _tip("true", "predicted", "images", "share")
    layers = [alt.Chart().mark_rect(color=BLUE).encode(x=x, y=y, opacity=opacity, tooltip=tip)]
    if len(places) <= 15:
        layers.append(alt.Chart().mark_text(fontSize=12).encode(x=x, y=y, text="images:Q", tooltip=tip))
    return _chart("Confusion matrix", max(240, 24 * len(places)), rows, *layers)
