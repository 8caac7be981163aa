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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from resgrid import watch
from resgrid.cell_states import CellState, cell_states
from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.grid import compared_factors, expand
from resgrid.project import project_root, read_json
from resgrid.run_status import Run as Result
from resgrid.run_status import started_at
from resgrid.tracking.mirror import NOTE, Snapshot, mirror, run_key, runs_of, synced, this_process
from resgrid.tracking.store import CHAMPION, REGISTRY, Store, open_store, shown, store_folder, unusable
from resgrid.tracking.view import VIEW_QUERY, save_default_view

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

TABLE = "leaderboard.csv"
LINEAGE = (  # of a version, from the tags and params of its run
    "cell", "data_digest", "git_commit", "git_dirty", "weights_sha256", "architecture", "optimizer", "seed",
)  # fmt: skip


@dataclass
class SyncReport:
    """What `sync` did."""

    experiment: str
    store: str
    # Of a cell with a current result: its run was complete (`unchanged`), was `completed` or `created`, its
    # own process completes it (`running`), or its files are `damaged`; of others the state of the cell.
    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why a cell has no complete run, where it is known
    superseded: list[str] = field(default_factory=list)  # ids of runs
    champions: dict[str, str | None] = field(default_factory=dict)  # models that got another cell, or none
    comparison: str | None = None  # the run to which the reports went

    def __str__(self) -> str:
        counts = Counter(self.cells.values())
        counts["superseded"] = len(self.superseded)
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        lines = [f"MLflow: {outcomes or 'no cells'}, in {self.experiment!r} of {self.store}"]
        for name, cell in sorted(self.champions.items()):
            lines.append(f"champion of models:/{name}: {cell or 'none'}")
        return "\n  ".join(lines + [f"{cell}: {why}" for cell, why in self.reasons.items()])


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
            states = cell_states(expand(params), pipeline_folder.resolve(), project_root(pipeline_folder))
            complete: dict[str, Result] = {}  # by the id of the run
            for done, state in enumerate(states, start=1):
                if run_id := _sync_cell(store, state, runs.pop(state.cell.id, []), report):
                    complete[run_id] = state.run
                if on_cell is not None:
                    on_cell(done, len(states))
            report.superseded += settle(store, [run for of_former in runs.values() for run in of_former])
            save_default_view(store)
            report.comparison = _log_comparison(store, pipeline_folder / "reports")
            asked = os.environ.get(REGISTRY) or store.uri
            report.champions = _promote_champions(store, pipeline_folder, complete)
    except (MlflowException, OSError) as error:
        raise unusable(asked, error) from None
    return report


