"""What ResGrid asks of Prefect's server besides running flows: pools, automations, lost runs, artifacts."""

from __future__ import annotations

import csv
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import artifacts
from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectAlreadyExists, PrefectException
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed

from resgrid.dvc.pipeline import Pipeline
from resgrid.errors import ResgridError
from resgrid.tracking import shown
from resgrid.tracking.view import run_page
from tasks.spec import QUEUE

WATCHED = "resgrid-watched"  # the tag of deployments in pools of processes, where silence means an end
AUTOMATIONS = "ResGrid's cells: "  # how the names of ours begin
BEAT_SECONDS = 30  # between two signs of life: the least that Prefect allows
SILENCE_SECONDS = 60  # without one, a run is set to Crashed
START_SECONDS = 90  # likewise, from a worker's taking of a run to its first sign of life
FORMER_SECONDS = 24 * 3600.0  # without a worker's look, after which a queue may go
PAGE = 200  # flow runs in one answer of the server
PAUSE_SECONDS = 60.0  # without an artifact after one that failed, for such a call takes up to half a minute

ACTIVE = ("SCHEDULED", "PENDING", "RUNNING")  # types of the states of runs that a cell may join
TAKEN = ("PENDING", "RUNNING", "CANCELLING")  # by a worker
AWAY = (httpx.HTTPError, PrefectException, OSError)  # what asking a server raises that is away

log = logging.getLogger(__name__)


@contextmanager
def prefect_client(url: str) -> Iterator[SyncPrefectClient]:
    """A client of the server at `url`, an API's address; raises ResgridError if it cannot be used."""
    try:
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            client.raise_for_api_version_mismatch()
            yield client
    except (*AWAY, RuntimeError) as error:
        reason = f"{type(error).__name__}: {shown(str(error)).splitlines()[0]}" if str(error) else repr(error)
        raise ResgridError(
            f"{shown(url)}: Prefect's server cannot be used: {reason}. If it was started "
            "with a user:password, set PREFECT_API_AUTH_STRING to that."
        ) from error


def make_pool(client: SyncPrefectClient, name: str, queues: Collection[str] = ()) -> None:
    """Make a work pool of processes and its queues, unless they are there, the pool of whatever type."""
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    for queue in queues:
        with suppress(ObjectAlreadyExists):
            client.create_work_queue(queue, work_pool_name=name)


def watch_runs(client: SyncPrefectClient) -> None:
    """Have the server set runs to Crashed whose heartbeats stop: two automations, made once.

    A worker that dies before the flow begins leaves its run Pending, or Submitting, which follows at once and
    so is no sign of life. One that dies in the moment of the beginning leaves it Running without a heartbeat.
    """
    for former in (f"no heartbeat for {SILENCE_SECONDS} s", f"taken, but not begun for {START_SECONDS} s"):
        for automation in client.read_automations_by_name(AUTOMATIONS + former):
            client.delete_automation(automation.id)  # it sets a state of a name of its own
    for name, after, expect, seconds in (
        ("no heartbeat", {"Running", "heartbeat"}, "heartbeat", SILENCE_SECONDS),
        ("taken, not begun", {"Pending"}, "Running", START_SECONDS),
    ):
        title = f"{AUTOMATIONS}Crashed after {seconds} s, {name}"
        if client.read_automations_by_name(title):
            continue
        expected = {expect, "Completed", "Failed", "Crashed", "Cancelled"}
        trigger = EventTrigger(
            after={f"prefect.flow-run.{event}" for event in after},
            expect={f"prefect.flow-run.{event}" for event in expected},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{WATCHED}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=seconds),
        )
        message = f"No sign of life for {seconds} s: its worker is gone, or cut off."
        action = ChangeFlowRunState(state=StateType.CRASHED, message=message)
        client.create_automation(AutomationCore(name=title, trigger=trigger, actions=[action]))


