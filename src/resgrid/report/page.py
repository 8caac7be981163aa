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
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from PIL import Image

from resgrid.evaluation import Predictions
from resgrid.report import figures
from resgrid.report.figures import Chart
from resgrid.report.findings import Findings
from resgrid.report.leaderboard import headline, readable, text_table
from resgrid.report.rates import RatePoint

DRAWN = ("answer", "differences", "rates")  # the parts whose charts are PNGs as well
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
    for chart in (chart for part in DRAWN for chart in charts.get(part, ())):
        (out / f"figures/{chart.id}.png").write_bytes(figures.png(chart))


def markdown(findings: Findings, slot: Callable[..., str] | None = None) -> str:
    """The report's tables, sentences and figures, for a terminal, a diff or a pull request.

    `slot` says what stands in the place of a part by its name, other than its figures.
    """
    charts = {} if slot else figures.charts(findings)

    def pictures(part: str, instead: str = "") -> str:
        of_part = charts.get(part, ()) if part in DRAWN else ()
        return instead + "\n\n".join(f"![{each.title}](figures/{each.id}.png)" for each in of_part)

    text = TEMPLATES.get_template("report.md").render(
        findings=findings,
        frame=findings.frame,
        rates=rates(findings),
        tries=tries(findings),
        costs=costs(findings),
        studies=studies(findings),
        every_cell=readable(findings.frame),
        table=lambda frame: text_table(frame.replace(r"\|", r"\\|", regex=True), "pipe"),
        slot=slot or pictures,
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
    """Of each cell the mistakes it was most confident of, in words, and every image of them once."""
    names, labels = findings.meta.class_names, findings.test.labels.tolist()
    cells: dict[str, list[tuple[int, str]]] = {}
    images: dict[int, str] = {}
    for result, of in findings.scored:
        cells[result.cell.id] = [
            (i, f"{names[of.classes[i]]}, {100 * of.confidence[i]:.1f} % sure; is {names[labels[i]]}")
            for i in most_confident_mistakes(of, NUM_MISTAKES)
        ]
        for place in {place for place, _ in cells[result.cell.id]} - images.keys():
            buffer = io.BytesIO()
            Image.fromarray(findings.test.images[place].numpy()).save(buffer, "PNG", optimize=True)
            images[place] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"cells": cells, "images": dict(sorted(images.items()))}


def most_confident_mistakes(predictions: Predictions, count: int) -> list[int]:
    """The places of `count` wrong predictions, by falling confidence."""
    wrong = np.flatnonzero(~predictions.correct)
    order = np.argsort(-predictions.confidence[wrong], kind="stable")
    places: list[int] = wrong[order][:count].tolist()
    return places


# --- tables, as texts; columns in which nothing stands are left out where one is printed --------------


def costs(findings: Findings) -> pd.DataFrame:
    """A row an architecture with an optimizer: what it reaches, at what cost, and if nothing beats it.

    Where a group has two seeds or more, also what the mean of their networks' probabilities reaches.
    """
    errors = findings.frame.set_index("cell")["calibration_error"]
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
            "calibration error, points": _percent(errors[[r.cell.id for r in group.completed]].mean()),
        }
        for group in sorted(findings.trained, key=lambda group: -group.mean("test_accuracy"))
    )


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


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
