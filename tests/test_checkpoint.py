"""Trainings that are killed for real, at any moment, and go on as if nothing had been."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ruamel.yaml import YAML
from small import ROOT, Project, digits
from test_run import CPU, cell, folder, smaller, train  # noqa: F401  # `folder` is a fixture

from resgrid import checkpoint, tracking
from resgrid.checkpoint import Checkpoints
from resgrid.config import load_params
from resgrid.data.dataset import load_meta
from resgrid.gc import checkpoint_folder, delete, find_leftovers
from resgrid.grid import Cell, find_cell
from resgrid.provenance import CODE, code_digest
from resgrid.train_cell import train_cell
from resgrid.training.engine import Epoch

SAME = ["history.csv", "run.json", "summary.txt", "weights.safetensors"]  # the bytes of each run
# Augmentation and a schedule: the streams of random numbers and the counters are in use.
LIVELY = {
    "schedule": {"name": "cosine", "final_factor": 0.0},
    "augmentation": {"flip": True, "crop_padding": 2, "rotation_degrees": 5.0, "shift_fraction": 0.1},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):  # noqa: F811
    return smaller(folder, tmp_path_factory.mktemp("few") / "processed", train=32, test=16, validation=16)


PLAIN = "fp32, eager"


def start(trained: Cell, data: Path, kept: Path) -> Checkpoints:
    return Checkpoints(kept, trained, load_meta(data).digest, CPU, PLAIN)


def go_on(trained: Cell, data: Path, kept: Path, out: Path, stop_after: int = 1000) -> list[Epoch]:
    """Train with checkpoints, and leave off after some epochs; those that were trained."""
    torch.manual_seed(time.time_ns())  # what another process would bring
    training = train_cell(trained, data, out, CPU, checkpoints=start(trained, data, kept))
    epochs = [epoch for _, epoch in zip(range(stop_after), training, strict=False)]
    training.close()
    return epochs


def same_files(out: Path, reference: Path) -> bool:
    return all((out / name).read_bytes() == (reference / name).read_bytes() for name in SAME)


# --- processes that are killed -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Real processes, from a server that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "resgrid.tracking", __name__])
    return context


def _train(trained: Cell, data: Path, kept: Path, out: Path) -> None:
    torch.set_num_threads(1)
    for _ in train_cell(trained, data, out, CPU, checkpoints=start(trained, data, kept)):
        pass


@pytest.mark.parametrize(
    ("kills", "epochs"), [(1, 4), pytest.param(50, 100, marks=pytest.mark.long, id="50-100")]
)
def test_a_cell_that_is_killed_again_and_again_ends_as_one_that_is_left_alone(
    data, tmp_path, processes, kills, epochs
):
    trained = cell("resnet20-adam-0", epochs=epochs, **LIVELY)
    began = time.monotonic()
    train(trained, data, tmp_path / "alone")
    an_epoch = (time.monotonic() - began) / epochs
    moments = random.Random(time.time_ns())
    survived = 0
    while survived < kills:
        process = processes.Process(
            target=_train, args=(trained, data, tmp_path / "kept", tmp_path / "killed")
        )
        process.start()
        process.join(0.3 + moments.uniform(0, 3 * an_epoch))
        process.kill()
        process.join()
        if (
            process.exitcode == 0
        ):  # it was done before: from now on it is killed at its end, or restarts there
            shutil.rmtree(tmp_path / "killed")
        survived += process.exitcode == -signal.SIGKILL
    process = processes.Process(target=_train, args=(trained, data, tmp_path / "kept", tmp_path / "killed"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert same_files(tmp_path / "killed", tmp_path / "alone")


def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(data, tmp_path, processes):
    trained = cell("resnet10-adam-0", epochs=3, batch_size=8, **LIVELY)  # 59 MB: time to be hit
    train(trained, data, tmp_path / "alone")
    kept = tmp_path / "kept"
    for _ in range(10):
        shutil.rmtree(kept, ignore_errors=True)
        process = processes.Process(target=_train, args=(trained, data, kept, tmp_path / "killed"))
        process.start()
        # The second is being written beside the first.
        while not (
            len(names := [path.name for path in kept.glob("*")]) == 2 and names[0][:32] == names[1][:32]
        ):
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        if torn := list(kept.glob("*.part")):
            break
    assert torn
    assert start(trained, data, kept).num_epochs == 1
    assert [epoch.epoch for epoch in go_on(trained, data, kept, tmp_path / "killed")] == [2, 3]
    assert same_files(tmp_path / "killed", tmp_path / "alone")


# --- what a checkpoint is worth ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adagrad"])
def test_in_pieces_every_optimizer_gives_the_same_bytes(data, tmp_path, optimizer):
    trained = cell(f"resnet20-{optimizer}-0", epochs=4, **LIVELY)
    train(trained, data, tmp_path / "alone")
    before, after = time.time_ns() // 1000, 0
    pieces = []
    for stop_after in (1, 2, 9):
        pieces.append(go_on(trained, data, tmp_path / "kept", tmp_path / "pieces", stop_after))
        after = after or time.time_ns() // 1000
    assert [[epoch.epoch for epoch in piece] for piece in pieces] == [[1], [2, 3], [4]]
    assert same_files(tmp_path / "pieces", tmp_path / "alone")
    timing = json.loads((tmp_path / "pieces/timing.json").read_text())
    assert before < timing["started"] < after  # when the first of them began
    assert len(timing["epoch_seconds"]) == 4  # those of all starts
    assert timing["train_seconds"] == sum(timing["epoch_seconds"])


def test_a_finished_training_whose_results_are_gone_writes_them_alone(data, tmp_path):
    trained = cell(epochs=2, **LIVELY)
    train(trained, data, tmp_path / "alone")
    go_on(trained, data, tmp_path / "kept", tmp_path / "run")
    timing = (tmp_path / "run/timing.json").read_bytes()
    shutil.rmtree(tmp_path / "run")  # as DVC does before it runs the command again
    assert go_on(trained, data, tmp_path / "kept", tmp_path / "run") == []
    assert same_files(tmp_path / "run", tmp_path / "alone")
    assert (tmp_path / "run/timing.json").read_bytes() == timing  # it is the same training


def test_a_divergence_after_an_interruption_brings_back_the_weights_before_it(
    data: Path, tmp_path: Path
) -> None:
    explosion = {"name": "piecewise", "boundaries": (4,), "factors": (1.0, 1e30)}  # in the third epoch
    trained = cell(epochs=5, schedule=explosion)
    _, alone = train(trained, data, tmp_path / "alone")
    assert alone.status == "diverged"
    assert len(go_on(trained, data, tmp_path / "kept", tmp_path / "pieces", stop_after=2)) == 2
    assert go_on(trained, data, tmp_path / "kept", tmp_path / "pieces") == []
    assert same_files(tmp_path / "pieces", tmp_path / "alone")


def test_a_torn_or_altered_checkpoint_is_refused_once_and_the_training_begins_anew(data, tmp_path, caplog):
    trained, kept = cell(epochs=2, **LIVELY), tmp_path / "kept"
    train(trained, data, tmp_path / "alone")
    go_on(trained, data, kept, tmp_path / "run", stop_after=1)
    [path] = kept.iterdir()
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[-1] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(altered), b"", b"resgrid checkpoint 1 0\n{}\n"):
        caplog.clear()
        path.write_bytes(damaged)
        assert start(trained, data, kept).num_epochs == 0
        assert start(trained, data, kept).num_epochs == 0
        [said] = caplog.messages
        assert said.startswith(f"{path}: it is no whole checkpoint of this version: its checksum is wrong.")
    assert len(go_on(trained, data, kept, tmp_path / "run")) == 2
    assert same_files(tmp_path / "run", tmp_path / "alone")


def test_only_the_same_cell_data_and_execution_go_on(data, tmp_path):
    trained = cell(epochs=3, **LIVELY)
    go_on(trained, data, tmp_path, tmp_path / "run", stop_after=1)
    digest = load_meta(data).digest

    def found(other: Cell, digest: str = digest) -> int:
        return Checkpoints(tmp_path, other, digest, CPU, PLAIN).num_epochs

    assert found(trained) == 1
    assert found(cell(epochs=4, **LIVELY)) == 0
    assert found(cell(epochs=3, lr=0.01, **LIVELY)) == 0
    assert found(trained.model_copy(update={"seed": 1})) == 0
    assert found(cell(epochs=3, **LIVELY | {"time_decay": 0.1})) == 0
    assert found(trained, "sha256:" + 64 * "0") == 0
    compiled = "fp32, compiled"
    assert Checkpoints(tmp_path, trained, digest, CPU, compiled).num_epochs == 0
    # Also under the name of a file that is ours: the owner stands inside.
    other = Checkpoints(tmp_path, cell(epochs=4, **LIVELY), digest, CPU, PLAIN)
    shutil.copy(start(trained, data, tmp_path).path, other.path)
    assert found(cell(epochs=4, **LIVELY)) == 0


def test_a_change_of_the_code_that_trains_makes_another_digest(tmp_path):
    shutil.copytree(ROOT / "src/resgrid", tmp_path / "resgrid", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "resgrid"
    before = code_digest(package)
    assert before == code_digest()
    for name in ("cli.py", "report/leaderboard.py", "tracking/live.py", "data/fetch.py"):
        (package / name).write_text("# edited")
    (package / "models/__pycache__").mkdir()
    (package / "models/__pycache__/vgg.pyc").write_bytes(b"code")
    assert code_digest(package) == before
    for name in ("data/batches.py", "models/vgg.py", "training/engine.py", "training/optimizers.py"):
        (package / name).write_text((package / name).read_text() + "# edited\n")
        assert code_digest(package) != before
        before = code_digest(package)


def test_the_code_that_it_belongs_to_is_that_of_the_stage():
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    for deps in (stages["train"]["deps"], stages["train-study"]["do"]["deps"]):
        assert deps == ["data/processed", *(f"src/resgrid/{name}" for name in CODE)]
    scoring = sorted([*CODE, "evaluation.py", "report"])
    assert stages["evaluate"]["deps"] == [
        "data/processed",
        "runs",
        *(f"src/resgrid/{name}" for name in scoring),
    ]


def test_the_number_of_threads_is_kept_as_far_as_there_are_cores(data: Path, tmp_path: Path) -> None:
    trained, cores = cell(epochs=2, **LIVELY), len(os.sched_getaffinity(0))
    for first, now, expected in ((1, 2, 1), (cores + 1, 1, cores)):
        out = tmp_path / f"{first}"
        torch.set_num_threads(first)
        go_on(trained, data, out / "kept", out / "run", stop_after=1)
        torch.set_num_threads(now)
        go_on(trained, data, out / "kept", out / "run")
        assert json.loads((out / "run/timing.json").read_text())["threads"] == expected


def test_on_a_full_disk_the_last_checkpoint_stays_and_training_goes_on_from_there_with_room(
    data, tmp_path, disks
):
    trained = cell(epochs=4, **LIVELY)
    train(trained, data, tmp_path / "alone")
    disk = disks.mount(tmp_path / "disk", "3m")  # room for one checkpoint, and not for a second one
    kept = disk / "kept"
    with pytest.raises(OSError, match=r"No space left on device: .*/resnet20-sgd-0"):
        go_on(trained, data, kept, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert start(trained, data, kept).num_epochs == 1
    assert len(list(kept.iterdir())) == 1
    disks.resize(disk, "9m")
    assert [epoch.epoch for epoch in go_on(trained, data, kept, tmp_path / "run")] == [2, 3, 4]
    assert same_files(tmp_path / "run", tmp_path / "alone")


# --- with DVC and MLflow -----------------------------------------------------------------------------

CELL = "resnet20-sgd-0"
KILL_DVC = """
import psutil
[dvc] = [process for process in psutil.Process().parents() if "repro" in process.cmdline()]
dvc.kill()
"""


@dataclass
class Repository(Project):
    """One cell of 24 epochs, whose stage has an `after.py` as well; nothing else is a stage."""

    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def kept(self) -> Path:
        return self.root / ".resgrid/checkpoints"

    def begin(self, *command: str) -> subprocess.Popen[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        begun = subprocess.Popen(
            command, cwd=self.root, env=os.environ | {"PATH": path, "RESGRID_THREADS": "1"}, text=True,
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.begun.append(begun)
        return begun

    def repro(self, *options: str) -> str:
        """What `dvc repro` prints."""
        done = self.run("dvc", "repro", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def timing(self) -> dict[str, Any]:
        return json.loads((self.root / "runs" / CELL / "timing.json").read_text())

    def kill_after_an_epoch(self, begun: subprocess.Popen[str]) -> int:
        """Kill all of it after some epochs; how many are on the disk."""
        while "  epoch   2/" not in (line := begun.stdout.readline()):
            assert line
        os.killpg(begun.pid, signal.SIGKILL)
        begun.communicate()
        left = [checkpoint.read(path) for path in self.kept.glob("*") if path.suffix != ".part"]
        return max(len(each.epochs) for each in left if each.timing is None)

    def mlflow_runs(self) -> list[Any]:
        store = tracking.open_store("small", self.root)
        return list(store.client.search_runs([store.experiment_id]))


@pytest.fixture
def project(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    for name in [each for each in os.environ if each.startswith(("MLFLOW", "RESGRID"))]:
        monkeypatch.delenv(name)
    made = Repository(digits(tmp_path / "ein Projekt, größer").root)
    shutil.copytree(data, made.root / "data/processed")
    made.set("grid.optimizers=[sgd]", "recipes.*.epochs=24", "recipes.*.batch_size=16")
    train = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["train"]
    train |= {"cmd": f"{train['cmd']} && python after.py", "deps": ["data/processed"]}
    (made.root / "dvc.yaml").write_text(json.dumps({"stages": {"train": train}}))
    (made.root / "after.py").write_text("")
    yield made
    for process in made.begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_killed_by_every_means_and_started_again_it_is_one_training_and_one_run(
    project: Repository, data: Path, tmp_path: Path
) -> None:
    """SIGTERM, then SIGKILL of trainer and DVC, then of DVC alone before it records what was trained."""
    trained = find_cell(load_params(project.root / "params.yaml"), CELL)
    train(trained, data, tmp_path / "alone")

    first = project.begin("dvc", "repro")
    while not any("learning_rate" in run.data.metrics for run in project.mlflow_runs()):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    [trainer] = psutil.Process(first.pid).children(recursive=True)[-1:]
    assert "train" in trainer.cmdline()
    trainer.terminate()
    began = time.monotonic()
    trainer.wait()
    assert time.monotonic() - began < 10
    first.communicate()
    assert first.returncode != 0
    [run] = project.mlflow_runs()
    assert run.info.status == "KILLED"
    done = len(project.mlflow.get_metric_history(run.info.run_id, "train_loss"))
    assert 0 < done < 24

    second = project.begin("dvc", "repro")
    while "goes on after epoch" not in (line := second.stdout.readline()):
        assert line
    assert int(line.split("after epoch ")[1].split("/")[0]) >= done
    epoch = second.stdout.readline()
    assert epoch.startswith(CELL)
    os.killpg(second.pid, signal.SIGKILL)  # all at once, as when the power is cut
    second.communicate()

    # DVC is killed when the trainer has ended well.
    (project.root / "after.py").write_text(KILL_DVC)
    third = project.begin("dvc", "repro")
    said, _ = third.communicate()
    assert third.returncode == -signal.SIGKILL, said
    assert "epoch  24/24" in said
    assert not (project.root / "dvc.lock").exists()
    assert same_files(project.root / "runs" / CELL, tmp_path / "alone")
    (project.root / "after.py").write_text("")
    fourth = project.run("dvc", "repro")
    assert fourth.returncode == 0, fourth.stderr
    assert "goes on after epoch 24/24" in fourth.stderr
    assert "loss" not in fourth.stderr  # no epoch was trained
    assert same_files(project.root / "runs" / CELL, tmp_path / "alone")

    [one] = project.mlflow_runs()
    assert (one.info.run_id, one.info.status) == (run.info.run_id, "FINISHED")
    assert one.data.tags["grid"] == "current"
    for key in ("train_loss", "test_accuracy", "learning_rate"):
        points = project.mlflow.get_metric_history(one.info.run_id, key)
        assert sorted(point.step for point in points) == list(range(1, 25)), key

    # The lock lists it now, so its checkpoint may go.
    kept = project.run("resgrid", "gc", "--json")
    assert kept.returncode == 0, kept.stderr
    assert [each["why"] for each in json.loads(kept.stdout)["leftovers"]] == [
        "its training is recorded in dvc.lock"
    ]
    assert list(project.kept.iterdir()) == []


@pytest.fixture
def short(project: Repository) -> Repository:
    """With six epochs, and DVC's run cache left out where a test says so."""
    project.set("recipes.resnet20.epochs=6")
    return project


