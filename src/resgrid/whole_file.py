"""Files that are whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, *content: bytes, synced: bool = False) -> None:
    """Replace `path` by the parts of `content`, one after the other; its folder is made if need be.

    Who reads meanwhile sees the former file. `synced`: it is whole also if the power is cut.
    Raises OSError, which names `path`.
    """
    # A name of this thread's own, since several processes write the states of one grid.
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
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
