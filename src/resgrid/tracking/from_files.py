"""What `resgrid sync` does: runs from the files of trained cells, champions, and a run of the comparison.

A pipeline has one registered model, called as it is, and one an architecture: `digits`, `digits+resnet20` (no
name of a pipeline has a plus sign). Each version is a cell that was the best when `sync` looked; the alias
`champion` is on the one that still is, so that `models:/digits@champion` works in whatever reads MLflow's
models.

The run of the comparison has the files of `reports/`; MLflow shows its leaderboard as a table. It has no tag
`grid`, so that the filter `tags.grid = 'current'` shows cells and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from resgrid import watch
from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.grid import compared_factors, expand
from resgrid.project import read_json
from resgrid.run_status import Run as Result
from resgrid.run_status import data_digest, find_runs, started_at
from resgrid.tracking.mirror import Snapshot, mirror, run_key, runs_of, synced, this_process
from resgrid.tracking.store import CHAMPION, REGISTRY, Store, open_store, shown, store_folder, unusable
from resgrid.tracking.view import VIEW_QUERY, save_default_view

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

TABLE = "leaderboard.csv"
NOTE = "mlflow.note.content"


@dataclass
class SyncReport:
    """What `sync` did."""

    experiment: str
    store: str
    # Of each cell: its run was complete (`unchanged`), was `completed` or `created`; its own process
    # completes it (`training`); there is no whole result (`missing`), one of other numbers, code or data
    # than today's (`stale`), or one with damaged files (`failed`).
    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of cells that are stale or failed
    superseded: list[str] = field(default_factory=list)  # ids of runs
    champions: dict[str, str | None] = field(default_factory=dict)  # models that got another cell, or none
    comparison: str | None = None  # the run that was made of the reports

    def __str__(self) -> str:
        counts = Counter(self.cells.values())
        counts["superseded"] = len(self.superseded)
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        lines = [f"MLflow: {outcomes or 'no cells'}, in {self.experiment!r} of {self.store}"]
        for name, cell in sorted(self.champions.items()):
            lines.append(f"champion of models:/{name}: {cell or 'none'}")
        lines += [f"{cell}: {why}" for cell, why in self.reasons.items()]
        return "\n  ".join(lines)


def sync(
    params: Params,
    pipeline_folder: Path,
    on_cell: Callable[[int, int], None] | None = None,
    rebuild: bool = False,
) -> SyncReport:
    """Give every cell of `params` that has a whole folder `runs/<cell>` one complete run, marked as current.

    It is the run of the folder's training, completed if it is partial, and made from the files if there is
    none. Other runs of the cell, and those of cells that are no more, become superseded; one whose process
    was killed ends as KILLED. Then the registry gets its champions and the reports their run. A second time
    there is nothing to do. With `rebuild` all of it goes into a new experiment, and the one before is
    renamed. `on_cell` is called with how many cells are done, and of how many.

    Raises ResgridError if the store or the registry cannot be used; what is wrong with single cells stands in
    the report.
    """
    store = open_store(params.name, pipeline_folder, rebuild)

    from mlflow.exceptions import MlflowException

    report, asked = SyncReport(store.name, shown(store.uri)), store.uri
    try:
        with FileLock(store_folder(store.uri) / ".resgrid/sync.lock"):  # one `sync` at a time
            runs: dict[str, list[Run]] = {}
            for run in runs_of(store):
                runs.setdefault(run.data.tags["cell"], []).append(run)
                _drop_shared_checkpoint(store, run)
            results = find_runs(expand(params), pipeline_folder)
            for done, result in enumerate(results, start=1):
                report.cells[result.cell.id] = _sync_cell(store, result, runs.pop(result.cell.id, []), report)
                if on_cell is not None:
                    on_cell(done, len(results))
            for of_former_cell in runs.values():
                report.superseded += mark_superseded(store, of_former_cell)
            asked = os.environ.get(REGISTRY) or store.uri
            current = [run for run in runs_of(store) if run.data.tags.get("grid") == "current"]
            cells = _compared(params, pipeline_folder, {run.data.tags["cell"] for run in current})
            compared = [run for run in current if run.data.tags["cell"] in cells]
            report.champions = _promote_champions(store, compared, data_digest(pipeline_folder))
            asked = store.uri
            save_default_view(store)
            report.comparison = _log_comparison(store, pipeline_folder / "reports")
    except (MlflowException, OSError) as error:
        raise unusable(asked, error) from None
    return report


def _compared(params: Params, pipeline_folder: Path, current: set[str]) -> set[str]:
    """The cells that may be champion: studies, and the grid's at the rates that `evaluate` compared."""
    findings = pipeline_folder / "reports/findings.json"
    factors = compared_factors(read_json(findings), current) if findings.is_file() else {}
    return {
        cell.id
        for cell in expand(params)
        if cell.study or cell.rate_factor == factors.get(f"{cell.architecture}-{cell.optimizer.name}", 1)
    }


