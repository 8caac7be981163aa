"""What a work pool costs beside the training, measured; and what that comes to with 100 workers, simulated.

Real PostgreSQL, S3 server, Prefect, MLflow and DVC, as `tests/cluster.py` starts them. Stages only sleep.

- at 24, 100 and 240 cells: placing and recording them. Their results lie in the DVC remote already, and a
  process that only tells Prefect so stands in for the workers, so what is left is the coordinator's work.
  Beside the clock, the CPU time of the coordinator with its `dvc` commands, of Prefect's server, PostgreSQL
  and the S3 server.
- recording alone, in a grid of 240 and of 3,000 recorded cells: one command for one cell, and for 21.
- 12 cells of 10 s on three real workers: what a worker adds to each cell.
- the model: a simulation of coordinator and workers at those costs.

The figures depend on the machine and on what else runs there: run it on an idle one. Ours: docs/scale.md.
"""

from __future__ import annotations

import argparse
import heapq
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cluster import Cluster  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.settings import PREFECT_API_URL, temporary_settings  # noqa: E402
from prefect.states import Completed, Pending, Running  # noqa: E402
from sleeping import Sleeping, sleeping  # noqa: E402
from test_pool import NAPPING, Project, commit  # noqa: E402

from tasks.stage import DVC_COMMAND  # noqa: E402

SIX = "resnet20, resnet32, resnet44, resnet56, resnet110, resnet10"
FOUR = "sgd, adam, rmsprop, adagrad"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", type=int, default=[24, 100, 240])
    parser.add_argument("--cell", type=float, help="what a cell costs, instead of measuring it")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        each = options.cell
        if each is None:
            cluster = Cluster(Path(folder))
            try:
                each = coordinator(cluster, Path(folder), options.cells)
                workers(cluster, Path(folder))
            finally:
                cluster.end()
        model(recording(Path(folder), each))


# --- measured ---------------------------------------------------------------------------------------


def coordinator(cluster: Cluster, folder: Path, sizes: list[int]) -> float:
    """Seconds that a cell costs, at the largest of these sizes."""
    print("\n| cells | by the clock | a cell | coordinator | Prefect | PostgreSQL | S3 |")
    print("|---|---|---|---|---|---|---|")
    fixed = _one(cluster, folder / "0", 4)["clock"]
    each = []
    for num in sizes:
        found = _one(cluster, folder / str(num), num)
        each.append((found["clock"] - fixed) / (num - 4))
        shares = " | ".join(f"{found[name] / num:.2f} s" for name in ("grid", "prefect", "postgres", "s3"))
        print(f"| {num} | {found['clock']:.0f} s | {each[-1]:.2f} s | {shares} |", flush=True)
    print(f"\n(the run with 4 cells, most of it fixed: {fixed:.0f} s)")
    return each[-1]


