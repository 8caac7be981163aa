"""A grid on several machines: workers in clones of their own, with real services between them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cluster import BUCKET, Cluster, end_tree, wait_until
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from sleeping import ROOT, WORK, Sleeping, sleeping
from small import digits

from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import Outcome, reproduce
from resgrid.errors import ResgridError
from tasks.order import Order
from tasks.plan import Step
from tasks.pool import LOST, Pool, record, watch_runs
from tasks.worker import NotPushed, push

RUN = """
import json, sys
from flows.train_all import train_all
state = train_all(**json.loads(sys.argv[1]), return_state=True)
print(json.dumps([state.name, state.message]))
"""

# A nap is made of short ones, so that a process that was stopped has the rest of it before it; and what came
# to an end is told.
NAP = "for i in $(seq ${NAP:-0}); do sleep 1; done"
NAPPING = WORK.replace("sleep ${NAP:-0}", NAP) + 'echo "$1" >> ended\n'


@dataclass
class Worker:
    """`resgrid worker` in a clone of the project."""

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
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
        done = subprocess.run(
            command, cwd=cwd or self.root, env=self.cluster.env | more, capture_output=True, text=True,
            timeout=1200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def work(self, name: str, slots: int = 1, **more: str) -> Worker:
        """One more worker, in a clone of its own."""
        clone = self.root.parent / name
        if not clone.exists():
            self.run("git", "clone", "-q", str(self.root), str(clone))
        command = [sys.executable, "-m", "resgrid.cli", "worker", "--slots", str(slots), "--name", name]
        code = "import sys; from resgrid.cli import main; sys.exit(main())"
        command = [sys.executable, "-P", "-c", code, *command[3:]]
        with clone.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=clone, env=self.cluster.env | more, stdout=log, stderr=log
            )
        self.workers.append(Worker(clone, process))
        return self.workers[-1]

    def train_all(self, **parameters: Any) -> subprocess.Popen[str]:
        content = json.dumps({"where": "pool"} | parameters)
        self.coordinator = subprocess.Popen(
            [sys.executable, "-c", RUN, content], cwd=self.root, env=self.cluster.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return self.coordinator

    def lines(self, name: str) -> Counter[str]:
        """How often each stage stands in that file of any checkout."""
        files = [root / name for root in (self.root, *(worker.root for worker in self.workers))]
        text = "".join(file.read_text() for file in files if file.exists())
        return Counter(line.split()[0] for line in text.splitlines())

    def runs(self) -> list[dict[str, Any]]:
        """All flow runs of this project's cells, as Prefect's server has them."""
        of_project = {
            "flows": {"name": {"any_": ["train-cell"]}},
            "flow_runs": {"expected_start_time": {"after_": self.began.isoformat()}},
        }
        found: list[dict[str, Any]] = self.cluster.ask("flow_runs/filter", of_project)
        return found

    def states(self) -> list[list[str]]:
        """The names of the states of each of them, one after the other."""
        each = [self.cluster.ask(f"flow_run_states/?flow_run_id={run['id']}") for run in self.runs()]
        return [[state["name"] for state in sorted(of, key=lambda s: s["timestamp"])] for of in each]

    def mlflow_runs(self) -> dict[str, list[str]]:
        """The ids of the runs that MLflow has of each cell of this project, which is an experiment of its own."""
        client = MlflowClient(self.cluster.url("mlflow"))
        runs: dict[str, list[str]] = {}
        if experiment := client.get_experiment_by_name(self.root.parent.name.replace("_", "-")):
            for run in client.search_runs([experiment.experiment_id]):
                if cell := run.data.tags.get("cell"):
                    runs.setdefault(cell, []).append(run.info.run_id)
        return runs

    def check_recorded_once(self, cells: int) -> None:
        """Each cell stands in dvc.lock, and MLflow has one run of it."""
        assert (self.root / "dvc.lock").read_text().count("  train@resnet") == cells
        assert self.run("dvc", "status", "--json").strip() == "{}"
        assert [len(runs) for runs in self.mlflow_runs().values()] == [1] * cells

    def end(self) -> None:
        if self.coordinator:
            with self.coordinator:
                self.coordinator.kill()
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
            worker.process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.end()


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
        "git config user.name t", "git config user.email t@t.invalid", "git add -A", "git commit -qm start",
        "prefect --no-prompt work-pool create --type process --overwrite resgrid",
        "prefect --no-prompt deploy --all",
    ):  # fmt: skip
        project.run(*command.split())


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Iterator[Project]:
    """Four cells that sleep."""
    origin = sleeping(tmp_path / "origin", "resnet20, resnet32", "sgd, adam")
    (origin.root / "work.sh").write_text(NAPPING)
    with (origin.root / ".gitignore").open("a") as file:
        file.write("/behave\n/trained\n/ended\n")
    made = Project(cluster, origin)
    commit(made)
    yield made
    made.end()


def test_the_server_is_told_once_what_silence_means(cluster: Cluster) -> None:
    url = cluster.env["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        for _ in range(2):
            watch_runs(client)
        assert len(client.read_automations()) == 2


def test_killed_and_stopped_workers_and_a_killed_coordinator_cost_no_cell_and_none_is_trained_twice(
    project: Project,
) -> None:
    """Four cells over three workers, of which two go away with their flows."""
    naps = {"leaves": "60", "hangs": "60", "stays": "1"}
    first, second, third = (project.work(name, NAP=nap) for name, nap in naps.items())
    grid = project.train_all()
    wait_until(lambda: first.has_begun() and second.has_begun(), 300, "no cell has begun")
    grid.kill()
    grid.communicate()
    first.signal(signal.SIGKILL)
    second.signal(signal.SIGSTOP)
    said, _ = project.train_all().communicate(timeout=600)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "4 cells: 4 trained"], said

    lock = (project.root / "dvc.lock").read_text()
    assert lock.count("  train@resnet") == 4
    assert project.run("dvc", "status", "--json").strip() == "{}"
    for cell in project.root.glob("runs/*"):
        assert (cell / "weights").read_text() == f"{cell.name} depth = 20\n"

    second.signal(signal.SIGCONT)  # late: it lets its cell go
    wait_until(lambda: "has let the cell go" in second.said or "Cancelled" in second.said, 60, second.said)
    ended = project.lines("ended")
    cells = [stage for stage in ended if stage.startswith("resnet")]
    assert sorted(cells) == sorted(path.name for path in project.root.glob("runs/*"))
    assert {ended[cell] for cell in cells} == {1}
    assert len(project.runs()) == 6  # the two cells were placed again, by the coordinator that took over
    assert (ended["download"], ended["preprocess"], ended["evaluate"]) == (1, 1, 1)  # the data were brought
    third.process.send_signal(signal.SIGTERM)
    assert third.process.wait(30) == 0
    assert "The worker has left." in third.said


@pytest.mark.long
def test_services_that_are_started_again_in_the_middle_cost_no_cell(project: Project) -> None:
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
    said, _ = grid.communicate(timeout=500)
    assert project.run("dvc", "status", "--json").strip() == "{}", said
    assert (project.root / "dvc.lock").read_text().count("  train@resnet") == 4
    ended = project.lines("ended")
    assert {ended[path.name] for path in project.root.glob("runs/*")} == {1}, said


@pytest.mark.long
def test_cells_that_train_while_prefects_server_is_away_are_not_trained_again(real: Project) -> None:
    """For two minutes, after which each is declared lost. The automation does that unless a heartbeat comes
    first; so that it happens each time, it is done here as well."""
    real.origin.edit(
        "dvc.yaml", "cmd: resgrid train ${item.arch", "cmd: sleep 200 && resgrid train ${item.arch"
    )
    real.origin.edit("params.yaml", "optimizers: [sgd, adam]", "optimizers: [sgd, adam, rmsprop]")
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
        lost = {"state": {"type": "CRASHED", "name": LOST}, "force": True}
        real.cluster.ask(f"flow_runs/{run['id']}/set_state", lost)
    said, _ = grid.communicate(timeout=900)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "3 cells: 3 trained"], said
    states = real.states()
    assert len(states) == 3  # each was placed once
    assert all(LOST in of and of[-1] == "Completed" for of in states)
    real.check_recorded_once(3)


@pytest.mark.long
def test_a_worker_killed_before_its_flow_begins_loses_no_cell(real: Project) -> None:
    commit(real)
    first = real.work("first")
    grid = real.train_all()
    wait_until(lambda: any(run["state_type"] == "PENDING" for run in real.runs()), 120, "no cell was taken")
    first.signal(signal.SIGKILL)
    real.work("second")
    said, _ = grid.communicate(timeout=600)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "2 cells: 2 trained"], said
    (lost,) = [of for of in real.states() if "Lost" in of]
    assert "Running" not in lost
    assert not (first.root / "runs").exists()
    real.check_recorded_once(2)


@pytest.mark.long
def test_a_worker_at_another_commit_or_with_changed_files_refuses(project: Project) -> None:
    elsewhere = project.work("elsewhere")
    elsewhere.signal(signal.SIGKILL)
    (elsewhere.root / "code/net.py").write_text("depth = 56\n")
    changed = project.work("elsewhere", NAP="1")
    grid = project.train_all()
    assert changed.process.wait(120) == 1
    assert "a cell came that this clone must not train: code/net.py differ from the commit" in changed.said
    project.run("git", "config", "user.name", "t", cwd=changed.root)
    project.run("git", "config", "user.email", "t@t.invalid", cwd=changed.root)
    project.run("git", "commit", "-qam", "other", cwd=changed.root)
    committed = project.work("elsewhere", NAP="1")
    assert committed.process.wait(120) == 1
    assert "it stands at commit " in committed.said
    project.work("sound", NAP="1")
    said, _ = grid.communicate(timeout=300)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "4 cells: 4 trained"], said
    assert not (changed.root / "ended").exists()


@pytest.mark.long
def test_cells_that_need_a_gpu_do_not_go_to_a_worker_without_one(project: Project) -> None:
    plain = project.work("plain", NAP="1", RESGRID_DEVICE="cpu")
    grid = project.train_all(device="cuda")
    assert grid.stdout is not None
    for line in grid.stdout:
        if "none of the workers plain takes a cell" in line:
            assert "with the device cuda" in line
            break
    else:
        pytest.fail("the coordinator does not say that nobody takes the cells")
    grid.terminate()
    grid.communicate(timeout=60)
    assert not plain.has_begun()

    said, _ = project.train_all(device="cpu").communicate(timeout=300)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "4 cells: 4 trained"], said
    assert {project.lines("ended")[path.name] for path in project.root.glob("runs/*")} == {1}


# --- real cells -------------------------------------------------------------------------------------


@pytest.fixture
def real(cluster: Cluster, tmp_path: Path) -> Iterator[Project]:
    """The project itself on the digits, to be committed by the test."""
    made = Project(cluster, Sleeping(digits(tmp_path / "origin").root))
    made.origin.edit("params.yaml", "name: small", f"name: {tmp_path.name.replace('_', '-')}")
    yield made
    made.end()


@pytest.mark.long
def test_24_cells_on_three_workers_have_the_weights_of_one_machine(real: Project, tmp_path: Path) -> None:
    real.origin.edit("params.yaml", "optimizers: [sgd, adam]", "optimizers: [sgd, adam, rmsprop, adagrad]")
    real.origin.edit("params.yaml", "seeds: [0]", "seeds: [0, 1, 2, 3, 4, 5]")
    commit(real)
    for name in ("one", "two", "three"):
        real.work(name, slots=2)  # of one thread each
    said, _ = real.train_all().communicate(timeout=900)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "24 cells: 24 trained"], said
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

    real.check_recorded_once(24)

    # A colleague has all of it without training.
    real.run("dvc", "push")
    real.run("git", "add", "-f", "dvc.lock")
    real.run("git", "commit", "-qm", "results")
    colleague = tmp_path / "colleague"
    real.run("git", "clone", "-q", str(real.root), str(colleague))
    real.run("dvc", "pull", cwd=colleague)
    assert real.run("dvc", "status", "--json", cwd=colleague).strip() == "{}"
    assert (colleague / "reports/index.html").exists()


@pytest.mark.long
def test_a_training_goes_on_on_another_machine_with_the_same_weights(real: Project, tmp_path: Path) -> None:
    real.origin.edit("params.yaml", "epochs: 1\n", "epochs: 250\n")
    real.origin.edit("params.yaml", "optimizers: [sgd, adam]", "optimizers: [sgd]")
    commit(real)
    first = real.work("first", slots=2)
    grid = real.train_all()

    def is_shared() -> bool:
        client = MlflowClient(real.cluster.url("mlflow"))
        return any(client.list_artifacts(run, "checkpoint") for (run,) in real.mlflow_runs().values())

    wait_until(is_shared, 240, "no checkpoint was put with the run")
    first.signal(signal.SIGKILL)
    second = real.work("second", slots=2)
    said, _ = grid.communicate(timeout=600)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "1 cells: 1 trained"], said
    assert "/250, which another machine has reached" in second.said
    real.check_recorded_once(1)
    alone = tmp_path / "alone"
    real.run("git", "clone", "-q", str(real.root), str(alone))
    real.run("dvc", "repro", cwd=alone, RESGRID_THREADS="1", MLFLOW_TRACKING_URI="")
    metrics = "runs/resnet20-sgd-0/run.json"
    assert (real.root / metrics).read_text() == (alone / metrics).read_text()
    assert not is_shared()  # it is done


# --- what travels -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's folder and a worker's clone, and beside them the folder that is their DVC remote."""
    folder = tmp_path_factory.mktemp("clones")
    origin = sleeping(folder / "origin", "resnet20", "sgd, adam, rmsprop")
    (origin.root / "work.sh").write_text(NAPPING)
    for command in (
        "dvc remote add --default storage ../storage", "git add -A",
        "git -c user.name=t -c user.email=t@t.invalid commit -qm start",
        f"git clone -q {origin.root} {folder}/clone",
    ):  # fmt: skip
        assert origin.run(*command.split()).returncode == 0
    for each in (origin, Sleeping(folder / "clone")):
        assert each.run("dvc", "repro", "--single-item", "download", "preprocess").returncode == 0
    return folder


