"""The grid in parallel: real Prefect server, real worker, real DVC, real processes; most stages only sleep."""

from __future__ import annotations

import http.server
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import end_tree
from ports import free_port
from sleeping import ROOT, Sleeping, answers, ask, clean_env, left_over, sleeping, wait_until
from small import digits

from resgrid.cell_states import read_grid_run
from resgrid.dvc.pipeline import Pipeline
from tasks.status import status

RUN = """
import json, sys
from flows.{module} import {flow}
state = {flow}(**json.loads(sys.argv[1]), return_state=True)
print(json.dumps([state.name, state.message]))
"""
GRID = ["resnet20-sgd-0", "resnet20-adam-0", "resnet10-sgd-0", "resnet10-adam-0"]


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
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=self.env, cwd=self.log.parent, stdout=log, stderr=log
            )
        wait_until(lambda: answers(f"{self.url}/api/health"), 120, self.log)

    def kill(self) -> None:
        end_tree(self.process)
        self.process.wait()

    def ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        return ask(f"{self.url}/api/{path}", content)

    def begin(self, repository: Sleeping, flow: str = "train_all", /, nap: float = 0, **parameters) -> Flow:
        code = RUN.format(module=flow, flow=flow)
        parameters = {"pipeline": str(repository.root)} | parameters
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(parameters)], cwd=ROOT, text=True,
            env=self.env | {"NAP": str(nap)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return Flow(self, process)

    def run(self, repository: Sleeping, flow: str = "train_all", /, **more) -> Flow:
        begun = self.begin(repository, flow, **more)
        begun.end()
        return begun

    def tasks(self, flow_run: str) -> dict[str, str]:
        """The state's name by the task run's; of several with the same name the last."""
        runs: list[Any] = []
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # events, which the server takes in when it has time
            query = {"flow_runs": {"id": {"any_": [flow_run]}}, "sort": "EXPECTED_START_TIME_ASC"}
            runs = self.ask("task_runs/filter", query)
            if runs and all(run["end_time"] for run in runs):
                break
            time.sleep(0.5)
        return {run["name"]: run["state"]["name"] for run in runs}

    def artifacts(self, flow_run: str) -> dict[str, Any]:
        artifacts = self.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}})
        return {artifact["key"]: artifact for artifact in artifacts}


class Flow:
    """A flow in a process of its own, as a worker starts it."""

    def __init__(self, server: Server, process: subprocess.Popen[str]) -> None:
        self.server, self.process = server, process
        self.state = self.message = self.id = ""
        self.output = ""

    def end(self) -> None:
        self.output, _ = self.process.communicate(timeout=240)
        assert "View at" in self.output, self.output
        self.id = self.output.split("flow-run/")[1][:36]
        if self.process.returncode == 0:
            self.state, self.message = json.loads(self.output.splitlines()[-1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def deployment(server: Server) -> str:
    """The id of `train-all`, registered as `make up` does it."""
    for command in ("work-pool create --type process resgrid", "--no-prompt deploy --all"):
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *command.split()],
            cwd=ROOT,
            env=server.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return server.ask("deployments/name/train-all/train-all")["id"]


@pytest.fixture
def worker(server: Server, deployment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker in the project's folder, as `make up` starts it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, which would be inherited
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "resgrid", "--type", "process"]
    with server.log.open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=server.env, stdout=log, stderr=log)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Sleeping:
    return sleeping(tmp_path_factory.mktemp("a repository"), "resnet20, resnet10", "sgd, adam")


@pytest.fixture
def plain(repository: Sleeping) -> Iterator[Sleeping]:
    """The repository, with no cell made to behave in another way."""
    yield repository
    for file in [
        *repository.root.glob("behave/*"),
        *repository.root.glob("begun*"),
        *repository.root.glob("closed*"),
    ]:
        file.unlink()


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[str]]]:
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
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{receiver.server_port}/hook", texts
        receiver.shutdown()


# --- what is run, and what is not -------------------------------------------------------------------


