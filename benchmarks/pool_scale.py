"""What a work pool costs beside the training.

Real PostgreSQL, S3 server, Prefect, MLflow and DVC, as `tests/cluster.py` starts them. Stages only sleep.

- at 24, 100 and 240 cells: placing and recording them. Their results lie in the DVC remote already, and a
  process that only tells Prefect so stands in for the workers, so what is left is the coordinator's work.
  Beside the clock, the CPU time of the coordinator with its `dvc` commands, of Prefect's server, PostgreSQL
  and the S3 server.
- 12 cells of 10 s on three real workers: what a worker adds to each cell.

The figures depend on the machine and on what else runs there: run it on an idle one. Ours: pool_scale.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cluster import Cluster  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: E402
from prefect.states import Completed, Pending, Running  # noqa: E402
from sleeping import Sleeping, sleeping  # noqa: E402
from test_pool import NAPPING, Project, commit, deploy  # noqa: E402

from resgrid.dvc.pipeline import DVC_COMMAND  # noqa: E402

SIX = "resnet20, resnet32, resnet44, resnet56, resnet110, resnet10"
FOUR = "sgd, adam, rmsprop, adagrad"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", type=int, default=[24, 100, 240])
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        try:
            deploy(cluster)
            coordinator(cluster, Path(folder), options.cells)
            workers(cluster, Path(folder))
        finally:
            cluster.end()


def coordinator(cluster: Cluster, folder: Path, sizes: list[int]) -> None:
    print("\n| cells | by the clock | a cell | coordinator | Prefect | PostgreSQL | S3 |")
    print("|---|---|---|---|---|---|---|")
    fixed = _one(cluster, folder / "0", 4)["clock"]
    for num in sizes:
        found = _one(cluster, folder / str(num), num)
        each = (found["clock"] - fixed) / (num - 4)
        shares = " | ".join(f"{found[name] / num:.2f} s" for name in ("grid", "prefect", "postgres", "s3"))
        print(f"| {num} | {found['clock']:.0f} s | {each:.2f} s | {shares} |", flush=True)
    print(f"\n(the run with 4 cells, most of it fixed: {fixed:.0f} s)")


def _one(cluster: Cluster, folder: Path, num: int) -> dict[str, float]:
    """Seconds: by the clock of one train-all whose cells' results are in the remote; CPU of each part."""
    folder.mkdir()
    seeds = ", ".join(str(seed) for seed in range(-(-num // 24)))
    origin = sleeping(folder / "origin", SIX, FOUR, seeds)
    origin.set(f"name=cells-{num}")  # an experiment belongs to one repository
    (origin.root / "work.sh").write_text(NAPPING)
    project = Project(cluster, origin)
    commit(project)
    chosen = _cells(origin)[:num]
    stages = [f"train@{cell}" for cell in chosen]
    reference = folder / "reference"
    project.run("git", "clone", "-q", str(origin.root), str(reference))
    command = (*DVC_COMMAND, "repro", "--single-item", "download", "preprocess")
    project.run(*command, *stages, cwd=reference)
    project.run("dvc", "push", "--run-cache", cwd=reference)
    shutil.rmtree(reference)

    parts = {name: psutil.Process(cluster.processes[name].pid) for name in ("prefect", "s3")}
    parts["postgres"] = _postgres(cluster)
    before = {name: _cpu(process) for name, process in parts.items()}
    over = threading.Event()
    stand_in = threading.Thread(target=_stand_in, args=(cluster.env["PREFECT_API_URL"], over), daemon=True)
    stand_in.start()
    began, grid_before = time.perf_counter(), _children_cpu()
    said, _ = project.train_all(cells=chosen).communicate()
    clock, grid = time.perf_counter() - began, _children_cpu() - grid_before
    over.set()
    stand_in.join()
    assert f"{num} cells: {num} trained" in said, said
    used = {name: _cpu(process) - before[name] for name, process in parts.items()}
    return used | {"clock": clock, "grid": grid}


def _cells(origin: Sleeping) -> list[str]:
    from resgrid.config import load_params
    from resgrid.grid import expand

    return [cell.id for cell in expand(load_params(origin.root / "params.yaml"))]


def _stand_in(url: str, over: threading.Event) -> None:
    """Whatever is placed in the pool is at once done, as far as Prefect knows."""
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        while not over.wait(0.5):
            try:
                found: Any = client.request(
                    "POST",
                    "/work_pools/{name}/get_scheduled_flow_runs",
                    path_params={"name": "pool"},
                    json={"limit": 200},
                ).json()
            except Exception:  # the pool is not made yet
                continue
            for each in found:
                for state in (Pending(), Running(), Completed()):
                    client.set_flow_run_state(each["flow_run"]["id"], state, force=True)


def _postgres(cluster: Cluster) -> psutil.Process:
    number = (cluster.postgres.root / "data/postmaster.pid").read_text().split()[0]
    return psutil.Process(int(number))


def _cpu(process: psutil.Process) -> float:
    """Of a process with all it has started and waited for, seconds."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        times = each.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def workers(cluster: Cluster, folder: Path) -> None:
    """12 cells of 10 s on three workers, each in a clone of its own: ideally 40 s."""
    origin = sleeping(folder / "w" / "origin", SIX, "sgd, adam")
    origin.set("name=workers")
    (origin.root / "work.sh").write_text(NAPPING)
    project = Project(cluster, origin)
    commit(project)
    try:
        for name in ("one", "two", "three"):
            project.work(name, NAP="10")
        began = time.perf_counter()
        said, _ = project.train_all().communicate()
        clock = time.perf_counter() - began
    finally:
        project.end()
    assert "12 cells: 12 trained" in said, said
    print(f"\n12 cells of 10 s on three workers: {clock:.0f} s by the clock, 40 s of it asleep", flush=True)


if __name__ == "__main__":
    main()