@pytest.fixture
def clones(made: Path, tmp_path: Path) -> tuple[Sleeping, Sleeping]:
    """Copies of both, of this test's own; the data are everywhere."""
    shutil.copytree(made, tmp_path / "of its own", symlinks=True)
    return Sleeping(tmp_path / "of its own/origin"), Sleeping(tmp_path / "of its own/clone")


def taken(origin: Sleeping, *cells: str) -> list[bool | None]:
    """Of each of these cells, whether `record` has brought its result here."""
    here, stop = Pipeline.find(origin.root), threading.Event()
    return [record(here, f"train@{cell}", {}, print, stop) for cell in cells]


def test_what_the_remote_has_is_recorded_and_nothing_is_trained_for_the_rest(clones) -> None:
    origin, clone = clones
    there, elsewhere, nowhere = "resnet20-sgd-0", "resnet20-adam-0", "resnet20-rmsprop-0"
    for cell in (there, elsewhere):
        assert clone.run("dvc", "repro", "--single-item", f"train@{cell}").returncode == 0
    # A worker that was cut off in the middle of its push: the outputs without their entry in the run cache.
    assert clone.run("dvc", "push", f"train@{elsewhere}").returncode == 0
    assert taken(origin, there, elsewhere) == [False, False]
    # The next push brings what is left of the one before as well.
    push(Pipeline.find(clone.root), f"train@{there}", threading.Event())
    assert taken(origin, there, elsewhere, nowhere) == [True, True, False]
    lock = (origin.root / "dvc.lock").read_text()
    assert [f"train@{cell}" in lock for cell in (there, elsewhere, nowhere)] == [True, True, False]
    assert "resnet20" not in (origin.root / "trained").read_text()


