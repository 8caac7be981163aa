"""Facts about the project and its machine, each from one function: the root, git's state, cores and memory,
and how files are read and written.

All of it runs where there is torch alone: cores and memory come from /proc and the cgroup, not from psutil.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from resgrid.errors import ResgridError

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
RESTORED = "`dvc checkout --force` restores it."


# --- the root, and git ------------------------------------------------------------------------------


def nearest(folder: Path, name: str) -> Path | None:
    """The nearest folder that holds `name`: `folder` or one above it."""
    return next((each for each in (folder, *folder.parents) if (each / name).exists()), None)


def project_root(folder: Path | None = None) -> Path:
    """The nearest folder with a `.dvc`, upwards of `folder` (the current one), else with a `.git`, else it.

    Absolute. The project's state and its MLflow store lie there.
    """
    here = (folder or Path.cwd()).resolve()
    return nearest(here, ".dvc") or nearest(here, ".git") or here


@dataclass(frozen=True)
class GitState:
    """What git says of a folder: nothing where there is no git, no repository or no commit yet."""

    commit: str | None = None
    dirty: bool | None = None  # whether tracked files differ; dvc.lock may, for DVC rewrites it at each stage
    problem: str | None = None  # git's own words, where there is a repository that it refuses to read


def git_state(folder: Path | None = None) -> GitState:
    """That of the repository of `folder`, by default the current one."""
    here = (folder or Path.cwd()).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)

    if nearest(here, ".git") is None:
        return GitState()
    try:
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        if head.returncode == 1:  # there is no commit yet
            return GitState()
        all_but_lock = (":(top)", ":(top,exclude,glob)**/dvc.lock")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *all_but_lock)
    except OSError:  # no git
        return GitState()
    if failed := next((each for each in (head, changed) if each.returncode), None):
        return GitState(problem=failed.stderr.strip() or f"git ended with status {failed.returncode}")
    return GitState(head.stdout.strip(), bool(changed.stdout.strip()))


# --- the machine ------------------------------------------------------------------------------------


def num_cores() -> int:
    """Cores that this process may use: physical ones of its affinity, within a container's limit of CPU time.

    Threads beyond any of the three only wait for one another.
    """
    allowed = _allowed_cores()
    for quota in _limits("cpu", "cpu.max", "cpu.cfs_quota_us"):
        with suppress(OSError, ValueError):  # no limit reads `max 100000` or -1
            if quota.name == "cpu.max":
                microseconds, period = map(int, quota.read_text().split())
            else:
                microseconds = int(quota.read_text())
                period = int(quota.with_name("cpu.cfs_period_us").read_text())
            if microseconds > 0:
                allowed = min(allowed, microseconds // period)
    return max(1, allowed)


def free_cores() -> int:
    """How many of `num_cores` nothing computes on just now, at least 1; takes half a second.

    By the quietest of three looks, for a program that computes is in all of them. The load average would
    count the training that has just ended here as well. Where /proc does not say, all of them.
    """
    cores = num_cores()
    try:
        idle = max(_idle_cpus(0.15) for _ in range(3))
    except (OSError, AttributeError):  # no Linux
        return cores
    return max(1, min(cores, round(idle * cores / len(os.sched_getaffinity(0)))))


def _idle_cpus(seconds: float) -> float:
    """How many of this process's CPUs idled, on the average of so many seconds."""

    def idle_ticks() -> int:
        lines = re.findall(r"^cpu(\d+) (.+)$", (PROC / "stat").read_text(), re.MULTILINE)
        mine = [line.split() for number, line in lines if int(number) in os.sched_getaffinity(0)]
        return sum(int(fields[3]) + int(fields[4]) for fields in mine)  # idle, and waiting for a disk

    before, began = idle_ticks(), time.monotonic()
    time.sleep(seconds)
    return (idle_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)


