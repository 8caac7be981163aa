"""A cell's run while it trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from resgrid.grid import Cell
from resgrid.runs import read_json
from resgrid.tracking import contents
from resgrid.tracking.from_files import retire, runs_of
from resgrid.tracking.store import Store, open_store, reason

if TYPE_CHECKING:
    from resgrid.data.dataset import Meta
    from resgrid.training.engine import Epoch


def live_run(name: str, cell: Cell, meta: Meta, folder: Path | None = None) -> LiveRun:
    """A context manager that logs the training of `cell` into the experiment `name` as it goes on.

    `with live_run(…) as run:`, then `run.log_epoch(epoch)` after each, and `run.complete(run_folder)` when
    the files are written. The run ends as FINISHED, as KILLED by Ctrl-C or SystemExit (into which the command
    line turns SIGTERM), or as FAILED by another exception.

    Nothing here raises, and only `complete` and the end wait for MLflow. Where that fails, one line on stderr
    says so, training goes on, and `sync` completes the run another day.
    """
    return LiveRun(name, cell, meta, folder)


class LiveRun:
    """See `live_run`. What is called here is done, in turn, by the one thread that talks to MLflow."""

    def __init__(self, name: str, cell: Cell, meta: Meta, folder: Path | None = None) -> None:
        self._name, self._cell, self._meta, self._folder = name, cell, meta, folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._store: Store | None = None
        self._run_id = ""
        self._monitor: Any = None  # MLflow's, which has no types
        self._failed = False  # until the end nothing more is tried: each try may take seconds
        self._over = False

    def __enter__(self) -> Self:
        self._thread.submit(self._attempt, self._start, _now())
        return self

    def log_epoch(self, epoch: Epoch) -> None:
        """The figures of one epoch; returns at once."""
        if not self._failed:
            self._thread.submit(self._attempt, self._log_epoch, epoch, _now())

    def complete(self, run_folder: Path) -> None:
        """All that is left, from the files that training has written: outcome, artifacts, model."""
        self._thread.submit(self._attempt, self._finish, run_folder, _now()).result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._thread.submit(self._attempt, self._end, status)
        self._thread.shutdown(wait=True)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # whatever MLflow, its database or the network comes up with
            if not self._failed:
                print(
                    f"resgrid: MLflow does not get all of {self._cell.id}: {reason(error)}\n"
                    "resgrid: this does not touch the training; `resgrid sync` completes the run later.",
                    file=sys.stderr,
                    flush=True,
                )
            self._failed = True

    def _start(self, start_time: int) -> None:
        store = open_store(self._name, self._folder)
        self._run_id = contents.create(store, self._cell, self._meta.digest, "live", start_time)
        self._store = store
        contents.log_data(store, self._run_id, self._meta.digest, self._meta)

        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self._run_id, tracking_uri=store.uri)  # type: ignore[no-untyped-call]
        self._monitor.collect_metrics()  # psutil counts CPU load from the last look, for each thread
        self._monitor.start()

    def _log_epoch(self, epoch: Epoch, timestamp: int) -> None:
        from mlflow.entities import Metric

        if self._store is None or self._failed:
            return
        figures = {key: getattr(epoch, key) for key in contents.EACH_EPOCH}
        metrics = [
            Metric(key, value, timestamp, epoch.epoch) for key, value in figures.items() if value is not None
        ]
        self._store.client.log_batch(self._run_id, metrics=metrics)

    def _finish(self, run_folder: Path, end_time: int) -> None:
        if self._store is None:
            return
        self._over = True  # from here on an error is for `sync`: ending the run would fail as well
        self._stop_monitor()
        contents.complete(self._store, self._run_id, self._cell, run_folder, self._meta, end_time)
        started = contents.started_at(read_json(run_folder / "timing.json"))
        retire(self._store, runs_of(self._store, self._cell.id), self._run_id, started)

    def _end(self, status: str) -> None:
        if self._store is None or self._over:
            return
        self._stop_monitor()
        self._store.client.set_terminated(self._run_id, status)

    def _stop_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        monitor.finish()
        # A last sample, so that a run shorter than MLflow's interval of 10 s has one. Its CPU load is the
        # mean over the whole run.
        for part in monitor.monitors:
            part.clear_metrics()
        monitor.collect_metrics()
        monitor.publish_metrics(monitor.aggregate_metrics())
        monitor.mlflow_logger.flush()


def _now() -> int:
    return time.time_ns() // 1_000_000
