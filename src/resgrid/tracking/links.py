"""`reports/runs.html`: the way from the report's cells to their runs.

The report itself is an output of DVC, made without MLflow, so its links lead to this file beside it, which
DVC does not know: `runs.html#resnet20-adam-0` goes on to the run's page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from resgrid.tracking.store import Store, shown

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


def write_links(store: Store, runs: Mapping[str, str], reports: Path) -> None:
    """Write the file, unless it stands there already; `runs` has the id of each cell's run."""
    remote = store.uri.startswith(("http://", "https://"))
    port = os.environ.get("RESGRID_MLFLOW_PORT", "5000")
    address = shown(store.uri).rstrip("/") if remote else f"http://127.0.0.1:{port}"
    page = f"{address}/#/experiments/{store.experiment_id}/runs"
    rows = [  # without the query MLflow asks which kind of work it is
        f'<li><a id="{escape(cell)}" href="{escape(f"{page}/{run}")}?workflowType=machine_learning">'
        f"{escape(cell)}</a></li>"
        for cell, run in runs.items()
    ]
    text = PAGE.format(
        name=escape(store.name),
        address=escape(address),
        served="" if remote else ", while <code>resgrid ui</code> serves it",
        rows="\n".join(rows),
    )
    path = reports / "runs.html"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    reports.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
