"""Enough disk and memory, as far as it can be known before the work starts."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from resgrid.errors import ResgridError
from resgrid.progress import amount


def require_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Raises ResgridError if the disk of `folder`, which exists, has no room for `num_bytes` of `what`."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ResgridError(
            f"{folder}: {what} needs {amount(num_bytes, 'B')} of disk, and {amount(free, 'B')} is free. "
            "Make room, or use another disk."
        )


def require_memory(num_bytes: int, what: str) -> None:
    """Raises ResgridError if this machine cannot give `num_bytes` of memory to `what`."""
    free = available_memory()
    if free is not None and num_bytes > free:
        raise ResgridError(
            f"{what} needs {amount(num_bytes, 'B')} of memory, and {amount(free, 'B')} is free. "
            "Take fewer images, or a machine with more memory."
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping: on Linux as the kernel estimates it, elsewhere all there is."""
    try:
        estimate = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        estimate = None
    if estimate:
        return int(estimate[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such figure on this system
        return None
