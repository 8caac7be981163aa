"""A cell's run while it trains: one thread mirrors the latest snapshot, and training never waits for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from resgrid import __version__
from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.provenance import experiment, made_by
from resgrid.tracking.from_files import settle
from resgrid.tracking.mirror import NOTE, Snapshot, log_points, mirror, runs_of, this_process
from resgrid.tracking.store import SETTINGS, Store, is_local, open_store, reason, shown, store_uri

REST_SECONDS = 30.0  # after an error
END_SECONDS = 5.0  # that the end waits for a store elsewhere
STOP_SECONDS = 2.0  # and for any store after Ctrl-C
# A server that never answers: an error after 5 s, where MLflow's defaults take 120 s and seven tries.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

log = logging.getLogger(__name__)


class LiveRun:
    """A context manager that mirrors the training of `cell` into the experiment `name` while it goes on.

    `with LiveRun(…) as run:`, then `run.log_epochs(…)` after each, and `run.complete(run_folder)` when the
    files are written. The run ends as FINISHED, as KILLED by Ctrl-C or SystemExit (into which the command
    line turns SIGTERM), or as FAILED by another exception, which its description then names.

    Nothing here raises, and only the end waits: for a store elsewhere at most END_SECONDS.
    """

    def __init__(
        self, name: str, cell: Cell, data_digest: str, started: int, epochs: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """`started` (in microseconds) and the `epochs` of an earlier start are the checkpoint's."""
        self._name = name
        self._snapshot = Snapshot(
            cell=cell, data_digest=data_digest, started=started, epochs=tuple(epochs),
            timing=made_by() | {"resgrid": __version__},
        )  # fmt: skip
        self._folder: Path | None = None  # of the files, once they are written
        self._status, self._note = "FINISHED", ""
        self._changed, self._ending = threading.Event(), threading.Event()
        # A daemon: a server that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._sent: tuple[Store, str] | None = None  # the run's store and id, once it is made
        self._num_sent = 0  # epochs
        self._monitor: Any = None  # MLflow's, which has no types
        self._has_warned = False

    def __enter__(self) -> Self:
        self._thread.start()
        self._changed.set()
        return self

    def log_epochs(self, epochs: Sequence[Mapping[str, Any]]) -> None:
        """All epochs so far that a checkpoint on the disk holds; returns at once."""
        self._snapshot = replace(self._snapshot, epochs=tuple(epochs))
        self._changed.set()

    def complete(self, run_folder: Path) -> None:
        """The files are written: the end mirrors them as well."""
        self._folder = run_folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = None if is_local(store_uri()) else END_SECONDS
        if isinstance(error, Exception):
            self._status, self._note = "FAILED", f"**Failed**: {type(error).__name__}: {shown(str(error))}"
        elif error is not None:
            self._status, seconds = "KILLED", STOP_SECONDS
        self._ending.set()
        self._changed.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn("no answer in time")

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._changed.wait()
            self._changed.clear()
            is_last = self._ending.is_set()
            try:
                store, run_id = self._send()
                if is_last:
                    self._end(store, run_id)
            except Exception as error:  # whatever MLflow, its database or the network comes up with
                self._warn(str(error) if isinstance(error, ResgridError) else reason(error))
                self._ending.wait(REST_SECONDS)

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            log.warning(
                "Logging %s to MLflow failed: %s\n"
                "The training goes on; `resgrid sync` completes the run later.",
                self._snapshot.cell.id,
                why,
            )
        self._has_warned = True

    def _send(self) -> tuple[Store, str]:
        """Log the epochs so far."""
        snapshot = self._snapshot
        if self._sent is None:
            os.environ |= {k: v for k, v in IMPATIENT.items() if os.environ.get(k) in (None, SETTINGS[k])}
            store = open_store(self._name)
            run_id = mirror(store, snapshot)
            store.client.set_tag(run_id, "process", this_process())
            store.client.update_run(run_id, "RUNNING")

            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(run_id, tracking_uri=store.uri, resume_logging=True)  # type: ignore[no-untyped-call]
            self._monitor.start()
            self._sent = store, run_id
        else:
            log_points(*self._sent, [p for p in snapshot.points() if p.step > self._num_sent])
        self._num_sent = len(snapshot.epochs)
        return self._sent

    def _end(self, store: Store, run_id: str) -> None:
        self._monitor.finish()
        final = Snapshot.from_files(self._snapshot.cell, self._folder) if self._folder else None
        if final is not None and final.key == self._snapshot.key:
            run_id = mirror(store, final, files=is_local(store.uri))
            if experiment() is None:
                settle(store, runs_of(store, final.cell.id), run_id, final.started // 1000)
            return
        if self._note:
            store.client.set_tag(run_id, NOTE, self._note)
        if final is not None:  # another training of the cell has replaced the files since
            store.client.set_tag(run_id, "grid", "superseded")
        store.client.set_terminated(run_id, self._status)
