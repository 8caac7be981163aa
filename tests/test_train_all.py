"""The grid in parallel: real Prefect server, real worker, real DVC, real processes; most stages only sleep."""

from __future__ import annotations

import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from cluster import begin_flow, end_tree
from ports import free_port
from prefect.flows import Flow
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from sleeping import ROOT, Sleeping, answers, ask, clean_env, left_over, sleeping, wait_until
from small import CELL, Project

from flows.prepare_data import prepare_data
from flows.train_all import train_all
from flows.train_cell import train_cell
from resgrid.cell_states import read_grid_run
from resgrid.dvc.pipeline import Pipeline
from resgrid.project import num_cores
from tasks.server import make_pool, prefect_client
from tasks.status import status

GRID = ["resnet20-sgd-0", "resnet20-adam-0", "resnet10-sgd-0", "resnet10-adam-0"]
RESNET20 = ["resnet20-sgd-0", "resnet20-adam-0"]


class Server:
    """A Prefect server on loopback, and flows run at it."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = home / "server.log"
        self.env = clean_env(
            PYTHONPATH=str(ROOT),
            PREFECT_HOME=str(home / "prefect"),
            PREFECT_API_URL=f"{self.url}/api",
            PREFECT_WORKER_QUERY_SECONDS="1",
            PREFECT_LOGGING_EXTRA_LOGGERS="resgrid,tasks",  # as prefect.yaml sets it
        )
        self.start()

    def start(self) -> None:
        self.process = self.spawn("server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        wait_until(lambda: answers(f"{self.url}/api/health"), 120, self.log)

    def spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        """One of Prefect's commands, in the project's folder."""
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "prefect", *arguments]
            return subprocess.Popen(command, env=self.env, cwd=ROOT, stdout=log, stderr=log)

    def kill(self) -> None:
        end_tree(self.process)
        self.process.wait()

    def ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        return ask(f"{self.url}/api/{path}", content)

    def begin(self, repository: Sleeping, nap: float = 0, **parameters: Any) -> Begun:
        """A train-all in a process of its own, as a worker starts it."""
        env = self.env | {"NAP": str(nap)}
        return Begun(begin_flow(ROOT, env, pipeline=str(repository.root), **parameters))

    def run(self, flow: Flow, repository: Sleeping | Project, /, **parameters) -> Any:
        """The state in which a flow ends that runs in this process, which has imported all that it needs."""
        # No log goes to the server, which is gone when this process ends and sends the last ones.
        settings = {PREFECT_API_URL: f"{self.url}/api", PREFECT_LOGGING_TO_API_ENABLED: False}
        with patch.dict(os.environ, self.env, clear=True), temporary_settings(settings):
            return flow(pipeline=str(repository.root), return_state=True, **parameters)

    def tasks(self, flow_run: object) -> dict[str, str]:
        """The state's name by the task run's; of several with the same name the last."""
        query = {"flow_runs": {"id": {"any_": [str(flow_run)]}}, "sort": "EXPECTED_START_TIME_ASC"}
        runs: list[Any] = []

        def have_ended() -> bool:
            """By events, which the server takes in when it has time."""
            runs[:] = self.ask("task_runs/filter", query)
            return bool(runs) and all(run["end_time"] for run in runs)

        wait_until(have_ended, 20)
        return {run["name"]: run["state"]["name"] for run in runs}


class Begun:
    """A flow in a process of its own; `end` waits for it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.state = self.message = self.id = self.output = ""

    def end(self) -> None:
        self.output, _ = self.process.communicate(timeout=240)
        assert "View at" in self.output, self.output
        self.id = self.output.split("flow-run/")[1][:36]
        if self.process.returncode == 0:
            self.state, self.message = json.loads(self.output.splitlines()[-1])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def deployment(server):
    """The id of `train-all`, registered as `make up` does it."""
    with prefect_client(f"{server.url}/api") as client:
        make_pool(client, "resgrid")
    assert server.spawn("--no-prompt", "deploy", "--all").wait() == 0, server.log.read_text()
    return server.ask("deployments/name/train-all/train-all")["id"]