def _one(cluster: Cluster, folder: Path, num: int) -> dict[str, float]:
    """Seconds: by the clock of one train-all whose cells' results are in the remote; CPU of each part."""
    folder.mkdir()
    seeds = ", ".join(str(seed) for seed in range(-(-num // 24)))
    origin = sleeping(folder / "origin", SIX, FOUR, seeds)
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


def recording(folder: Path, each: float) -> Costs:
    """What DVC needs to record cells that it has in its cache, in a small and a large grid."""
    print("\n| cells in dvc.lock | recording one | recording 21 | so a command | and a cell |")
    print("|---|---|---|---|---|")
    found = []
    for num_seeds in (10, 125):
        one, many = _record(folder / f"r{num_seeds}", num_seeds)
        num, cell = 24 * num_seeds, (many - one) / 20
        found.append((num, one - cell, cell))
        print(f"| {num:,} | {one:.2f} s | {many:.2f} s | {one - cell:.2f} s | {cell:.2f} s |", flush=True)
    (few, command, cell), (lots, command_there, cell_there) = found
    growth, command_growth = (cell_there - cell) / (lots - few), (command_there - command) / (lots - few)
    return Costs(each / 2, each / 2, growth, command - command_growth * few, command_growth)


def _record(folder: Path, num_seeds: int) -> tuple[float, float]:
    """Seconds for one cell and for 21, each the least of three, among 24 cells for each seed."""
    origin = sleeping(folder / "origin", SIX, FOUR, ", ".join(str(seed) for seed in range(num_seeds)))
    first = [f"train@{cell}" for cell in _cells(origin) if cell.endswith("-0")]
    command = (*DVC_COMMAND, "repro", "--single-item")
    done = origin.run(*command, "download", "preprocess", *first)
    assert done.returncode == 0, done.stderr
    # The entries of the other seeds are those of the first with another name: recording only carries them.
    lock = origin.root / "dvc.lock"
    head, *blocks = re.split(r"^(?=  \S)", lock.read_text(), flags=re.MULTILINE)
    trained = [block for block in blocks if block.startswith("  train@")]
    rest = [block for block in blocks if block not in trained]
    for seed in range(1, num_seeds):
        rest += [re.sub(r"(resnet\d+-[a-z]+)-0", rf"\1-{seed}", block) for block in trained]

    def seconds(stages: list[str]) -> float:
        kept = [block for block in trained if block.partition(":")[0].strip() not in stages]
        lock.write_text(head + "".join(rest + kept))
        began = time.perf_counter()
        done = origin.run(*command, *stages)
        assert done.stdout.count("is cached - skipping run") == len(stages), done.stdout + done.stderr
        return time.perf_counter() - began

    return min(seconds(first[:1]) for _ in range(3)), min(seconds(first[:21]) for _ in range(3))


def workers(cluster: Cluster, folder: Path) -> None:
    """12 cells of 10 s on three workers, each in a clone of its own: ideally 40 s."""
    origin = sleeping(folder / "w" / "origin", SIX, "sgd, adam")
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


# --- simulated --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Of the coordinator, in seconds. It places cells and records results beside each other."""

    place: float  # a cell
    record: float  # a cell
    growth: float  # more of recording, for each cell of the grid
    command: float  # each `dvc repro --pull`, whatever it records
    command_growth: float  # more of it, for each cell of the grid


def model(costs: Costs, overhead: float = 15.5) -> None:
    """How long grids take, with `overhead` seconds that a worker adds to each cell."""
    print("\n| cells | slots | of | ideal | with the pool | lost | recording is busy |")
    print("|---|---|---|---|---|---|---|")
    for minutes in (60, 5):
        for cells, slots in ((240, 12), (1000, 100), (3000, 100), (10_000, 100), (10_000, 800)):
            length = 60.0 * minutes
            ideal = cells * length / slots
            end, busy = simulate(costs, cells, slots, length, overhead)
            print(
                f"| {cells:,} | {slots} | {minutes} min | {ideal / 3600:.1f} h | {end / 3600:.1f} h "
                f"| {100 * (end / ideal - 1):.0f} % | {100 * busy / end:.0f} % |"
            )


def simulate(costs: Costs, cells: int, slots: int, length: float, overhead: float) -> tuple[float, float]:
    """(when the last cell is recorded, how long recording was at work), in seconds.

    Cells are placed one after the other, and each is taken by the slot that is free first. They are recorded
    one after the other, a command each, and differ by ± 20 % in length.
    """
    draws = np.random.default_rng(0).uniform(0.8, 1.2, cells) * length
    free = [0.0] * slots  # when each slot is
    ends = []
    for number, draw in enumerate(draws):
        began = max(heapq.heappop(free), (number + 1) * costs.place)
        ends.append(began + draw + overhead)
        heapq.heappush(free, ends[-1])
    work = costs.command + costs.record + (costs.command_growth + costs.growth) * cells
    clock = 0.0
    for end in sorted(ends):
        clock = max(clock, end) + work
    return clock, work * cells


if __name__ == "__main__":
    main()