def end_runs(client: SyncPrefectClient, pool: str, why: str, seconds: float = 0.0) -> int:
    """End the flow runs of a pool that have no end; return the number of those that its workers did not end.

    For `seconds` its workers cancel them. Then one that was being cancelled becomes cancelled, any other
    crashed, and so their tasks.
    """
    deadline = time.monotonic() + seconds
    for run in read_runs(client, TAKEN, work_pools=named(pool)) if seconds else ():
        client.set_flow_run_state(run.id, Cancelling(message=why), force=True)
    while (runs := read_runs(client, TAKEN, work_pools=named(pool))) and time.monotonic() < deadline:
        time.sleep(0.2)
    for run in runs:
        of_run = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
        active = TaskRunFilter.model_validate({"state": {"type": {"any_": TAKEN}}})
        for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=active):
            client.set_task_run_state(task.id, Crashed(message=why), force=True)
        end = Cancelled if run.state is not None and run.state.is_cancelling() else Crashed
        client.set_flow_run_state(run.id, end(message=why), force=True)
    return len(runs)


def delete_former_queues(client: SyncPrefectClient, pool: str, current: str) -> None:
    """Delete the empty queues of a pool of other digests than `current` that no worker asks."""
    for queue in client.read_work_queues(work_pool_name=pool):
        asked = queue.last_polled or queue.created or datetime.now(UTC)
        is_quiet = datetime.now(UTC) - asked > timedelta(seconds=FORMER_SECONDS)
        is_former = QUEUE.fullmatch(queue.name) and not queue.name.startswith(current)
        of_queue: dict[str, Any] = {"work_pools": named(pool), "work_pool_queues": named(queue.name)}
        if is_former and is_quiet and not read_runs(client, ACTIVE, **of_queue):
            client.delete_work_queue_by_id(queue.id)


def read_runs(
    client: SyncPrefectClient, types: Collection[str], *, tag: str = "", **filters: object
) -> list[FlowRun]:
    """The flow runs in a state of these types that match the REST interface's other `filters`."""
    of_runs: dict[str, object] = {"state": {"type": {"any_": types}}}
    if tag:
        of_runs["tags"] = {"all_": [tag]}
    runs: list[FlowRun] = []
    while True:
        content = {"flow_runs": of_runs, **filters, "limit": PAGE, "offset": len(runs)}
        page = client.request("POST", "/flow_runs/filter", json=content).json()
        runs += [FlowRun.model_validate(run) for run in page]
        if len(page) < PAGE:
            return runs


def named(*names: str) -> dict[str, object]:
    """The filter for pools or queues of these names."""
    return {"name": {"any_": names}}


class Page:
    """The artifacts of one flow run: progress, a link a cell to MLflow, the leaderboard. Nothing here raises.

    A server that is away is no reason to stop training, so what cannot be published is left out.
    """

    def __init__(self, pipeline: Pipeline, mlflow: str | None) -> None:
        """`mlflow` is where its pages are served, if they are."""
        self._mlflow = mlflow
        self._board = pipeline.folder / "reports/leaderboard.csv"
        self._suffix = _key(pipeline.name) or "root"
        self._progress: UUID | None = None
        self._sending = threading.Lock()
        self._away_until = 0.0

    def progress(self, percent: float, text: str) -> None:
        """Show how far the grid is, in place of the figure before."""

        def show() -> None:
            if self._progress is None:
                created = artifacts.create_progress_artifact(
                    percent, key=f"progress-{self._suffix}", description=text
                )
                self._progress = cast(UUID, created)  # as in all synchronous code
            else:
                artifacts.update_progress_artifact(self._progress, percent, description=text)

        self._publish(show)

    def leaderboard(self) -> None:
        """reports/leaderboard.csv as a table, if it is there."""
        if self._board.is_file():
            with self._board.open(encoding="utf-8", newline="") as lines:
                table = [{key: value or None for key, value in row.items()} for row in csv.DictReader(lines)]
            key, text = f"leaderboard-{self._suffix}", f"`{self._board}`"
            self._publish(lambda: artifacts.create_table_artifact(table, key=key, description=text))

    def link(self, experiment: str, cell: str) -> None:
        """To the cell's run in MLflow, if it answers; called within its task, whose page then shows it."""
        if page := self._mlflow and run_page(self._mlflow, experiment, cell):
            key, text = f"mlflow-{_key(cell)}", f"{cell} in MLflow"
            self._publish(lambda: artifacts.create_link_artifact(page, link_text=text, key=key))

    def _publish(self, publish: Callable[[], object]) -> None:
        with self._sending:
            if time.monotonic() < self._away_until:
                return
            try:
                publish()
            except Exception as error:  # whatever a server that is away may raise
                self._away_until = time.monotonic() + PAUSE_SECONDS
                log.warning("Prefect's page is not up to date: %s", error)


def _key(name: str) -> str:
    """As keys of artifacts are: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