@pytest.fixture(scope="module")
def workers():
    begun: list[subprocess.Popen[bytes]] = []
    yield begun
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def worker(server, deployment, workers):
    """A process worker in the project's folder, as `make up` starts it; that of the test before, if it lives."""
    if not workers or workers[-1].poll() is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, which would be inherited
        workers.append(server.spawn("worker", "start", "--pool", "resgrid", "--type", "process"))
    return workers[-1]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return sleeping(tmp_path_factory.mktemp("a repository"), "resnet20, resnet10", "sgd, adam")


@pytest.fixture
def plain(repository):
    """The repository, with no cell made to behave in another way."""
    yield repository
    for pattern in ("behave/*", "begun*", "closed*"):
        for file in repository.root.glob(pattern):
            file.unlink()


@pytest.fixture
def webhook():
    """An address on loopback, and the texts that were posted there."""
    texts: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as receiver:
        threading.Thread(target=receiver.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{receiver.server_port}/hook", texts
        receiver.shutdown()


# --- what is run, and what is not -------------------------------------------------------------------


def test_the_grid_is_trained_in_parallel_and_what_dvc_repro_has_trained_is_not_trained_again(server, plain):
    assert plain.run("dvc", "repro", "train@resnet20-sgd-0").returncode == 0
    by_hand = ["download", "preprocess", "resnet20-sgd-0"]
    assert plain.trained() == by_hand
    # Each of these two waits for the other: one after the other they would wait for good.
    for cell, other in (("resnet10-sgd-0", "resnet10-adam-0"), ("resnet10-adam-0", "resnet10-sgd-0")):
        plain.behave(cell, f"touch begun-{cell}; while [ ! -f begun-{other} ]; do sleep 0.1; done")
    flow = server.begin(plain, slots=2)
    flow.end()
    assert (flow.state, flow.message) == ("Completed", "4 cells: 3 trained, 1 up to date"), flow.output
    assert set(plain.trained()[3:5]) == {"resnet10-sgd-0", "resnet10-adam-0"}  # the longest first
    assert plain.trained()[5:] == ["resnet20-adam-0", "evaluate"]
    # No `dvc` was started for those that were trained before.
    logs = {file.stem for file in (plain.root / ".resgrid/logs").iterdir()}
    assert not logs & {*by_hand, "train@resnet20-sgd-0"}

    used = {
        line.split()[0]: line.split()[2:] for line in (plain.root / "trained").read_text().splitlines()[3:]
    }
    del used["evaluate"]
    # A share of the cores each, and the flow run's id, by which MLflow leads back here.
    assert list(used.values()) == [[str(max(1, num_cores() // 2)), flow.id]] * 3

    names = ["resnet10-sgd-0", "resnet10-adam-0", "resnet20-adam-0", "evaluate", "sync"]
    states = dict.fromkeys(by_hand, "Up to date") | dict.fromkeys(names, "Completed")
    assert server.tasks(flow.id) == states
    artifacts = {
        artifact["key"]: artifact
        for artifact in server.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow.id]}}})
    }
    assert set(artifacts) == {"progress-root", "leaderboard-root"}
    assert artifacts["progress-root"]["data"] == 100.0
    assert artifacts["progress-root"]["description"] == "4 of 4 cells done"
    row = {"cell": "resnet10-adam-0", "status": "completed"}
    assert json.loads(artifacts["leaderboard-root"]["data"])[0] == row

    assert plain.run("dvc", "status", "--json").stdout.strip() == "{}"
    assert str(status(Pipeline.find(plain.root))).startswith("Nothing runs now.")
    logs = server.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [flow.id]}}, "limit": 200})
    of_tasks = {line["message"] for line in logs if line["task_run_id"]}
    assert {f"{cell} begins" for cell in used} <= of_tasks  # what a stage prints is on its task's page


def test_only_what_was_asked_for_is_trained(server, plain):
    assert server.run(prepare_data, plain).name == "Completed"
    plain.change_code()
    before = len(plain.trained())
    assert server.run(train_all, plain, cells=["resnet20-*"], slots=1).message == "2 cells: 2 trained"
    assert sorted(plain.trained()[before:]) == ["evaluate", "resnet20-adam-0", "resnet20-sgd-0"]
    assert server.run(train_cell, plain, cell="resnet10-sgd-0").message == "1 cells: 1 trained"
    assert plain.trained()[before + 3 :] == ["resnet10-sgd-0"]
    data = server.run(prepare_data, plain)
    assert (data.name, data.message) == ("Completed", "up to date")


