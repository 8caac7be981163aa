"""A process that is to end with another one, by real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from resgrid import watch
from resgrid.errors import ResgridError

WATCHER = """
import signal, sys, time
from resgrid import watch

def closed(signum, frame):
    print("closed", flush=True)
    raise SystemExit(143)

signal.signal(signal.SIGTERM, {handler})
watch.watch(poll_seconds=0.1, grace_seconds=0.5)
print("begun", flush=True)
time.sleep(60)
"""


def watcher(watched: str, handler: str = "closed") -> subprocess.Popen[str]:
    """A process that watches another one, or nobody; it has begun, or ended, when this returns."""
    env = os.environ | {"RESGRID_WATCH": watched}
    command = [sys.executable, "-c", WATCHER.format(handler=handler)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("handler", "out", "status"), [("closed", "closed\n", 143), ("signal.SIG_IGN", "", -signal.SIGKILL)]
)
def test_a_process_gets_sigterm_when_the_watched_one_is_killed_and_is_killed_if_it_ignores_that(
    sleeper, handler, out, status
):
    process = watcher(watch.describe(sleeper.pid), handler)
    time.sleep(0.5)
    assert process.poll() is None  # as long as that one lives
    sleeper.kill()  # and is a zombie, for nobody waits for it
    assert process.communicate(timeout=10)[0] == out
    assert process.returncode == status


def test_another_process_with_the_same_id_is_not_the_watched_one(sleeper):
    pid, _, started = watch.describe(sleeper.pid).partition(":")
    process = watcher(f"{pid}:{int(started) - 1}")
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_nobody_is_watched_unless_told():
    process = watcher("")
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.mark.parametrize("value", ["", "4711", "4711:", "a:1", ":1"])
def test_a_malformed_value_is_refused(value):
    with pytest.raises(ResgridError, match=f"RESGRID_WATCH={value}"):
        watch.alive(value)


def test_a_process_that_is_gone_cannot_be_described(sleeper):
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(ProcessLookupError):
        watch.describe(sleeper.pid)


def test_a_signal_that_comes_in_a_callback_of_pythons_own_ends_the_command_all_the_same():
    """As one does that comes while a module is imported: Python prints such an exception and goes on."""
    program = """
import os, signal, sys, time, weakref
from resgrid.cli import main

class Gone: ...

def cells(options):
    gone = Gone()
    reference = weakref.ref(gone, lambda _: [os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.2)])
    del gone
    try:
        time.sleep(20)
    finally:
        print("closed")

from resgrid.commands import grid
grid.cells = cells
sys.exit(main(["cells"]))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    assert (done.returncode, done.stdout) == (143, "closed\n"), done.stderr
    assert "ignored" not in done.stderr
