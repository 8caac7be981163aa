"""The comparison in MLflow: one run with the leaderboard as a table and the files of `reports/`.

It has no tag `grid`, so that the filter `tags.grid = 'current'` shows cells and nothing else; the description
of the experiment links to it, and says how to compare the cells.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from resgrid.errors import ResgridError
from resgrid.run_status import STATUSES
from resgrid.tracking.links import NAME as LINKS
from resgrid.tracking.links import linked
from resgrid.tracking.registry import CHAMPION
from resgrid.tracking.store import Store, reason
from resgrid.tracking.view import VIEW_QUERY

if TYPE_CHECKING:
    import pandas as pd

TABLE = "leaderboard.json"
FIRST = (  # the columns that fit on a page
    "cell", "status", "test_accuracy", "validation_accuracy", "train_accuracy", "best_test_accuracy",
    "train_seconds", "num_parameters",
)  # fmt: skip
UNITS = {"train_seconds": "training (s)", "images_per_second": "images/s"}
NOTE = "mlflow.note.content"


def summarize(store: Store, reports: Path, pages: Mapping[str, str]) -> str | None:
    """A run of the files in `reports`, and the description of the experiment.

    In its copy of the report each cell leads to the address of its run that `pages` has.

    Returns the run's id, or None where there is no comparison or it has its run already. Runs of earlier
    comparisons become superseded. Raises ResgridError for a leaderboard that cannot be read.
    """
    if not (reports / "leaderboard.csv").is_file():
        return None
    import pandas as pd

    client = store.client
    digest = _digest(reports)
    for run in client.search_runs([store.experiment_id], "tags.summary = 'begun'"):
        client.delete_run(run.info.run_id)  # an interruption left it
    earlier = client.search_runs([store.experiment_id], "tags.summary = 'current'")
    if any(run.data.tags.get("reports_sha256") == digest for run in earlier):
        return None
    try:
        frame = pd.read_csv(reports / "leaderboard.csv")
        note = _headline(frame, pages)
    except (ValueError, KeyError) as error:  # pandas' own are of these
        raise ResgridError(
            f"{reports / 'leaderboard.csv'}: cannot be read as a comparison ({reason(error)}). "
            "`dvc repro -f --single-item evaluate` makes it anew."
        ) from None
    now = round(1000 * time.time())
    run_id: str = client.create_run(
        store.experiment_id,
        now,
        {
            "summary": "begun",
            "reports_sha256": digest,
            "mlflow.source.name": "resgrid sync",
            "mlflow.source.type": "LOCAL",
            NOTE: note,
        },
        run_name="comparison",
    ).info.run_id
    table = readable(frame)
    content = table.astype(object).where(table.notna(), None).to_dict(orient="split", index=False)
    client.log_dict(run_id, content, TABLE)
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": TABLE, "type": "table"}]))
    for file in _files(reports):
        place = file.relative_to(reports)
        if place == Path("index.html"):
            client.log_text(run_id, linked(file.read_text(encoding="utf-8"), pages), place.as_posix())
        elif place.name != LINKS:
            client.log_artifact(
                run_id, str(file), None if place.parent == Path() else place.parent.as_posix()
            )
    client.set_experiment_tag(store.experiment_id, NOTE, _guide(store, run_id))
    client.set_terminated(run_id, "FINISHED", now)
    for run in earlier:
        client.set_tag(run.info.run_id, "summary", "superseded")
    client.set_tag(run_id, "summary", "current")  # last: it says that all of it is there
    return run_id


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The leaderboard with accuracies in percent, units in the names of its columns, and results first."""
    columns = [column for column in FIRST if column in frame]
    table, names = frame[columns + [column for column in frame if column not in FIRST]].copy(), {}
    for column in frame:
        name = str(column)
        if name.endswith("_accuracy") or name == "difference":
            table[column] = (100 * frame[column]).round(2)
            names[name] = f"{name.replace('_', ' ')} (%)"
        else:
            names[name] = UNITS.get(name, name.replace("_", " "))
    return table.rename(columns=names)


def _headline(frame: pd.DataFrame, pages: Mapping[str, str]) -> str:
    """How much there is, and the first five of it, linked to their runs."""
    counts = frame["status"].value_counts()
    known = [f"{counts[status]} {status}" for status in STATUSES if status in counts]

    def link(cell: str) -> str:
        return f"[{cell}]({pages[cell][pages[cell].index('#') :]})" if cell in pages else cell

    lines = [f"**{len(frame)} cells**: {', '.join(known)}. The whole table is `{TABLE}` under Artifacts.", ""]
    best = frame[frame["status"] == "completed"].head(5)
    if len(best) and {"test_accuracy", "train_seconds"} <= set(frame):
        lines += ["| cell | test accuracy | training |", "|:--|--:|--:|"]
        lines += [
            f"| {link(row['cell'])} | {row['test_accuracy']:.2%} | {row['train_seconds']:,.0f} s |"
            for row in best.to_dict(orient="records")
        ]
    return "\n".join(lines)


def _guide(store: Store, run_id: str) -> str:
    """What stands at the head of the experiment's page."""
    grid = f"#/experiments/{store.experiment_id}/runs?{VIEW_QUERY}"
    return (
        f"Every cell of the pipeline **{store.name}** is one run. [The grid]({grid}) is a view of the "
        "present ones, with charts; its filter `tags.grid = 'current'` leaves out what was trained again "
        "since. Group by the params `architecture`, `optimizer` or `seed`; select runs and press *Compare* "
        "for parallel coordinates; *Chart* overlays "
        "learning curves. Accuracies are in 0–1, with the weights of the last epoch.\n\n"
        f"[The comparison](#/experiments/{store.experiment_id}/runs/{run_id}/artifacts/{TABLE}) is a run "
        "of its own, with the leaderboard as a table. The best cell is "
        f"[models:/{store.name}@{CHAMPION}](#/models/{store.name.replace(' ', '%20')})."
    )


def _files(reports: Path) -> Iterator[Path]:
    for file in sorted(reports.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(reports).parts)
        if file.is_file() and not is_hidden and file.suffix != ".safetensors":  # logits, 400 kB a cell
            yield file


def _digest(reports: Path) -> str:
    sha256 = hashlib.sha256()
    for file in _files(reports):
        for part in (file.relative_to(reports).as_posix().encode(), file.read_bytes()):
            sha256.update(len(part).to_bytes(8) + part)
    return sha256.hexdigest()
