"""The comparison as a run of its own.

It has the leaderboard as a table and the files of `reports/`. It has no tag `grid`, so that
the filter `tags.grid = 'current'` shows cells and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from resgrid.errors import ResgridError
from resgrid.tracking.registry import CHAMPION
from resgrid.tracking.store import Store, reason
from resgrid.tracking.view import VIEW_QUERY

TABLE = "leaderboard.json"
NOTE = "mlflow.note.content"


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
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
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
