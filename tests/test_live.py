"""`resgrid status --watch`: curves of what runs, from the files that training writes."""

from __future__ import annotations

import os
import re
import time

import pytest
from small import Project

from resgrid import watch
from resgrid.dvc.pipeline import Pipeline
from resgrid.run_status import RUN
from resgrid.stage_record import Record
from resgrid.train import show_history
from resgrid.training.engine import Epoch
from tasks.live import COLOURS, curves
from tasks.publish import Status


def running(*cells: str) -> Status:
    by = watch.describe(os.getpid())
    return Status(None, True, tuple((Record(f"train@{cell}", by, time.time()), "") for cell in cells))


def test_each_running_cell_is_a_curve_with_its_name(small: Project):
    shown = curves(Pipeline.find(small.root), running("resnet20-sgd-0", "resnet20-adam-0"))
    assert "test accuracy, %" in shown
    assert "resnet20-sgd-0" in shown
    assert "resnet20-adam-0" in shown
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in shown.splitlines()) <= 100


def test_of_many_running_cells_only_some_are_drawn(small: Project):
    cells = [*[f"resnet20-sgd-{seed}" for seed in range(len(COLOURS))], "resnet20-adam-1"]
    shown = curves(Pipeline.find(small.root), running(*cells))
    assert "resnet20-sgd-1" in shown
    assert "resnet20-adam-1" not in shown


def test_before_the_first_epoch_it_says_when_curves_appear(small: Project):
    assert "first epoch" in curves(Pipeline.find(small.root), running("resnet20-sgd-7"))


def test_without_a_grid_the_state_is_shown_once(small: Project):
    done = small.run("resgrid", "status", "--watch")
    assert done.returncode == 0, done.stderr
    assert "No train-all has run here, and nothing runs now." in done.stdout


@pytest.fixture
def epochs() -> list[Epoch]:
    figures = dict.fromkeys(Epoch.__dataclass_fields__, 0.5)
    return [Epoch(**figures | {"epoch": number}) for number in (1, 2)]


def test_the_epochs_so_far_are_shown_and_a_whole_result_is_left_alone(tmp_path, epochs):
    show_history(tmp_path / "cell", epochs)
    assert len((tmp_path / "cell/history.csv").read_text().splitlines()) == 3
    (tmp_path / "cell" / RUN).write_text("{}")
    show_history(tmp_path / "cell", epochs[:1])
    assert len((tmp_path / "cell/history.csv").read_text().splitlines()) == 3