def test_the_grid_is_trained_in_parallel_and_then_nothing_is_left_to_do(server, plain):
    # Each of these two waits for the other: one after the other they would wait for good.
    for cell, other in (("resnet10-sgd-0", "resnet10-adam-0"), ("resnet10-adam-0", "resnet10-sgd-0")):
        plain.behave(cell, f"touch begun-{cell}; while [ ! -f begun-{other} ]; do sleep 0.1; done")
    flow = server.run(plain, slots=2)
    assert (flow.state, flow.message) == ("Completed", "4 cells: 4 trained"), flow.output
    assert sorted(plain.trained()) == sorted(["download", "preprocess", *GRID, "evaluate"])
    assert plain.trained()[:2] == ["download", "preprocess"]
    assert set(plain.trained()[2:4]) == {"resnet10-sgd-0", "resnet10-adam-0"}  # the longest first
    assert plain.trained()[-1] == "evaluate"

    used = {line.split()[0]: line.split()[2:] for line in (plain.root / "trained").read_text().splitlines()}
    assert {used[cell][0] for cell in GRID} == {"1"}  # a thread each, on two cores
    assert {used[cell][1] for cell in GRID} == {flow.id}  # by which MLflow leads back here

    done = ["download", "preprocess", *GRID, "evaluate", "sync"]
    assert server.tasks(flow.id) == dict.fromkeys(done, "Completed")
    artifacts = server.artifacts(flow.id)
    assert artifacts["progress-root"]["data"] == 100.0
    assert artifacts["progress-root"]["description"] == "4 of 4 cells done"
    assert json.loads(artifacts["leaderboard-root"]["data"])[0] == {
        "cell": "resnet10-adam-0",
        "status": "completed",
    }
    assert set(artifacts) == {"progress-root", "leaderboard-root"}

    clean = plain.run("dvc", "status", "--json")
    assert (clean.stdout.strip(), clean.returncode) == ("{}", 0)
    assert "Running stage" not in plain.run("dvc", "repro").stdout
    assert str(status(Pipeline.find(plain.root))).startswith("Nothing runs now.")
    logs = server.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [flow.id]}}, "limit": 200})
    of_tasks = {line["message"] for line in logs if line["task_run_id"]}
    assert {f"{cell} begins" for cell in GRID} <= of_tasks  # what a stage prints is on its task's page


def test_what_dvc_repro_has_trained_is_not_trained_again(server, plain):
    plain.change_code()
    assert plain.run("dvc", "repro").returncode == 0
    before = plain.trained()
    logs = {file: file.stat().st_mtime_ns for file in plain.root.glob(".resgrid/logs/train@*")}
    flow = server.run(plain)
    assert (flow.state, flow.message) == ("Completed", "4 cells: 4 up to date")
    assert plain.trained() == before
    stages = ["download", "preprocess", *GRID, "evaluate"]
    assert server.tasks(flow.id) == dict.fromkeys(stages, "Up to date") | {"sync": "Completed"}
    # and no dvc was started for any of them
    assert {file: file.stat().st_mtime_ns for file in plain.root.glob(".resgrid/logs/train@*")} == logs


def test_only_the_chosen_cells_are_trained_and_a_wrong_name_is_told(server, plain):
    plain.change_code()
    before = len(plain.trained())
    flow = server.run(plain, cells=["resnet20-*"], slots=1)
    assert flow.message == "2 cells: 2 trained"
    assert sorted(plain.trained()[before:]) == ["evaluate", "resnet20-adam-0", "resnet20-sgd-0"]
    wrong = server.run(plain, cells=["resnet20-sdg-0"])
    assert wrong.state == "Failed"
    assert "no cell is called 'resnet20-sdg-0'; did you mean resnet20-sgd-0" in wrong.message
    data = server.run(plain, "prepare_data")
    assert (data.state, data.message) == ("Completed", "up to date")


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
    flow = server.run(plain, slots=2)
    assert flow.state == "Failed"
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
    assert server.tasks(flow.id)["resnet10-sgd-0"] == "Failed"
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
    assert f"/runs/flow-run/{flow.id}" in ended


def test_when_the_data_fail_nothing_is_trained(server, plain):
    plain.set("preprocess.seed=7")
    plain.behave("preprocess", "fail null 'data/raw/x.png: is no image'")
    before = len(plain.trained())
    flow = server.run(plain)
    plain.set("preprocess.seed=0")
    assert flow.state == "Failed"
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
def endless(plain: Sleeping) -> Sleeping:
    """Two cells that train for minutes, in processes that end as `resgrid train` does."""
    for cell in ("resnet20-sgd-0", "resnet20-adam-0"):
        plain.behave(cell, f"exec {sys.executable} trainer.py {cell} 300")
    return plain


def begun(repository: Sleeping) -> bool:
    return len(list(repository.root.glob("begun-*"))) == 2


