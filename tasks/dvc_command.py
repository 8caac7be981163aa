"""`dvc`, with what many processes at once need changed: `python dvc_command.py repro …`.

DVC's Python interface is internal, so it is used here and in `stages.py`, and nowhere else.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from pathlib import Path
from typing import Any

import dvc.cli
import dvc.dvcfile
import dvc.lock
import dvc.rwlock
from dvc.stage.serialize import to_lockfile
from dvc.utils.serialize import dumps_yaml

HEAD = "schema: '2.0'\nstages:\n"  # of dvc.lock
_dump_stages = dvc.dvcfile.Lockfile.dump_stages  # DVC's own


def main() -> int:
    # DVC looks every 0.5 s whether the repository's lock is free, and among six cells one waited up to 5 s.
    dvc.lock.DEFAULT_TIMEOUT = 0.3  # six times as long as it sleeps between two looks
    # It gives up after 3 s where it waits for the lock of its rwlock file.
    dvc.rwlock.make_lock = functools.partial(dvc.lock.make_lock, wait=True)
    dvc.dvcfile.Lockfile.dump_stages = dump_stages
    # One parse of dvc.yaml and dvc.lock for all stages that the command names, and not one for each.
    dvc.dvcfile.load_file = functools.cache(dvc.dvcfile.load_file)
    if {"--pull", "--run-cache"} & set(sys.argv):
        from dvc.stage.cache import StageCache

        StageCache.transfer = transfer
    status: int = dvc.cli.main()
    return status


def dump_stages(lockfile: Any, stages: list[Any], **settings: Any) -> None:
    """Put what is known of these stages into dvc.lock, and touch only their lines there.

    DVC itself parses all of the file and writes it anew, in pure Python: 5 ms for each stage that it holds.
    What is written is the same, byte for byte. A file that is not as DVC leaves it is left to DVC.
    """
    path = Path(lockfile.path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rest = text.removeprefix(HEAD)
    if rest == text or re.search(r"^(?!  )", rest.rstrip("\n"), re.MULTILINE):
        _dump_stages(lockfile, stages, **settings)
        return
    blocks = {block.partition("\n")[0]: block for block in re.split(r"^(?=  \S)", rest, flags=re.MULTILINE)}
    for stage in stages:
        block = dumps_yaml({"schema": "2.0", "stages": to_lockfile(stage, **settings)}).removeprefix(HEAD)
        blocks[block.partition("\n")[0]] = block
    new = HEAD + "".join(blocks.values())
    if new == text:
        return
    print(f"Updating lock file '{lockfile.relpath}'", flush=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(new, encoding="utf-8", newline="\n")
    part.replace(path)
    lockfile.repo.scm_context.track_file(lockfile.relpath)


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