def test_a_failed_cell_does_not_end_the_grid_and_only_transient_faults_are_tried_again(
    server, plain, webhook
):
    address, texts = webhook
    page = (ROOT / "docs/guide/notifications.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    code = code.replace("https://hooks.slack.com/services/T000/B000/XXXX", address)
    done = subprocess.run([sys.executable, "-c", code], env=server.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(server.ask("automations/filter", {})) == 2
    plain.change_code()
    plain.behave("resnet10-sgd-0", "fail null 'recipes.resnet10.epochs: must be 1 or more'")
    # Out of memory as long as a neighbour has it.
    plain.behave(
        "resnet10-adam-0",
        'if [ ! -f begun ]; then touch begun; sleep 1; fail \'"memory"\' "too little memory"; fi',
    )
    plain.behave("resnet20-sgd-0", "until [ -f begun ]; do sleep 0.1; done; sleep 3")  # the neighbour
    before = len(plain.trained())
    flow = server.run(train_all, plain, slots=2)
    assert flow.name == "Failed"
    assert plain.trained()[before:].count("resnet10-sgd-0") == 1
    assert plain.trained()[before:].count("resnet10-adam-0") == 2
    assert plain.trained()[-2:] == ["resnet10-adam-0", "evaluate"]  # at the end and alone
    assert flow.message == (
        "resnet10-sgd-0 failed (3 trained, 1 failed).\n"
        "train@resnet10-sgd-0: recipes.resnet10.epochs: must be 1 or more\n"
        "    Running stage 'train@resnet10-sgd-0':\n"
        "    > sh work.sh resnet10-sgd-0 runs/resnet10-sgd-0\n"
        "    resnet10-sgd-0 begins\n"
        "    resgrid: recipes.resnet10.epochs: must be 1 or more\n"
        "    ERROR: failed to reproduce 'train@resnet10-sgd-0': failed to run: sh work.sh resnet10-sgd-0 "
        "runs/resnet10-sgd-0, exited with 1\n"
        f"    All of it: {plain.root}/.resgrid/logs/train@resnet10-sgd-0.log"
    )
    flow_run = flow.state_details.flow_run_id
    assert server.tasks(flow_run)["resnet10-sgd-0"] == "Failed"
    assert "resnet10-sgd-0" not in (plain.root / "reports/leaderboard.csv").read_text()
    cells = {each.cell.id: each for each in status(Pipeline.find(plain.root)).cells}
    assert cells["resnet10-sgd-0"].word == "failed"
    assert cells["resnet10-sgd-0"].reason == "recipes.resnet10.epochs: must be 1 or more"

    wait_until(lambda: len(texts) >= 3)
    messages = {text.partition("\n")[0]: text for text in texts}
    assert set(messages) == {"resnet10-adam-0: Failed", "resnet10-sgd-0: Failed", "train-all: Failed"}
    assert "recipes.resnet10.epochs: must be 1 or more" in messages["resnet10-sgd-0: Failed"]
    ended = messages["train-all: Failed"]
    assert "resnet10-sgd-0 failed (3 trained, 1 failed)." in ended
    assert f"/runs/flow-run/{flow_run}" in ended


def test_when_the_data_fail_nothing_is_trained(server, plain):
    plain.set("preprocess.seed=7")
    plain.behave("preprocess", "fail null 'data/raw/x.png: is no image'")
    before = len(plain.trained())
    flow = server.run(train_all, plain)
    plain.set("preprocess.seed=0")
    assert flow.name == "Failed"
    assert flow.message.startswith(
        "preprocess failed (nothing was trained).\npreprocess: data/raw/x.png: is no image\n"
    )
    assert plain.trained()[before:] == ["preprocess"]


@pytest.mark.long
def test_of_two_forced_runs_at_once_the_second_waits_and_trains_nothing_twice(server, plain):
    assert plain.run("dvc", "repro").returncode == 0
    plain.behave("resnet20-sgd-0", "touch begun; until [ -f go ]; do sleep 0.1; done; sleep 3")
    before = len(plain.trained())
    checkpoints = plain.root / ".resgrid/checkpoints"  # of trainings that were cut off
    checkpoints.mkdir(parents=True)
    for cell in ("resnet20-sgd-0", "resnet10-adam-0"):
        (checkpoints / f"{cell}.0123456789abcdef.0").write_text("half a training")
    first = server.begin(plain, cells=["resnet20-*"], force=True, slots=1)
    wait_until((plain.root / "begun").exists)
    second = server.begin(plain, cells=["*-sgd-*"], force=True, slots=1)
    at_work = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    wait_until(lambda: len(server.ask("flow_runs/filter", at_work)) == 2, 120)
    (plain.root / "go").touch()
    second.end()
    first.end()
    assert (first.message, second.message) == ("2 cells: 2 trained", "2 cells: 1 trained, 1 up to date")
    assert "waiting for another train-all, which is at work in this pipeline" in second.output
    cells = [stage for stage in plain.trained()[before:] if stage in GRID]
    assert sorted(cells) == ["resnet10-sgd-0", "resnet20-adam-0", "resnet20-sgd-0"]
    assert [path.name for path in checkpoints.iterdir()] == [
        "resnet10-adam-0.0123456789abcdef.0"
    ]  # not forced


# --- every way to end -------------------------------------------------------------------------------


@pytest.fixture
def endless(plain):
    """Two cells that train for minutes, in processes that end as `resgrid train` does."""
    for cell in RESNET20:
        plain.behave(cell, f"exec {sys.executable} trainer.py {cell} 300")
    return plain


def wait_for_trainers(repository: Sleeping) -> None:
    wait_until(lambda: len(list(repository.root.glob("begun-*"))) == 2, 120, "the cells have not begun")


def deployed(server: Server, deployment: str, repository: Sleeping) -> str:
    """The id of a run of the deployment that a worker has begun."""
    parameters = {"pipeline": str(repository.root), "cells": ["resnet20-*"], "slots": 2, "force": True}
    run = server.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]
    wait_for_trainers(repository)
    return run


def assert_all_has_ended(repository: Sleeping, within: float) -> None:
    assert wait_until(lambda: not left_over(repository), 30) < within
    assert len(list(repository.root.glob("closed-*"))) == 2  # each trainer had its time to close
    entries = json.loads((repository.root / ".dvc/tmp/rwlock").read_text())
    assert not any(entries.values())
    pipeline = Pipeline.find(repository.root)
    for name in ("train-all", "train@resnet20-sgd-0"):
        lock = pipeline.lock(name)
        lock.acquire(timeout=20)  # the flow's process may live a little longer than its children
        lock.release()


def test_cancelling_a_run_ends_every_trainer_and_leaves_nothing(server, deployment, worker, endless):
    run = deployed(server, deployment, endless)
    now = status(Pipeline.find(endless.root))
    assert sorted(each.cell.id for each in now.cells if each.word == "running") == sorted(RESNET20)
    assert sorted(each.at_work.slot for each in now.cells if each.at_work) == ["cpu 1/2", "cpu 2/2"]
    assert [record.stage for record, _ in now.running] == ["train@resnet20-adam-0", "train@resnet20-sgd-0"]
    server.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert_all_has_ended(endless, within=10)
    wait_until(lambda: server.ask(f"flow_runs/{run}")["state"]["type"] == "CANCELLED", 30)
    assert server.tasks(run)["resnet20-sgd-0"] == "Cancelled"
    wait_until(lambda: read_grid_run(endless.root, endless.root) is None, 20)  # its file went with it


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_stopping_or_killing_the_worker_ends_every_trainer(server, deployment, worker, endless, number):
    deployed(server, deployment, endless)
    worker.send_signal(number)
    assert_all_has_ended(endless, within=10)
    worker.wait(30)


def test_killing_the_flow_ends_every_trainer_and_the_next_run_goes_on(server, endless):
    flow = server.begin(endless, cells=["resnet20-*"], slots=2, force=True)
    wait_for_trainers(endless)
    flow.kill()
    assert_all_has_ended(endless, within=10)
    now = status(Pipeline.find(endless.root))
    assert str(now).startswith("The last train-all was killed. Run it again: what it had finished is kept.\n")
    assert not any(each.word in ("queued", "running") for each in now.cells)
    for cell in RESNET20:
        endless.behave(cell, "true")
    assert server.run(train_all, endless).name == "Completed"
    assert endless.run("dvc", "status", "--json").stdout.strip() == "{}"


@pytest.mark.long
def test_a_flow_killed_at_random_moments_leaves_a_grid_that_the_next_finishes(server, tmp_path):
    """With the bytes of one that nobody disturbed, and each cell recorded."""
    killed, whole = (sleeping(tmp_path / name, "resnet20, resnet10", "sgd, adam") for name in ("k", "w"))
    assert whole.run("dvc", "repro").returncode == 0
    draws = random.Random(20)
    for _ in range(20):
        killed.change_code()
        flow = server.begin(killed, slots=2, nap=0.5)
        time.sleep(draws.uniform(3, 20))
        flow.kill()
        wait_until(lambda: not left_over(killed), 20)
    killed.change_code((whole.root / "code/net.py").read_text().strip())
    assert server.run(train_all, killed, slots=2).name == "Completed"
    assert killed.run("dvc", "status", "--json").stdout.strip() == "{}"
    for file in [*whole.root.glob("runs/*/weights"), whole.root / "reports/leaderboard.csv"]:
        assert (killed.root / file.relative_to(whole.root)).read_bytes() == file.read_bytes()


@pytest.mark.long
def test_a_server_that_is_away_does_not_stop_the_grid(server, plain):
    plain.change_code()
    flow = server.begin(plain, slots=1, nap=3)
    before = len(plain.trained())
    wait_until(lambda: len(plain.trained()) > before)
    server.kill()
    wait_until(lambda: len(plain.trained()) == before + 4)
    server.start()
    flow.end()
    assert plain.run("dvc", "status", "--json").stdout.strip() == "{}"


@pytest.mark.long
def test_a_lost_connection_and_a_failed_card_are_tried_again_and_at_most_twice(server, plain):
    plain.change_code()
    plain.behave("resnet20-sgd-0", 'fail \'"connection"\' "the server does not answer"')
    plain.behave("resnet20-adam-0", 'fail \'"card"\' "CUDA error"')
    before = len(plain.trained())
    flow = server.run(train_all, plain, slots=2)
    assert "(2 trained, 2 failed)." in flow.message
    again = plain.trained()[before:]
    assert [again.count(cell) for cell in RESNET20] == [3, 3]


@pytest.mark.long
def test_64_cells_on_32_slots_lose_no_result(server, tmp_path):
    grid = "resnet20, resnet32, resnet44, resnet56"
    repository = sleeping(tmp_path / "r", grid, "sgd, adam, rmsprop, adagrad", "0, 1, 2, 3")
    flow = server.begin(repository, slots=32, nap=1)
    flow.end()
    assert (flow.state, flow.message) == ("Completed", "64 cells: 64 trained"), flow.output
    assert "Unable to acquire lock" not in flow.output
    assert "trying again" not in flow.output
    assert len(repository.trained()) == len(set(repository.trained())) == 67
    assert repository.run("dvc", "status", "--json").stdout.strip() == "{}"
    recorded = (repository.root / "dvc.lock").read_text()
    assert recorded.count("  train@resnet") == 64


# --- real cells -------------------------------------------------------------------------------------


def test_both_doors_give_the_same_weights_at_the_same_number_of_threads(server, small, tmp_path):
    real = small.copy(tmp_path / "a project", mirrored=True)

    def read(name: str) -> Any:
        return json.loads((real.root / "runs" / CELL / name).read_text())

    by_hand, started = read("run.json")["weights_sha256"], read("timing.json")["started"]  # on one thread
    flow = server.run(train_all, real, cells=[CELL], slots=num_cores(), force=True)
    assert flow.message == "1 cells: 1 trained"
    assert (read("timing.json")["threads"], read("timing.json")["started"] > started) == (1, True)
    assert read("run.json")["weights_sha256"] == by_hand
    [current] = real.runs().query("`tags.grid` == 'current' and `tags.cell` == @CELL")["tags.flow_run_id"]
    assert current == str(flow.state_details.flow_run_id)