@pytest.mark.parametrize("missing", [(), ("resnet20-adam-0",)])
def test_cells_that_end_together_are_recorded_together(clones, missing, monkeypatch) -> None:
    origin, clone = clones
    cells = ["resnet20-sgd-0", "resnet20-adam-0", "resnet20-rmsprop-0"]
    for cell in set(cells) - set(missing):
        assert clone.run("dvc", "repro", "--single-item", f"train@{cell}").returncode == 0
        push(Pipeline.find(clone.root), f"train@{cell}", threading.Event())
    commands = []

    def counted(*arguments: Any, **keywords: Any) -> Outcome:
        commands.append(1 + len(keywords["others"]))
        return reproduce(*arguments, **keywords)

    monkeypatch.setattr("tasks.pool.reproduce", counted)
    monkeypatch.setattr("tasks.pool._deploy", lambda client, name: None)
    pool = Pool(None, "pool", Pipeline.find(origin.root), None, {}, print, threading.Event())
    steps = [Step(f"train@{cell}", None, "stale", ()) for cell in cells]
    with ThreadPoolExecutor() as threads:
        with pool._recording:  # as another's `dvc` does
            waiting = [threads.submit(pool._record, step, print) for step in steps]
            while len(pool._ended) < len(steps):
                time.sleep(0.01)
        found = [each.result() for each in waiting]
    assert found == [cell not in missing for cell in cells]
    assert commands[0] == 3
    assert missing or len(commands) == 1
    lock = (origin.root / "dvc.lock").read_text()
    assert [f"train@{cell}" in lock for cell in cells] == found


