"""A grid on several machines: workers in clones of their own, with real services between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cluster import BUCKET, Cluster, begin_flow, end_tree
from mlflow import MlflowClient
from prefect.automations import AutomationCore
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists
from sleeping import ROOT, WORK, Checkout, Sleeping, left_over, sleeping, wait_until
from small import digits

from resgrid import watch
from resgrid.dvc import ask
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import StageFailed
from resgrid.errors import ResgridError
from resgrid.stage_record import Fault
from tasks import server, spec
from tasks.pool import Pool, _deploy
from tasks.spec import RunSpec, checkout, difference

# A nap is made of short ones, so that a process that was stopped has the rest of it before it; and what came
# to an end is written down.
NAP = "for i in $(seq ${NAP:-0}); do sleep 1; done"
NAPPING = WORK.replace("sleep ${NAP:-0}", NAP) + 'echo "$1" >> ended\n'


def experiment_name(folder: Path) -> str:
    """Of the project in a test's folder: MLflow's server is every test's."""
    return folder.name.replace("_", "-")


@dataclass
class Worker:
    """`resgrid worker` in a clone of the project."""

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def output(self) -> str:
        return self.root.with_suffix(".log").read_text()

    def has_begun(self) -> bool:
        """Whether a cell that sleeps has begun here."""
        return (self.root / "trained").exists()

    def signal(self, number: int) -> None:
        """To the worker with its flows and their trainers."""
        end_tree(self.process, number)


@dataclass
class Project:
    """The coordinator's checkout, and those of its workers."""

    cluster: Cluster
    origin: Sleeping
    workers: list[Worker] = field(default_factory=list)
    coordinator: subprocess.Popen[str] | None = None
    began: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def root(self) -> Path:
        return self.origin.root

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        done = Checkout(cwd or self.root).run(*command, **self.cluster.env | more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def clone(self, name: str) -> Path:
        clone = self.root.parent / name
        if not clone.exists():
            self.run("git", "clone", "-q", str(self.root), str(clone))
        return clone

    def work(self, name: str, slots: int = 1, **more: str) -> Worker:
        """One more worker, in a clone of its own."""
        clone = self.clone(name)
        command = ["resgrid", "worker", "--slots", str(slots), "--name", name]
        with clone.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=clone, env=self.cluster.env | more, stdout=log, stderr=log
            )
        self.workers.append(Worker(clone, process))
        return self.workers[-1]

    def train_all(self, **parameters: Any) -> subprocess.Popen[str]:
        self.coordinator = begin_flow(self.root, self.cluster.env, where="pool", **parameters)
        return self.coordinator

    def ended(self) -> Counter[str]:
        """How often each stage has come to an end, in any checkout."""
        files = self.root.parent.glob("*/ended")
        return Counter(line for file in files for line in file.read_text().splitlines())

    def runs(self) -> list[dict[str, Any]]:
        """All flow runs of this project's cells, as Prefect's server has them."""
        of_project = {
            "flows": {"name": {"any_": ["train-cell"]}},
            "flow_runs": {"expected_start_time": {"after_": self.began.isoformat()}},
        }
        return self.cluster.ask("flow_runs/filter", of_project)

    def states(self) -> list[list[str]]:
        """The names of the states of each of them, one after the other."""
        each = [self.cluster.ask(f"flow_run_states/?flow_run_id={run['id']}") for run in self.runs()]
        return [[state["name"] for state in sorted(of, key=lambda s: s["timestamp"])] for of in each]

    def check_recorded(self, cells: int) -> None:
        """Each cell stands in dvc.lock, nothing is stale; MLflow has a run of each that is real."""
        assert (self.root / "dvc.lock").read_text().count("  train@resnet") == cells
        assert self.run("dvc", "status", "--json").strip() == "{}"
        of_sleeping = list(self.root.glob("runs/*/weights"))
        for weights in of_sleeping:
            assert weights.read_text() == f"{weights.parent.name} depth = 20\n"
        if not of_sleeping:
            client = MlflowClient(self.cluster.url("mlflow"))
            experiment = client.get_experiment_by_name(experiment_name(self.root.parent))
            runs = client.search_runs([experiment.experiment_id])
            assert len({run.data.tags.get("cell") for run in runs} - {None}) == cells

    def end(self) -> None:
        if self.coordinator:
            with self.coordinator:
                self.coordinator.kill()
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
            worker.process.wait()


