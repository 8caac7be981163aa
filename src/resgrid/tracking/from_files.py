"""Runs from the files of trained cells: what `resgrid sync` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.run_status import Run as Result
from resgrid.run_status import data_digest, find_runs, read_json
from resgrid.tracking import contents, shared
from resgrid.tracking.cell_runs import end_killed, is_live, mark, retire, runs_of, start_second
from resgrid.tracking.registry import crown, judge
from resgrid.tracking.reports import log_comparison, write_links
from resgrid.tracking.store import Store, open_store, project_root, shown, unusable
from resgrid.tracking.view import arrange

if TYPE_CHECKING:
    from mlflow.entities import Run


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
            told = f"{cell}, {self.accuracies[cell]}" if cell else "none, for no cell of it is current"
            lines.append(f"  champion of models:/{name}: {told}")
        if self.summary:
            lines.append(f"  the comparison is run {self.summary}")
        lines += [f"  {cell}: {why}" for cell, why in (self.stale | self.failed).items()]
        return "\n".join(lines)


def sync(
    params: Params, pipeline_folder: Path, on_cell: Callable[[int, int], None] | None = None
) -> SyncReport:
    """Give every cell of `params` that has a whole folder `runs/<cell>` one complete run, marked as current.

    A run is found by its cell and the digest of its weights, completed if it is partial, and made from the
    files if there is none. Other runs of the cell, and those of cells that are no more, become superseded;
    one whose process was killed ends as KILLED. Then the registry gets its champions, the reports their run,
    and `reports/runs.html` the links from the report to the runs. A second time there is nothing to do.
    `on_cell` is told how many cells are done, and of how many.
    Raises ResgridError if the store cannot be used; what is wrong with single cells stands in the report.
    """
    store = open_store(params.name, pipeline_folder)

    from mlflow.exceptions import MlflowException

    report = SyncReport(store.name, shown(store.uri))
    lock = project_root(pipeline_folder) / ".resgrid" / "sync.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock):
            runs: dict[str, list[Run]] = {}
            for run in runs_of(store):
                runs.setdefault(run.data.tags["cell"], []).append(run)
            results = find_runs(expand(params), pipeline_folder)
            links: dict[str, str] = {}
            for done, result in enumerate(results, start=1):
                run_id = _sync_cell(store, result, runs.pop(result.cell.id, []), report)
                if run_id:
                    links[result.cell.id] = run_id
                if on_cell is not None:
                    on_cell(done, len(results))
            for of_former_cell in runs.values():
                report.superseded += retire(store, of_former_cell)
            if links:
                write_links(store, links, pipeline_folder / "reports")
            settled = [run for run in runs_of(store) if "grid" in run.data.tags]
            for run in settled:
                shared.drop(store, run)
            current = [run for run in settled if run.data.tags["grid"] == "current"]
            report.champions = crown(store, current, data_digest(pipeline_folder))
            report.accuracies = {cell: _accuracy(current, cell) for cell in report.champions.values() if cell}
            arrange(store)
            report.summary = log_comparison(store, pipeline_folder / "reports")
    except (MlflowException, OSError) as error:
        raise unusable(store.uri, error) from None
    return report


def _accuracy(runs: list[Run], cell: str) -> str:
    """`test 52.10 %` or, where there is a validation split, its accuracy: what a champion was chosen by."""
    run = next(run for run in runs if run.data.tags["cell"] == cell)
    split = judge([run])
    return f"{split} {100 * run.data.metrics[f'{split}_accuracy']:.2f} %"


def _sync_cell(store: Store, result: Result, runs: list[Run], report: SyncReport) -> str | None:
    """The id of the cell's run: without a current result that of its last attempt, if there is one."""
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
            tags = each.data.tags
            is_of_it = record is not None and tags.get("weights_sha256") == record["weights_sha256"]
            if tags.get("grid") == "current" or is_of_it:
                mark(store, each, "stale" if is_of_it else "superseded")
        last = max(runs, key=lambda run: run.info.start_time, default=None)
        return str(last.info.run_id) if last else None
    try:
        started = contents.started_at(read_json(result.folder / "timing.json"))
        run = _find(runs, cell, record, started)
        if run and is_live(run, started):
            report.training.append(cell.id)
            return str(run.info.run_id)
        if run and run.data.tags.get("synced") == f"{record['weights_sha256']}:{contents.FORMAT}":
            run_id, done = run.info.run_id, report.unchanged
            if mark(store, run, "current"):
                store.client.update_run(run_id, name=cell.id)  # of an experiment it is called otherwise
        else:
            run_id = contents.complete(store, run.info.run_id if run else None, cell, result.folder)
            done = report.completed if run else report.created
    except ResgridError as error:
        report.failed[cell.id] = str(error)
        return None
    done.append(cell.id)
    report.superseded += retire(store, runs, run_id, started)
    return str(run_id)


def _find(runs: list[Run], cell: Cell, metrics: dict[str, Any], started: int) -> Run | None:
    """The run that records these metrics, or one that logged the training but not its end."""
    params = contents.params_of(cell)

    def agrees(run: Run) -> bool:
        return all(run.data.params.get(key) == value for key, value in params.items())

    candidates = [run for run in runs if run.data.tags.get("weights_sha256") == metrics["weights_sha256"]]
    candidates = candidates or [
        run
        for run in runs
        if not {"weights_sha256", "dvc_experiment"} & run.data.tags.keys()
        and run.data.tags["data_digest"] == metrics["data_digest"]
        and run.info.status in ("RUNNING", "FINISHED")
        and start_second(run) <= started
        and agrees(run)
    ]
    # Several have the same weights where a cell was trained again without a change, as by `dvc repro -f`.
    return max(
        candidates,
        key=lambda run: (
            agrees(run),
            "synced" in run.data.tags,
            run.data.tags.get("grid") == "current",
            run.info.start_time,
            run.info.run_id,
        ),
        default=None,
    )