def epochs_of(said: str) -> int:
    return len([line for line in said.splitlines() if re.match(rf"{CELL}  epoch +\d+/", line)])


def test_forced_a_recorded_training_begins_anew_and_one_that_was_cut_off_goes_on(short):
    """Under `dvc repro`, whose command cannot see `--force`."""
    assert epochs_of(short.repro()) == 6
    started = short.timing()["started"]
    done = short.kill_after_an_epoch(short.begin("dvc", "repro", "--force"))
    said = short.repro("--force")
    assert f"goes on after epoch {done}/6" in said
    assert epochs_of(said) == 6 - done
    assert short.timing()["started"] > started


@pytest.mark.long
def test_which_start_trains_and_which_takes_what_is_there(short: Repository) -> None:
    """Each by `dvc repro`, whose stage cannot see `--force`."""
    assert epochs_of(short.repro()) == 6
    first = short.timing()
    assert epochs_of(short.repro("--force")) == 6  # recorded: trains anew
    assert epochs_of(short.repro("--force")) == 6  # and again
    assert short.timing()["started"] > first["started"]

    # Param changed and back, without the run cache and with it: not an epoch is trained.
    a = short.timing()
    short.set("recipes.resnet20.batch_size=8")
    assert epochs_of(short.repro("--no-run-cache")) == 6
    short.set("recipes.resnet20.batch_size=16")
    said = short.repro("--no-run-cache")
    assert "goes on after epoch 6/6" in said
    assert epochs_of(said) == 0
    assert short.timing() == a
    short.set("recipes.resnet20.batch_size=8")
    assert epochs_of(short.repro()) == 0
    short.set("recipes.resnet20.batch_size=16")
    assert epochs_of(short.repro()) == 0
    assert short.timing() == a

    # Forced and killed, then forced: it goes on. Left off, a plain one has nothing to do but to check out.
    killed = short.begin("dvc", "repro", "--force")
    done = short.kill_after_an_epoch(killed)
    said = short.repro("--force")
    assert f"goes on after epoch {done}/6" in said
    assert epochs_of(said) == 6 - done
    b = short.timing()
    assert b["started"] > a["started"]
    killed = short.begin("dvc", "repro", "--force")
    short.kill_after_an_epoch(killed)
    assert epochs_of(short.repro()) == 0
    assert short.timing() == b

    # And where a person asks for it.
    done = short.run("resgrid", "train", CELL, "--afresh")
    assert epochs_of(done.stderr) == 6


