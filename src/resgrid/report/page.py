"""`index.html`: the whole report in one file, which needs no network.

The charts are drawn by plotly.js, which stands in the page, compressed: 2 MB instead of 5. Tables and
sentences are HTML that stands there without it. Links lead to `runs.html` beside the page: `resgrid sync`
writes it, since it alone knows which run of MLflow a cell has.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from plotly.offline import get_plotlyjs

from resgrid.data.dataset import Split
from resgrid.evaluation import Predictions, Result
from resgrid.report import figures, tables
from resgrid.report.figures import MAX_CLASSES, Chart
from resgrid.report.findings import Findings, Group, conclusions
from resgrid.report.leaderboard import as_csv, missing, readable, spread
from resgrid.report.statistics import confusion

LINKS = "runs.html"
NUM_CURVES = 4  # cells that are shown before a person chooses
NUM_MISTAKES = 12  # a cell; half as many in a page of many cells
MANY_CELLS = 60


def page(findings: Findings) -> str:
    """The page, the same bytes for the same findings."""
    templates = Environment(
        loader=PackageLoader("resgrid.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = templates.loader
    assert source is not None
    style, script = (source.get_source(templates, name)[0] for name in ("page.css", "page.js"))
    scored = findings.scored
    with_curves = [result for result, _ in scored if result.history is not None and len(result.history)]
    meta, frame = findings.meta, findings.frame
    charts = _charts(findings)
    data = {
        "charts": {chart.id: json.loads(chart.figure.to_json()) for chart in charts.values()},
        "chosen": _chosen(findings, with_curves),
        "mistakes": _mistakes(findings),
    }
    return templates.get_template("page.html").render(
        style=style,
        script=script,
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        csv="data:text/csv;base64," + base64.b64encode(as_csv(frame).encode()).decode(),
        findings=findings,
        meta=meta,
        links=LINKS,
        grid=_grid(findings),
        conclusions=conclusions(findings),
        missing=missing(frame),
        best=frame.iloc[0] if len(scored) and frame.iloc[0]["status"] == "completed" else None,
        counts=[(state, int(n)) for state, n in frame["status"].value_counts().items()],
        charts=charts,
        table=_table,
        tables=tables,
        every_cell=readable(frame),
        scored=[result.cell.id for result, _ in scored],
        facts={result.cell.id: _facts(findings, result, said) for result, said in scored},
        with_curves=[result.cell.id for result in with_curves],
        first_curves=[result.cell.id for result in with_curves[:NUM_CURVES]],
        too_many_classes=len(meta.class_names) > MAX_CLASSES,
        max_classes=MAX_CLASSES,
    )


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    """What the template makes a table of; a column of words is set left, one of figures right."""
    texts = frame.fillna("").astype(str)
    words = [not texts[name].str.contains(r"^[-+]?\d").any() for name in texts]
    return {"columns": list(texts), "words": words, "rows": texts.to_numpy().tolist()}


def _grid(findings: Findings) -> dict[str, Any]:
    """The architecture x optimizer table: of each place its text, its shade and its cells."""
    groups = {(group.architecture, group.optimizer): group for group in findings.groups}
    optimizers = list(dict.fromkeys(group.optimizer for group in findings.groups))
    architectures = list(dict.fromkeys(group.architecture for group in findings.groups))
    frame = findings.frame.set_index("cell", drop=False)
    half_an_image = 0.5 / findings.meta.num_images["test"]
    # By the logarithm of the error, else one cell that has learned nothing takes all other shades away.
    errors = {
        group.name: math.log(max(1 - group.mean("test_accuracy"), half_an_image))
        for group in findings.trained
    }
    lowest, highest = min(errors.values(), default=0.0), max(errors.values(), default=0.0)

    def place(group: Group) -> dict[str, Any]:
        shade = None
        if group.name in errors:
            span = highest - lowest
            shade = round((highest - errors[group.name]) / span, 3) if span else 0.5
        return {
            "text": spread(frame.loc[[result.cell.id for result in group.results]]),
            "shade": shade,
            "cells": [
                {
                    "id": r.cell.id,
                    "seed": r.cell.seed,
                    "tried": r.status != "missing",
                    "cause": r.cause,
                }
                for r in group.results
            ],
        }

    rows = [
        (name, [place(groups[name, o]) if (name, o) in groups else None for o in optimizers])
        for name in architectures
    ]
    return {"optimizers": optimizers, "rows": rows}


def _charts(findings: Findings) -> dict[str, Chart]:
    """Those of the whole grid, by id; none of what there is nothing of."""
    charts = []
    for id, title, comparisons in (
        ("optimizers", "Optimizers compared", findings.optimizers),
        ("depths", "Depths compared", findings.depths),
    ):
        if any(comparison.difference for comparison in comparisons):
            charts.append(Chart(id, title, figures.differences(comparisons)))
    if findings.trained:
        for id, cost, title in (
            ("by-parameters", "num_parameters", "parameters"),
            ("by-time", "train_seconds", "training time, s"),
        ):
            figure = figures.trade_off(findings, cost, title)
            charts.append(Chart(id, f"Accuracy against {title.partition(',')[0]}", figure))
        charts.append(Chart("gap", "Generalisation gap", figures.gap(findings)))
        charts.append(Chart("calibration", "Calibration", figures.calibration(findings)))
    if not all(row.differences for row in findings.published):
        charts.append(Chart("published", "Published and measured", figures.published(findings.published)))
    for study in findings.studies:
        if any(level.accuracy for series in study.series for level in series.levels):
            id = "study-" + study.factor.replace(" ", "-").replace(".", "-")
            charts.append(Chart(id, study.factor, figures.study(study)))
    return {chart.id: chart for chart in charts}


def _chosen(findings: Findings, with_curves: list[Result]) -> dict[str, Any]:
    """The charts of single cells, by id: one layout, and the traces of each cell."""
    labels, names = findings.test.labels.numpy(), findings.meta.class_names
    draw: dict[str, Callable[[Predictions], go.Figure]] = {
        "reliability": figures.reliability_diagram,
        "confusion": lambda said: figures.confusion_matrix(said, labels, names),
        "classes": lambda said: figures.class_accuracy(said, labels, names),
    }
    drawn = {
        id: {result.cell.id: json.loads(chart(said).to_json()) for result, said in findings.scored}
        for id, chart in draw.items()
    }
    drawn["curves"] = {r.cell.id: json.loads(figures.curves(r).to_json()) for r in with_curves}
    return {
        id: {
            "layout": next(iter(of_cells.values()))["layout"],
            "cells": {cell: figure["data"] for cell, figure in of_cells.items()},
        }
        for id, of_cells in drawn.items()
        if of_cells
    }


def _mistakes(findings: Findings) -> dict[str, Any]:
    """Of each cell the mistakes it was most confident of, and every image of them once."""
    scored, names = findings.scored, findings.meta.class_names
    labels = findings.test.labels.tolist()
    count = NUM_MISTAKES if len(scored) <= MANY_CELLS else NUM_MISTAKES // 2
    cells = {
        result.cell.id: [
            {
                "image": place,
                "is": names[labels[place]],
                "taken": names[said.classes[place]],
                "confidence": round(100 * float(said.confidence[place]), 1),
            }
            for place in most_confident_mistakes(said, count)
        ]
        for result, said in scored
    }
    shown = sorted({each["image"] for mistakes in cells.values() for each in mistakes})
    return {"cells": cells, "images": {place: _png(findings.test, place) for place in shown}}


def most_confident_mistakes(said: Predictions, count: int) -> list[int]:
    """The places of `count` wrong predictions, by falling confidence."""
    wrong = np.flatnonzero(~said.correct)
    order = np.argsort(-said.confidence[wrong], kind="stable")
    places: list[int] = wrong[order][:count].tolist()
    return places


def _png(split: Split, place: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(split.images[place].numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _facts(findings: Findings, result: Result, said: Predictions) -> str:
    """A sentence or two on one cell."""
    assert result.scores is not None
    wrong, names = int((~said.correct).sum()), findings.meta.class_names
    row = findings.frame.set_index("cell").loc[result.cell.id]
    text = (
        f"{100 * result.scores.accuracy:.2f} % of {result.scores.num_images:,} test images right, {wrong:,} "
        f"wrong; {100 * said.confidence.mean():.2f} % confident on the mean; expected calibration error "
        f"{100 * row['calibration_error']:.2f} points."
    )
    counts = confusion(findings.test.labels.numpy(), said.classes, len(names))
    never = [names[place] for place in np.flatnonzero(counts.sum(0) == 0)]
    if never:
        more = f" and {len(never) - 10} more" if len(never) > 10 else ""
        text += f" Never predicted: {', '.join(never[:10])}{more}."
    if result.status == "diverged":
        text += f" Diverged: {result.cause}"
    return text
