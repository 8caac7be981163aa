"""Where the arithmetic is done, and in what: chosen once, at the start of a command."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from resgrid.config import Engine
from resgrid.errors import ResgridError
from resgrid.grid import Cell

log = logging.getLogger(__name__)

# Compiling takes about a minute of a cold start. Measured on two cores with AMX, at batch 128, a step is then
# 1.18 to 1.26 times as fast for ResNet-20 and 1.15 to 1.39 times for ResNet-56: the minute is paid back
# after some 300,000 images, six epochs of CIFAR-10. Wide networks gain nothing; without AMX, 4 % at most.
COMPILE_FROM_IMAGES = 300_000


@dataclass(frozen=True)
class Execution:
    """How a cell's steps are computed on this machine; it changes results by no more than rounding."""

    precision: torch.dtype  # float32, or bfloat16 for autocast over float32 weights
    compiled: bool = False
    graphed: bool = False  # replayed as a CUDA graph, which changes no bit: so __str__ leaves it out

    @property
    def precision_name(self) -> str:
        return "bf16" if self.precision is torch.bfloat16 else "fp32"

    def __str__(self) -> str:
        return f"{self.precision_name}, {'compiled' if self.compiled else 'eager'}"


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or else by RESGRID_DEVICE, or else the best that is there.

    Names are `auto`, `cpu`, `cuda`, `cuda:N` and `mps`; `auto` takes CUDA before MPS before the CPU. It also
    sets torch's threads to RESGRID_THREADS; without that variable torch takes one a core.
    Raises ResgridError for another name, for a device that this machine does not have, and for a
    RESGRID_THREADS that is no whole number from 1 to 9999.
    """
    _set_threads()
    if name is None:
        origin, name = "RESGRID_DEVICE", os.environ.get("RESGRID_DEVICE") or "auto"
    else:
        origin = "device"
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    with warnings.catch_warnings(record=True) as caught:  # of a driver that is too old for this torch
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            present[:0] = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for warning in caught:
        log.warning("no CUDA: %s", str(warning.message).partition(" (Triggered")[0])
    if name == "auto":
        return torch.device(present[0])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in present:
        known = re.fullmatch(r"cpu|mps|cuda(:\d+)?", name)
        problem = "this machine has no such device" if known else "no device has that name"
        raise ResgridError(
            f"{origin}={name}: {problem}. This machine has {', '.join(present)}; or write auto."
        )
    return torch.device(wanted)


def choose_precision(engine: Engine, device: torch.device) -> torch.dtype:
    """float32, or bfloat16 for autocast over float32 weights.

    `auto` is bf16 where the device multiplies it natively: CUDA from compute capability 8 on, and CPUs with
    AMX or AVX512-BF16 (or Arm's, where torch's oneDNN uses it).
    Raises ResgridError for `bf16` on another device, where it would be emulated, and slow.
    """
    match engine.precision:
        case "fp32":
            return torch.float32
        case "auto":
            return torch.bfloat16 if _multiplies_bf16(device) else torch.float32
        case "bf16":
            if not _multiplies_bf16(device):
                raise ResgridError(
                    f"engine.precision: bf16, but {device_name(device)} ({device}) has no bf16 arithmetic; "
                    "write fp32, or auto, which takes what the device is good at."
                )
            return torch.bfloat16


def choose_execution(cell: Cell, num_train: int, device: torch.device) -> Execution:
    """As the cell's `engine` says; `auto` goes by the machine and by the whole work of the cell.

    Never by what is cached or left to do, so that a cell gives the same weights whenever it is started.
    Without a C++ compiler nothing is compiled, not even with `compile: always`. On CUDA, steps are replayed
    as a graph.
    Raises ResgridError as `choose_precision` does.
    """
    precision = choose_precision(cell.engine, device)
    graphed = device.type == "cuda"
    if cell.engine.compile == "auto":
        pays = (
            device.type == "cpu"
            and _has_amx()
            and cell.family == "cifar_resnet"
            and cell.recipe.epochs * num_train >= COMPILE_FROM_IMAGES
        )
        return Execution(precision, pays and _can_compile(), graphed)
    return Execution(precision, cell.engine.compile == "always" and _can_compile(), graphed)


def _can_compile() -> bool:
    """Whether there is a C++ compiler, and Python's headers, which what torch generates includes."""
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))
    return has_compiler and Path(sysconfig.get_path("include"), "Python.h").is_file()


def _has_amx() -> bool:
    """Whether the CPU multiplies matrices in tiles: there convolutions are so fast that the rest weighs."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def device_name(device: torch.device) -> str:
    """The name that its maker gives it, such as `NVIDIA H200` or `AMD EPYC 9654 96-Core Processor`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        if platform.machine().lower() in ("x86_64", "amd64"):
            # torch's public torch.cpu.get_capabilities is younger than 2.11; AMX implies AVX512-BF16.
            supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        else:
            supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return supported is not None and bool(supported())
    return False


def _set_threads() -> None:
    # Processes times threads should not exceed the cores: at twice as many, all together are slower than one.
    text = os.environ.get("RESGRID_THREADS")
    if not text:
        return
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise ResgridError(f"RESGRID_THREADS={text}: must be a whole number of threads, from 1 to 9999.")
    torch.set_num_threads(int(text))