@pytest.mark.long
def test_a_training_whose_commit_failed_is_recorded_without_another_epoch(short: Repository) -> None:
    cache = short.root / ".dvc/cache/files/md5"
    cache.mkdir(parents=True)
    for place in cache.parent.parent.glob("*"):
        assert place.is_dir()
    shutil.rmtree(cache)
    cache.write_text("in the way")  # so that DVC can store no output
    done = short.run("dvc", "repro")
    assert done.returncode != 0
    assert epochs_of(done.stderr) == 6
    timing = short.timing()
    cache.unlink()
    assert epochs_of(short.repro()) == 0
    assert short.timing() == timing
    assert (
        hashlib.md5((short.root / "runs" / CELL / "timing.json").read_bytes()).hexdigest()
        in (short.root / "dvc.lock").read_text()
    )


def test_without_dvc_a_finished_cell_is_finished(short: Repository) -> None:
    for expected, arguments in ((6, ()), (0, ()), (6, ("--afresh",)), (0, ())):
        done = short.run("resgrid", "train", CELL, *arguments)
        assert done.returncode == 0, done.stderr
        assert epochs_of(done.stderr) == expected, arguments


def test_gc_takes_what_is_of_no_use_and_leaves_what_will_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, cache = tmp_path / "examples/small", tmp_path / ".dvc/cache"
    kept = checkpoint_folder(tmp_path, pipeline)
    assert kept == tmp_path / ".resgrid/checkpoints/examples/small"
    unfinished, old, unrecorded, recorded = (
        cell(epochs=2, **LIVELY).model_copy(update={"id": f"resnet20-sgd-{seed}", "seed": seed})
        for seed in range(4)
    )
    for each in (unfinished, old):
        go_on(each, data, kept, tmp_path / "run", stop_after=1)
    for each in (unrecorded, recorded):
        go_on(each, data, kept, tmp_path / "run")
    whole, altered = hashlib.md5(b"12345").hexdigest(), 30 * "0"
    places = {name: start(each, data, kept).path for name, each in (("old", old), ("recorded", recorded))}
    for path in (
        *(kept / f"resnet20-sgd-0.0123.{suffix}" for suffix in ("0", "1", "done")),  # of a former version
        pipeline / "data/.partial/rest.part", pipeline / "data/raw/whole",
        kept / "resnet20-sgd-0.0.part",  # may be being written
        tmp_path / ".resgrid/weights/fetched.safetensors",  # may be being used
        cache / "files/md5/ab/.Xk3.tmp",  # DVC is about to rename it
        cache / "files/md5/ab" / altered, cache / "files/md5" / whole[:2] / whole[2:],
    ):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")

    def record() -> None:
        md5 = hashlib.md5((tmp_path / "run/timing.json").read_bytes()).hexdigest()
        (pipeline / "dvc.lock").write_text(
            f"stages: {{train: {{outs: [{{path: timing.json, md5: {md5}}}]}}}}"
        )

    def age(path: Path, days: float) -> None:
        os.utime(path, 2 * (time.time() - days * 24 * 3600,))

    record()
    age(places["old"], days=31)
    age(start(unfinished, data, kept).path, days=29)
    leftovers = find_leftovers(tmp_path, pipeline, cache)
    assert {each.path: each.why for each in leftovers} == {
        **{
            kept / f"resnet20-sgd-0.0123.{suffix}": "it is of a former version"
            for suffix in ("0", "1", "done")
        },
        places["old"]: "nobody has gone on from it for a month",
        places["recorded"]: "its training is recorded in dvc.lock",
        pipeline / "data/.partial": "data/raw is complete",
        cache / "files/md5/ab" / altered: "it is damaged: its content is not that of its name",
    }
    assert {each.num_bytes for each in leftovers if each.why == "data/raw is complete"} == {5}
    delete(each.path for each in leftovers)
    assert find_leftovers(tmp_path, pipeline, cache) == []
    assert [start(each, data, kept).num_epochs for each in (unfinished, unrecorded)] == [1, 2]

    # What checkouts share goes by its age alone: another may have recorded it, or not.
    monkeypatch.setenv("RESGRID_CHECKPOINTS", str(tmp_path / "shared"))
    shared = checkpoint_folder(tmp_path, pipeline)
    assert shared == tmp_path / "shared/examples/small"
    go_on(recorded, data, shared, tmp_path / "run")
    record()
    assert find_leftovers(tmp_path, pipeline, cache) == []
    age(start(recorded, data, shared).path, days=31)
    assert [each.why for each in find_leftovers(tmp_path, pipeline, cache)] == [
        "nobody has gone on from it for a month"
    ]


def test_only_what_dvc_has_recorded_trains_anew(data, tmp_path):
    kept, lock, trained = tmp_path / "kept", tmp_path / "dvc.lock", cell(epochs=2, **LIVELY)

    def left(afresh: bool = False) -> int:
        made = Checkpoints(kept, trained, load_meta(data).digest, CPU, PLAIN, lock, afresh)
        return made.num_epochs

    go_on(trained, data, kept, tmp_path / "run")
    assert left() == 2  # there is no dvc.lock yet
    lock.write_text("md5: 0123456789abcdef0123456789abcdef\n")
    assert left() == 2  # it lists an earlier training
    md5 = hashlib.md5((tmp_path / "run/timing.json").read_bytes()).hexdigest()
    lock.write_text(f"stages: {{train: {{outs: [{{path: timing.json, md5: {md5}}}]}}}}\n")
    assert left() == 0
    assert list(kept.iterdir()) == []
    go_on(trained, data, kept, tmp_path / "run", stop_after=1)
    assert left() == 1
    assert left(afresh=True) == 0
