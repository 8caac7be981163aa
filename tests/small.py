"""A small pipeline that is trained for real: DVC in its own repository, a SQLite MLflow, real images."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from mlflow import MlflowClient
from PIL import Image
from sklearn.datasets import load_digits
from sleeping import ROOT, Checkout

from resgrid.cli import main
from resgrid.edit import rewritten

RECIPE = """
    epochs: {epochs}
    batch_size: {batch_size}
    schedule: {{name: constant}}
    warmup: {{steps: 0, factor: 1.0}}
    time_decay: 0.0
    weight_decay: 0.0
    decay_norm_and_bias: false
    dropout: 0.0
    augmentation:
      flip: false
      crop_padding: 1
      rotation_degrees: 5.0
      shift_fraction: 0.0
    normalization: {{name: scalar}}
    approach: end_to_end
    initial_weights: {{name: random}}"""
PARAMS = """
name: small
data: {data}
preprocess:
  resize: stretch
  validation_fraction: {validation}
  training_fraction: {training}
  seed: 0
grid: {{architectures: [resnet20], optimizers: [sgd, adam], seeds: {seeds}, own_architectures: []}}
rates: {{factors: []}}
recipes:
  resnet20:{recipe}
tuning:
  resnet20:
    sgd: {{lr: 0.05}}
    adam: {{lr: 0.001}}
    rmsprop: {{lr: 0.001}}
    adagrad: {{lr: 0.01}}
optimizers:
  sgd: {{momentum: 0.9, nesterov: true}}
  adam: {{betas: [0.9, 0.999], eps: 1.0e-8}}
  rmsprop: {{alpha: 0.99, momentum: 0.0, eps: 1.0e-8}}
  adagrad:
    lr_decay: 0.0
    initial_accumulator_value: 0.0
    eps: 1.0e-10
studies: {studies}
engine: {{precision: fp32, compile: never, scored_epochs: all}}
"""
STUDIES = """
  too-fast: {architecture: resnet20, optimizer: sgd, seed: 0, lr: 1.0e+9}
  no-weights:
    architecture: resnet20
    optimizer: sgd
    seed: 0
    initial_weights:
      name: file
      path: absent.safetensors
      checksum: md5:00000000000000000000000000000000"""
SMALL = PARAMS.format(
    data="{source: image-folder, location: images, test_fraction: 0.0, on_broken: refuse}",
    training=1.0,
    validation=0.1,
    seeds="[0, 1]",
    recipe=RECIPE.format(epochs=2, batch_size=16),
    studies=STUDIES,
)
DIGITS = PARAMS.format(
    data="{source: digits, test_fraction: 0.1, split_seed: 0}",
    training=0.1,
    validation=0.0,
    seeds="[0]",
    recipe=RECIPE.format(epochs=1, batch_size=32),
    studies="{}",
)
GRID = ["resnet20-sgd-0", "resnet20-sgd-1", "resnet20-adam-0", "resnet20-adam-1"]
CELL = "resnet20-sgd-0"

ALWAYS = {"train-study@no-weights"}  # it has no outputs, so it is always to be done


@dataclass
class Project(Checkout):
    """A pipeline of the project itself."""

    trained: subprocess.CompletedProcess[str] | None = None
    evaluated: subprocess.CompletedProcess[str] | None = None

    def copy(self, root: Path, mirrored: bool = False) -> Project:
        """The same in another folder; `mirrored`: with an experiment of its own in MLflow, which takes 5 s."""
        project = replace(self, root=shutil.copytree(self.root, root, symlinks=True))
        if mirrored:
            done = project.run("resgrid", "sync", "--rebuild")
            assert done.returncode == 0, done.stderr
        return project

    @property
    def env(self) -> dict[str, str]:
        here = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return here | {"PATH": path, "RESGRID_THREADS": "1"}

    def run(self, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        if command[0] == "resgrid" and set(extra) <= {"MLFLOW_TRACKING_URI"}:
            return self.run_here(command, self.env | extra)
        return super().run(*command, **extra)

    def run_here(
        self, command: tuple[str, ...], environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """The same in this process, which has imported torch and MLflow already: 4 s of CPU less each time."""
        handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
        with (
            chdir(self.root), patch.dict(os.environ, environment, clear=True),
            redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err,
        ):  # fmt: skip
            try:
                code = main(command[1:])
            except SystemExit as left:  # argparse's
                code = int(left.code or 0)
            finally:
                signal.signal(signal.SIGTERM, handler)
                torch.set_num_threads(threads)
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    def stale(self) -> set[str]:
        """The stages that `dvc status` calls changed, less those whose outputs were never made."""
        done = self.run("dvc", "status", "--json")
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout))

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.root}/mlflow.db")

    def runs(self) -> pd.DataFrame:
        """A row a run, as `mlflow.search_runs` gives it, but with no tracking URI set for other tests."""
        experiment = self.mlflow.get_experiment_by_name("small")
        return pd.DataFrame(
            {"run_id": run.info.run_id, "status": run.info.status}
            | {f"params.{key}": value for key, value in run.data.params.items()}
            | {f"tags.{key}": value for key, value in run.data.tags.items()}
            for run in self.mlflow.search_runs([experiment.experiment_id])
        )


def trained(root: Path) -> Project:
    """A pipeline on 240 real digits as PNG files in `root`, of which every cell but one can be trained.

    The stages that end well run in this process and are then committed: half a minute of CPU less.
    """
    project = _checkout(root, SMALL)
    found = load_digits()
    for i, (pixels, label) in enumerate(zip(found.images[:240], found.target[:240], strict=True)):
        folder = root / "images" / ("test" if i % 4 == 0 else "train") / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9375).astype("uint8")).save(folder / f"{i:04}.png")
    for command in ("git add -A", "git commit -qm start"):
        assert project.run(*command.split()).returncode == 0
    cells = {f"train@{cell}": cell for cell in GRID} | {"train-study@too-fast": "too-fast"}
    commands = {"download": ["download"], "preprocess": ["preprocess"]}
    commands |= {stage: ["train", cell] for stage, cell in cells.items()}
    for stage, command in commands.items():
        environment = project.env | {"DVC_ROOT": str(root), "DVC_STAGE": stage}  # as DVC sets them
        done = project.run_here(("resgrid", *command), environment)
        assert done.returncode == 0, done.stderr
    assert project.run("dvc", "commit", "--force", *commands).returncode == 0
    project.trained = project.run("dvc", "repro", "-k")
    project.evaluated = project.run("dvc", "repro", "--single-item", "evaluate")
    return project


def digits(root: Path) -> Project:
    """The project's own stages on scikit-learn's digits, one epoch, two cells; nothing is trained yet."""
    return _checkout(root, DIGITS)


def _checkout(root: Path, params: str) -> Project:
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / "params.yaml").write_text(rewritten(params))
    project = Project(root)
    project.initialize()
    return project
