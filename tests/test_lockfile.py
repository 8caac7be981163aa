"""dvc.lock after kills, by real DVC: what was recorded stays so, and nothing is trained for it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from sleeping import Sleeping, sleeping

from resgrid.dvc.lock import is_cut, repair
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import reproduce
from resgrid.errors import ResgridError
from tasks.plan import make_plan

CELL = "resnet20-sgd-0"
STAGE = f"train@{CELL}"
PART = 8192  # bytes: Python writes so many at once; from 3.14 on 16 times as many, more than these files have


def all_recorded(root: Path, architectures: str, optimizers: str, seeds: str = "0") -> Sleeping:
    """A grid of which all is recorded in a dvc.lock of several buffers; two cells give other bytes each time."""
    repository = sleeping(root, architectures, optimizers, seeds)
    for cell in ("resnet20-sgd-0", "resnet20-adam-0"):
        repository.behave(cell, "date +%s.%N > $2/nap")
    repository.edit("work.sh", "$(cat code/net.py) >", "$(cat code/net.py $2/nap 2>/dev/null) >")
    assert repository.run("dvc", "repro").returncode == 0
    assert len(lock(repository).read_bytes()) > PART
    make_plan(Pipeline.find(repository.root))  # as each run of the grid begins
    return repository


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Sleeping:
    return all_recorded(tmp_path_factory.mktemp("original") / "r", "resnet20, resnet32", "sgd, adam, rmsprop")


@pytest.fixture
def recorded(original: Sleeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sleeping:
    repository = Sleeping(shutil.copytree(original.root, tmp_path / "r", symlinks=True))
    for name, value in repository.env.items():
        monkeypatch.setenv(name, value)
    return repository


def lock(repository: Sleeping) -> Path:
    return repository.root / "dvc.lock"


def recorded_weights(repository: Sleeping) -> dict[str, str]:
    """What dvc.lock says of each cell's weights."""
    stages = YAML(typ="safe").load(lock(repository))["stages"]
    return {name: entry["outs"][0]["md5"] for name, entry in stages.items() if name.startswith("train@")}


def mend(repository: Sleeping) -> None:
    """As each run of the grid begins, and then brings what is stale up to date."""
    repair(Pipeline.find(repository.root))
    assert repository.run("dvc", "repro", "-k").returncode == 0


def assert_all_is_recorded(repository: Sleeping) -> None:
    assert repository.run("dvc", "status", "--json").stdout.strip() == "{}"


def cut(repository: Sleeping, size: int = PART) -> None:
    lock(repository).write_bytes(lock(repository).read_bytes()[:size])


def train_again(repository: Sleeping) -> float:
    """Train a cell anew, so that its entry is none of the copy's; when its command ended."""
    pipeline = Pipeline.find(repository.root)
    assert reproduce(pipeline, STAGE, {}, force=True)
    record = pipeline.record(STAGE)
    assert record is not None and record.ended is not None  # noqa: PT018
    return record.ended


def test_a_lock_that_a_kill_has_cut_is_told_from_a_whole_one_wherever_it_is_cut(recorded: Sleeping) -> None:
    """Inside lines, at the end of an entry, or before it; written a second after the command."""
    ended, pipeline = train_again(recorded), Pipeline.find(recorded.root)
    content = lock(recorded).read_bytes()
    assert not is_cut(pipeline)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    last = content.rindex(b"\n  train@")  # of whose entry some lines may be gone, and all others be there
    for size in [0, *(end for end in ends if end <= last), *set(range(1, len(content), 97)) - {*ends}]:
        lock(recorded).write_bytes(content[:size])
        os.utime(lock(recorded), (ended + 1, ended + 1))
        assert is_cut(pipeline), content[:size][-80:]


def test_dvc_restores_what_a_cut_inside_the_last_entry_has_lost(recorded: Sleeping) -> None:
    """At the end of a line, where the file is not told from one that git has made."""
    content, trained = lock(recorded).read_text(), recorded.trained()
    lock(recorded).write_text(content[: content.rindex("\n      hash: md5") + 1])
    mend(recorded)
    assert_all_is_recorded(recorded)
    assert recorded.trained() == trained


def test_a_lock_that_git_or_a_hand_has_made_shorter_stays_as_it_is(recorded: Sleeping) -> None:
    """At the end of an entry, where a kill might have left it: nothing ran, or long before."""
    whole, pipeline = lock(recorded).read_text(), Pipeline.find(recorded.root)
    entries = [i.start() for i in re.finditer(r"^  \S", whole, flags=re.MULTILINE)]
    shorter = whole[: entries[-2]]
    lock(recorded).write_text(shorter)
    assert not is_cut(pipeline)
    lock(recorded).write_text(whole)
    ended = train_again(recorded)
    lock(recorded).write_text(shorter)
    os.utime(lock(recorded), (ended + 60, ended + 60))
    assert not is_cut(pipeline)
    lock(recorded).write_text("# by hand\n" + whole)
    assert not is_cut(pipeline)


