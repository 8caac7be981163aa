"""What a person sees of a grid while it runs: in Prefect's page, and in the terminal by `resgrid status`.

The state of the grid lies in `.resgrid/state/<pipeline>/`, so the terminal needs no server; Prefect's
artifacts show the same. A server that is away is no reason to stop training, so what cannot be published is
left out.
"""

from __future__ import annotations

import csv
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, cast
from uuid import UUID

import httpx

from resgrid import tracking, watch
from resgrid.config import load_params
from resgrid.dvc.pipeline import Pipeline
from resgrid.grid import expand
from resgrid.progress import duration
from resgrid.run_status import STATUSES, Run, find_runs
from resgrid.stage_record import Record, read_state, write_state
from tasks.services import running

GRID = "train-all"  # the name of the grid's own state, beside those of the stages
# What a cell may be called besides what DVC had to do for it; CUT: its run was ended before it was done.
WAITING, RUNNING, FAILED, CUT = "waiting", "running", "failed", "cut off"


@dataclass
class Progress:
    """How far a run of the grid is; `cells` gives each chosen cell's status by its id."""

    started: float  # seconds since the epoch
    by: str  # the flow's process, in terms of `watch.describe`
    slots: int
    flow_run: str | None  # its page, if there is one
    cells: dict[str, str] = field(default_factory=dict)
    until: float | None = None  # when the last cell should end, as far as it is known
    ended: float | None = None

    def count(self) -> Counter[str]:
        """Cells by status; all that are up to date by now are `done`."""
        others = (WAITING, RUNNING, FAILED, CUT)
        return Counter(status if status in others else "done" for status in self.cells.values())

    def __str__(self) -> str:
        num = self.count()
        said = f"{num['done']} of {len(self.cells)} cells done"
        if num[RUNNING] or num[WAITING]:
            said += f", {num[RUNNING]} running, {num[WAITING]} waiting"
        for status in (FAILED, CUT):
            said += f", {num[status]} {status}" if num[status] else ""
        if num[RUNNING] or num[WAITING]:
            left = "unknown until a cell of every architecture has been trained"
            said += (
                f"; time left: {left if self.until is None else duration(max(0.0, self.until - time.time()))}"
            )
        return said


# --- the terminal -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """What runs now in a pipeline, by whichever flow, and how far its grid is."""

    grid: Progress | None
    alive: bool  # whether the grid's process is
    running: tuple[tuple[Record, str], ...]  # with the last line of the log

    def as_dict(self) -> dict[str, Any]:
        return {
            "grid": asdict(self.grid) if self.grid else None,
            "alive": self.alive,
            "running": [asdict(record) | {"last_line": line} for record, line in self.running],
        }

    def __str__(self) -> str:
        if self.grid is None and not self.running:
            return "No train-all has run here, and nothing runs now."
        lines = []
        if self.grid:
            ago = duration(time.time() - (self.grid.ended or self.grid.started))
            if self.grid.ended:
                lines.append(f"The last run of the grid ended {ago} ago.")
            elif self.alive:
                lines.append(f"The grid has been running for {ago}.")
            else:
                lines.append("The last run of the grid was cut off: its process is gone. Run it again.")
            lines.append(f"{self.grid}.")
            if self.alive and self.grid.flow_run:
                lines.append(f"{self.grid.flow_run}")
        width = max((len(record.stage) for record, _ in self.running), default=0)
        for record, line in self.running:
            since = f"for {duration(time.time() - record.started)}"
            lines.append(f"  {record.stage:{width}}  {since:>14}  {record.slot:>9}  {line}")
        failed = [cell for cell, status in (self.grid.cells.items() if self.grid else ()) if status == FAILED]
        if failed:
            lines.append(f"Failed: {', '.join(failed)}")
        return "\n".join(lines)


def status(pipeline: Pipeline) -> Status:
    """From the state on disk alone."""
    found = read_state(pipeline.state(GRID))
    grid = Progress(**found) if found else None
    records = [
        record
        for path in sorted(pipeline.state(GRID).parent.glob("*.json"))
        if (record := pipeline.record(path.stem)) and record.is_running
    ]
    return Status(
        grid=grid,
        alive=bool(grid and not grid.ended and watch.alive(grid.by)),
        running=tuple((record, _last_line(pipeline.log(record.stage))) for record in records),
    )


def results(pipeline: Pipeline, now: Status) -> tuple[list[Run], str]:
    """What there is of each cell of the grid, and a line that counts it."""
    runs = find_runs(expand(load_params(pipeline.folder / "params.yaml")), pipeline.folder)
    training = {record.stage.partition("@")[2] for record, _ in now.running}
    counts = Counter("being trained" if run.cell.id in training else run.status for run in runs)
    told = [f"{counts[each]} {each}" for each in (*STATUSES, "being trained") if counts[each]]
    return runs, f"Results: {', '.join(told)}."


def save(pipeline: Pipeline, progress: Progress) -> None:
    write_state(pipeline.state(GRID), asdict(progress))


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")


# --- Prefect's page ---------------------------------------------------------------------------------


