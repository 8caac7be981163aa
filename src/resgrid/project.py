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
    if nearest(here, ".git") is None:
        return GitState()
    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--"]
    all_but_lock = [":(top)", ":(top,exclude,glob)**/dvc.lock"]
    try:
        done = subprocess.run(
            [*command, *all_but_lock], cwd=here, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return GitState()
    if done.returncode:
        return GitState(problem=done.stderr.strip())
    commit = re.findall("^# branch.oid ([0-9a-f]+)$", done.stdout, re.MULTILINE)  # or `(initial)`
    return GitState(commit[0], bool(re.search("^[^#]", done.stdout, re.MULTILINE))) if commit else GitState()


# --- the machine ------------------------------------------------------------------------------------


def num_cores() -> int:
    """Cores that this process may use: physical ones of its affinity, within a container's limit of CPU time.

    Threads beyond any of the three only wait for one another.
    """
    allowed = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS, whose processors have one thread a core
        siblings = set()  # hardware threads that share a core count once
        for number in os.sched_getaffinity(0):
            file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
            siblings.add(file.read_text() if file.exists() else str(number))
        allowed = len(siblings)
    for group in _cgroups("cpu"):
        version_1 = (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
        quota = _figures(group / "cpu.max") or _figures(*version_1)  # microseconds of each period
        if quota and quota[0] > 0:
            allowed = min(allowed, quota[0] // quota[1])
    return max(1, allowed)


def free_cores() -> int:
    """How many of `num_cores` nothing computes on just now, at least 1; takes half a second.

    By the quietest of three looks, for a program that computes is in all of them. The load average would
    count the training that has just ended here as well. Where /proc does not say, all of them.
    """
    cores, idle = num_cores(), 0.0
    try:
        mine = os.sched_getaffinity(0)
        for _ in range(3):
            before, began = _idle_ticks(mine), time.monotonic()
            time.sleep(0.15)
            ticks = (_idle_ticks(mine) - before) / (time.monotonic() - began)  # a second
            idle = max(idle, ticks / os.sysconf("SC_CLK_TCK") / len(mine))
    except (OSError, AttributeError):  # no Linux
        return cores
    return max(1, min(cores, round(idle * cores)))


def _idle_ticks(cpus: set[int]) -> int:
    """How long these CPUs have had nothing to do since the machine began, all together."""
    lines = re.findall(r"^cpu(\d+) (.+)$", (PROC / "stat").read_text(), re.MULTILINE)
    fields = [line.split() for number, line in lines if int(number) in cpus]
    return sum(int(each[3]) + int(each[4]) for each in fields)  # idle, and waiting for a disk


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
    for group in _cgroups("memory"):
        version_1 = (group / "memory.limit_in_bytes", group / "memory.usage_in_bytes")
        if limit := _figures(group / "memory.max", group / "memory.current") or _figures(*version_1):
            # Pages of files that nobody uses count as taken, and go when memory is asked for.
            stat = (group / "memory.stat").read_text()  # in version 1 its own, then with all below it
            *_, pages = re.findall(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
            free = min(free, max(0, limit[0] - limit[1] + int(pages)))
    return free


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders with this process's limits: its own cgroup's and those of all above it, as any may bind.

    A container sees its own as the root, also where /proc names it by the path that it has outside.
    """
    if not (PROC / "self/cgroup").exists():  # no Linux
        return
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)  # version 2 names none
        if controllers and controller not in controllers.split(","):
            continue
        places = (CGROUP / controllers, CGROUP / controller)  # `cpu,cpuacct` may be there by one name alone
        place = next((each for each in places if each.is_dir()), CGROUP)
        own = place / path.strip("/")
        yield from (each for each in (own, *own.parents) if each.is_relative_to(place))


def _figures(*files: Path) -> list[int]:
    """The numbers in these files; none where one is missing, or says `max`: no limit."""
    try:
        return [int(word) for file in files for word in file.read_text().split()]
    except (OSError, ValueError):
        return []


# --- files ------------------------------------------------------------------------------------------


def unreadable(path: Path, error: Exception, way_out: str) -> ResgridError:
    """The error for a file that is there and cannot be read, or is not what it should be."""
    if isinstance(error, PermissionError):
        way_out = "It belongs to another user, or its mode is wrong."
    why = error.strerror if isinstance(error, OSError) else error
    return ResgridError(f"{path}: cannot be read ({why}). {way_out}".rstrip())


def denied(*places: Path) -> Path | None:
    """The first file in `places` that another user's hands keep from this one, as after `sudo dvc repro`.

    What is merely read-only and this user's own, as DVC's cache is, is not among them.
    """
    for path in (path for place in places for path in (place, *sorted(place.rglob("*")))):
        if path.exists():
            needed = os.R_OK if path.stat().st_uid == os.geteuid() else os.R_OK | os.W_OK
            if not os.access(path, needed):
                return path
    return None


def read_json(path: Path, way_out: str = RESTORED) -> dict[str, Any]:
    """The object in a JSON file; raises ResgridError, which ends with `way_out`, if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise unreadable(path, error, way_out) from None
    return content


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, by the safe loader; raises ResgridError if it cannot be read."""
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise unreadable(path, error, "") from None


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