def deploy(cluster: Cluster) -> None:
    """Register the deployments of prefect.yaml, which name no folder."""
    with server.prefect_client(cluster.env["PREFECT_API_URL"]) as client:
        server.make_pool(client, "resgrid")
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    subprocess.run(command, cwd=ROOT, env=cluster.env, check=True, capture_output=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        deploy(made)
        yield made
    finally:
        made.end()


@pytest.fixture
def client(cluster):
    """Of Prefect's server."""
    with server.prefect_client(cluster.env["PREFECT_API_URL"]) as client:
        yield client


def commit(project: Project) -> None:
    """Make it a checkout that others can clone: with the flows, and a DVC remote in S3."""
    cluster, root = project.cluster, project.root
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("flows", "tasks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    for name in ("prefect.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    remote = f"s3://{BUCKET}/{root.parent.name}"
    for command in (
        f"dvc remote add --default storage {remote}",
        f"dvc remote modify storage endpointurl {cluster.url('s3')}",
        "git add -A", "git commit -qm start",
    ):  # fmt: skip
        project.run(*command.split())


@pytest.fixture
def project(cluster, tmp_path, request):
    """Two cells that sleep, or one for each of the optimizers that a test names."""
    origin = sleeping(tmp_path / "origin", "resnet20", getattr(request, "param", "sgd, adam"))
    (origin.root / "work.sh").write_text(NAPPING)
    with (origin.root / ".gitignore").open("a") as file:
        file.write("/behave\n/trained\n/ended\n")
    made = Project(cluster, origin)
    commit(made)
    yield made
    made.end()


def test_the_server_sets_runs_without_heartbeats_to_crashed_and_forgets_the_former_automations(client):
    server.watch_runs(client)
    made = client.read_automations()
    former = made[0].model_copy(update={"name": "ResGrid's cells: no heartbeat for 60 s"})
    client.create_automation(AutomationCore.model_validate(former.model_dump(exclude={"id"})))
    server.watch_runs(client)
    assert {each.id for each in client.read_automations()} == {each.id for each in made}
    actions = [action for each in made for action in each.actions]
    assert [(action.state, action.name) for action in actions] == [(StateType.CRASHED, None)] * 2


def test_cells_that_the_version_before_has_placed_are_cancelled(client):
    server.make_pool(client, "former")
    deployment = _deploy(client, "former", "default")
    runs = {}
    for queue in ("default", "cpu", "0123456789abcdef"):
        with suppress(ObjectAlreadyExists):
            client.create_work_queue(queue, work_pool_name="former")
        runs[queue] = client.create_flow_run_from_deployment(
            deployment, work_queue_name=queue, parameters={"cell": "resnet20-sgd-0"}
        )
    _deploy(client, "former", "default")
    states = {queue: client.read_flow_run(run.id).state for queue, run in runs.items()}
    assert {queue: state and state.type for queue, state in states.items()} == {
        "default": StateType.CANCELLED, "cpu": StateType.CANCELLED, "0123456789abcdef": StateType.SCHEDULED,
    }  # fmt: skip


def test_empty_queues_of_former_checkouts_are_deleted(client, monkeypatch):
    monkeypatch.setattr(server, "FORMER_SECONDS", 0.0)
    empty, used, current = "a" * 16, "b" * 16, "c" * 16
    server.make_pool(client, "queues", [empty, f"{empty}-cpu", used, current, "people's own"])
    deployment = _deploy(client, "queues", used)
    client.create_flow_run_from_deployment(deployment, work_queue_name=used, parameters={"cell": "a"})
    server.delete_former_queues(client, "queues", current)
    left = {queue.name for queue in client.read_work_queues("queues")}
    assert left == {used, current, "people's own", "default"}


def test_a_cancelled_coordinator_cancels_its_cells_and_a_killed_one_with_a_killed_worker_costs_none(project):
    grid = project.train_all()
    # Before any worker has made the queue, which PostgreSQL refuses to all but one that make it at once.
    wait_until(lambda: len(project.runs()) == 2, 120, "not every cell was placed")
    first = project.work("first", NAP="600")
    wait_until(first.has_begun, 300, "no cell has begun")
    began = time.monotonic()
    grid.terminate()
    grid.communicate(timeout=60)
    assert time.monotonic() - began < 15
    wait_until(lambda: not trainers(first), 60, "a cell still trains")
    assert {run["state_type"] for run in project.runs()} <= {"CANCELLED", "CANCELLING"}

    (first.root / "trained").unlink()
    grid = project.train_all()
    wait_until(first.has_begun, 300, "no cell has begun")
    grid.kill()
    grid.communicate()
    first.signal(signal.SIGKILL)
    for run in project.runs():
        if run["state_type"] == "RUNNING":  # the automations do this a minute later
            set_crashed(project, run["id"])
    second = project.work("second", NAP="0")
    assert_completed(project.train_all(), 2, 300)
    project.check_recorded(2)
    # Two were cancelled, one crashed and was placed again, and the third coordinator joined the other.
    assert len(project.runs()) == 5
    ended = project.ended()
    assert (ended["download"], ended["preprocess"], ended["evaluate"]) == (1, 1, 1)  # the data were brought
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(30) == 0
    assert "The worker has left." in second.output


@pytest.mark.long
@pytest.mark.parametrize("project", ["sgd, adam, rmsprop, adagrad"], indirect=True)
def test_killed_and_stopped_workers_and_a_killed_coordinator_cost_no_cell(project):
    """Four cells over three workers, of which two go away with their flows; the server sees that by itself."""
    naps = {"leaves": "60", "hangs": "60", "stays": "1"}
    first, second, _ = (project.work(name, NAP=nap) for name, nap in naps.items())
    grid = project.train_all()
    wait_until(lambda: first.has_begun() and second.has_begun(), 300, "no cell has begun")
    grid.kill()
    grid.communicate()
    first.signal(signal.SIGKILL)
    second.signal(signal.SIGSTOP)
    assert_completed(project.train_all(), 4, 600)
    project.check_recorded(4)
    # The second coordinator joined the runs of the first, and placed again the two that were lost; of cells
    # that had ended meanwhile a worker took the results from the remote.
    assert 6 <= len(project.runs()) <= 8


def set_crashed(project: Project, run: str) -> None:
    """As the server's automations do."""
    state = {"state": {"type": "CRASHED"}, "force": True}
    project.cluster.ask(f"flow_runs/{run}/set_state", state)


def assert_completed(grid: subprocess.Popen[str], cells: int, seconds: int) -> str:
    """That the coordinator ends within that time and has trained all cells; what it printed."""
    output, _ = grid.communicate(timeout=seconds)
    assert json.loads(output.splitlines()[-1]) == ["Completed", f"{cells} cells: {cells} trained"], output
    return output


def trainers(worker: Worker) -> list[str]:
    """The commands of stages that run in a worker's clone."""
    return [line for line in left_over(Sleeping(worker.root)) if "work.sh" in line]


@pytest.mark.long
def test_services_that_are_started_again_in_the_middle_cost_no_cell(project):
    workers = [project.work(name, NAP="5") for name in ("one", "two")]
    grid = project.train_all()
    wait_until(lambda: all(worker.has_begun() for worker in workers), 120, "no cell has begun")
    services = project.cluster
    for name in ("prefect", "mlflow"):
        services.kill(name)
    services.postgres.stop()
    time.sleep(8)
    services.postgres.start()
    for name in ("mlflow", "prefect"):
        services.start(name)
    output, _ = grid.communicate(timeout=500)
    project.check_recorded(2)
    assert set(project.ended()) >= {path.name for path in project.root.glob("runs/*")}, output


@pytest.mark.long
def test_each_cell_ends_recorded_though_prefects_server_is_away_for_two_minutes(real):
    """The automations may set the living runs to Crashed when the server is back: so that it happens each
    time, it is done here as well."""
    real.origin.edit(
        "dvc.yaml", "cmd: resgrid train ${item.arch", "cmd: sleep 200 && resgrid train ${item.arch"
    )
    real.origin.set("grid.optimizers=[sgd, adam, rmsprop]")
    commit(real)
    worker = real.work("worker", slots=3)
    grid = real.train_all()
    log = "train@resnet20-*.log"
    wait_until(lambda: len(list((worker.root / ".resgrid/logs").glob(log))) == 3, 300, "no three cells train")
    real.cluster.kill("prefect")
    time.sleep(120)
    real.cluster.start("prefect")
    assert not list((worker.root / "runs").glob("*/run.json")), "they are over already"
    for run in real.runs():
        set_crashed(real, run["id"])
    assert_completed(grid, 3, 900)
    real.check_recorded(3)


@pytest.mark.long
def test_a_worker_killed_before_its_flow_begins_loses_no_cell(real):
    commit(real)
    first = real.work("first")
    grid = real.train_all()
    wait_until(lambda: any(run["state_type"] == "PENDING" for run in real.runs()), 120, "no cell was taken")
    first.signal(signal.SIGKILL)
    real.work("second")
    assert_completed(grid, 2, 600)
    (lost,) = [of for of in real.states() if "Crashed" in of]
    assert "Running" not in lost
    assert not (first.root / "runs").exists()
    real.check_recorded(2)


@pytest.mark.long
def test_a_worker_with_changed_files_does_not_start_and_one_at_another_commit_takes_no_cell(project):
    elsewhere = project.clone("elsewhere")
    (elsewhere / "code/net.py").write_text("depth = 56\n")
    changed = project.work("elsewhere", NAP="1")
    assert changed.process.wait(120) == 1
    assert "code/net.py differ from the commit" in changed.output
    commit_all(project, elsewhere)
    other = project.work("elsewhere", NAP="1")
    grid = project.train_all()
    wait_for_line(grid, "No worker of the pool 'pool' takes these cells")
    assert not other.has_begun()
    project.work("sound", NAP="1")
    assert_completed(grid, 2, 300)
    assert not (elsewhere / "ended").exists()


@pytest.mark.long
def test_git_pull_in_a_workers_clone_in_the_middle_of_a_grid_costs_no_cell(project):
    pulled, stays = project.work("pulled", NAP="60"), project.work("stays", NAP="1")
    grid = project.train_all()
    wait_until(pulled.has_begun, 300, "no cell has begun")
    source = project.clone("source")
    (source / "code/net.py").write_text("depth = 56\n")
    commit_all(project, source)
    project.run("git", "pull", "-q", str(source), "main", cwd=pulled.root)
    assert pulled.process.wait(60) == 1
    assert "The worker leaves: " in pulled.output
    assert "it is at commit" in pulled.output
    assert_completed(grid, 2, 300)
    project.check_recorded(2)
    assert stays.process.poll() is None


@pytest.mark.long
def test_a_worker_with_other_data_leaves_and_its_cell_goes_to_another(project):
    clone = project.clone("other")
    (clone / "behave").mkdir()
    Sleeping(clone).behave("preprocess", "echo other > $2/other")
    project.run("dvc", "repro", "preprocess", cwd=clone)
    other = project.work("other", NAP="1")
    grid = project.train_all()
    assert other.process.wait(300) == 0
    assert "The worker has left." in other.output
    project.work("sound", NAP="1")
    output = assert_completed(grid, 2, 300)
    assert "the data here are" in output
    assert "Crashed" in [state for states in project.states() for state in states]
    assert "resnet" not in (clone / "trained").read_text()


@pytest.mark.long
def test_cells_that_need_a_gpu_do_not_go_to_a_worker_without_one(project):
    plain = project.work("plain", NAP="1", RESGRID_DEVICE="cpu")
    grid = project.train_all(device="cuda")
    assert "device: cuda" in wait_for_line(grid, "No worker of the pool 'pool' takes these cells")
    grid.terminate()
    grid.communicate(timeout=60)
    assert not plain.has_begun()

    assert_completed(project.train_all(device="cpu"), 2, 300)


def wait_for_line(grid: subprocess.Popen[str], words: str, seconds: float = 300) -> str:
    """The coordinator's next line that has these words; it is killed where there is none in time."""
    assert grid.stdout is not None
    limit = threading.Timer(seconds, grid.kill)
    limit.start()
    line = next((line for line in grid.stdout if words in line), "")
    limit.cancel()
    assert line, f"the coordinator did not log: {words}"
    return line


def commit_all(project: Project, clone: Path) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@t.invalid")
    project.run("git", *who, "commit", "-qam", "other", cwd=clone)


# --- real cells -------------------------------------------------------------------------------------


@pytest.fixture
def real(cluster, tmp_path):
    """The project itself on the digits, to be committed by the test."""
    made = Project(cluster, Sleeping(digits(tmp_path / "origin").root))
    made.origin.set(f"name={experiment_name(tmp_path)}")
    yield made
    made.end()


@pytest.mark.long
def test_24_cells_on_three_workers_have_the_weights_of_one_machine(real, tmp_path):
    real.origin.set("grid.optimizers=[sgd, adam, rmsprop, adagrad]", "grid.seeds=[0, 1, 2, 3, 4, 5]")
    commit(real)
    for name in ("one", "two", "three"):
        real.work(name, slots=2)  # of one thread each
    assert_completed(real.train_all(), 24, 900)
    trained = [len(list((worker.root / "runs").glob("*/run.json"))) for worker in real.workers]
    assert sum(trained) == 24
    assert min(trained) > 0
    real.end()

    alone = tmp_path / "alone"
    real.run("git", "clone", "-q", str(real.root), str(alone))
    real.run("dvc", "repro", cwd=alone, RESGRID_THREADS="1", MLFLOW_TRACKING_URI="")
    for cell in (real.root / "runs").iterdir():
        here = json.loads((cell / "run.json").read_text())
        assert here == json.loads((alone / "runs" / cell.name / "run.json").read_text())

    real.check_recorded(24)

    # A colleague has all of it without training.
    real.run("dvc", "push")
    real.run("git", "add", "-f", "dvc.lock")
    real.run("git", "commit", "-qm", "results")
    colleague = tmp_path / "colleague"
    real.run("git", "clone", "-q", str(real.root), str(colleague))
    real.run("dvc", "pull", cwd=colleague)
    assert real.run("dvc", "status", "--json", cwd=colleague).strip() == "{}"
    assert (colleague / "reports/index.html").exists()


# --- what travels -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A coordinator's folder and a worker's clone, and beside them the folder that is their DVC remote."""
    folder = tmp_path_factory.mktemp("clones")
    origin = sleeping(folder / "origin", "resnet20", "sgd, adam, rmsprop, adagrad")
    (origin.root / "work.sh").write_text(NAPPING)
    for command in (
        "dvc remote add --default storage ../storage", "git add -A", "git commit -qm start",
        f"git clone -q {origin.root} {folder}/clone",
    ):  # fmt: skip
        assert origin.run(*command.split()).returncode == 0
    for each in (origin, Sleeping(folder / "clone")):
        assert each.run("dvc", "repro", "--single-item", "download", "preprocess").returncode == 0
    return folder


@pytest.fixture
def clones(made, tmp_path):
    """Copies of both, of this test's own; the data are everywhere."""
    shutil.copytree(made, tmp_path / "of its own", symlinks=True)
    return Sleeping(tmp_path / "of its own/origin"), Sleeping(tmp_path / "of its own/clone")


SGD, ADAM, RMSPROP, ADAGRAD = (f"resnet20-{name}-0" for name in ("sgd", "adam", "rmsprop", "adagrad"))


def record(origin: Sleeping, cell: str) -> Fault | None:
    return ask.record(Pipeline.find(origin.root), [f"train@{cell}"], threading.Event())


def push(clone: Sleeping, stage: str) -> None:
    """As a worker does."""
    for what in ([], ["--run-cache", stage]):
        ask.push(Pipeline.find(clone.root), what, threading.Event())


def test_what_the_remote_has_is_recorded_at_once_and_nothing_is_trained_for_the_rest(clones, monkeypatch):
    origin, clone = clones
    cells = [f"train@{cell}" for cell in (SGD, ADAM, RMSPROP)]
    assert clone.run("dvc", "repro", "--single-item", *cells).returncode == 0
    # A worker that was cut off in the middle of its push: the outputs without their entry in the run cache.
    assert clone.run("dvc", "push", f"train@{ADAM}").returncode == 0
    assert record(origin, ADAM) == Fault.NO_RESULT
    # The next push brings what is left of the one before as well.
    push(clone, f"train@{SGD}")

    monkeypatch.setattr("tasks.pool._deploy", lambda *given: None)
    begun, real = [], ask.record
    monkeypatch.setattr("tasks.pool.record", lambda *given: begun.append(given[1]) or real(*given))
    here = Pipeline.find(origin.root)
    pool = Pool(None, "pool", here, RunSpec.of(here, None), threading.Event())
    for together, results in (((SGD, ADAM), [True, True]), ((RMSPROP, ADAGRAD), [True, False])):
        with ThreadPoolExecutor() as threads:
            with pool._recording:  # as another's `dvc` does
                waiting = [threads.submit(pool._record, f"train@{cell}") for cell in together]
                while len(pool._ended) < len(together):
                    time.sleep(0.01)
            assert [each.result() for each in waiting] == results
    assert begun[0] == tuple(sorted(cells[:2]))
    lock = (origin.root / "dvc.lock").read_text()
    assert [f"train@{cell}" in lock for cell in (SGD, ADAM, RMSPROP, ADAGRAD)] == [True, True, True, False]
    assert "resnet20" not in (origin.root / "trained").read_text()


def test_a_push_that_the_remote_does_not_take_is_a_transient_fault(clones):
    _, clone = clones
    runs = clone.root.parent / "storage/runs"  # DVC ends well although it has not pushed the run cache
    runs.parent.mkdir()
    runs.touch()
    with pytest.raises(StageFailed) as failed:
        push(clone, "preprocess")
    assert failed.value.fault == Fault.CONNECTION


def test_a_remote_that_is_away_is_not_one_without_the_result(clones):
    origin, clone = clones
    push(clone, "preprocess")
    here = Pipeline.find(origin.root)
    assert ask.remote_answers(here, "preprocess")
    origin.run("dvc", "remote", "modify", "storage", "url", "s3://nobody/there")
    origin.run("dvc", "remote", "modify", "storage", "endpointurl", "http://127.0.0.1:9")
    assert not ask.remote_answers(here, "preprocess")
    assert record(origin, SGD) is not None


def test_a_cell_taken_by_prefects_worker_after_resgrids_was_killed_alone_is_placed_again_and_ends_it():
    flow = "from tasks.worker import train_for; print(train_for('resnet20-sgd-0', '.', None).name)"
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {flow!r}])"
    env = os.environ | {"PYTHONPATH": str(ROOT), watch.VARIABLE: "999999999:1"}  # no process has this id
    done = subprocess.run(
        [sys.executable, "-c", worker], env=env, stdout=subprocess.PIPE, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "Crashed\n")


