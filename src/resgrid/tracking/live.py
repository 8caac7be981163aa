"""A cell's run while it trains."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from resgrid.grid import Cell
from resgrid.provenance import experiment
from resgrid.run_status import read_json
from resgrid.tracking import contents, shared
from resgrid.tracking.cell_runs import is_live, retire, runs_of
from resgrid.tracking.store import Store, open_store, reason, shown

if TYPE_CHECKING:
    from mlflow.entities import Run

    from resgrid.training.engine import Epoch

LAST_WORD_SECONDS = 7.0  # for MLflow when the process is to end, which it has 10 s for


class LiveRun:
    """A context manager that logs the training of `cell` into the experiment `name` as it goes on.

    The run of an earlier start of the same `training`, a digest, goes on, with no epoch logged twice, unless
    it has epochs and this start begins anew: at `resumed_epochs` 0.

    `with LiveRun(…) as run:`, then `run.log_epoch(epoch)` after each, and `run.complete(run_folder)` when
    the files are written. The run ends as FINISHED, as KILLED by Ctrl-C or SystemExit (into which the command
    line turns SIGTERM), or as FAILED by another exception, which its description then tells.

    Nothing here raises, and only `complete` and the end wait for MLflow: all is done, in turn, by the one
    thread that talks to it. Where that fails, one line on stderr says so, training goes on, and `sync`
    completes the run another day.
    """

    def __init__(
        self, name: str, cell: Cell, data_digest: str, training: str | None = None, resumed_epochs: int = 0
    ) -> None:
        self._name, self._cell, self._data_digest = name, cell, data_digest
        self._training, self._resumed_epochs = training, resumed_epochs
        self._waiting: Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = Queue()
        # A daemon: a server that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._store: Store | None = None
        self._run_id = ""
        self._logged: set[int] = set()  # epochs
        self._monitor: Any = None  # MLflow's, which has no types
        self._failed = False  # until the end nothing more is tried: each try may take seconds
        self._over = False
        self._shared = time.monotonic()  # when the last checkpoint was

    def __enter__(self) -> Self:
        self._thread.start()
        if find_spec("mlflow") is None:  # a machine with torch and little else
            self._failed = True
            print(
                f"resgrid: {self._cell.id} is not logged while it trains: mlflow is not installed",
                file=sys.stderr,
            )
        else:
            self._do(self._start, _now())
        return self

    def log_epoch(self, epoch: Epoch) -> None:
        """The figures of one epoch; returns at once."""
        if not self._failed:
            self._do(self._log_epoch, epoch, _now())

    def share_checkpoint(self, path: Path | None) -> None:
        """Put the latest checkpoint beside the run, where they are shared, now and then; returns at once."""
        now = time.monotonic()
        if path and shared.are_shared() and now - self._shared >= shared.SECONDS:
            self._shared = now
            self._do(self._share, path)

    def complete(self, run_folder: Path) -> None:
        """All that is left, from the files that training has written: outcome, artifacts, model."""
        self._do(self._finish, run_folder, _now())
        self._waiting.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        why = f"**Failed**: {type(error).__name__}: {shown(str(error))}" if status == "FAILED" else None
        self._do(self._end, status, why)
        self._waiting.put(None)
        self._thread.join(LAST_WORD_SECONDS if status == "KILLED" else None)
        if self._thread.is_alive():
            self._complain("it did not answer in time")

    def _do(self, action: Callable[..., None], *arguments: Any) -> None:
        self._waiting.put((action, arguments))

    def _work(self) -> None:
        while task := self._waiting.get():
            action, arguments = task
            try:
                action(*arguments)
            except Exception as error:  # whatever MLflow, its database or the network comes up with
                self._complain(reason(error))
            self._waiting.task_done()

    def _complain(self, why: str) -> None:
        if not self._failed:
            print(
                f"resgrid: MLflow does not get all of {self._cell.id}: {why}\n"
                "resgrid: this does not touch the training; `resgrid sync` completes the run later.",
                file=sys.stderr,
                flush=True,
            )
        self._failed = True

    def _start(self, start_time: int) -> None:
        store = open_store(self._name)
        earlier = self._earlier(store)
        if earlier is None:
            self._run_id = contents.create(store, self._cell, self._data_digest, start_time, self._training)
        else:
            self._run_id = earlier.info.run_id
            store.client.set_tag(self._run_id, "process", contents.this_process())  # first: now it is live
            store.client.update_run(self._run_id, "RUNNING")
            history = store.client.get_metric_history(self._run_id, "learning_rate")
            self._logged = {point.step for point in history}
        self._store = store

        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            self._run_id, tracking_uri=store.uri, resume_logging=earlier is not None
        )
        self._monitor.collect_metrics()  # psutil counts CPU load from the last look, for each thread
        self._monitor.start()

    def _earlier(self, store: Store) -> Run | None:
        """The run of an earlier start of this training, if it goes on."""
        if self._training is None:
            return None
        made = experiment()
        runs = [
            run
            for run in runs_of(store, self._cell.id)
            if run.data.tags.get("training") == self._training
            and run.data.tags.get("dvc_experiment") == (made.name if made else None)
            and not is_live(run, _now() if shared.are_shared() else None)  # a pool has one training of a cell
            and (self._resumed_epochs > 0 or "learning_rate" not in run.data.metrics)
        ]
        return max(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)

    def _log_epoch(self, epoch: Epoch, timestamp: int) -> None:
        from mlflow.entities import Metric

        if not self._failed and epoch.epoch not in self._logged and (store := self._our_store()):
            figures = {key: getattr(epoch, key) for key in contents.EACH_EPOCH}
            metrics = [
                Metric(key, value, timestamp, epoch.epoch)
                for key, value in figures.items()
                if value is not None
            ]
            store.client.log_batch(self._run_id, metrics=metrics)

    def _share(self, path: Path) -> None:
        if path.exists() and (store := self._our_store()):
            with suppress(Exception):  # whatever MLflow comes up with: the next one is tried all the same
                shared.put(store, self._run_id, path)

    def _our_store(self) -> Store | None:
        """None where there is none, or in a pool another machine has taken the cell over from this one."""
        if self._store is not None and shared.are_shared():
            by = self._store.client.get_run(self._run_id).data.tags.get("process")
            if by != contents.this_process():
                self._store = None
                self._complain(f"the cell was taken over by the process {by}")
        return self._store

    def _finish(self, run_folder: Path, end_time: int) -> None:
        if store := self._our_store():
            self._over = True  # from here on an error is for `sync`: ending the run would fail as well
            self._stop_monitor()
            contents.complete(store, self._run_id, self._cell, run_folder, end_time)
            started = contents.started_at(read_json(run_folder / "timing.json"))
            if experiment() is None:
                retire(store, runs_of(store, self._cell.id), self._run_id, started)

    def _end(self, status: str, why: str | None) -> None:
        if not self._over and (store := self._our_store()):
            self._stop_monitor()
            if why is not None:
                store.client.set_tag(self._run_id, "mlflow.note.content", why)
            store.client.set_terminated(self._run_id, status)

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
