"""What a disk, a clock or a hand can do to a pipeline: real DVC, real MLflow, real disks that are full."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import Run
from ports import free_port
from ruamel.yaml import YAML
from sleeping import answers, wait_until
from small import ALWAYS, CELL, GRID, ROOT, Project

from resgrid import tracking
from resgrid.config import load_params
from resgrid.tracking.store import SETTINGS, server

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)  # Debian's package `faketime`


@pytest.fixture
def pipeline(small, tmp_path):
    """A copy of a trained pipeline, in a folder with a space and umlauts in its name."""
    return small.copy(tmp_path / "eine Kopie, größer")


def make_stale(pipeline: Project) -> None:
    """As a change of the cell's learning rate does."""
    pipeline.set("tuning.resnet20.sgd.lr=0.04")


def train(pipeline: Project, **extra: str) -> subprocess.CompletedProcess[str]:
    return completed(pipeline.run("resgrid", "train", CELL, **extra))


def repro(pipeline: Project, **extra: str) -> subprocess.CompletedProcess[str]:
    return completed(pipeline.run("dvc", "repro", f"train@{CELL}", **extra))


def completed(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert "Traceback" not in done.stdout + done.stderr
    return done


def flip(path: Path) -> None:
    """The last bit of a file, whatever its mode, with its time of change."""
    content, mode = bytearray(path.read_bytes()), path.stat().st_mode
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


# --- another folder ---------------------------------------------------------------------------------


def test_the_makefile_holds_in_a_folder_of_any_name_and_deletes_nothing_beside_it(tmp_path):
    """Its programs are looked for in the folder's own .venv, where one stands here that says which it is."""
    folder = tmp_path / "my own \"dir\" $HOME 'größer' #1 %"
    (folder / ".venv/bin").mkdir(parents=True)
    neighbours = [tmp_path / "my", tmp_path / "own"]
    for neighbour in neighbours:
        neighbour.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    own = folder / ".venv/bin/resgrid"
    own.write_text('#!/bin/sh\necho "ours: $@ in $PWD"\n')
    own.chmod(0o755)
    (folder / ".venv/installed").touch()
    (folder / "a pipeline").mkdir()

    def make(*arguments: str) -> str:
        done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Run the tests" in make("help")
    assert f"ours: ui in {folder}/a pipeline" in make("ui", "PIPELINE=a pipeline")
    assert "ours: worker --pool a pool" in make("worker", "POOL=a pool")
    targets = ("install", "demo", "up", "test", "check", "audit", "format", "repro", "bench", "lock")
    for target in targets:
        lines = make("--dry-run", "--always-make", target)
        assert subprocess.run(["sh", "-n"], input=lines, text=True, check=False).returncode == 0, target
    make("clean")
    assert not (folder / ".venv").exists()
    assert all(neighbour.is_dir() for neighbour in neighbours)


@pytest.mark.parametrize("how", ["copied", pytest.param("moved", marks=pytest.mark.long)])
def test_a_checkout_elsewhere_records_nothing_until_a_rebuild_and_then_all_of_it(
    pipeline, tmp_path, monkeypatch, how
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # The small pipeline's store was moved, too.
    assert pipeline.run("resgrid", "sync", "--rebuild").returncode == 0
    original = pipeline.root
    commit = json.loads((original / f"runs/{CELL}/timing.json").read_text())["commit"]
    if how == "copied":
        pipeline = pipeline.copy(tmp_path / "another")
    else:
        pipeline = replace(pipeline, root=original.rename(tmp_path / "another"))

    def files(root: Path) -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in root.rglob("mlruns/**/*"))

    before = files(original)
    assert pipeline.stale() <= ALWAYS
    refused = pipeline.run("resgrid", "sync")
    assert refused.returncode == 1
    assert "this checkout was moved or copied" in refused.stderr
    assert "`resgrid sync --rebuild`" in refused.stderr
    make_stale(pipeline)
    trained = train(pipeline)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("moved or copied") == 1
    assert files(original) == before

    rebuilt = pipeline.run("resgrid", "sync", "--rebuild")
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert files(original) == before
    store = tracking.open_store("small", pipeline.root)
    names = [experiment.name for experiment in store.client.search_experiments()]
    assert [name for name in names if name.startswith("small (before 20")], names
    runs = store.client.search_runs([store.experiment_id], "tags.grid = 'current'")
    cells = sorted(run.data.tags["cell"] for run in runs)
    assert cells == sorted({*GRID, "too-fast"} - {"resnet20-sgd-1"})  # which is stale
    here = (pipeline.root / "mlruns/small").as_uri()
    for run in runs:
        assert run.info.artifact_uri.startswith(here)
        [model] = run.outputs.model_outputs
        loaded = mlflow.pyfunc.load_model(store.client.get_logged_model(model.model_id).artifact_location)
        assert loaded.predict(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 10)
    version = store.client.get_model_version_by_alias("small", "champion")
    assert version.run_id in {run.info.run_id for run in runs}
    assert version.source.startswith(here)
    assert version.tags["git_commit"] == commit
    again = pipeline.run("resgrid", "sync")
    assert f"{len(cells)} unchanged, " in again.stdout, again.stdout + again.stderr


def test_a_deleted_database_is_filled_again_from_the_run_folders(pipeline):
    for path in pipeline.root.glob("mlflow.db*"):
        path.unlink()
    shutil.rmtree(pipeline.root / "mlruns")
    assert pipeline.run("resgrid", "sync").returncode == 0
    runs = pipeline.runs()
    assert sorted(runs.loc[runs["tags.grid"] == "current", "tags.cell"]) == sorted([*GRID, "too-fast"])
    assert set(runs.loc[runs["tags.grid"] == "current", "tags.git_commit"]) == {
        pipeline.run("git", "rev-parse", "HEAD").stdout.strip()
    }


# --- damaged files ----------------------------------------------------------------------------------


def test_a_damaged_copy_in_dvcs_cache_is_named_and_the_cell_trained_again(pipeline):
    """DVC trusts what it has in its cache, and would hand the damaged file out again and again."""
    weights = pipeline.root / "runs" / CELL / "weights.safetensors"
    good = weights.read_bytes()
    lock = YAML(typ="safe").load((pipeline.root / "dvc.lock").read_text())
    [md5] = [out["md5"] for out in lock["stages"][f"train@{CELL}"]["outs"] if "weights" in out["path"]]
    copy = pipeline.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    flip(copy)
    weights.unlink()
    restore = ("dvc", "checkout", "--force", str(weights.relative_to(pipeline.root)))
    assert pipeline.run(*restore).returncode == 0
    assert weights.read_bytes() != good

    refused = pipeline.run("resgrid", "evaluate")
    assert refused.returncode == 1
    assert f"runs/{CELL}/weights.safetensors: the file has changed since it was trained" in refused.stderr
    assert f"`resgrid gc` deletes that, and `dvc repro train@{CELL}` trains it again" in refused.stderr

    cleaned = pipeline.run("resgrid", "gc")
    assert f"{copy.relative_to(pipeline.root)}: it is damaged" in cleaned.stdout
    assert not copy.exists()
    assert repro(pipeline).returncode == 0
    assert weights.read_bytes() == copy.read_bytes() == good
    assert pipeline.run("resgrid", "evaluate").returncode == 0


def test_damaged_data_are_neither_trained_on_nor_scored_with(pipeline):
    for split in ("train", "test"):
        flip(pipeline.root / f"data/processed/{split}.safetensors")
    for refused in (train(pipeline), completed(pipeline.run("resgrid", "evaluate"))):
        assert refused.returncode == 1
        assert ".safetensors: the file is damaged (its digest is not the one in meta.json)" in refused.stderr
    assert pipeline.run("dvc", "repro", "preprocess").returncode == 0
    assert not pipeline.stale() - ALWAYS


# --- no room ----------------------------------------------------------------------------------------


def test_on_a_full_disk_for_results_the_training_waits_and_ends_with_room_without_an_epoch(pipeline, disks):
    make_stale(pipeline)
    shutil.rmtree(pipeline.root / "runs" / CELL)
    disk = disks.mount(pipeline.root / "runs" / CELL, "600k")  # the weights take 1.1 MB
    full = train(pipeline)
    assert full.returncode != 0
    assert f"runs/{CELL}/weights.safetensors: cannot be written: " in full.stderr
    assert "Check the folder and the space on its disk." in full.stderr
    assert not (disk / "run.json").exists()
    disks.release(disk)
    again = train(pipeline)
    assert again.returncode == 0, again.stderr
    assert f"{CELL}  goes on after epoch 2/2" in again.stderr
    assert "loss" not in again.stderr


@pytest.mark.long
def test_on_a_full_disk_for_dvcs_cache_nothing_is_lost_and_nothing_trained_twice(pipeline, disks, tmp_path):
    make_stale(pipeline)
    disk = disks.mount(tmp_path / "cache", "24m")
    shutil.copytree(pipeline.root / ".dvc/cache", disk, dirs_exist_ok=True)
    (disk / "filling").write_bytes(bytes(shutil.disk_usage(disk).free - 500_000))
    assert pipeline.run("dvc", "cache", "dir", "--local", str(disk)).returncode == 0
    full = repro(pipeline)
    assert full.returncode != 0
    assert "No space left on device" in full.stderr
    disks.resize(disk, "32m")
    again = repro(pipeline)
    assert again.returncode == 0, again.stderr
    assert f"{CELL}  goes on after epoch 2/2" in again.stderr
    assert f"train@{CELL}" not in pipeline.stale()


def test_when_mlflows_disk_is_full_training_goes_on_and_sync_brings_the_rest(
    pipeline, disks, tmp_path, monkeypatch
):
    disk = disks.mount(tmp_path / "mlflow", "50m")
    uri = f"sqlite:///{disk}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracking.open_store("small", pipeline.root)  # its tables are made while there is room
    used = sum(path.stat().st_size for path in disk.rglob("*"))
    disks.resize(disk, f"{used // 1024 + 300}k")
    make_stale(pipeline)
    done = train(pipeline, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stderr
    assert f"Logging {CELL} to MLflow failed" in done.stderr

    disks.resize(disk, "100m")
    for outcome in ("completed", "unchanged"):
        synced = pipeline.run("resgrid", "sync", "--json", MLFLOW_TRACKING_URI=uri)
        assert json.loads(synced.stdout)["cells"][CELL] == outcome, synced.stdout + synced.stderr
    store = tracking.open_store("small", pipeline.root)
    current = f"tags.cell = '{CELL}' and tags.grid = 'current'"
    [run] = store.client.search_runs([store.experiment_id], current)
    history = store.client.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == [1, 2]


@pytest.mark.long
def test_a_full_folder_of_temporary_files_stops_nothing(pipeline, disks, tmp_path):
    disk = disks.mount(tmp_path / "temporary", "64k")
    with pytest.raises(OSError, match="No space"):
        (disk / "filling").write_bytes(bytes(2**17))
    make_stale(pipeline)
    done = train(pipeline, TMPDIR=str(disk))
    assert done.returncode == 0, done.stdout + done.stderr
    synced = pipeline.run("resgrid", "sync", TMPDIR=str(disk))
    assert synced.returncode == 0, synced.stdout + synced.stderr


def test_a_checkout_that_cannot_be_written_says_so(pipeline, disks):
    make_stale(pipeline)
    disks.protect(pipeline.root)
    for refused in (repro(pipeline), train(pipeline), completed(pipeline.run("resgrid", "sync"))):
        assert refused.returncode != 0, refused.args
        assert "Read-only file system" in refused.stdout + refused.stderr, refused.args


# --- the clock --------------------------------------------------------------------------------------


@pytest.mark.skipif(FAKETIME is None, reason="Debian's package `faketime` is not installed")
@pytest.mark.parametrize(
    "years", [{"sgd": 2020}, pytest.param({"sgd": 2040, "adam": 2020}, marks=pytest.mark.long)]
)
def test_a_clock_that_jumps_changes_no_result_and_loses_none(pipeline, years):
    """Back, or to 2040 and then, in the middle of the same grid, to 2020."""
    names = ("weights.safetensors", "run.json", "history.csv", "summary.txt")
    paths = [path for name in names for path in pipeline.root.glob(f"runs/resnet20-*-0/{name}")]
    before = {path: path.read_bytes() for path in paths}
    assert len(before) == 8
    for optimizer, year in years.items():
        clock = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"@{year}-01-01 00:00:00"}
        # Without the second, threads that wait for the GIL never sleep, and it takes minutes.
        clock |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
        done = pipeline.run("dvc", "repro", "-f", "-s", f"train@resnet20-{optimizer}-0", **clock)
        assert done.returncode == 0, done.stderr
        timing = json.loads((pipeline.root / f"runs/resnet20-{optimizer}-0/timing.json").read_text())
        assert datetime.fromtimestamp(timing["started"] / 1e6, UTC).date() == date(year, 1, 1)
        assert 0 < timing["train_seconds"] < 600
    assert pipeline.stale() - ALWAYS == {"evaluate"}  # timing.json alone is new
    assert {path: path.read_bytes() for path in paths} == before
    assert pipeline.run("resgrid", "sync", "--rebuild").returncode == 0


# --- kills ------------------------------------------------------------------------------------------


def points(store: tracking.Store, run: Run) -> dict[str, list[tuple[int, float | None]]]:
    """(step, value) of every metric of a run, without values that the clock or the machine makes."""
    measured = ("images_per_second", "train_seconds", "peak_memory_bytes")
    return {
        key: sorted(
            (point.step, None if key in measured else point.value)
            for point in store.client.get_metric_history(run.info.run_id, key)
        )
        for key in run.data.metrics
        if not key.startswith("system/")
    }


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_a_cell_has_one_current_run_with_the_points_of_an_undisturbed_training(
    pipeline, monkeypatch, kills
):
    """The trainer, DVC with it, or MLflow's server: at a random time, or between metrics, model and tags."""
    assert pipeline.run("resgrid", "sync", "--rebuild").returncode == 0
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = load_params(pipeline.root / "params.yaml")
    store = tracking.open_store("small", pipeline.root)

    def runs() -> list[Run]:
        return list(store.client.search_runs([store.experiment_id], f"tags.cell = '{CELL}'"))

    def current() -> Run:
        [run] = [run for run in runs() if run.data.tags.get("grid") == "current"]
        return run

    def is_there(what: str, before: set[str]) -> bool:
        """Whether a new run has it, but not yet what comes next."""
        for run in runs():
            if run.info.run_id in before or "synced" in run.data.tags:
                continue
            models = store.client.search_logged_models(
                [store.experiment_id], f"source_run_id = '{run.info.run_id}'"
            )
            here = {"run": True, "metrics": "train_loss" in run.data.metrics, "model": bool(models)}
            here["outcome"] = "weights_sha256" in run.data.tags
            if here[what]:
                return True
        return False

    undisturbed = points(store, current())
    assert [step for step, _ in undisturbed["test_accuracy"]] == [1, 2]
    drawn = random.Random(0)
    targets, moments = ("server", "trainer", "group"), ("any", "run", "metrics", "outcome", "model")
    for number in range(kills):
        target, moment = targets[number % 3], drawn.choice(moments)
        where = f"kill {number}: {target} at {moment}"
        before = {run.info.run_id for run in runs()}
        shutil.rmtree(pipeline.root / ".resgrid/checkpoints", ignore_errors=True)
        environment = dict(pipeline.env)
        served = None
        if target == "server":
            port = free_port()
            command = [sys.executable, "-m", *server(store.uri, port)]
            served = subprocess.Popen(
                command, env=SETTINGS | os.environ, start_new_session=True, stderr=subprocess.DEVNULL
            )
            environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
            wait_until(lambda port=port: answers(f"http://127.0.0.1:{port}/health"))
        command = ["resgrid", "train", CELL, "--afresh"]
        if target == "group":
            command = ["dvc", "repro", "-f", "-s", f"train@{CELL}"]
        process = subprocess.Popen(
            command, cwd=pipeline.root, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + drawn.uniform(2, 12)
        while process.poll() is None:
            if time.monotonic() > until if moment == "any" else is_there(moment, before):
                break
        for victim in [served] if served else [process]:
            with suppress(ProcessLookupError):
                (os.kill if target == "trainer" else os.killpg)(victim.pid, signal.SIGKILL)
            victim.wait()
        process.wait()
        if target != "server":  # goes on, or does nothing where it had ended
            done = train(pipeline)
            assert done.returncode == 0, f"{where}\n{done.stderr}"
        for outcomes in ({"completed", "created", "unchanged"}, {"unchanged"}):
            report = tracking.sync(params, pipeline.root)
            assert report.cells[CELL] in outcomes, where
        run = current()
        assert (run.info.status, run.info.run_id in before) == ("FINISHED", False), where
        assert points(store, run) == undisturbed, where
        [model] = store.client.search_logged_models(
            [store.experiment_id], f"source_run_id = '{run.info.run_id}'"
        )
        assert (model.status, len(run.outputs.model_outputs)) == ("READY", 1), where
        assert all(each.info.status != "RUNNING" for each in runs()), where