def test_a_push_that_the_remote_does_not_take_is_told(clones) -> None:
    _, clone = clones
    assert clone.run("dvc", "repro", "--single-item", "train@resnet20-sgd-0").returncode == 0
    runs = clone.root.parent / "storage/runs"  # DVC ends well although it has not pushed the run cache
    runs.parent.mkdir()
    runs.touch()
    with pytest.raises(NotPushed, match="resnet20-sgd-0"):
        push(Pipeline.find(clone.root), "train@resnet20-sgd-0", threading.Event())


def test_a_remote_that_is_away_says_nothing_of_any_cell(clones) -> None:
    origin, _ = clones
    url = "s3://nobody/there"
    origin.run("dvc", "remote", "modify", "storage", "url", url)
    origin.run("dvc", "remote", "modify", "storage", "endpointurl", "http://127.0.0.1:9")
    assert taken(origin, "resnet20-sgd-0") == [None]


def test_another_commit_other_packages_and_changed_files_are_named(clones, tmp_path: Path) -> None:
    origin, clone = clones
    order = Order.of(Pipeline.find(origin.root), None)
    here = Pipeline.find(clone.root)
    assert order.refusal(here) is None  # though dvc.lock is new there
    assert set(order.versions) >= {"resgrid", "torch", "numpy", "dvc"}
    assert "pytest" not in order.versions
    older = order.model_copy(update={"versions": order.versions | {"torch": "1.0.0"}})
    assert "torch " in (older.refusal(here) or "")
    (clone.root / "code/net.py").write_text("depth = 56\n")
    assert "code/net.py differ" in (order.refusal(here) or "")
    clone.run("git", "-c", "user.name=t", "-c", "user.email=t@t.invalid", "commit", "-qam", "other")
    assert f"the grid at {order.commit[:10]}" in (order.refusal(here) or "")
    (origin.root / "params.yaml").write_text((origin.root / "params.yaml").read_text() + "\n")
    with pytest.raises(ResgridError, match=r"params\.yaml differ from the commit"):
        Order.of(Pipeline.find(origin.root), None)
