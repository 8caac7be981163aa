"""`reports/runs.html`: the way from the report's cells to their runs.

The report itself is an output of DVC, made without MLflow, so its links lead to this file beside it, which
DVC does not know: `runs.html#resnet20-adam-0` goes on to the run's page. The copy of the report that MLflow
holds has no files beside it: there the links lead to the runs themselves, which helps whoever downloads it,
since MLflow shows it in a frame that lets no link out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from resgrid.tracking.store import Store, shown

NAME = "runs.html"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: the runs in MLflow</title>
<style>:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}</style>
<h1>{name}: the runs in MLflow</h1>
<p>At {address}{served}.</p>
<ul>
{rows}
</ul>
<script>
const link = document.getElementById(location.hash.slice(1));
if (link) location.replace(link.href);
</script>
</html>
"""


def address_of(store: Store) -> str:
    """Where a browser finds MLflow: the server, or where `resgrid ui` serves a file's store."""
    port = os.environ.get("RESGRID_MLFLOW_PORT", "5000")
    return shown(store.uri).rstrip("/") if _is_server(store) else f"http://127.0.0.1:{port}"


def pages_of(store: Store, runs: Mapping[str, str]) -> dict[str, str]:
    """The address of each cell's run, whose id `runs` has."""
    page = f"{address_of(store)}/#/experiments/{store.experiment_id}/runs"
    # without the query MLflow asks which kind of work it is
    return {cell: f"{page}/{run}?workflowType=machine_learning" for cell, run in runs.items()}


def write_links(store: Store, pages: Mapping[str, str], reports: Path) -> None:
    """Write the file, unless it stands there already; `pages` has the address of each cell's run."""
    rows = [
        f'<li><a id="{escape(cell)}" href="{escape(page)}">{escape(cell)}</a></li>'
        for cell, page in pages.items()
    ]
    text = PAGE.format(
        name=escape(store.name),
        address=escape(address_of(store)),
        served="" if _is_server(store) else ", while <code>resgrid ui</code> serves it",
        rows="\n".join(rows),
    )
    path = reports / NAME
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    reports.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def linked(report: str, pages: Mapping[str, str]) -> str:
    """The HTML of the report, its links leading to `pages` in a window of their own."""
    for cell, page in pages.items():
        report = report.replace(
            f'href="{NAME}#{escape(cell)}"', f'href="{escape(page)}" target="_blank" rel="noopener"'
        )
    return report


def _is_server(store: Store) -> bool:
    return store.uri.startswith(("http://", "https://"))
