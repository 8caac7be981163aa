"""One stage, by real DVC and real processes: what it came to, that it ends, and that nothing is left."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from sleeping import Sleeping, left_over, sleeping, wait_until

from resgrid import watch
from resgrid.dvc.pipeline import Pipeline
from resgrid.dvc.process import StageFailed, Stopped, reproduce
from resgrid.errors import ResgridError
from resgrid.stage_record import Fault
from tasks.plan import make_plan

CELL = "resnet20-sgd-0"
STAGE = f"train@{CELL}"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Sleeping:
    repository = sleeping(tmp_path_factory.mktemp("a repository"), "resnet20", "sgd, adam")
    assert repository.run("dvc", "repro", "preprocess").returncode == 0
    return repository


@pytest.fixture
def stale(repository, monkeypatch):
    """The repository with a cell that is stale in a new way, so that no run cache knows it."""
    repository.change_code()
    for path in ("behave", "begun", "closed", "trained"):
        for file in repository.root.glob(f"{path}*/*" if path == "behave" else f"{path}*"):
            file.unlink()
    for name, value in repository.env.items():
        monkeypatch.setenv(name, value)
    return repository


class Running:
    """`reproduce` in a thread, as the flow calls it, and the messages that it logs."""

    def __init__(self, repository: Sleeping) -> None:
        self.root, self.pipeline = repository.root, Pipeline.find(repository.root)
        self.stop, self.lines = threading.Event(), list[str]()
        self.result: bool | BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        handler = logging.Handler()
        handler.emit = lambda each: each.thread == self.thread.ident and self.lines.append(each.getMessage())
        logging.getLogger("resgrid").setLevel(logging.INFO)
        logging.getLogger("resgrid").addHandler(handler)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = reproduce(self.pipeline, STAGE, {}, stop=self.stop)
        except BaseException as error:
            self.result = error

    def wait_for(self, name: str) -> int:
        """Until the trainer has written its process id to the file."""
        path = self.root / name
        wait_until(
            lambda: not self.thread.is_alive() or (path.exists() and path.read_text()), what=self.lines
        )
        return int(path.read_text())

    def end(self) -> bool | BaseException | None:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.result

    def stopped(self) -> float:
        """Stop it; the seconds that took. Nothing of it is left, and DVC itself was not killed."""
        began = time.monotonic()
        self.stop.set()
        self.end()
        assert_nothing_is_left(self.root)
        return time.monotonic() - began


def assert_nothing_is_left(root: Path) -> None:
    assert left_over(Sleeping(root)) == []
    assert not any(json.loads((root / ".dvc/tmp/rwlock").read_text()).values())


def assert_it_trains(repository: Sleeping) -> None:
    repository.behave(CELL, "true")
    assert reproduce(Pipeline.find(repository.root), STAGE, {})


def test_trained_and_not_run_are_told_apart_whatever_the_run_cache_holds(stale, caplog):
    pipeline = Pipeline.find(stale.root)
    caplog.set_level(logging.INFO, "resgrid")
    first = reproduce(pipeline, STAGE, {"RESGRID_THREADS": "3"})
    assert (first, stale.trained()) == (True, [CELL])
    assert (stale.root / "trained").read_text().split()[2] == "3"
    assert caplog.messages == [f"Running stage '{STAGE}':", f"> sh work.sh {CELL} runs/{CELL}", f"{CELL} begins",
                     f"{CELL} ends", "Updating lock file 'dvc.lock'"]  # fmt: skip
    assert "To track the changes with git" in pipeline.log(STAGE).read_text()  # which has all of it
    assert not reproduce(pipeline, STAGE, {})
    before = (stale.root / "code/net.py").read_text()
    (stale.root / "code/net.py").write_text("depth = 110\n")
    assert reproduce(pipeline, STAGE, {})
    (stale.root / "code/net.py").write_text(before)
    assert not reproduce(pipeline, STAGE, {})  # restored
    assert (stale.root / f"runs/{CELL}/weights").read_text() == f"{CELL} {before}"
    assert reproduce(pipeline, STAGE, {}, force=True)
    assert stale.trained() == [CELL] * 3
    record = pipeline.record(STAGE)
    assert (record.status, record.is_running, record.seconds < 10) == ("done", False, True)


@pytest.mark.parametrize(
    ("commands", "why", "fault"),
    [
        ("fail null 'recipes.resnet20.epochs: must be 1 or more'",
         "recipes.resnet20.epochs: must be 1 or more", None),
        ("fail '\"memory\"' 'the memory of cuda:0 is too small'", "the memory of cuda:0 is too small", "memory"),
        ("fail '\"connection\"' 'the server does not answer'", "the server does not answer", "connection"),
        ("for i in $(seq 100); do echo line $i; done; kill -9 $$",
         "its process was killed: by somebody, or by the system for lack of memory", None),
    ],
)  # fmt: skip
def test_a_failure_says_why_with_the_end_of_the_log_and_where_the_rest_is(stale, commands, why, fault):
    stale.behave(CELL, commands)
    with pytest.raises(StageFailed) as failed:
        reproduce(Pipeline.find(stale.root), STAGE, {})
    assert (failed.value.why, failed.value.fault) == (why, fault)
    assert str(failed.value).splitlines()[0] == f"{STAGE}: {failed.value.why}"
    assert str(failed.value).splitlines()[-1] == f"    All of it: {stale.root}/.resgrid/logs/{STAGE}.log"
    assert 3 <= len(failed.value.tail) <= 8
    if "line" in commands:
        assert "    line 100" in str(failed.value).splitlines()
        assert "line 1\n" in failed.value.log.read_text()


def test_what_is_in_dvcs_own_way_has_its_words_and_can_pass(stale):
    lock = stale.root / "dvc.lock"
    whole = lock.read_text()
    lock.write_text("schema: '2.0'\nstages: [")
    with pytest.raises(StageFailed, match=r"dvc\.lock") as failed:
        reproduce(Pipeline.find(stale.root), STAGE, {})
    assert failed.value.fault is Fault.DVC
    assert stale.trained() == []
    lock.write_text(whole)


def test_what_dvc_could_not_record_is_a_transient_fault(stale):
    """`dvc` is killed between the end of its command and its own; a training then goes on at its end."""
    stale.behave(CELL, "leave $(date +%s.%N) done; trap - EXIT; kill -9 $PPID; sleep 1")
    with pytest.raises(StageFailed, match="it is done, but DVC has not recorded it") as failed:
        reproduce(Pipeline.find(stale.root), STAGE, {})
    assert failed.value.fault is Fault.DVC
    assert failed.value.fault.transient


def test_output_arrives_while_the_stage_runs(stale):
    stale.behave(CELL, "echo epoch 1; while [ ! -f behave/go ]; do sleep 0.1; done; echo epoch 2")
    running = Running(stale)
    wait_until(lambda: "epoch 1" in running.lines)
    assert "epoch 2" not in running.lines
    assert running.pipeline.record(STAGE).is_running
    (stale.root / "behave/go").touch()
    assert running.end() is True
    assert "epoch 2" in running.lines


def test_stopping_closes_the_trainer_and_leaves_nothing(stale):
    stale.behave(CELL, f"exec {sys.executable} trainer.py {CELL} 60")
    running = Running(stale)
    trainer = running.wait_for(f"begun-{CELL}")
    assert running.stopped() < 10
    assert isinstance(running.result, Stopped)
    assert (stale.root / f"closed-{CELL}").read_text() == str(trainer)  # it had its time to close
    assert not running.pipeline.record(STAGE).is_running
    assert_it_trains(stale)


def test_a_command_that_ignores_sigterm_is_killed_within_ten_seconds(stale):
    stale.behave(CELL, "trap '' TERM; echo $$ > begun; while true; do sleep 1; done")
    running = Running(stale)
    running.wait_for("begun")
    assert 7 < running.stopped() < 10
    assert isinstance(running.result, Stopped)
    assert_it_trains(stale)


@pytest.mark.parametrize("seconds", [0.1, 0.6])
def test_stopping_before_the_command_runs_ends_it_at_its_beginning(stale, seconds):
    stale.behave(CELL, "sleep 60")
    running = Running(stale)
    time.sleep(seconds)  # DVC loads, or reads the pipeline
    assert running.stopped() < 10


def test_stopping_while_dvc_records_a_result_lets_it(stale):
    running = Running(stale)
    while f"{CELL} ends" not in running.lines:
        time.sleep(0.01)
    while (record := running.pipeline.record(STAGE)) and watch.alive(record.by):
        time.sleep(0.01)  # its last line is printed before it has ended
    running.stopped()
    assert json.loads(stale.run("dvc", "status", "--json", STAGE).stdout) == {}


def test_half_an_rwlock_is_mended_when_no_dvc_runs(stale):
    file = stale.root / ".dvc/tmp/rwlock"
    file.write_text('{"write": {"')
    assert "JSON structure is corrupted" in stale.run("dvc", "status", STAGE).stderr
    assert reproduce(Pipeline.find(stale.root), STAGE, {})


def test_a_dvc_that_is_killed_takes_its_command_with_it_and_blocks_nobody(stale):
    stale.behave(CELL, f"exec {sys.executable} trainer.py {CELL} 60")
    running = Running(stale)
    trainer = running.wait_for(f"begun-{CELL}")
    next(process for process in psutil.Process(trainer).parents() if "dvc" in process.cmdline()).kill()
    failure = running.end()
    assert isinstance(failure, StageFailed)
    assert "killed" in failure.why
    assert (stale.root / f"closed-{CELL}").read_text() == str(trainer)
    assert left_over(stale) == []
    assert_it_trains(stale)
    make_plan(Pipeline.find(stale.root))  # as each run of the grid begins
    assert_nothing_is_left(stale.root)


def test_a_trainer_ends_when_the_process_it_works_for_is_killed(stale):
    stale.behave(CELL, f"exec {sys.executable} trainer.py {CELL} 60")
    code = f"""if True:
        from resgrid.dvc.pipeline import Pipeline
        from resgrid.dvc.process import reproduce
        reproduce(Pipeline.find("."), {STAGE!r}, {{}})"""
    command = [sys.executable, "-c", code]
    flow = subprocess.Popen(command, cwd=stale.root, env=stale.env, stdout=subprocess.DEVNULL)
    wait_until((stale.root / f"begun-{CELL}").exists)
    flow.kill()
    flow.wait()
    wait_until(lambda: not left_over(stale), 10)
    assert (stale.root / f"closed-{CELL}").exists()
    assert_nothing_is_left(stale.root)
    assert not Pipeline.find(stale.root).record(STAGE).is_running
    assert_it_trains(stale)


def test_a_stage_that_runs_already_is_waited_for_and_not_trained_again(stale):
    stale.behave(CELL, "echo $$ > begun; while [ ! -f behave/go ]; do sleep 0.1; done")
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", STAGE]
    by_hand = subprocess.Popen(command, cwd=stale.root, env=stale.env, stdout=subprocess.DEVNULL)
    wait_until((stale.root / "begun").exists)
    patient = Running(stale)
    wait_until(lambda: patient.lines, what=patient.result)
    trainer = patient.pipeline.record(STAGE).by.partition(":")[0]
    assert patient.lines == [f"waiting for {STAGE}, which process {trainer} runs"]
    (stale.root / "behave/go").touch()
    assert by_hand.wait(60) == 0
    outcome = patient.end()
    assert outcome is False or outcome.fault is Fault.DVC  # it is still recording
    assert not reproduce(patient.pipeline, STAGE, {})
    assert stale.trained() == [CELL]


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ResgridError, match=r"there is no dvc\.yaml here"):
        Pipeline.find(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    with pytest.raises(ResgridError, match="in no DVC repository"):
        Pipeline.find(tmp_path)


def test_the_state_of_a_sub_folders_pipeline_lies_in_the_root(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "examples/digits").mkdir(parents=True)
    (tmp_path / "examples/digits/dvc.yaml").touch()
    pipeline = Pipeline.find(os.path.relpath(tmp_path / "examples/digits"))
    assert pipeline.name == "examples/digits"
    assert pipeline.log("evaluate") == tmp_path / ".resgrid/logs/examples/digits/evaluate.log"
