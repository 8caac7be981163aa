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


def train_again(repository: Sleeping) -> None:
    """Train a cell anew, so that its entry is none of the copy's."""
    assert reproduce(Pipeline.find(repository.root), STAGE, {}, force=True)


def test_a_lock_that_is_cut_within_a_line_or_after_a_key_is_told_from_a_whole_one(recorded):
    content = lock(recorded).read_bytes()
    assert not is_cut(lock(recorded))
    keys = [i + 1 for i in range(len(content)) if content[i - 1 : i + 1] == b":\n"]
    for size in [0, *keys, *(size for size in range(1, len(content), 97) if content[size - 1] != ord("\n"))]:
        lock(recorded).write_bytes(content[:size])
        assert is_cut(lock(recorded)), content[:size][-80:]


def test_a_whole_lock_of_gits_or_of_a_hand_is_left_as_it_is(recorded):
    whole = lock(recorded).read_text()
    entries = re.split(r"^(?=  \S)", whole, flags=re.MULTILINE)
    for content in ("".join(entries[:-2]), "# by hand\n" + whole, "".join(entries[:3] + entries[4:])):
        lock(recorded).write_text(content)
        repair(Pipeline.find(recorded.root))
        assert lock(recorded).read_text() == content


def test_conflict_markers_are_refused_with_what_git_offers_and_nothing_is_replaced(recorded):
    """As a merge of two branches leaves them that recorded another training of the same cell."""
    whole = lock(recorded).read_text()
    conflict = f"<<<<<<< HEAD\n{whole}=======\n{whole}>>>>>>> other\n"
    lock(recorded).write_text(conflict)
    for command in ("plan", "sync"):
        done = recorded.run("resgrid", command)
        assert done.returncode == 1
        assert "dvc.lock: holds git's conflict markers." in done.stderr
        assert "git checkout --ours dvc.lock" in done.stderr
    with pytest.raises(ResgridError, match="conflict markers"):  # as train-all begins
        repair(Pipeline.find(recorded.root))
    assert lock(recorded).read_text() == conflict


@pytest.mark.parametrize("at", ["nothing", "a buffer", "a line", "an entry"])
def test_what_a_cut_has_lost_is_recorded_again_from_its_latest_run(recorded, at):
    """Also of a forced run since the copy was made, of whose inputs the run cache has an earlier result."""
    train_again(recorded)
    expected, weights = recorded_weights(recorded), (recorded.root / f"runs/{CELL}/weights").read_bytes()
    recorded.run("dvc", "repro", "--single-item", "evaluate")
    content, trained = lock(recorded).read_text(), recorded.trained()
    ends = {"nothing": 0, "a buffer": PART, "a line": content.rindex("\n      hash: md5") + 1,
            "an entry": content.rindex("\n  train@") + 1}  # fmt: skip
    lock(recorded).write_text(content[: ends[at]])
    mend(recorded)
    assert recorded_weights(recorded) == expected
    assert (recorded.root / f"runs/{CELL}/weights").read_bytes() == weights
    assert recorded.run("dvc", "status", "--json").stdout.strip() == "{}"
    assert recorded.trained() == trained


def test_after_dvc_gc_nothing_that_is_recorded_is_trained_anew(recorded):
    before = recorded_weights(recorded)
    train_again(recorded)  # the earlier entry's outputs go with the next lines
    recorded.run("dvc", "repro", "--single-item", "evaluate")
    make_plan(Pipeline.find(recorded.root))
    expected, trained = recorded_weights(recorded), recorded.trained()
    assert expected != before
    assert recorded.run("dvc", "gc", "--workspace", "--force").returncode == 0
    lock(recorded).write_bytes(lock(recorded).read_bytes()[:PART])
    mend(recorded)
    assert recorded_weights(recorded) == expected
    assert recorded.run("dvc", "status", "--json").stdout.strip() == "{}"
    assert recorded.trained() == trained


@pytest.mark.parametrize("num", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_dvc_killed_at_random_moments_of_its_writing_costs_no_record_and_no_training(
    tmp_path, monkeypatch, num
):
    seeds = "0, 1, 2, 3"
    repository = all_recorded(tmp_path / "r", "resnet20, resnet32, resnet44", "sgd, adam, rmsprop", seeds)
    for name, value in repository.env.items():
        monkeypatch.setenv(name, value)
    draws, num_cut = random.Random(num), 0
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
        num_cut += is_cut(lock(repository))
        trained = [each for each in repository.trained() if each != "evaluate"]
        weights = (repository.root / f"runs/{CELL}/weights").read_bytes()
        mend(repository)
        assert len(recorded_weights(repository)) == 36
        assert (repository.root / f"runs/{CELL}/weights").read_bytes() == weights
        assert [each for each in repository.trained() if each != "evaluate"] == trained
    assert num_cut