def deployed(server: Server, deployment: str, repository: Sleeping) -> str:
    """A run of the deployment, for a worker to take; its id."""
    parameters = {"pipeline": str(repository.root), "cells": ["resnet20-*"], "slots": 2, "force": True}
    return server.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]


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
    wait_until(lambda: begun(endless), 120)
    now = status(Pipeline.find(endless.root))
    assert {each.cell.id: each.word for each in now.cells if each.word == "running"} == dict.fromkeys(
        ["resnet20-sgd-0", "resnet20-adam-0"], "running"
    )
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
    wait_until(lambda: begun(endless), 120)
    worker.send_signal(number)
    assert_all_has_ended(endless, within=10)


def test_killing_the_flow_ends_every_trainer_and_the_next_run_goes_on(server, endless):
    flow = server.begin(endless, cells=["resnet20-*"], slots=2, force=True)
    wait_until(lambda: begun(endless), 120)
    flow.process.kill()
    flow.process.communicate()
    assert_all_has_ended(endless, within=10)
    lines = str(status(Pipeline.find(endless.root))).splitlines()
    assert lines[0] == "The last train-all was killed. Run it again: what it had finished is kept."
    assert not any(each.word in ("queued", "running") for each in status(Pipeline.find(endless.root)).cells)
    for cell in ("resnet20-sgd-0", "resnet20-adam-0"):
        endless.behave(cell, "true")
    assert server.run(endless).state == "Completed"
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
        flow.process.kill()
        flow.process.communicate()
        wait_until(lambda: not left_over(killed), 20)
    killed.change_code((whole.root / "code/net.py").read_text().strip())
    finished = server.run(killed, slots=2)
    assert finished.state == "Completed", finished.output
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
    flow = server.run(plain, slots=2)
    assert "(2 trained, 2 failed)." in flow.message
    again = plain.trained()[before:]
    assert [again.count(cell) for cell in ("resnet20-sgd-0", "resnet20-adam-0")] == [3, 3]


@pytest.mark.long
def test_64_cells_on_32_slots_lose_no_result(server, tmp_path):
    grid = "resnet20, resnet32, resnet44, resnet56"
    repository = sleeping(tmp_path / "r", grid, "sgd, adam, rmsprop, adagrad", "0, 1, 2, 3")
    flow = server.run(repository, slots=32, nap=1)
    assert (flow.state, flow.message) == ("Completed", "64 cells: 64 trained"), flow.output
    assert "Unable to acquire lock" not in flow.output
    assert "trying again" not in flow.output
    assert len(repository.trained()) == len(set(repository.trained())) == 67
    assert repository.run("dvc", "status", "--json").stdout.strip() == "{}"
    recorded = (repository.root / "dvc.lock").read_text()
    assert recorded.count("  train@resnet") == 64


# --- real cells -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Sleeping:
    """A pipeline of the project itself, on the digits."""
    return Sleeping(digits(tmp_path_factory.mktemp("real") / "project").root)


def test_both_doors_give_the_same_weights_at_the_same_number_of_threads(server, real):
    flow = server.run(real, "train_cell", cell="resnet20-sgd-0")
    assert flow.message == "1 cells: 1 trained", flow.output
    assert "  evaluate:" not in (real.root / "dvc.lock").read_text()  # a cell alone
    run = real.root / "runs/resnet20-sgd-0"
    by_flow = json.loads((run / "run.json").read_text())["weights_sha256"]
    threads = json.loads((run / "timing.json").read_text())["threads"]
    shutil.rmtree(real.root / ".dvc/cache/runs")
    by_hand = real.run(
        "dvc", "repro", "--force", "--single-item", "train@resnet20-sgd-0", RESGRID_THREADS=str(threads)
    )
    assert by_hand.returncode == 0, by_hand.stderr
    assert "Running stage" in by_hand.stdout
    assert json.loads((run / "run.json").read_text())["weights_sha256"] == by_flow


@pytest.mark.long
def test_the_mlflow_run_of_a_cancelled_cell_is_killed_and_leads_back_to_its_flow(server, real):
    from mlflow import MlflowClient

    real.edit("params.yaml", "epochs: 1", "epochs: 1000")
    flow = server.begin(real, "train_cell", cell="resnet20-adam-0")
    log = real.root / ".resgrid/logs/train@resnet20-adam-0.log"
    try:
        wait_until(lambda: log.exists() and "epoch   2/1000" in log.read_text(), 120)
    finally:
        flow.process.terminate()
    assert wait_until(lambda: not left_over(real)) < 10
    flow.end()
    client = MlflowClient(f"sqlite:///{real.root}/mlflow.db")
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = {run.data.tags["cell"]: run for run in client.search_runs([experiment])}
    assert runs["resnet20-adam-0"].info.status == "KILLED"
    assert runs["resnet20-adam-0"].data.tags["flow_run_id"] == flow.id
