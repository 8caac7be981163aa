"""What a stage's command leaves of its beginning and its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small import Project

from resgrid import watch
from resgrid.errors import ConnectionLost, OutOfMemory, ResgridError
from resgrid.stage_record import Record, read_record, recorded


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose stage `train@a-b-0` this process is, as DVC says it in the environment."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_STAGE", "train@a-b-0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(root: Path, folder: str = ".") -> Record:
    latest = read_record(root, root / folder, "train@a-b-0")
    assert latest is not None
    return latest


def test_a_command_that_runs_says_which_process_it_is_and_then_how_long_it_took(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded():
        begun = record(root)
        assert (begun.is_running, begun.by) == (True, watch.describe(os.getpid()))
        assert begun.seconds is None
    ended = record(root)
    assert (ended.status, ended.is_running) == ("done", False)
    assert ended.seconds is not None and 0 <= ended.seconds < 5  # noqa: PT018


@pytest.mark.parametrize(
    ("error", "fault", "why"),
    [
        (ResgridError("recipes: no"), None, "recipes: no"),
        (OutOfMemory("batch_size: too large"), "memory", "batch_size: too large"),
        (MemoryError("no"), "memory", "MemoryError: no"),
        (ConnectionLost("away"), "connection", "away"),
        (ConnectionResetError(104, "reset"), "connection", "ConnectionResetError: [Errno 104] reset"),
        (KeyError("x"), None, "KeyError: 'x'"),
    ],
)
def test_the_kind_of_a_fault_is_that_of_its_exception(
    root: Path, error: Exception, fault: str | None, why: str
) -> None:
    with pytest.raises(type(error)), recorded():
        raise error
    assert (record(root).status, record(root).fault, record(root).why) == ("failed", fault, why)


def test_a_command_that_is_told_to_end_is_stopped_and_no_fault(root: Path) -> None:
    with pytest.raises(SystemExit), recorded():
        raise SystemExit(143)
    assert (record(root).status, record(root).fault) == ("interrupted", None)


def test_another_pipelines_stage_and_an_experiments_copy_do_not_get_in_the_way(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "examples/digits").mkdir(parents=True)
    monkeypatch.chdir(root / "examples/digits")
    monkeypatch.setenv("DVC_STAGE", "examples/digits/dvc.yaml:train@a-b-0")  # called from the root
    with recorded():
        pass
    assert record(root, "examples/digits").status == "done"
    copy = root / ".dvc/tmp/exps/standalone/tmp1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with recorded():
        pass
    assert len(list((root / ".resgrid").rglob("*.json"))) == 1


def test_a_training_by_hand_is_recorded_and_within_a_stage_of_dvcs_the_stage_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(), recorded(by_hand="train@other"):
        pass
    assert [path.stem for path in (root / ".resgrid").rglob("*.json")] == ["train@a-b-0"]
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.delenv("DVC_STAGE")
    (root / ".dvc").mkdir()
    with pytest.raises(ResgridError), recorded(), recorded(by_hand="train@a-b-0"):
        raise ResgridError("no")
    assert (record(root).status, record(root).why) == ("failed", "no")


def test_every_stage_of_a_trained_pipeline_has_left_its_record(small: Project) -> None:
    for stage in ("download", "preprocess", "train@resnet20-sgd-0", "evaluate"):
        latest = read_record(small.root, small.root, stage)
        assert latest is not None, stage
        assert (latest.stage, latest.status) == (stage, "done")
