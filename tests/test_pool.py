"""A grid on several machines: workers in clones of their own, with real services between them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cluster import BUCKET, Cluster, end_tree, wait_until
from sleeping import ROOT, WORK, Sleeping, sleeping

RUN = """
import json, sys
from flows.train_all import train_all
state = train_all(**json.loads(sys.argv[1]), return_state=True)
print(json.dumps([state.name, state.message]))
"""

# As `resgrid` does, a stage that is only to be taken over refuses. A nap is made of short ones, so that a
# process that was stopped has the rest of it before it; and what came to an end is told.
GUARD = 'if [ -n "$RESGRID_RECORD_ONLY" ]; then echo "resgrid: not run here"; exit 1; fi'
NAP = "for i in $(seq ${NAP:-0}); do sleep 1; done"
GUARDED = (
    WORK.replace("set -e\n", f"set -e\n{GUARD}\n").replace("sleep ${NAP:-0}", NAP) + 'echo "$1" >> ended\n'
)


@dataclass
class Worker:
    """`resgrid worker` in a clone of the project."""

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return self.root.with_suffix(".log").read_text()

    def signal(self, number: int) -> None:
        """To the worker with its flows and their trainers."""
        end_tree(self.process, number)


@dataclass
class Project:
    """The coordinator's checkout, and those of its workers."""

    cluster: Cluster
    origin: Sleeping
    workers: list[Worker] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.origin.root

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        done = subprocess.run(
            command, cwd=cwd or self.root, env=self.cluster.env | more, capture_output=True, text=True,
            timeout=300, check=False,
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
        return subprocess.Popen(
            [sys.executable, "-c", RUN, content], cwd=self.root, env=self.cluster.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def lines(self, name: str) -> Counter[str]:
        """How often each stage stands in that file of any checkout."""
        files = [root / name for root in (self.root, *(worker.root for worker in self.workers))]
        text = "".join(file.read_text() for file in files if file.exists())
        return Counter(line.split()[0] for line in text.splitlines())

    def end(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
            worker.process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.end()


def committed(cluster: Cluster, origin: Sleeping) -> Project:
    """A checkout that others can clone: its flows, and a DVC remote in S3."""
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("flows", "tasks"):
        shutil.copytree(ROOT / folder, origin.root / folder, ignore=ignore)
    for name in ("prefect.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, origin.root / name)
    project = Project(cluster, origin)
    remote = f"s3://{BUCKET}/{origin.root.parent.name}"
    for command in (
        f"dvc remote add --default storage {remote}",
        f"dvc remote modify storage endpointurl {cluster.url('s3')}",
        "git config user.name t", "git config user.email t@t.invalid", "git add -A", "git commit -qm start",
        "prefect --no-prompt work-pool create --type process --overwrite resgrid",
        "prefect --no-prompt deploy --all",
    ):  # fmt: skip
        project.run(*command.split())
    return project


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Iterator[Project]:
    """Six cells that sleep."""
    origin = sleeping(tmp_path / "origin", "resnet20, resnet32, resnet44", "sgd, adam")
    (origin.root / "work.sh").write_text(GUARDED)
    with (origin.root / ".gitignore").open("a") as file:
        file.write("/behave\n/trained\n/ended\n")
    made = committed(cluster, origin)
    yield made
    made.end()


def test_a_killed_and_a_stopped_worker_lose_nothing_and_nothing_is_trained_twice(project: Project) -> None:
    """24 cells over three workers, and two of them go away, in a short form: six over three."""
    naps = {"leaves": "60", "hangs": "60", "stays": "1"}
    first, second, third = (project.work(name, NAP=nap) for name, nap in naps.items())
    grid = project.train_all()

    def cell_of(worker: Worker) -> bool:
        begun = worker.root / "trained"
        return begun.exists() and len(begun.read_text().splitlines()) > 0

    wait_until(lambda: cell_of(first) and cell_of(second), 120, "no cell has begun")
    first.signal(signal.SIGKILL)
    second.signal(signal.SIGSTOP)
    said, _ = grid.communicate(timeout=400)
    assert json.loads(said.splitlines()[-1]) == ["Completed", "6 cells: 6 trained"], said

    lock = (project.root / "dvc.lock").read_text()
    assert lock.count("  train@resnet") == 6
    assert project.run("dvc", "status", "--json").strip() == "{}"
    for cell in project.root.glob("runs/*"):
        assert (cell / "weights").read_text() == f"{cell.name} depth = 20\n"

    second.signal(signal.SIGCONT)  # late: it lets its cell go
    wait_until(lambda: "has let the cell go" in second.said or "Cancelled" in second.said, 60, second.said)
    ended = project.lines("ended")
    cells = [stage for stage in ended if stage.startswith("resnet")]
    assert sorted(cells) == sorted(path.name for path in project.root.glob("runs/*"))
    assert {ended[cell] for cell in cells} == {1}
    assert (ended["download"], ended["preprocess"], ended["evaluate"]) == (1, 1, 1)  # the data were brought
    third.process.send_signal(signal.SIGTERM)
    assert third.process.wait(30) == 0
    assert "The worker has left." in third.said
