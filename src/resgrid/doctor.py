"""`resgrid doctor`: what this machine offers, what stands in the way, and what to do about it.

It imports torch alone, and survives that, so that it answers where an installation is broken.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from resgrid.project import available_memory, git_state, num_cores, project_root

PYTHON = ((3, 11), (3, 15))  # from, and below which
DISK_BYTES = 10e9
PORTS = {"Prefect": 4200, "MLflow": 5000}  # of `make up`, unless it is given others
PACKAGES = ("torch", "torchvision", "dvc", "prefect", "mlflow")
SETTINGS = re.compile(r"RESGRID_|MLFLOW_TRACKING_URI$|PREFECT_API_URL$|(https?|no|all)_proxy$", re.IGNORECASE)
CHECKOUT = Path(__file__).parents[2]

Level = Literal["good", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the table; a `problem` keeps ResGrid from working, a `note` is good to know."""

    what: str
    value: str
    level: Level = "good"
    advice: str = ""

    def __str__(self) -> str:
        mark = {"good": " ", "note": "·", "problem": "!"}[self.level]
        advice = f"\n{'':18} → {self.advice}" if self.advice else ""
        return f"{mark} {self.what:<16} {self.value}{advice}"


def examine() -> Iterator[Finding]:
    """Each finding, as soon as it is known."""
    git, memory = git_state(), available_memory()
    changed = ", with changed files" if git.dirty else ""
    yield Finding("ResGrid", f"{_version('resgrid')}, commit {(git.commit or 'unknown')[:12]}{changed}")
    room = "" if memory is None else f", {memory / 1e9:.1f} GB of memory free"
    yield Finding("System", f"{platform.platform()}, {num_cores()} cores to use{room}")
    fits = PYTHON[0] <= sys.version_info[:2] < PYTHON[1]
    python = f"{platform.python_version()} ({sys.executable})"
    yield _check(fits, "Python", python, "3.11 to 3.14 are supported: make PYTHON=…", "problem")
    yield from _packages()
    version = _output("git", "--version").removeprefix("git version ")
    yield _check(version != "", "git", version or "not on the PATH", "install it: DVC needs it", "problem")
    if git.problem:
        refusal = "refuses to read this repository, so results name no commit"
        yield Finding("git", refusal, "problem", git.problem)
    root = project_root()
    inside = (root / ".dvc").is_dir()
    way = "go to a clone; `resgrid init` makes a pipeline elsewhere"
    yield _check(inside, "DVC repository", str(root) if inside else "none around this folder", way)
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free here"
    yield _check(free > DISK_BYTES, "Disk", text, "the environment takes 7 GB, the grid on CIFAR-10 3")
    yield from _devices()
    for service, port in PORTS.items():
        taken = _answers("127.0.0.1", port)
        value, way = (
            "taken" if taken else "free",
            "by `make up`, if it runs; else that takes the next free one",
        )
        yield _check(not taken, f"Port {port}", f"{service}'s: {value}", way)
    yield from _settings()


def _check(good: bool, what: str, value: str, advice: str, level: Level = "note") -> Finding:
    return Finding(what, value) if good else Finding(what, value, level, advice)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    """Against the versions that were tested together, in a checkout's constraints.txt."""
    tested = CHECKOUT / "constraints.txt"
    lines = tested.read_text(encoding="utf-8").splitlines() if tested.is_file() else []
    wanted = dict(line.split("==") for line in lines if "==" in line)
    for name in PACKAGES:
        version = _version(name)
        level: Level = "problem" if version is None and name.startswith("torch") else "note"
        asked = wanted.get(name, version)
        good = version is not None and version.partition("+")[0] == asked
        yield _check(good, name, version or "not installed", f"{asked} was tested: make install", level)


def _devices() -> Iterator[Finding]:
    """The GPUs as the driver shows them, and what torch can use of them."""
    cards = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("GPU", f"torch cannot be imported: {error}", "problem", "make clean install")
        return
    if cards:
        value = f"{'; '.join(cards.splitlines())} (driver); torch is built for CUDA {torch.version.cuda}"
        works = torch.cuda.is_available()
        yield _check(works, "GPU", value, "torch cannot use it: update its driver", "problem")
        daemon, way = shutil.which("nvidia-cuda-mps-control"), "each card trains one cell at a time"
        yield _check(daemon is not None, "NVIDIA MPS", daemon or "not there", way)
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "Apple's (mps)")
    else:
        yield Finding("GPU", "none", "note", "cells train on the CPU: `resgrid plan --measure` says how long")


def _settings() -> Iterator[Finding]:
    """Environment variables that change what happens, without passwords; servers that do not answer."""
    names = sorted(filter(SETTINGS.match, os.environ))
    for name in names:
        yield Finding(name, re.sub(r"//[^/@]*@", "//…@", os.environ[name]))
    direct = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in names):
        advice = "export NO_PROXY=127.0.0.1,localhost, or servers here are asked through the proxy"
        yield _check("127.0.0.1" in direct, "NO_PROXY", direct or "not set", advice)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        url = urlsplit(os.environ.get(name, ""))
        if url.scheme in ("http", "https"):
            good = _answers(url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
            advice = "start that server, or unset the variable"
            yield _check(good, f"{name} answers", "yes" if good else "no", advice, "problem")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