class Page:
    """The artifacts of one flow run.

    They are sent by a thread of their own, because a server that is away holds up a call for half a minute.
    Nothing here raises; `say` gets what could not be published, once.
    """

    def __init__(self, pipeline: Pipeline, say: Callable[[str], None]) -> None:
        # keys of artifacts: lower-case letters, digits and dashes
        self._suffix = _key(pipeline.name) or "root"
        self._say = say
        self._progress: UUID | None = None
        self._latest: tuple[float, str] | None = None
        self._quiet = False
        self._waiting: SimpleQueue[Callable[[], object]] = SimpleQueue()
        Thread(target=self._send, name="page", daemon=True).start()

    def progress(self, progress: Progress) -> None:
        """Show how far the grid is, in place of what was shown before."""
        num = progress.count()
        self._latest = (100 * (num["done"] + num[FAILED]) / max(1, len(progress.cells)), str(progress))
        self._put(self._show_latest)

    def _show_latest(self) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        latest, self._latest = self._latest, None
        if latest is None:  # this one went with the last
            return
        percent, said = latest
        if self._progress is None:
            created = create_progress_artifact(percent, key=f"progress-{self._suffix}", description=said)
            self._progress = cast(UUID, created)  # as in all synchronous code
        else:
            update_progress_artifact(self._progress, percent, description=said)

    def leaderboard(self, file: Path) -> None:
        """reports/leaderboard.csv as a table, if it is there."""
        from prefect.artifacts import create_table_artifact

        if file.is_file():
            with file.open(encoding="utf-8", newline="") as lines:
                table = [{key: value or None for key, value in row.items()} for row in csv.DictReader(lines)]
            key = f"leaderboard-{self._suffix}"
            self._put(lambda: create_table_artifact(table, key=key, description=f"`{file}`"))

    def cells(self, rows: Iterable[tuple[str, str, float | None]], links: dict[str, str]) -> None:
        """A table of (cell, status, seconds), each with the way to its run in MLflow."""
        from prefect.artifacts import create_markdown_artifact

        lines = ["| cell | status | time | MLflow |", "|---|---|---|---|"]
        for cell, said, seconds in rows:
            link = f"[run]({links[cell]})" if cell in links else ""
            lines.append(f"| {cell} | {said} | {'' if seconds is None else duration(seconds)} | {link} |")
        self._put(lambda: create_markdown_artifact("\n".join(lines), key=f"cells-{self._suffix}"))

    def link(self, cell: str, link: str) -> None:
        """To the cell's run in MLflow; called within the cell's task, whose page then shows it."""
        from prefect.artifacts import create_link_artifact

        self._put(
            lambda: create_link_artifact(link, link_text=f"{cell} in MLflow", key=f"mlflow-{_key(cell)}")
        )

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until all of it has been sent."""
        sent = Event()
        self._put(sent.set)
        sent.wait(timeout)

    def _put(self, publish: Callable[[], object]) -> None:
        self._waiting.put(partial(copy_context().run, publish))  # which holds the flow run, or the task run

    def _send(self) -> None:
        while True:
            try:
                self._waiting.get()()
                self._quiet = False
            except Exception as error:  # whatever a server that is away may raise
                if not self._quiet:
                    self._say(f"Prefect's page is not up to date: {error}")
                self._quiet = True


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def flow_environment() -> dict[str, str]:
    """By which a trainer's run in MLflow leads back to the flow run that this is called in."""
    from prefect import runtime

    env = {"RESGRID_FLOW_RUN_ID": str(runtime.flow_run.id or "")}
    if url := runtime.flow_run.ui_url:
        env["RESGRID_FLOW_RUN_URL"] = url
    return env


# --- MLflow's pages ---------------------------------------------------------------------------------


def mlflow_address(root: Path) -> str | None:
    """Where MLflow's pages are served, if they are: by `resgrid up`, or by a server that serves the store."""
    if services := running(root):
        return services.mlflow.rstrip("/")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri.rstrip("/") if uri.startswith(("http://", "https://")) else None


def mlflow_runs(root: Path, experiment: str, cells: Iterable[str]) -> dict[str, str]:
    """The page of each cell's latest run in MLflow, asked of its server; what it does not answer is left out.

    By MLflow's REST interface, because importing mlflow takes this process 3 s and 150 MB.
    """
    address = mlflow_address(root)
    if address is None:
        return {}
    user, page = os.environ.get("MLFLOW_TRACKING_USERNAME"), tracking.shown(address)
    auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    links = {}
    try:
        with httpx.Client(base_url=f"{address}/api/2.0/mlflow", auth=auth, timeout=5) as server:
            found = server.get("experiments/get-by-name", params={"experiment_name": experiment})
            number = found.raise_for_status().json()["experiment"]["experiment_id"]
            for cell in cells:
                wanted = {
                    "experiment_ids": [number],
                    "filter": f"tags.cell = '{cell}'",
                    "order_by": ["attributes.start_time DESC"],
                    "max_results": 1,
                }
                found = server.post("runs/search", json=wanted)
                for run in found.raise_for_status().json().get("runs", []):
                    place = f"{page}/#/experiments/{number}/runs/{run['info']['run_id']}"
                    links[cell] = f"{place}?{tracking.WORK}"
    except (httpx.HTTPError, ValueError, KeyError):
        pass
    return links
