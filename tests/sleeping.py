"""Pipelines whose stages only sleep and write a file: real DVC, real processes, a real ResGrid grid.

What a cell does stands in the file `behave/<cell>` of shell commands, which is no dependency of its stage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil

from resgrid.edit import assign

ROOT = Path(__file__).parents[1]

STAGES = """
stages:
  download:
    cmd: sh work.sh download data/raw
    params: [data]
    outs: [data/raw]
  preprocess:
    cmd: sh work.sh preprocess data/processed
    deps: [data/raw]
    params: [data, preprocess]
    outs: [data/processed]
  train:
    matrix:
      architecture: ${grid.architectures}
      optimizer: ${grid.optimizers}
      seed: ${grid.seeds}
    cmd: sh work.sh ${item.architecture}-${item.optimizer}-${item.seed}
      runs/${item.architecture}-${item.optimizer}-${item.seed}
    deps: [data/processed, code]
    params:
      - recipes.${item.architecture}
      - tuning.${item.architecture}.${item.optimizer}
      - optimizers.${item.optimizer}
      - engine
    outs:
      - runs/${item.architecture}-${item.optimizer}-${item.seed}/weights
  evaluate:
    cmd: sh work.sh evaluate reports
    deps: [data/processed, runs]
    params: [grid]
    outs: [reports]
"""

# $1: the stage or cell, $2: its folder. `trained` gets a line for each time that a stage really runs.
# Its record is that of `resgrid`'s commands, written by the shell because starting Python takes a second;
# `fail FAULT WHY` ends it as a command does that knows why.
WORK = """
set -e
fault=null
leave() {
  mkdir -p .resgrid/state
  printf '{"stage": "%s", "by": "%s", "started": %s, "ended": %s, "status": "%s", "fault": %s, "why": "%s"}' "$DVC_STAGE" "$by" "$started" "$1" "$2" "$fault" "$why" > .resgrid/state/$$
  mv .resgrid/state/$$ ".resgrid/state/$DVC_STAGE.json"
}
ended() {
  if [ $1 = 0 ]; then leave $(date +%s.%N) done; else leave $(date +%s.%N) failed; fi
}
fail() {
  fault=$1
  why=$2
  echo "resgrid: $2"
  exit 1
}
if [ -n "$DVC_STAGE" ]; then
  if [ -e /proc/$$/stat ]; then by=$$:$(cut -d' ' -f22 /proc/$$/stat); else by=$$:$(ps -o lstart= -p $$); fi
  started=$(date +%s.%N)
  leave null running
  trap 'ended $?' EXIT
fi
if [ -n "$RESGRID_RECORD_ONLY" ]; then fail '"no result"' "not run here"; fi
echo "$1 begins"
echo "$1 $$ ${RESGRID_THREADS:-} ${RESGRID_FLOW_RUN_ID:-}" >> trained
mkdir -p $2
if [ -f behave/$1 ]; then . behave/$1; else sleep ${NAP:-0}; fi
if [ $1 = evaluate ]; then
  echo cell,status > $2/leaderboard.csv
  for cell in runs/*/weights; do echo $(basename $(dirname $cell)),completed >> $2/leaderboard.csv; done
else
  echo $1 $(cat code/net.py) > $2/weights
fi
if [ $1 = preprocess ]; then echo '{"num_images": {"train": 50000, "test": 10000}}' > $2/meta.json; fi
echo "$1 ends"
"""

# A command that ends as `resgrid train` does: whom it works for is watched, and SIGTERM closes what is open.
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from resgrid import watch

def closed(signum, frame):
    Path(f"closed-{sys.argv[1]}").write_text(str(os.getpid()))
    raise SystemExit(143)

signal.signal(signal.SIGTERM, closed)
watch.watch()
Path(f"begun-{sys.argv[1]}").write_text(str(os.getpid()))
time.sleep(float(sys.argv[2]))
"""


def clean_env(**more: str) -> dict[str, str]:
    """An environment that leads to no service, with the programs of this one's folder."""
    services = ("PREFECT", "MLFLOW", "RESGRID", "AWS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(services)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
    return env | quiet | {"PATH": path, "NO_PROXY": "127.0.0.1", **more}


def wait_until(holds: Callable[[], object], seconds: float = 60, what: object = "") -> float:
    """Wait until `holds()`; how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.1)
    return time.monotonic() - began


def ask(url: str, content: dict[str, Any] | None = None) -> Any:
    """The answer of a REST interface."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for _ in range(20):
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except HTTPError as error:
            if error.code != 503:  # Prefect's SQLite is busy: its own clients ask again, too
                raise
            time.sleep(0.5)
    raise TimeoutError(url)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


@dataclass
class Checkout:
    """A repository of git's and DVC's in `root`, with a pipeline in the root itself."""

    root: Path

    @property
    def env(self) -> dict[str, str]:
        return clean_env()

    def run(self, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.root, env=self.env | extra, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip

    def initialize(self) -> None:
        """Make it a repository, with the project's settings."""
        for name in (".dvcignore", ".gitignore"):
            shutil.copy(ROOT / name, self.root / name)
        for command in (
            "git init -q -b main", "git config user.name t", "git config user.email t@t.invalid", "dvc init -q",
        ):  # fmt: skip
            done = self.run(*command.split())
            assert done.returncode == 0, done.stderr
        shutil.copy(ROOT / ".dvc/config", self.root / ".dvc/config")

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.root / path
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    def set(self, *assignments: str) -> None:
        """As `resgrid set` does."""
        path = self.root / "params.yaml"
        path.write_text(assign(path.read_text(), assignments))


class Sleeping(Checkout):
    """Its stages sleep."""

    @property
    def env(self) -> dict[str, str]:
        return clean_env(PYTHONPATH=str(ROOT))

    def behave(self, cell: str, commands: str) -> None:
        (self.root / "behave" / cell).write_text(commands + "\n")

    def change_code(self, to: str | None = None) -> None:
        """Make every cell stale; unless `to` is given, in a way that no run cache knows."""
        (self.root / "code/net.py").write_text(f"{to or f'depth = {time.time_ns()}'}\n")

    def trained(self) -> list[str]:
        """The stages whose command has run, in order."""
        file = self.root / "trained"
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def sleeping(root: Path, architectures: str, optimizers: str, seeds: str = "0") -> Sleeping:
    """A new one in `root`; its params are those of the project, with this grid and no studies."""
    grid = {"architectures": architectures, "optimizers": optimizers, "seeds": seeds}
    lists = [f"grid.{key}=[{items}]" for key, items in grid.items()]
    params = assign((ROOT / "params.yaml").read_text(), [*lists, "studies={}"])
    for folder in ("behave", "code"):
        (root / folder).mkdir(parents=True)
    (root / "params.yaml").write_text(params)
    (root / "dvc.yaml").write_text(STAGES)
    (root / "work.sh").write_text(WORK)
    (root / "trainer.py").write_text(TRAINER)
    (root / "code/net.py").write_text("depth = 20\n")
    pipeline = Sleeping(root)
    pipeline.initialize()
    return pipeline


def left_over(repository: Checkout) -> list[str]:
    """The command lines of all processes that work in the repository."""
    commands = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == repository.root and process.status() != psutil.STATUS_ZOMBIE:
                commands.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return commands
