"""MPS is started for cells that share a card and ended with them, and a daemon of somebody else is left alone.

The stand-in for nvidia-cuda-mps-control writes down how it is called.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from resgrid import mps
from resgrid.errors import ResgridError
from tasks import slots

TWO = ["0", "0"]  # the cards of two slots
CONTROL = """#!/bin/sh
case "$1" in
-d) echo "started in $CUDA_MPS_PIPE_DIRECTORY, log in $CUDA_MPS_LOG_DIRECTORY" >> {calls}
    touch "$CUDA_MPS_PIPE_DIRECTORY/control";;
*) read command; echo "$command in $CUDA_MPS_PIPE_DIRECTORY" >> {calls};;
esac
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in, which is on PATH, was called with; no daemon runs."""
    path = tmp_path / "calls"
    path.touch()
    executable(tmp_path, CONTROL.format(calls=path), monkeypatch)
    for name in (mps.PIPES, mps.LOGS, mps.SWITCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mps, "DEFAULT_PIPES", tmp_path / "default")
    return path


def executable(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / mps.CONTROL).write_text(script)
    (folder / mps.CONTROL).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_cells_that_share_a_card_have_a_daemon_in_a_folder_of_its_own_which_ends_with_them(calls, caplog):
    caplog.set_level("INFO")
    with suppress(KeyboardInterrupt), mps.shared(TWO) as variables:
        folder = variables["CUDA_MPS_PIPE_DIRECTORY"]
        assert calls.read_text() == f"started in {folder}, log in {folder}\n"
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == folder  # so whatever is started here is a client
        assert "RESGRID_MPS=never" in caplog.text
        raise KeyboardInterrupt  # also where the grid breaks off
    assert calls.read_text().endswith(f"quit in {folder}\n")
    assert not Path(folder).exists()
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def assert_none_is_started(cards: list[str | None], calls: Path) -> None:
    with mps.shared(cards) as variables:
        assert variables == {}
    assert calls.read_text() == ""


@pytest.mark.parametrize("alone", [[], ["0"], ["0", "1"], [None, None]])
def test_cells_that_share_no_card_have_none(alone, calls):
    assert_none_is_started(alone, calls)


def test_a_daemon_that_runs_already_is_left_alone(calls, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/of/somebody")
    assert mps.available()
    assert_none_is_started(TWO, calls)
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/of/somebody"
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")
    (tmp_path / "default").mkdir()
    (tmp_path / "default/control").touch()  # where clients look without the variable
    assert_none_is_started(TWO, calls)


def test_it_is_switched_off_by_the_environment(calls, monkeypatch):
    monkeypatch.setenv("RESGRID_MPS", "never")
    assert_none_is_started(TWO, calls)
    monkeypatch.setenv("RESGRID_MPS", "off")
    with pytest.raises(ResgridError, match="RESGRID_MPS=off: must be never"), mps.shared(TWO):
        pass


def test_a_daemon_that_does_not_start_is_logged_and_done_without(calls, monkeypatch, tmp_path, caplog):
    executable(tmp_path, "#!/bin/sh\necho 'no such device' >&2\nexit 1\n", monkeypatch)
    with mps.shared(TWO) as variables:
        assert variables == {}
    assert caplog.messages == ["MPS does not start, so cells take turns on their card: no such device"]


def test_without_mps_a_card_has_one_cell_at_a_time_unless_told(calls, monkeypatch):
    monkeypatch.setattr(mps, "cards", lambda: [mps.Card("0", 80 * 2**30), mps.Card("1", 80 * 2**30)])
    monkeypatch.setattr(slots, "num_cores", lambda: 16)
    assert len(slots.share(36, architectures=["resnet20"])) == 16
    monkeypatch.setenv("RESGRID_MPS", "never")
    assert [slot.name for slot in slots.share(36, architectures=["resnet20"])] == ["cuda:0 1/1", "cuda:1 1/1"]
    assert len(slots.share(36, architectures=["resnet20"], slots=6)) == 6
