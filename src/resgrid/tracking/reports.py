"""The report and MLflow: the way from its cells to their runs, and the comparison as a run of its own.

`reports/runs.html`: the report is an output of DVC, made without MLflow, so its links lead to this file
beside it, which DVC does not know: `runs.html#resnet20-adam-0` goes on to the run's page.

The comparison's run has the leaderboard as a table and the files of `reports/`. It has no tag `grid`, so that
the filter `tags.grid = 'current'` shows cells and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path

from resgrid.errors import ResgridError
from resgrid.tracking.registry import CHAMPION
from resgrid.tracking.store import Store, is_remote, reason, shown
from resgrid.tracking.view import VIEW_QUERY, WORK

LINKS = "runs.html"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: the runs in MLflow</title>
<style>:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}</style>
<h1>{name}: the runs in MLflow</h1>
<p>The links lead to {address}{when}.</p>
<p id="away" role="alert" hidden>It does not answer now. Once it does, this is <a href="">the run</a>.</p>
<ul>
{rows}
</ul>
<script>
const link = document.getElementById(location.hash.slice(1));
const away = document.getElementById("away");
if (link) fetch(link.href, {{mode: "no-cors"}}).then(() => location.replace(link.href), () => {{
  away.hidden = false;
  away.querySelector("a").href = link.href;
}});
</script>
</html>
"""
WHEN = ", which answers while <code>resgrid ui</code> or <code>resgrid up</code> runs"
TABLE = "leaderboard.json"
NOTE = "mlflow.note.content"


def write_links(store: Store, runs: Mapping[str, str], reports: Path) -> None:
    """Write `runs.html` with the page of each cell's run, whose id `runs` has; leave it if it is the same."""
    port = os.environ.get("RESGRID_MLFLOW_PORT", "5000")
    address = shown(store.uri).rstrip("/") if is_remote(store.uri) else f"http://127.0.0.1:{port}"
    page = f"{address}/#/experiments/{store.experiment_id}/runs/"
    rows = [
        f'<li><a id="{escape(cell)}" href="{page}{run}?{WORK}">{escape(cell)}</a></li>'
        for cell, run in runs.items()
    ]
    when = "" if is_remote(store.uri) else WHEN
    text = PAGE.format(name=escape(store.name), address=escape(address), when=when, rows="\n".join(rows))
    path = reports / LINKS
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        reports.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def log_comparison(store: Store, reports: Path) -> str | None:
    """A run of the files in `reports`, to which the description of the experiment leads.

    Returns the run's id, or None where there is no comparison or it has its run already. Runs of earlier
    comparisons become superseded. Raises ResgridError for a leaderboard that cannot be read.
    """
    if not (reports / "leaderboard.csv").is_file():
        return None
    import pandas as pd

    client = store.client
    files = [file for file in sorted(reports.glob("[!.]*")) if file.is_file()]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.name != LINKS]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    for run in client.search_runs([store.experiment_id], "tags.summary = 'begun'"):
        client.delete_run(run.info.run_id)  # an interruption left it
    earlier = client.search_runs([store.experiment_id], "tags.summary = 'current'")
    if any(run.data.tags.get("reports_sha256") == digest for run in earlier):
        return None
    try:
        frame = pd.read_csv(reports / "leaderboard.csv")
        counts = frame["status"].value_counts()
    except (ValueError, KeyError) as error:  # pandas' own are of these
        raise ResgridError(
            f"{reports / 'leaderboard.csv'}: cannot be read as a comparison ({reason(error)}). "
            "`dvc repro -f -s evaluate` makes it anew."
        ) from None
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    tags = {
        "summary": "begun",
        "reports_sha256": digest,
        "mlflow.source.name": "resgrid sync",
        "mlflow.source.type": "LOCAL",
        NOTE: f"**{len(frame)} cells**: {states}. The whole table is `{TABLE}` under Artifacts.",
    }
    now = round(1000 * time.time())
    run_id: str = client.create_run(store.experiment_id, now, tags, run_name="comparison").info.run_id
    client.log_text(run_id, frame.to_json(orient="split", index=False), TABLE)
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": TABLE, "type": "table"}]))
    for file in files:
        client.log_artifact(run_id, str(file))
    client.set_experiment_tag(store.experiment_id, NOTE, _guide(store, run_id))
    client.set_terminated(run_id, "FINISHED", now)
    for run in earlier:
        client.set_tag(run.info.run_id, "summary", "superseded")
    client.set_tag(run_id, "summary", "current")  # last: it says that all of it is there
    return run_id


def _guide(store: Store, run_id: str) -> str:
    """What stands at the head of the experiment's page."""
    runs = f"#/experiments/{store.experiment_id}/runs"
    model = f"models:/{store.name}@{CHAMPION}"
    return (
        f"Every cell of the pipeline **{store.name}** is one run; accuracies are in 0–1, with the weights of "
        f"the last epoch. [The grid]({runs}?{VIEW_QUERY}) shows the present ones, with charts; its filter "
        "`tags.grid = 'current'` leaves out what was trained again since. "
        f"[The comparison]({runs}/{run_id}/artifacts/{TABLE}) is a run with the leaderboard as a table. "
        f"The best cell is [{model}](#/models/{store.name.replace(' ', '%20')})."
    )