def test_conflict_markers_are_refused_with_what_git_offers_and_nothing_is_replaced(
    recorded: Sleeping,
) -> None:
    """Two branches that recorded another training of the same cell, merged by git."""
    for command in (
        "git config user.name t", "git config user.email t@t.invalid", "git add -A", "git commit -qm start",
        "git switch -qc other",
    ):  # fmt: skip
        assert recorded.run(*command.split()).returncode == 0
    train_again(recorded)
    for command in ("git commit -qam theirs", "git switch -q main", "dvc checkout -q --force"):
        assert recorded.run(*command.split()).returncode == 0
    train_again(recorded)
    assert recorded.run("git", "commit", "-qam", "ours").returncode == 0
    assert recorded.run("git", "merge", "other").returncode == 1
    conflict = lock(recorded).read_text()
    assert "<<<<<<< HEAD" in conflict
    for command in ("plan", "sync"):
        done = recorded.run("resgrid", command)
        assert done.returncode == 1
        assert "dvc.lock: holds git's conflict markers." in done.stderr
        assert "git checkout --ours dvc.lock" in done.stderr
    with pytest.raises(ResgridError, match="conflict markers"):  # as train-all begins
        repair(Pipeline.find(recorded.root))
    assert lock(recorded).read_text() == conflict
    for command in ("git checkout --theirs dvc.lock", "git add dvc.lock"):
        assert recorded.run(*command.split()).returncode == 0
    assert recorded.run("resgrid", "plan").returncode == 0


@pytest.mark.parametrize("size", [0, PART])
def test_what_is_trained_after_the_copy_is_recorded_from_its_latest_run(
    recorded: Sleeping, size: int
) -> None:
    """Also of a forced run, of whose inputs the run cache has an earlier result."""
    pipeline = Pipeline.find(recorded.root)
    assert reproduce(pipeline, STAGE, {}, force=True)
    expected, weights = recorded_weights(recorded), (recorded.root / f"runs/{CELL}/weights").read_bytes()
    recorded.run("dvc", "repro", "--single-item", "evaluate")
    trained = recorded.trained()
    cut(recorded, size)
    mend(recorded)
    assert recorded_weights(recorded) == expected
    assert (recorded.root / f"runs/{CELL}/weights").read_bytes() == weights
    assert_all_is_recorded(recorded)
    assert recorded.trained() == trained


def test_after_dvc_gc_nothing_that_is_recorded_is_trained_anew(recorded: Sleeping) -> None:
    pipeline = Pipeline.find(recorded.root)
    before = recorded_weights(recorded)
    assert reproduce(pipeline, STAGE, {}, force=True)  # its entry's outputs go with the next lines
    recorded.run("dvc", "repro", "--single-item", "evaluate")
    make_plan(pipeline)
    expected = recorded_weights(recorded)
    assert expected != before
    assert recorded.run("dvc", "gc", "--workspace", "--force").returncode == 0
    trained = recorded.trained()
    cut(recorded)
    mend(recorded)
    assert recorded_weights(recorded) == expected
    assert_all_is_recorded(recorded)
    assert recorded.trained() == trained


def test_a_whole_lock_of_gits_or_of_a_hand_is_left_as_it_is(recorded: Sleeping) -> None:
    whole = YAML(typ="safe").load(lock(recorded))
    del whole["stages"][STAGE]
    with lock(recorded).open("w") as file:
        YAML().dump(whole, file)
    before = lock(recorded).read_bytes()
    repair(Pipeline.find(recorded.root))
    assert lock(recorded).read_bytes() == before


@pytest.mark.parametrize("num", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_dvc_killed_at_random_moments_of_its_writing_costs_no_record_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    seeds = "0, 1, 2, 3"
    repository = all_recorded(tmp_path / "r", "resnet20, resnet32, resnet44", "sgd, adam, rmsprop", seeds)
    for name, value in repository.env.items():
        monkeypatch.setenv(name, value)
    pipeline, draws, num_cut = Pipeline.find(repository.root), random.Random(num), 0
    for i in range(num):
        size = lock(repository).stat().st_size
        command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", STAGE]
        dvc = subprocess.Popen(
            command, cwd=repository.root, env=repository.env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while lock(repository).stat().st_size == size:
            assert dvc.poll() is None
        time.sleep(draws.uniform(0, 0.3) if i else 0.0)
        os.killpg(dvc.pid, signal.SIGKILL)
        dvc.communicate()
        num_cut += is_cut(pipeline)
        trained = [each for each in repository.trained() if each != "evaluate"]
        weights = (repository.root / f"runs/{CELL}/weights").read_bytes()
        mend(repository)
        assert len(recorded_weights(repository)) == 36
        assert (repository.root / f"runs/{CELL}/weights").read_bytes() == weights
        assert [each for each in repository.trained() if each != "evaluate"] == trained
    assert num_cut
