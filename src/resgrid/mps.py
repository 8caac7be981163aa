"""NVIDIA's cards, and its Multi-Process Service (MPS): cells that share one run at once instead of in turns.

Without it four graphed ResNet-20 trained 0.99 times the images/s of one on an H200; with it see `gain`. The
daemon needs no root. A fault in one client can take the others along: their cells go on from their last
checkpoints.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resgrid.errors import ResgridError

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
DEFAULT_PIPES = Path("/tmp/nvidia-mps")  # where clients look for a daemon without PIPES
SWITCH = "RESGRID_MPS"
START_SECONDS, QUIT_SECONDS = 5.0, 20.0
MAX_SHARING = 8  # cells on one card

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """A GPU as CUDA_VISIBLE_DEVICES names it."""

    name: str
    free_bytes: int


def cards() -> list[Card]:
    """The GPUs that training would use: none if RESGRID_DEVICE names something else, or CUDA shows none.

    Asked of the driver and not of torch, whose import takes 2 s and whose context takes memory of each card.
    """
    device = os.environ.get("RESGRID_DEVICE") or "auto"
    if not re.fullmatch(r"auto|cuda(:\d+)?", device):
        return []
    import pynvml

    def card(name: str) -> Card:
        is_number = name.isdecimal()
        by = pynvml.nvmlDeviceGetHandleByIndex if is_number else pynvml.nvmlDeviceGetHandleByUUID
        handle = by(int(name) if is_number else name)
        return Card(name, pynvml.nvmlDeviceGetMemoryInfo(handle).free)

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if visible is None:
            names = [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
        if ":" in device:
            names = names[int(device.partition(":")[2]) :][:1]
        return [card(name) for name in names]
    except pynvml.NVMLError as error:
        raise ResgridError(
            f"CUDA_VISIBLE_DEVICES={visible}: the driver has no such GPUs: {error}. Give numbers, or names "
            "as `nvidia-smi -L` lists them; nothing (`CUDA_VISIBLE_DEVICES=`) means the CPU."
        ) from None
    finally:
        pynvml.nvmlShutdown()


def gain(sharing: int) -> float:
    """Images/s of `sharing` cells on one card under MPS, summed, by those of one alone.

    ResNet-20 on an H200: four cells 1.84, eight 2.06; between these by a straight line. (A prototype of the
    graph on an H100: 1.72 and 1.84.)
    """
    return float(np.interp(sharing, (1, 4, MAX_SHARING), (1.0, 1.84, 2.06)))


def running() -> bool:
    """Whether somebody else's daemon serves this process already, or is to."""
    return PIPES in os.environ or (DEFAULT_PIPES / "control").exists()


def available() -> bool:
    """Whether cells that share a card would run at once. Raises ResgridError for an unknown RESGRID_MPS."""
    switch = os.environ.get(SWITCH) or "auto"
    if switch not in ("auto", "never"):
        raise ResgridError(f"{SWITCH}={switch}: must be never, or auto, or not set.")
    return running() or (switch == "auto" and shutil.which(CONTROL) is not None)


@contextmanager
def shared(cards: Iterable[str | None]) -> Iterator[dict[str, str]]:
    """`daemon` where several slots, whose `cards` these are, share one; in this process's environment too."""
    if max(Counter(card for card in cards if card is not None).values(), default=0) < 2:
        yield {}
        return
    with daemon() as variables:
        os.environ.update(variables)
        try:
            yield variables
        finally:
            for name in variables:
                os.environ.pop(name, None)


@contextmanager
def daemon() -> Iterator[dict[str, str]]:
    """Start a daemon in a folder of its own, and end it; yields the variables by which clients find it.

    They are none, and nothing is started, where there is no MPS, RESGRID_MPS is `never`, or a daemon runs
    already. Where the daemon does not start, that is logged, and cells do without it.
    """
    if not available() or running():
        yield {}
        return
    # Not in the project: the path of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="resgrid-mps-", ignore_cleanup_errors=True) as folder:
        variables = {PIPES: folder, LOGS: folder}
        environment, output = os.environ | variables, Path(folder, "start")
        with output.open("w") as file:  # not a pipe, which the daemon would keep open
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            done = subprocess.run([CONTROL, "-d"], env=environment, check=False, **streams)
        if done.returncode:
            why = output.read_text().strip() or f"{CONTROL} -d ended with {done.returncode}"
            log.warning("MPS does not start, so cells take turns on their card: %s", why)
            yield {}
            return
        deadline = time.monotonic() + START_SECONDS
        while not Path(folder, "control").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        log.info("Cells share their card under MPS, which ends with them (%s=never: without it)", SWITCH)
        try:
            yield variables
        finally:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [CONTROL], input="quit\n", text=True, env=environment, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, timeout=QUIT_SECONDS, check=False,
                )  # fmt: skip
