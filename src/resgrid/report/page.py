"""The report: `report.md`, and `index.html`, which is the same Markdown rendered with charts in their places.

The page is one file, which needs no network. The charts are drawn by plotly.js, which stands in the page,
compressed: 2 MB instead of 5. Links lead to `runs.html` beside the page: `resgrid sync` writes it, since it
alone knows which run of MLflow a cell has.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from PIL import Image
from plotly.offline import get_plotlyjs

from resgrid.data.dataset import Split
from resgrid.evaluation import Predictions, Result
from resgrid.report import figures, tables
from resgrid.report.findings import Findings
from resgrid.report.leaderboard import as_csv, by_optimizer, missing, readable, text_table
from resgrid.report.statistics import confusion

NUM_CURVES = 4  # cells that are shown before a person chooses
NUM_MISTAKES = 12  # a cell; half as many in a page of many cells
MANY_CELLS = 60
TEMPLATES = Environment(
    loader=PackageLoader("resgrid.report", "template"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def markdown(findings: Findings, slot: Callable[..., str] = lambda name, instead="": instead) -> str:
    """The report's tables and sentences, for a terminal, a diff or a pull request.

    Where `index.html` has a part of its own stands what `slot` says of the part's name.
    """
    text = TEMPLATES.get_template("report.md").render(
        findings=findings,
        meta=findings.meta,
        frame=findings.frame,
        missing=missing(findings.frame),
        accuracy=_table(by_optimizer(findings.frame).reset_index()),
        every_cell=readable(findings.frame),
        tables=tables,
        table=_table,
        slot=slot,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _table(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "None."
    return text_table(
        frame.fillna("").astype(str).apply(lambda column: column.str.replace("|", "\\|")), "pipe"
    )


def page(findings: Findings) -> str:
    """The report for a browser, the same bytes for the same findings."""
    text = markdown(findings, lambda name, instead="": f"@{name}@")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace(
        "</table>", "</table></div>"
    )
    titles = re.findall("<h2>(.*?)</h2>", body)
    for number, title in enumerate(titles):
        body = body.replace(f"<h2>{title}</h2>", f'<h2 id="part-{number}">{title}</h2>')

    scored = findings.scored
    with_curves = [result for result, _ in scored if result.history is not None and len(result.history)]
    charts = figures.charts(findings)
    context = {
        "titles": titles,
        "csv": "data:text/csv;base64," + base64.b64encode(as_csv(findings.frame).encode()).decode(),
        "grid": _grid(findings),
        "charts": charts,
        "facts": {result.cell.id: _facts(findings, result, said) for result, said in scored},
        "with_curves": [result.cell.id for result in with_curves],
        "num_curves": NUM_CURVES,
        "num_classes": len(findings.meta.class_names),
        "max_classes": figures.MAX_CLASSES,
    }
    slot = TEMPLATES.get_template("slot.html")
    body = re.sub(r"<p>@(\w+)@</p>", lambda match: slot.render(context, slot=match[1]), body)
    data = {
        "charts": {
            chart.id: json.loads(chart.figure.to_json()) for place in charts.values() for chart in place
        },
        "chosen": _chosen(findings, with_curves),
        "mistakes": _mistakes(findings),
    }
    return TEMPLATES.get_template("page.html").render(
        name=findings.name,
        body=body,
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode(),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _grid(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """The architecture x optimizer table: of each place its text, its shade and its cells."""
    half_an_image = 0.5 / findings.meta.num_images["test"]
    # By the logarithm of the error, else one cell that has learned nothing takes all other shades away.
    errors = {
        group.name: math.log(max(1 - group.mean("test_accuracy"), half_an_image))
        for group in findings.trained
    }
    highest = max(errors.values(), default=0.0)
    span = highest - min(errors.values(), default=0.0)

    def shade(name: str) -> float:
        return round((highest - errors[name]) / span, 3) if span else 0.5

    table = by_optimizer(findings.frame)
    rows: dict[str, list[dict[str, Any]]] = {}
    for group in findings.groups:
        place = {
            "optimizer": group.optimizer,
            "text": table.loc[group.architecture, group.optimizer],
            "shade": shade(group.name) if group.name in errors else None,
            "cells": [result.cell for result in group.results if result.status != "missing"],
        }
        rows.setdefault(group.architecture, []).append(place)
    return rows


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
    num_images, wrong, names = len(said.correct), int((~said.correct).sum()), findings.meta.class_names
    row = findings.frame.set_index("cell").loc[result.cell.id]
    text = (
        f"{100 * row['test_accuracy']:.2f} % of {num_images:,} test images right, {wrong:,} wrong; "
        f"{100 * said.confidence.mean():.2f} % confident on the mean; expected calibration error "
        f"{100 * row['calibration_error']:.2f} points."
    )
    counts = confusion(findings.test.labels.numpy(), said.classes, len(names))
    if never := [names[place] for place in np.flatnonzero(counts.sum(0) == 0)]:
        more = f" and {len(never) - 10} more" if len(never) > 10 else ""
        text += f" Never predicted: {', '.join(never[:10])}{more}."
    if result.status == "diverged":
        text += f" Diverged: {result.cause}"
    return text
