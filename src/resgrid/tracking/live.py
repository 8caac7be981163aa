"""A cell's run while it trains: one thread mirrors the latest snapshot, and training never waits for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.provenance import experiment, made_by
from resgrid.tracking.mirror import Snapshot, log_files, mirror, runs_of, this_process
from resgrid.tracking.runs import mark_superseded
from resgrid.tracking.store import SETTINGS, Store, StoreAway, is_local, open_store, reason, shown, store_uri

REST_SECONDS = 30.0  # after an error
END_SECONDS = 5.0  # that the end waits for a store elsewhere
STOP_SECONDS = 2.0  # and for any store after Ctrl-C
# A server that never answers: an error after 5 s, where MLflow's defaults take 120 s and seven tries.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _End:
    """How the training ended."""

    status: str
    note: str | None = None  # of a failure
    folder: Path | None = None  # of the files, where it has written them


class LiveRun:
    """A context manager that mirrors the training of `cell` into the experiment `name` while it goes on.

    `with LiveRun(…) as run:`, then `run.log_epochs(…)` after each, and `run.complete(run_folder)` when the
    files are written. The run ends as FINISHED, as KILLED by Ctrl-C or SystemExit (into which the command
    line turns SIGTERM), or as FAILED by another exception, which its description then names.

    Nothing here raises, and only the end waits: for a store elsewhere at most END_SECONDS. Where MLflow
    fails, one warning says so, training goes on, and `sync` completes the run another day.
    """

    def __init__(
        self, name: str, cell: Cell, data_digest: str, started: int, epochs: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """`started` (in microseconds) and the `epochs` of an earlier start are the checkpoint's."""
        self._name = name
        self._folder: Path | None = None
        self._snapshot = Snapshot(
            cell=cell,
            digest=cell.digest,
            data_digest=data_digest,
            started=started,
            origin=made_by(),
            epochs=tuple(epochs),
        )
        self._changed, self._ending = threading.Condition(), threading.Event()
        self._request: Snapshot | _End | None = None
        # A daemon: a server that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._store: Store | None = None
        self._run_id: str | None = None
        self._num_sent = 0  # epochs
        self._monitor: Any = None  # MLflow's, which has no types
        self._has_warned = False

    def __enter__(self) -> Self:
        if find_spec("mlflow") is None:  # a machine with torch and little else
            self._warn("mlflow is not installed")
        else:
            self._thread.start()
            self._ask(self._snapshot)
        return self

    def log_epochs(self, epochs: Sequence[Mapping[str, Any]]) -> None:
        """All epochs so far that a checkpoint on the disk holds; returns at once."""
        self._snapshot = replace(self._snapshot, epochs=tuple(epochs))
        self._ask(self._snapshot)

    def complete(self, run_folder: Path) -> None:
        """The files are written: the end mirrors them as well."""
        self._folder = run_folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.ident is None:
            return
        if kind is None:
            end = _End("FINISHED", folder=self._folder)
        elif issubclass(kind, Exception):
            end = _End("FAILED", f"**Failed**: {type(error).__name__}: {shown(str(error))}")
        else:
            end = _End("KILLED")
        self._ending.set()
        self._ask(end)
        elsewhere = None if is_local(store_uri()) else END_SECONDS
        self._thread.join(STOP_SECONDS if end.status == "KILLED" else elsewhere)
        if self._thread.is_alive():
            self._warn("no answer in time")

    def _ask(self, request: Snapshot | _End) -> None:
        """The latest request takes the place of one that was not yet begun."""
        with self._changed:
            self._request = request
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._request is not None)
                request, self._request = self._request, None
            try:
                self._end(request) if isinstance(request, _End) else self._send(self._snapshot)
            except Exception as error:  # whatever MLflow, its database or the network comes up with
                is_for_good = isinstance(error, ResgridError) and not isinstance(error, StoreAway)
                self._warn(str(error) if isinstance(error, ResgridError) else reason(error), is_for_good)
                self._ending.wait(REST_SECONDS)
            if isinstance(request, _End):
                return

    def _warn(self, why: str, is_for_good: bool = False) -> None:
        if not self._has_warned:
            later = "" if is_for_good else "; `resgrid sync` completes the run later"
            log.warning(
                "Logging %s to MLflow failed: %s\nThe training goes on%s.", self._snapshot.cell.id, why, later
            )
        self._has_warned = True

    def _send(self, snapshot: Snapshot) -> None:
        if self._store is None:
            os.environ |= {k: v for k, v in IMPATIENT.items() if os.environ.get(k) in (None, SETTINGS[k])}
            self._store = open_store(self._name)
        is_first = self._run_id is None
        since = 0 if is_first else self._num_sent + 1
        self._run_id = mirror(self._store, snapshot, self._run_id, since=since)
        self._num_sent = len(snapshot.epochs)
        if is_first:
            self._store.client.set_tag(self._run_id, "process", this_process())
            self._store.client.update_run(self._run_id, "RUNNING")
            self._start_monitor(self._store.uri)

    def _end(self, end: _End) -> None:
        if self._run_id is None or end.folder is None:
            self._send(self._snapshot)
        store, run_id = self._store, self._run_id
        assert store is not None and run_id is not None  # noqa: PT018
        self._stop_monitor()
        if end.note is not None:
            store.client.set_tag(run_id, "mlflow.note.content", end.note)
        if end.folder is None:
            store.client.set_terminated(run_id, end.status)
            return
        final = Snapshot.from_files(self._snapshot.cell, end.folder)
        if final.key != self._snapshot.key:  # another training of the cell has replaced the files since
            store.client.set_terminated(run_id, end.status)
            store.client.set_tag(run_id, "grid", "superseded")
            return
        mirror(store, final, run_id, since=self._num_sent, files=False)
        if experiment() is None:
            mark_superseded(store, runs_of(store, final.cell.id), run_id, final.started // 1000)
        if is_local(store.uri):
            log_files(store, run_id, final)

    def _start_monitor(self, uri: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self._run_id, tracking_uri=uri, resume_logging=True)  # type: ignore[no-untyped-call]
        self._monitor.collect_metrics()  # psutil counts CPU load from the last look, for each thread
        self._monitor.start()

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
