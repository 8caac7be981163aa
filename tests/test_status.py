"""The state of every cell in one word, as `resgrid status` and all others show it."""

from __future__ import annotations

import os
import time
from dataclasses import asdict

import pytest
from small import Project

from resgrid import watch
from resgrid.cell_states import UNCHANGED, CellRun, GridRun, cell_states, read_grid_run
from resgrid.config import load_params
from resgrid.dvc.pipeline import Pipeline
from resgrid.grid import expand
from resgrid.run_status import RUN
from resgrid.stage_record import Fault, Record, State, read_record, state_file, write_state
from resgrid.train_cell import show_history
from resgrid.training.engine import Epoch
from tasks.plan import make_plan
from tasks.status import status

GONE = "1:1"  # no process has this start time


@pytest.fixture
def project(small: Project, tmp_path) -> Project:
    return small.copy(tmp_path / "a project")


def words(project: Project) -> dict[str, str]:
    cells = expand(load_params(project.root / "params.yaml"))
    return {each.cell.id: each.word for each in cell_states(cells, project.root, project.root)}


def leave_record(project: Project, cell: str, status: State, by: str = GONE, **more) -> None:
    record = Record(f"train@{cell}", by, time.time() - 60, status=status, **more)
    write_state(state_file(project.root, project.root, record.stage), asdict(record))


def test_a_result_is_what_its_folder_says_whatever_the_latest_attempt_did(project):
    before = words(project)
    assert before["resnet20-sgd-0"] == "completed"
    assert before["too-fast"] == "diverged"
    leave_record(project, "resnet20-sgd-0", State.FAILED, why="no")
    assert words(project) == before


def test_without_a_result_the_latest_attempt_speaks(project):
    (project.root / "runs/resnet20-sgd-0/run.json").unlink()
    for status_, by, word in (
        (State.FAILED, GONE, "failed"),
        (State.INTERRUPTED, GONE, "interrupted"),
        (State.RUNNING, GONE, "interrupted"),  # killed, so that it left no other word
        (State.RUNNING, watch.describe(os.getpid()), "running"),
        (State.DONE, GONE, "missing"),
    ):
        leave_record(project, "resnet20-sgd-0", status_, by)
        assert words(project)["resnet20-sgd-0"] == word
    # Its command only refused, since DVC was to record another machine's result.
    leave_record(project, "resnet20-sgd-0", State.FAILED, fault=Fault.NO_RESULT)
    assert words(project)["resnet20-sgd-0"] == "missing"


def test_what_train_all_has_queued_counts_as_long_as_its_process_lives(project):
    grid = GridRun(watch.describe(os.getpid()), time.time(), 1)
    grid.cells = {
        "resnet20-sgd-0": CellRun(State.QUEUED), "resnet20-sgd-1": CellRun(State.RUNNING, 2, "pool"),
        "resnet20-adam-0": CellRun(became=UNCHANGED),
    }  # fmt: skip
    grid.save(project.root, project.root)
    states = words(project)
    assert [states[name] for name in grid.cells] == ["queued", "running", "completed"]
    assert "train-all has been running for " in str(status(Pipeline.find(project.root)))
    grid.by = GONE
    grid.save(project.root, project.root)
    assert set(words(project).values()) & {"queued", "running"} == set()
    assert str(status(Pipeline.find(project.root))).startswith("The last train-all was killed.")


def test_a_failed_cell_has_the_reason_of_its_record(project):
    lines = str(status(Pipeline.find(project.root)))
    [line] = [line for line in lines.splitlines() if "no-weights" in line]
    assert line.split()[:2] == ["no-weights", "failed"]
    assert "absent.safetensors" in line


def test_what_the_version_before_has_left_is_read_or_ignored(project):
    """Its words for a record, train-all's progress and plan's memory of DVC's answer."""
    folder = state_file(project.root, project.root, "x").parent
    record = {
        "stage": "train@resnet20-sgd-0", "by": GONE, "started": 1000.0, "ended": 1077.0, "fault": None, "why": "",
        "slot": "cpu 1/2",
    }  # fmt: skip
    for former, now in (("good", State.DONE), ("fault", State.FAILED), ("stopped", State.INTERRUPTED)):
        write_state(folder / "train@resnet20-sgd-0.json", record | {"status": former})
        former_record = read_record(project.root, project.root, "train@resnet20-sgd-0")
        assert former_record is not None
        assert (former_record.status, former_record.seconds) == (now, 77.0 if now == State.DONE else None)
    write_state(folder / "train-all.json", {
        "started": 1.0, "by": GONE, "slots": 2, "flow_run": None, "until": None, "ended": 2.0,
        "cells": {"resnet20-sgd-0": "trained"},
    })  # fmt: skip
    write_state(folder / "status.json", {"asked": 1.0, "status": {"evaluate": ["changed command"]}})
    assert read_grid_run(project.root, project.root) is None
    assert str(status(Pipeline.find(project.root))).startswith("Nothing runs now.")
    stale = {step.title for step in make_plan(Pipeline.find(project.root)).steps if step.state == "stale"}
    assert stale == {"no-weights"}


def test_without_anything_at_work_watch_shows_every_cell_once(small):
    done = small.run("resgrid", "status", "--watch")
    assert done.returncode == 0, done.stderr
    assert "Nothing runs now." in done.stdout
    assert "resnet20-sgd-0" in done.stdout


def test_the_epochs_so_far_are_shown_and_a_whole_result_is_left_alone(tmp_path):
    figures = dict.fromkeys(Epoch.__dataclass_fields__, 0.5)
    epochs = [Epoch(**figures | {"epoch": number}) for number in (1, 2)]
    show_history(tmp_path / "cell", epochs)
    (tmp_path / "cell" / RUN).write_text("{}")
    show_history(tmp_path / "cell", epochs[:1])
    assert len((tmp_path / "cell/history.csv").read_text().splitlines()) == 3