def _sync_cell(store: Store, result: Result, runs: list[Run], report: SyncReport) -> str:
    cell, record = result.cell, result.record
    if record is None or not result.is_current:
        for run in runs:
            grid, sha256 = run.data.tags.get("grid"), run.data.tags.get("weights_sha256")
            is_of_it = record is not None and sha256 == record["weights_sha256"]
            if not _is_live(run):
                _settle(store, run, "stale" if is_of_it else "superseded" if grid == "current" else None)
        if record is None:
            return "missing"
        report.reasons[cell.id] = f"{result.status}: {result.reason}"
        return "stale"
    outcome = "unchanged"
    try:
        started = started_at(read_json(result.folder / "timing.json"))
        key = run_key(cell, started)
        ours = {run.info.run_id: run for run in runs if run.data.tags.get("key") == key}
        if any(_is_live(run, started // 1000) for run in ours.values()):
            return "training"
        whole = {"synced": synced(key), "weights_sha256": record["weights_sha256"]}.items()
        run_id = next((run_id for run_id, run in ours.items() if whole <= run.data.tags.items()), None)
        if run_id is None:
            run_id = mirror(store, Snapshot.from_files(cell, result.folder))
            outcome = "completed" if run_id in ours else "created"
        elif _settle(store, ours[run_id], "current"):
            store.client.update_run(run_id, name=cell.id)  # of an experiment it is called otherwise
    except (ResgridError, ValueError) as error:  # files that are damaged, or of different runs
        report.reasons[cell.id] = str(error)
        return "failed"
    report.superseded += mark_superseded(store, runs, run_id, started // 1000)
    return outcome


def mark_superseded(
    store: Store, runs: list[Run], keep: str | None = None, started: int | None = None
) -> list[str]:
    """Mark `runs` as superseded, but not `keep` nor what still trains; the ids of those that were not."""
    return [
        run.info.run_id
        for run in runs
        if run.info.run_id != keep
        and ("dvc_experiment" not in run.data.tags or run.data.tags.get("grid") == "current")
        and not _is_live(run, started)
        and _settle(store, run, "superseded")
    ]


def _settle(store: Store, run: Run, grid: str | None) -> bool:
    """End a run that is over, and set its tag `grid` unless that is None; whether it was another one."""
    if run.info.status == "RUNNING":  # SIGKILL, or the loss of the server, leaves it so
        store.client.set_terminated(run.info.run_id, "KILLED")
    if grid is None or run.data.tags.get("grid") == grid:
        return False
    store.client.set_tag(run.info.run_id, "grid", grid)
    return True


def _is_live(run: Run, started: int | None = None) -> bool:
    """Whether another process may yet log to `run`.

    On this machine that is known. On another one it counts as gone once its cell has files of a training that
    `started` (ms) no earlier. A run that has ended may still get its files, from a trainer on this machine.
    """
    process, status = run.data.tags.get("process", ""), run.info.status
    is_over = status not in ("RUNNING", "FINISHED") or (status == "FINISHED" and "synced" in run.data.tags)
    if is_over or process in ("", this_process()):
        return False
    host, _, process = process.partition(" ")
    if host == platform.node():
        return watch.alive(process)
    return status == "RUNNING" and (started is None or run.info.start_time > started)


def _drop_shared_checkpoint(store: Store, run: Run) -> None:
    """Delete the checkpoint that a worker of an earlier version has left beside its run."""
    if "shared_checkpoint" in run.data.tags:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=store.uri)
        repository.delete_artifacts("checkpoint")
        store.client.delete_tag(run.info.run_id, "shared_checkpoint")


def _promote_champions(store: Store, runs: Sequence[Run], data_digest: str | None) -> dict[str, str | None]:
    """Put the alias of every registered model on the best of `runs`, which are those of the current cells.

    Compared are completed cells on the data of `data_digest` or, where that is None since they are not here,
    on those of the latest run: by validation accuracy or, where there is no validation split, by the test
    accuracy of the last epoch; never by the best epoch. Among equals a champion stays, then the lower loss
    wins. Where there is none to compare, the alias goes. Returns, by registered model, the cells to which an
    alias moved, and None where it went.
    """
    candidates: dict[str, list[Run]] = {}
    if data_digest is None and runs:
        data_digest = max(runs, key=lambda run: run.info.start_time).data.tags["data_digest"]
    for run in runs:
        if run.data.tags.get("status") == "completed" and run.data.tags["data_digest"] == data_digest:
            for name in (store.name, f"{store.name}+{run.data.params['architecture']}"):
                candidates.setdefault(name, []).append(run)
    ours = store.client.search_registered_models(f"name LIKE '{store.name}%'", max_results=1000)
    models, moved = {model.name: model for model in ours}, dict[str, str | None]()
    for name, compared in candidates.items():
        if cell := _promote(store, name, models.get(name), compared):
            moved[name] = cell
    for name in models.keys() - candidates.keys():
        if models[name].tags.get("pipeline") == store.name and CHAMPION in models[name].aliases:
            store.client.delete_registered_model_alias(name, CHAMPION)
            moved[name] = None
    return moved


def _promote(store: Store, name: str, model: RegisteredModel | None, runs: list[Run]) -> str | None:
    """The cell that is the champion from now on, if it was not before; `model` is made where it is None."""
    client = store.client
    if model is None:
        what = f"The best current cell has the alias `{CHAMPION}`. Input: RGB images (N, 3, 32, 32) on 0–1."
        model = client.create_registered_model(name, {"pipeline": store.name}, what)
    # By the run: one of another experiment, as before a rebuild, has its files elsewhere.
    versions = client.search_model_versions(f"name = '{name}'", max_results=1000)
    reigning = next(
        (each for each in versions if str(each.version) == str(model.aliases.get(CHAMPION))), None
    )
    split = "validation" if all("validation_accuracy" in run.data.metrics for run in runs) else "test"

    def strength(run: Run) -> tuple[float, bool, float, str]:
        metrics, tags = run.data.metrics, run.data.tags
        # Also one that was trained again without a change reigns.
        reigns = reigning is not None and reigning.tags.get("weights_sha256") == tags["weights_sha256"]
        return metrics[f"{split}_accuracy"], reigns, -metrics[f"{split}_loss"], tags["cell"]

    best = max(runs, key=strength)
    if reigning is not None and reigning.run_id == best.info.run_id:
        return None
    version = next((each.version for each in versions if each.run_id == best.info.run_id), None)
    if version is None:  # with its lineage as tags
        tags, accuracy = best.data.tags | best.data.params, best.data.metrics[f"{split}_accuracy"]
        from_run = ("cell", "data_digest", "git_commit", "git_dirty", "weights_sha256")
        lineage = {key: tags[key] for key in (*from_run, "architecture", "optimizer", "seed") if key in tags}
        lineage |= {"chosen_by": f"{split} accuracy", "accuracy": f"{accuracy:.4f}"}
        assert best.outputs is not None, "a complete run has its model"
        logged = client.get_logged_model(best.outputs.model_outputs[0].model_id)
        version = client.create_model_version(
            name,
            logged.artifact_location,  # `models:/…` would be looked up in the global store, whichever that is
            best.info.run_id,
            lineage,
            description=f"{tags['cell']}: {split} accuracy {accuracy:.2%} after epoch {tags['epochs']}.",
            model_id=logged.model_id,
        ).version
    client.set_registered_model_alias(name, CHAMPION, str(version))
    return str(best.data.tags["cell"])


def _log_comparison(store: Store, reports: Path) -> str | None:
    """A run of the files in `reports`, to which the description of the experiment leads.

    Returns the run's id, or None where there is no comparison or it has its run already. Runs of earlier
    comparisons become superseded.
    """
    if not (reports / TABLE).is_file():
        return None
    client, number = store.client, store.experiment_id
    files = [file for file in sorted(reports.glob("[!.]*")) if file.is_file()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()
    earlier = client.search_runs([number], "tags.summary = 'current'")
    if any(run.data.tags.get("reports_sha256") == digest for run in earlier):
        return None
    tags = {"summary": "current", NOTE: f"The table is `{TABLE}` under Artifacts, the report `index.html`."}
    now = round(1000 * time.time())
    run_id: str = client.create_run(number, now, tags, run_name="comparison").info.run_id
    for file in files:
        client.log_artifact(run_id, str(file))
    page = f"#/experiments/{number}/runs"
    guide = (
        f"Each cell of the pipeline **{store.name}** is one run; accuracies are in 0–1, with the weights of "
        f"the last epoch. [The grid]({page}?{VIEW_QUERY}) shows the current ones, with charts. "
        f"[The comparison]({page}/{run_id}/artifacts/{TABLE}) is a run with the leaderboard as a table. "
        f"[The best cell](#/models/{store.name.replace(' ', '%20')}) is `models:/{store.name}@{CHAMPION}`."
    )
    client.set_experiment_tag(number, NOTE, guide)
    client.set_terminated(run_id, "FINISHED", now)
    for run in earlier:
        client.set_tag(run.info.run_id, "summary", "superseded")
    client.set_tag(run_id, "reports_sha256", digest)  # last: it says that all of it is there
    return run_id
