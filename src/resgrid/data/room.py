"""Enough disk and memory, as far as it can be known before the work starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from resgrid.errors import ResgridError
from resgrid.progress import amount
from resgrid.project import available_memory


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
