"""Every stage of a pipeline as DVC sees it now, as JSON: `python stages.py FOLDER`.

This is `dvc status --json dvc.yaml`, asked stage by stage, because the command itself ends as busy while one
stage runs, and given the names of the others instead it reads dvc.yaml and dvc.lock again for each of them
(7 s at 240 stages, 40 s with all of them recorded). DVC's Python interface is internal, so it is used here
and nowhere else, in a process of its own; a test compares the answer with the command's.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage


def main(folder: str) -> int:
    try:
        with Repo(folder, _wait_for_lock=True) as repo, repo.lock:
            stages = repo.stage.load_all(str(Path(folder, "dvc.yaml")))
            written = _being_written(repo)
            print(json.dumps([_describe(stage, written) for stage in stages]))
    except DvcException as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _being_written(repo: Repo) -> dict[str, dict[str, Any]]:
    """The outputs of stages that run now, each with its process.

    Entries of processes that are gone are taken out, before another gets their id and seems to be at work:
    DVC does so only for those that are in its way. Under the repository's lock nobody else edits the file.
    """
    file = Path(repo.tmp_dir, "rwlock")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError:  # a dvc was killed while it wrote it; without it none starts again
        if others := _other_dvcs(Path(repo.root_dir)):
            raise DvcException(f"{file} is damaged; delete it when process {others} has ended") from None
        found = {}
        file.write_text("{}", encoding="utf-8")
    write = {path: by for path, by in found.get("write", {}).items() if psutil.pid_exists(by["pid"])}
    read = {
        path: alive
        for path, readers in found.get("read", {}).items()
        if (alive := [by for by in readers if psutil.pid_exists(by["pid"])])
    }
    kept = {mode: entries for mode, entries in (("write", write), ("read", read)) if entries}
    if kept != found:
        file.write_text(json.dumps(kept), encoding="utf-8")
    return write


def _other_dvcs(root: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            runs_dvc = any(Path(word).name == "dvc" for word in process.cmdline()[:3])
            if runs_dvc and Path(process.cwd()).is_relative_to(root):
                found.append(process.pid)
    return found


def _describe(stage: PipelineStage, written: dict[str, dict[str, Any]]) -> dict[str, Any]:
    deps = [dep.fs_path for dep in stage.deps]
    outs = [out.fs_path for out in stage.outs]
    running = next((written[path] for path in outs if path in written), None)
    busy = running is None and any(_overlap(dep, path) for dep in deps for path in written)
    status = [] if running or busy else stage.status(check_updates=False).get(stage.addressing, [])
    return {
        "name": stage.name,
        "deps": deps,
        "outs": outs,
        "recorded": any(out.hash_info for out in stage.outs),
        "bytes": sum(out.meta.size or 0 for out in stage.outs),
        "running": running,  # {pid, cmd}, by whichever door
        "busy": busy,  # what it depends on is being written
        "status": status,
        "params": _changed_params(stage) if status else [],
    }


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def _changed_params(stage: PipelineStage) -> list[tuple[str, Any, Any]]:
    """(key, value in dvc.lock, value in params.yaml) where they differ; of a stage that has run before."""
    changed = []
    for dep in stage.params:
        before = dep.hash_info.value if dep.hash_info else None
        if before is not None:
            now = dep.read_params()
            changed += [
                (key, before.get(key), now.get(key)) for key in dep.params if before.get(key) != now.get(key)
            ]
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
