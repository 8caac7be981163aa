"""Runs from the files of trained cells: what `resgrid sync` does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.grid import compared_factors, expand
from resgrid.project import read_json
from resgrid.run_status import Run as Result
from resgrid.run_status import data_digest, find_runs, started_at
from resgrid.tracking.mirror import Snapshot, mirror, run_key, runs_of, synced
from resgrid.tracking.registry import promote_champions, selection_split
from resgrid.tracking.reports import log_comparison
from resgrid.tracking.runs import end_killed, is_live, mark, mark_superseded
from resgrid.tracking.store import Store, open_store, registry_uri, shown, sync_lock, unusable
from resgrid.tracking.view import save_default_view

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)


@dataclass
class SyncReport:
    """What `sync` found and did, by the ids of cells; `superseded` are the ids of runs."""

    experiment: str
    store: str
    unchanged: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    training: list[str] = field(default_factory=list)  # their own processes complete them
    missing: list[str] = field(default_factory=list)  # no whole folder runs/<cell>
    stale: dict[str, str] = field(default_factory=dict)  # of other numbers, code or data than today's; why
    failed: dict[str, str] = field(default_factory=dict)  # why
    champions: dict[str, str | None] = field(default_factory=dict)  # models that got another cell, or none
    accuracies: dict[str, str] = field(default_factory=dict)  # of these cells, as they were compared
    summary: str | None = None  # the run that was made of the reports

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        num_done = len(self.unchanged) + len(self.completed) + len(self.created)
        changed = {
            "created": self.created,
            "completed": self.completed,
            "of replaced weights, now tagged superseded": self.superseded,
        }
        changes = ", ".join(f"{len(ids)} {what}" for what, ids in changed.items() if ids)
        lines = [
            f"MLflow: {num_done} cells of {self.experiment!r} have their complete run in {self.store} "
            f"({changes or 'nothing to add'})"
        ]
        if self.missing:
            lines.append(f"  without a result yet: {', '.join(self.missing)}")
        if self.training:
            lines.append(f"  training now: {', '.join(self.training)}")
        for name, cell in sorted(self.champions.items()):
            champion = f"{cell}, {self.accuracies[cell]}" if cell else "none: no current cell"
            lines.append(f"  champion of models:/{name}: {champion}")
        if self.summary:
            lines.append(f"  the comparison is run {self.summary}")
        lines += [f"  {cell}: {why}" for cell, why in (self.stale | self.failed).items()]
        return "\n".join(lines)


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
        with sync_lock(store.uri):
            runs: dict[str, list[Run]] = {}
            for run in runs_of(store):
                runs.setdefault(run.data.tags["cell"], []).append(run)
                _drop_shared_checkpoint(store, run)
            results = find_runs(expand(params), pipeline_folder)
            for done, result in enumerate(results, start=1):
                _sync_cell(store, result, runs.pop(result.cell.id, []), report)
                if on_cell is not None:
                    on_cell(done, len(results))
            for of_former_cell in runs.values():
                report.superseded += mark_superseded(store, of_former_cell)
            current = [run for run in runs_of(store) if run.data.tags.get("grid") == "current"]
            asked = registry_uri(store.uri)
            cells = _compared(params, pipeline_folder, {run.data.tags["cell"] for run in current})
            compared = [run for run in current if run.data.tags["cell"] in cells]
            report.champions = promote_champions(store, compared, data_digest(pipeline_folder))
            asked = store.uri
            report.accuracies = {cell: _accuracy(current, cell) for cell in report.champions.values() if cell}
            try:
                save_default_view(store)
            except MlflowException as error:
                log.debug("%s: the default view of the page of runs: %s", shown(store.uri), error)
            report.summary = log_comparison(store, pipeline_folder / "reports")
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


def _accuracy(runs: list[Run], cell: str) -> str:
    """`test 52.10 %` or, where there is a validation split, its accuracy: what a champion was chosen by."""
    run = next(run for run in runs if run.data.tags["cell"] == cell)
    split = selection_split([run])
    return f"{split} {100 * run.data.metrics[f'{split}_accuracy']:.2f} %"


def _sync_cell(store: Store, result: Result, runs: list[Run], report: SyncReport) -> None:
    cell, record = result.cell, result.record
    if record is None or not result.is_current:
        if record is None:
            report.missing.append(cell.id)
        else:
            report.stale[cell.id] = f"{result.status}: {result.reason}"
        for each in runs:
            if is_live(each):
                continue
            end_killed(store, each)
            is_of_it = record is not None and each.data.tags.get("weights_sha256") == record["weights_sha256"]
            if each.data.tags.get("grid") == "current" or is_of_it:
                mark(store, each, "stale" if is_of_it else "superseded")
        return
    try:
        started = started_at(read_json(result.folder / "timing.json"))
        key = run_key(record["cell_digest"], started)
        ours = [run for run in runs if run.data.tags.get("key") == key]
        complete = [
            run
            for run in ours
            if run.data.tags.get("synced") == synced(key)
            and run.data.tags["weights_sha256"] == record["weights_sha256"]
        ]
        if any(is_live(run, started // 1000) for run in ours):
            report.training.append(cell.id)
            return
        if complete:
            run_id = complete[0].info.run_id
            if mark(store, complete[0], "current"):
                store.client.update_run(run_id, name=cell.id)  # of an experiment it is called otherwise
            report.unchanged.append(cell.id)
        else:
            run_id = mirror(store, Snapshot.from_files(cell, result.folder))
            known = [run.info.run_id for run in ours]
            (report.completed if run_id in known else report.created).append(cell.id)
    except ResgridError as error:
        report.failed[cell.id] = str(error)
        return
    report.superseded += mark_superseded(store, runs, run_id, started // 1000)


def _drop_shared_checkpoint(store: Store, run: Run) -> None:
    """Delete the checkpoint that a worker of an earlier version has left beside its run."""
    if "shared_checkpoint" in run.data.tags:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=store.uri)
        repository.delete_artifacts("checkpoint")
        store.client.delete_tag(run.info.run_id, "shared_checkpoint")