def available_memory() -> int | None:
    """Bytes that a new process can have without swapping, within a container's limit.

    On Linux the kernel's own estimate; elsewhere all that the machine has; None where nothing is known.
    """
    try:
        text = (PROC / "meminfo").read_text()
        free = int(re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # no such figure on this system
            return None
    for limit in _limits("memory", "memory.max", "memory.limit_in_bytes"):
        used, inactive = ("memory.current", "inactive_file")
        if limit.name != "memory.max":
            used, inactive = ("memory.usage_in_bytes", "total_inactive_file")
        with suppress(OSError, ValueError):  # `max`: no limit
            most, taken = int(limit.read_text()), int(limit.with_name(used).read_text())
            # Pages of files that nobody uses count as taken, and go when memory is asked for.
            stat = limit.with_name("memory.stat").read_text()
            pages = re.search(rf"^{inactive} (\d+)", stat, re.MULTILINE)
            free = min(free, max(0, most - taken + (int(pages[1]) if pages else 0)))
    return free


def _limits(controller: str, v2: str, v1: str) -> Iterator[Path]:
    """The files with this process's limits: its own cgroup's and those of all above it, as any may bind.

    A container sees its own as the root, also where /proc names it by the path that it has outside.
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            place, name = CGROUP / controllers, v1
            if not place.is_dir():  # `cpu,cpuacct` has links by the single names as well
                place = CGROUP / controller
        elif controllers == "":
            place, name = CGROUP, v2
        else:
            continue
        own = place / path.strip("/")
        for folder in (own, *own.parents):
            if (folder / name).is_file():
                yield folder / name
            if folder == place:
                break


def _allowed_cores() -> int:
    """Physical cores within the affinity: hardware threads that share one count once."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, whose processors have one thread a core
        return os.cpu_count() or 1
    siblings = set()
    for number in os.sched_getaffinity(0):
        file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        siblings.add(file.read_text() if file.exists() else str(number))
    return len(siblings)


# --- files ------------------------------------------------------------------------------------------


def unreadable(path: Path, error: Exception, way_out: str) -> ResgridError:
    """The error for a file that is there and cannot be read, or is not what it should be."""
    if isinstance(error, PermissionError):
        return ResgridError(
            f"Permission denied: {error.filename or path}. It belongs to another user, or its mode is wrong."
        )
    why = error.strerror if isinstance(error, OSError) else error
    return ResgridError(f"{path}: cannot be read ({why}). {way_out}".rstrip())


def denied(*places: Path) -> Path | None:
    """The first file in `places` that another user's hands keep from this one, as after `sudo dvc repro`.

    What is merely read-only and this user's own, as DVC's cache is, is not among them.
    """

    def is_denied(path: Path) -> bool:
        if not path.exists():
            return False
        return not os.access(path, os.R_OK) or (
            path.stat().st_uid != os.geteuid() and not os.access(path, os.W_OK)
        )

    paths = (path for place in places for path in (place, *sorted(place.rglob("*"))))
    return next(filter(is_denied, paths), None)


def read_json(path: Path, way_out: str = RESTORED) -> dict[str, Any]:
    """The object in a JSON file; raises ResgridError, which ends with `way_out`, if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, error, way_out) from None
    if not isinstance(content, dict):
        raise unreadable(path, ValueError("it holds no object"), way_out)
    return content


def read_yaml(path: Path, way_out: str = "") -> Any:
    """What a YAML file holds, by the safe loader; raises ResgridError if it cannot be read."""
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise unreadable(path, error, way_out) from None


def read_meta(pipeline: Path) -> dict[str, Any] | None:
    """The meta.json of a pipeline's processed data, unchecked; None where there are none.

    Raises ResgridError where it is there and cannot be read.
    """
    path = pipeline / "data/processed/meta.json"
    return read_json(path) if path.exists() else None


def read_history(path: Path) -> list[dict[str, float]]:
    """The epochs of a history.csv, without what was not scored; raises ResgridError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise unreadable(path, error, RESTORED) from None


def write_whole(path: Path, *content: bytes, synced: bool = False) -> None:
    """Replace `path` by the parts of `content`, one after the other; its folder is made if need be.

    Who reads meanwhile sees the former file. `synced`: it is whole also if the power is cut. Its mode is the
    umask's. Raises OSError, which names `path`.
    """
    # A name of this thread's own, on this machine: several write into one folder, which machines may share.
    part = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.writelines(content)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        error.filename, error.filename2 = str(path), None
        raise
    if synced:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # of the renaming
        finally:
            os.close(folder)
