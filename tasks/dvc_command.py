"""`dvc`, with what many processes at once need changed: `python dvc_command.py repro …`.

DVC's Python interface is internal, so it is used here and in `stages.py`, and nowhere else.
"""

from __future__ import annotations

import functools
import gc
import sys
from typing import Any

import dvc.cli
import dvc.lock
import dvc.rwlock


def main() -> int:
    # DVC looks every 0.5 s whether the repository's lock is free, and among six cells one waited up to 5 s.
    dvc.lock.DEFAULT_TIMEOUT = 0.3  # six times as long as it sleeps between two looks
    # It gives up after 3 s where it waits for the lock of its rwlock file.
    dvc.rwlock.make_lock = functools.partial(dvc.lock.make_lock, wait=True)
    if {"--pull", "--run-cache"} & set(sys.argv):
        from dvc.stage.cache import StageCache

        StageCache.transfer = transfer
    status: int = dvc.cli.main()
    return status


def transfer(cache: Any, source: Any, target: Any, force: bool = True) -> list[tuple[str, str]]:
    """Copy the entries of the run cache that `target` lacks; DVC itself copies all of them each time.

    An entry is a file `runs/<2>/<key>/<value>`. Raises what the file systems raise, where DVC only logs it.
    """
    from dvc_objects.fs import generic

    def names(odb: Any) -> set[str]:
        top = odb.fs.join(odb.path, "runs")
        found = odb.fs.find(top) if odb.fs.exists(top) else []
        return {"/".join(odb.fs.parts(path)[-4:]) for path in found}

    new = sorted(names(source) - names(target))
    if new:
        paths = [[odb.fs.join(odb.path, *name.split("/")) for name in new] for odb in (source, target)]
        for folder in {target.fs.parent(path) for path in paths[1]}:
            target.fs.makedirs(folder, exist_ok=True)
        generic.copy(source.fs, paths[0], target.fs, paths[1])
    return [(key, value) for _, _, key, value in (name.split("/") for name in new)]


if __name__ == "__main__":
    gc.disable()  # it starts in 0.46 s rather than 0.50 s
    sys.exit(main())
