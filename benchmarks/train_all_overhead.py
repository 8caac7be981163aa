"""What train-all costs beside the training: stages only sleep here.

- 36 cells of 5 s on 6 slots: ideally 30 s, at most 1.15 times that and 10 s
- the same again, with everything up to date: at most 10 s
- 64 cells on 16 slots: no lock error, no lost result
- planning and recording one cell, in a grid of 24, 100 and 240 recorded cells: a plan takes at most 10 s

Each with a Prefect server and DVC repositories of its own, in a folder that is deleted afterwards. The
figures depend on the machine and on what else runs there: run it on an idle one. Ours: train_all_overhead.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sleeping import Sleeping, sleeping  # noqa: E402
from test_train_all import Server  # noqa: E402

from resgrid.dvc.pipeline import Pipeline  # noqa: E402
from resgrid.dvc.process import reproduce  # noqa: E402
from tasks.plan import make_plan  # noqa: E402

NINE = "resnet20, resnet32, resnet44, resnet56, resnet110, resnet10, resnet18, resnet26, vgg16"
FOUR = "sgd, adam, rmsprop, adagrad"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["grid", "many", "recording"], help="one part alone")
    only = parser.parse_args().only
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if only != "recording":
            server = Server(Path(folder))
            try:
                if only != "many":
                    grid(server, Path(folder))
                if only != "grid":
                    many(server, Path(folder))
            finally:
                server.kill()
        if only in (None, "recording"):
            recording(Path(folder))


def grid(server: Server, folder: Path) -> None:
    repository = sleeping(folder / "grid", NINE, FOUR)
    repository.behave("evaluate", "true")
    assert repository.run("dvc", "repro", "preprocess").returncode == 0
    for what, ideal, limit in (("36 cells of 5 s, 6 slots", 30.0, 44.5), ("36 cells, up to date", 0.0, 10.0)):
        began = time.perf_counter()
        flow = server.run(repository, slots=6, nap=5)
        wall = time.perf_counter() - began
        assert flow.state == "Completed", flow.output
        print(f"{what:30} {wall:6.1f} s   ideal {ideal:4.1f} s, at most {limit:4.1f} s", flush=True)


def many(server: Server, folder: Path) -> None:
    repository = sleeping(folder / "many", "resnet20, resnet32, resnet44, resnet56", FOUR, "0, 1, 2, 3")
    repository.behave("evaluate", "true")
    assert repository.run("dvc", "repro", "preprocess").returncode == 0
    began = time.perf_counter()
    flow = server.run(repository, slots=16, nap=5)
    wall = time.perf_counter() - began
    assert flow.message == "64 cells: 64 trained", flow.output
    assert repository.run("dvc", "status", "--json").stdout.strip() == "{}"
    busy = len(re.findall(r"busy|acquire lock", flow.output))
    print(f"{'64 cells of 5 s, 16 slots':30} {wall:6.1f} s   ideal 20.0 s, {busy} lock errors", flush=True)


def recording(folder: Path) -> None:
    seeds = ", ".join(map(str, range(10)))
    for num, architectures, optimizers, numbers in (
        (24, "resnet20, resnet32, resnet44, resnet56, resnet110, resnet10", FOUR, "0"),
        (100, "resnet20, resnet32, resnet44, resnet56, resnet110", "sgd, adam", seeds),
        (240, "resnet20, resnet32, resnet44, resnet56, resnet110, resnet10", FOUR, seeds),
    ):
        repository = recorded(sleeping(folder / str(num), architectures, optimizers, numbers))
        pipeline = Pipeline.find(repository.root)
        os.environ |= repository.env
        began = time.perf_counter()
        plan = make_plan(pipeline)
        planned = time.perf_counter() - began
        assert [step.state for step in plan.cells] == ["up to date"] * num
        began = time.perf_counter()
        assert reproduce(pipeline, "train@resnet20-sgd-0", {}, force=True)
        took = time.perf_counter() - began
        size = (repository.root / "dvc.lock").stat().st_size
        figures = f"plan {planned:5.1f} s, one cell of 0 s {took:5.1f} s, dvc.lock {size / 1e3:4.0f} kB"
        print(f"{num:3} cells: {figures}", flush=True)


def recorded(repository: Sleeping) -> Sleeping:
    """Every cell recorded in dvc.lock, as if it had run: really running 240 takes a quarter of an hour."""
    for stage in ("preprocess", "train@resnet20-sgd-0"):
        assert repository.run("dvc", "repro", stage).returncode == 0
    yaml = YAML()
    lock = repository.root / "dvc.lock"
    content = yaml.load(lock.read_text())
    one = json.dumps(content["stages"]["train@resnet20-sgd-0"])
    params = YAML(typ="safe").load((repository.root / "params.yaml").read_text())
    for name in repository.run("dvc", "stage", "list", "--name-only").stdout.split():
        if not name.startswith("train@"):
            continue
        cell = name.removeprefix("train@")
        architecture, optimizer, _ = cell.split("-")
        entry = json.loads(one.replace("resnet20-sgd-0", cell))
        made = entry["params"]["params.yaml"] = {"engine": params["engine"]}
        made[f"recipes.{architecture}"] = params["recipes"][architecture]
        made[f"tuning.{architecture}.{optimizer}"] = params["tuning"][architecture][optimizer]
        made[f"optimizers.{optimizer}"] = params["optimizers"][optimizer]
        file = repository.root / f"runs/{cell}/weights"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{cell} depth = 20\n")
        md5 = hashlib.md5(file.read_bytes()).hexdigest()
        cached = repository.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_bytes(file.read_bytes())
        entry["outs"][0] |= {"md5": md5, "size": file.stat().st_size}
        content["stages"][name] = entry
    with lock.open("w") as out:
        yaml.dump(content, out)
    return repository


if __name__ == "__main__":
    main()