def test_a_queue_is_one_commits_and_versions_and_devices_and_what_differs_is_named(clones, monkeypatch):
    origin, clone = clones
    here, there = Pipeline.find(clone.root), Pipeline.find(origin.root)
    wanted = RunSpec.of(there, None)
    assert wanted.queue == RunSpec.of(here, None).queue == wanted.digest
    assert RunSpec.of(there, "cuda").queue == f"{wanted.digest}-cuda"
    assert spec.QUEUE.fullmatch(wanted.queue)
    assert difference(here, wanted.commit, wanted.digest) is None  # though dvc.lock is new there
    assert set(spec.installed()) >= {"resgrid", "torch", "numpy", "dvc"}
    assert "pytest" not in spec.installed()
    with monkeypatch.context() as patched:
        patched.setattr(spec, "installed", lambda: {"torch": "1.0.0"})
        assert "`make install`" in (difference(here, wanted.commit, wanted.digest) or "")
        assert checkout(here) == (wanted.commit, checkout(here)[1]) != (wanted.commit, wanted.digest)
    (clone.root / "code/net.py").write_text("depth = 56\n")
    assert "code/net.py differ" in (difference(here, wanted.commit, wanted.digest) or "")
    clone.run("git", "-c", "user.name=t", "-c", "user.email=t@t.invalid", "commit", "-qam", "other")
    assert f"they are for {wanted.commit[:10]}" in (difference(here, wanted.commit, wanted.digest) or "")
    origin.set("preprocess.seed=1")
    with pytest.raises(ResgridError, match=r"params\.yaml differ from the commit"):
        RunSpec.of(there, None)
