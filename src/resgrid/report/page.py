"""The report: `report.md`, and `index.html`, which is the same Markdown rendered with charts in their places.

The page is one file, which needs no network. The charts are drawn by Vega, which stands in the page once,
compressed: 0.4 MB.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from PIL import Image

from resgrid.data.dataset import Split
from resgrid.evaluation import Predictions, Result
from resgrid.report import figures, tables
from resgrid.report.figures import Chart
from resgrid.report.findings import Findings
from resgrid.report.leaderboard import as_csv, missing, readable, text_table

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
        accuracy=_table(findings.table.reset_index()),
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


def page(findings: Findings, charts: Mapping[str, Sequence[Chart]]) -> str:
    """The report for a browser, with the `charts` of its parts; the same bytes for the same findings."""
    import vl_convert  # see figures.png

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
    context = {
        "titles": titles,
        "csv": "data:text/csv;base64," + base64.b64encode(as_csv(findings.frame).encode()).decode(),
        "grid": _grid(findings),
        "charts": charts,
        "facts": {result.cell.id: _facts(findings, result, predictions) for result, predictions in scored},
        "with_curves": [result.cell.id for result in with_curves],
        "num_curves": NUM_CURVES,
        "num_classes": len(findings.meta.class_names),
        "max_classes": figures.MAX_CLASSES,
    }
    slot = TEMPLATES.get_template("slot.html")
    body = re.sub(r"<p>@(\w+)@</p>", lambda match: slot.render(context, slot=match[1]), body)
    data = {
        "themes": figures.THEMES,
        "charts": {
            chart.id: {"spec": chart.spec, "columns": chart.columns}
            for part in charts.values()
            for chart in part
        },
        "chosen": _chosen(findings, with_curves),
        "mistakes": _mistakes(findings),
    }
    bundle = vl_convert.javascript_bundle(vl_version=figures.VEGA_LITE)  # type: ignore[call-arg]
    return TEMPLATES.get_template("page.html").render(
        name=findings.name,
        body=body,
        vega=base64.b64encode(gzip.compress(bundle.encode(), 9, mtime=0)).decode(),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _grid(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """The architecture x optimizer table: of each place its text and its shade."""
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

    table = findings.table
    rows: dict[str, list[dict[str, Any]]] = {}
    for group in findings.groups:
        place = {
            "optimizer": group.optimizer,
            "text": table.loc[group.architecture, group.optimizer],
            "shade": shade(group.name) if group.name in errors else None,
        }
        rows.setdefault(group.architecture, []).append(place)
    return rows


def _chosen(findings: Findings, with_curves: list[Result]) -> dict[str, Any]:
    """The charts of single cells, by id: one specification, and the columns of each cell."""
    labels, names = findings.test.labels.numpy(), findings.meta.class_names
    draw: dict[str, Callable[[Predictions], Chart]] = {
        "reliability": figures.reliability_diagram,
        "confusion": lambda predictions: figures.confusion_matrix(predictions, labels, names),
        "classes": lambda predictions: figures.class_accuracy(predictions, labels, names),
    }
    chosen: dict[str, Any] = {}
    for id, chart in draw.items():
        of_cells = {result.cell.id: chart(predictions) for result, predictions in findings.scored}
        for first in list(of_cells.values())[:1]:
            cells = {cell: each.columns for cell, each in of_cells.items()}
            chosen[id] = {"spec": first.spec, "cells": cells}
    if with_curves:
        spec, columns = figures.curves(with_curves)
        chosen["curves"] = {"spec": spec, "cells": columns}
    return chosen


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
                "taken": names[predictions.classes[place]],
                "confidence": round(100 * float(predictions.confidence[place]), 1),
            }
            for place in most_confident_mistakes(predictions, count)
        ]
        for result, predictions in scored
    }
    shown = sorted({each["image"] for mistakes in cells.values() for each in mistakes})
    return {"cells": cells, "images": {place: _png(findings.test, place) for place in shown}}


def most_confident_mistakes(predictions: Predictions, count: int) -> list[int]:
    """The places of `count` wrong predictions, by falling confidence."""
    wrong = np.flatnonzero(~predictions.correct)
    order = np.argsort(-predictions.confidence[wrong], kind="stable")
    places: list[int] = wrong[order][:count].tolist()
    return places


def _png(split: Split, place: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(split.images[place].numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _facts(findings: Findings, result: Result, predictions: Predictions) -> str:
    """A sentence or two on one cell."""
    num_images, wrong = len(predictions.correct), int((~predictions.correct).sum())
    row = findings.frame.set_index("cell").loc[result.cell.id]
    text = (
        f"{100 * row['test_accuracy']:.2f} % of {num_images:,} test images right, {wrong:,} wrong; "
        f"{100 * predictions.confidence.mean():.2f} % confident on the mean; expected calibration error "
        f"{100 * row['calibration_error']:.2f} points."
    )
    if pd.notna(row["remark"]):
        text += f" {row['remark'][0].upper()}{row['remark'][1:]}."
    if result.status == "diverged":
        text += f" Diverged: {result.cause}"
    return text
