"""What `evaluate` leaves in `reports/`: data, `report.md`, and `index.html`.

The page is the same Markdown rendered, with charts in their places. It is one file, which needs no network:
Vega, which draws the charts, stands in it once, compressed to 0.4 MB.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from PIL import Image

from resgrid.data.dataset import Split
from resgrid.evaluation import Predictions
from resgrid.report import figures, tables
from resgrid.report.figures import Chart
from resgrid.report.findings import Findings
from resgrid.report.leaderboard import headline, missing, readable, text_table

NUM_CURVES = 4  # cells that are ticked before a person chooses
NUM_MISTAKES = 12  # a cell
TEMPLATES = Environment(
    loader=PackageLoader("resgrid.report", "template"),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(findings: Findings, out: Path) -> None:
    """The leaderboard, metrics, findings, report.md, the page and its PNGs in the folder `out`."""
    charts = figures.charts(findings)
    contents = {
        "leaderboard.csv": findings.frame.to_csv(index=False, lineterminator="\n"),  # floats with all digits
        "metrics.json": json.dumps(headline(findings.frame, findings.factors), indent=2) + "\n",
        "findings.json": json.dumps(findings.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown(findings),
        "index.html": page(findings, charts),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    shutil.rmtree(out / "figures", ignore_errors=True)
    (out / "figures").mkdir()  # an output of the stage, also where nothing was trained
    for chart in (chart for part in ("answer", "differences", "rates") for chart in charts.get(part, ())):
        (out / f"figures/{chart.id}.png").write_bytes(figures.png(chart))


def markdown(findings: Findings, slot: Callable[..., str] = lambda name, instead="": instead) -> str:
    """The report's tables and sentences, for a terminal, a diff or a pull request.

    Where `index.html` has a part of its own stands what `slot` says of the part's name.
    """
    text = TEMPLATES.get_template("report.md").render(
        findings=findings,
        frame=findings.frame,
        missing=missing(findings.frame),
        every_cell=readable(findings.frame),
        tables=tables,
        table=lambda frame: text_table(frame.replace(r"\|", r"\\|", regex=True), "pipe"),
        slot=slot,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def page(findings: Findings, charts: Mapping[str, Sequence[Chart]]) -> str:
    """The report for a browser, with the `charts` of its parts; the same bytes for the same findings."""
    import vl_convert  # see figures.png

    text = markdown(findings, lambda name, instead="": f"@{name}@")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub("(<table>.*?</table>)", r'<div class="wide" tabindex="0">\1</div>', body, flags=re.DOTALL)
    titles = re.findall("<h2>(.*?)</h2>", body)
    for number, title in enumerate(titles):
        body = body.replace(f"<h2>{title}</h2>", f'<h2 id="part-{number}">{title}</h2>')
    chosen, bundle = _chosen(findings), vl_convert.javascript_bundle(vl_version=figures.VEGA_LITE)  # type: ignore[call-arg]
    data = {
        "themes": figures.THEMES,
        "charts": {
            chart.id: {"spec": chart.spec, "columns": chart.columns}
            for part in charts.values()
            for chart in part
        },
        "chosen": chosen,
        "mistakes": _mistakes(findings),
    }
    return TEMPLATES.get_template("page.html").render(
        name=findings.name,
        parts=re.split(r"<p>@(\w+)@</p>", body),  # HTML and the names of slots, in turn
        titles=titles,
        charts=charts,
        scored=[result.cell.id for result, _ in findings.scored],
        with_curves=list(chosen["curves"]["cells"]),
        num_curves=NUM_CURVES,
        num_classes=len(findings.meta.class_names),
        max_classes=figures.MAX_CLASSES,
        vega=base64.b64encode(gzip.compress(bundle.encode(), 9, mtime=0)).decode(),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _chosen(findings: Findings) -> dict[str, Any]:
    """The charts of single cells, by id: one specification, and the columns of each cell."""
    labels, names = findings.test.labels.numpy(), findings.meta.class_names
    with_curves = [r for r, _ in findings.scored if r.history is not None and len(r.history)]
    spec, columns = figures.curves(with_curves)
    chosen: dict[str, Any] = {"curves": {"spec": spec, "cells": columns}}
    for result, predictions in findings.scored:
        for chart in (
            figures.reliability_diagram(predictions),
            figures.confusion_matrix(predictions, labels, names),
        ):
            of_cells = chosen.setdefault(chart.id, {"spec": chart.spec, "cells": {}})
            of_cells["cells"][result.cell.id] = chart.columns
    return chosen


def _mistakes(findings: Findings) -> dict[str, Any]:
    """Of each cell the mistakes it was most confident of, and every image of them once."""
    scored, names = findings.scored, findings.meta.class_names
    labels = findings.test.labels.tolist()
    cells = {
        result.cell.id: [
            {
                "image": place,
                "is": names[labels[place]],
                "taken": names[predictions.classes[place]],
                "confidence": round(100 * float(predictions.confidence[place]), 1),
            }
            for place in most_confident_mistakes(predictions, NUM_MISTAKES)
        ]
        for result, predictions in scored
    }
    images = {each["image"] for mistakes in cells.values() for each in mistakes}
    return {"cells": cells, "images": {place: _png(findings.test, place) for place in sorted(images)}}


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