def _sync_cell(store: Store, state: CellState, runs: list[Run], report: SyncReport) -> str | None:
    """Complete the run of a cell's current result; its id, or None if there is none to be complete."""
    cell, result, record = state.cell, state.run, state.run.record
    if record is None or not result.is_current:
        report.cells[cell.id] = state.word
        if state.reason:
            report.reasons[cell.id] = f"{state.word}: {state.reason}"
        settle(store, runs, stale=record["weights_sha256"] if record else "", all_others=False)
        return None
    try:
        started = started_at(read_json(result.folder / "timing.json"))
        key = run_key(cell, started)
        ours = {run.info.run_id: run for run in runs if run.data.tags.get("key") == key}
        if any(_is_live(run, started // 1000) for run in ours.values()):
            report.cells[cell.id] = "running"
            return None
        whole = {"synced": synced(key), "weights_sha256": record["weights_sha256"]}.items()
        run_id = next((run_id for run_id, run in ours.items() if whole <= run.data.tags.items()), None)
        report.cells[cell.id] = "unchanged"
        if run_id is None:
            run_id = mirror(store, Snapshot.from_files(cell, result.folder))
            report.cells[cell.id] = "completed" if run_id in ours else "created"
    except (ResgridError, ValueError) as error:  # files that are damaged, or of different runs
        report.cells[cell.id], report.reasons[cell.id] = "damaged", str(error)
        return None
    report.superseded += settle(store, runs, run_id, started // 1000)
    return run_id


def settle(
    store: Store,
    runs: Sequence[Run],
    current: str | None = None,
    started: int | None = None,
    stale: str = "",
    all_others: bool = True,
) -> list[str]:
    """End those of a cell's `runs` that are over, and tag each; returns the ids of those now superseded.

    The run of the id `current` is current, one of weights of the SHA-256 `stale` is stale; superseded are
    those that were current and, with `all_others`, all but those of DVC's experiments.
    """
    superseded = []
    for run in runs:
        run_id, tags = run.info.run_id, run.data.tags
        if _is_live(run, started):
            continue
        if run.info.status == "RUNNING" and run_id != current:  # as SIGKILL leaves it, or a lost server
            store.client.set_terminated(run_id, "KILLED")
        grid = was = tags.get("grid")
        if run_id == current:
            grid = "current"
        elif stale and tags.get("weights_sha256") == stale:
            grid = "stale"
        elif was == "current" or (all_others and "dvc_experiment" not in tags):
            grid = "superseded"
        if grid != was:
            store.client.set_tag(run_id, "grid", grid)
            if run_id == current:
                store.client.update_run(run_id, name=tags["cell"])  # of an experiment it is called otherwise
            superseded += [run_id] if grid == "superseded" else []
    return superseded


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


# --- champions --------------------------------------------------------------------------------------


def _promote_champions(store: Store, pipeline: Path, complete: dict[str, Result]) -> dict[str, str | None]:
    """Put the alias of every registered model on the best of the `complete` results, by the ids of runs.

    Compared are completed cells: studies, and the grid's at the rates that `evaluate` compared. Where there
    is none, the alias goes. Returns, by registered model, the cells to which an alias moved, and None where
    it went.
    """
    findings = pipeline / "reports/findings.json"
    current = {result.cell.id for result in complete.values()}
    factors = compared_factors(read_json(findings), current) if findings.is_file() else {}
    candidates: dict[str, dict[str, Result]] = {}
    for run_id, result in complete.items():
        cell, factor = result.cell, factors.get(f"{result.cell.architecture}-{result.cell.optimizer.name}", 1)
        if result.status == "completed" and (cell.study or cell.rate_factor == factor):
            for name in (store.name, f"{store.name}+{cell.architecture}"):
                candidates.setdefault(name, {})[run_id] = result
    ours = store.client.search_registered_models(f"name LIKE '{store.name}%'", max_results=1000)
    models, moved = {model.name: model for model in ours}, dict[str, str | None]()
    for name, results in candidates.items():
        if best := _promote(store, name, models.get(name), results):
            moved[name] = results[best].cell.id
    for name in models.keys() - candidates.keys():
        if models[name].tags.get("pipeline") == store.name and CHAMPION in models[name].aliases:
            store.client.delete_registered_model_alias(name, CHAMPION)
            moved[name] = None
    return moved


def _promote(
    store: Store, name: str, model: RegisteredModel | None, results: dict[str, Result]
) -> str | None:
    """The run that is the champion from now on, if it was not before; `model` is made where it is None.

    The best by validation accuracy or, where there is no validation split, by the test accuracy of the last
    epoch; never by the best epoch. Among equals a champion stays, then the lower loss wins.
    """
    client = store.client
    if model is None:
        what = f"The best current cell has the alias `{CHAMPION}`. Input: RGB images (N, 3, 32, 32) on 0–1."
        model = client.create_registered_model(name, {"pipeline": store.name}, what)
    # By the run: one of another experiment, as before a rebuild, has its files elsewhere.
    versions = {v.run_id: v for v in client.search_model_versions(f"name = '{name}'", max_results=1000)}
    place = str(model.aliases.get(CHAMPION))
    reigning = next((each for each in versions.values() if str(each.version) == place), None)
    records = {run_id: result.record for run_id, result in results.items() if result.record}
    has_validation = all(record["validation_accuracy"] is not None for record in records.values())
    split = "validation" if has_validation else "test"

    def strength(run_id: str) -> tuple[float, bool, float, str]:
        record = records[run_id]
        # Also one that was trained again without a change reigns.
        reigns = reigning is not None and reigning.tags.get("weights_sha256") == record["weights_sha256"]
        return record[f"{split}_accuracy"], reigns, -record[f"{split}_loss"], record["cell"]

    best = max(records, key=strength)
    if reigning is not None and reigning.run_id == best:
        return None
    version = versions.get(best)
    if version is None:
        run, accuracy = client.get_run(best), records[best][f"{split}_accuracy"]
        assert run.outputs is not None, "a complete run has its model"
        known = run.data.tags | run.data.params
        lineage = {key: known[key] for key in LINEAGE if key in known}
        logged = client.get_logged_model(run.outputs.model_outputs[0].model_id)
        version = client.create_model_version(
            name,
            logged.artifact_location,  # `models:/…` would be looked up in the global store, whichever that is
            best,
            lineage | {"chosen_by": f"{split} accuracy", "accuracy": f"{accuracy:.4f}"},
            description=f"{known['cell']}: {split} accuracy {accuracy:.2%} after epoch {known['epochs']}.",
            model_id=logged.model_id,
        )
    client.set_registered_model_alias(name, CHAMPION, str(version.version))
    return best


# --- the comparison ---------------------------------------------------------------------------------


def _log_comparison(store: Store, reports: Path) -> str | None:
    """Put the files of the report into the run to which the description of the experiment leads.

    Returns the run's id, or None where there is no report, or the run has it.
    """
    findings, client, number = reports / "findings.json", store.client, store.experiment_id
    if not findings.is_file():
        return None
    digest = hashlib.sha256(findings.read_bytes()).hexdigest()
    runs = client.search_runs([number], "tags.summary = 'current'")
    if runs and runs[0].data.tags.get("reports_sha256") == digest:
        return None
    run = runs[0] if runs else client.create_run(number, tags={"summary": "current"}, run_name="comparison")
    run_id, page = str(run.info.run_id), f"#/experiments/{number}/runs"
    for file in sorted(reports.glob("[!.]*.*")):
        client.log_artifact(run_id, str(file))
    guide = (
        f"Each cell of the pipeline **{store.name}** is one run; accuracies are in 0–1, with the weights of "
        f"the last epoch. [The grid]({page}?{VIEW_QUERY}) shows the current ones, with charts. "
        f"[The comparison]({page}/{run_id}/artifacts/{TABLE}) is a run with the leaderboard as a table. "
        f"[The best cell](#/models/{store.name.replace(' ', '%20')}) is `models:/{store.name}@{CHAMPION}`."
    )
    client.set_experiment_tag(number, NOTE, guide)
    client.set_terminated(run_id, "FINISHED")
    client.set_tag(run_id, "reports_sha256", digest)  # last: it says that all of it is there
    return run_id
