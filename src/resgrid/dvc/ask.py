"""What DVC says of a pipeline: which stages are stale, their graph, and where its cache is."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resgrid.dvc.lock import clear_stale_rwlock, keep, lock_holders, read_lock
from resgrid.dvc.pipeline import DVC_COMMAND, Pipeline, dvc
from resgrid.errors import ResgridError
from resgrid.project import denied

ERROR_HINTS = {  # by what DVC says
    "not a git repository": ". A checkout that was downloaded has no .git: run `git init` there, or have DVC "
    "work without git by `dvc config --local core.no_scm true`.",
    "is git-ignored": " DVC keeps nothing in such a folder: take the rule out of .gitignore, or move it.",
    "dvc.lock' validation failed": ". Another version of DVC may have written it: `dvc --version` is "
    "this one's; `git checkout` brings back the last file that was committed.",
    "validation failed": ". `dvc stage list` in that folder shows the line.",
    "extra keys not allowed": ". Another version of DVC may have written it: `dvc --version` is this one's.",
}


class Busy(ResgridError):
    """A `dvc` runs a stage, and DVC answers nothing meanwhile."""


@dataclass(frozen=True)
class Answer:
    """What DVC says of a pipeline."""

    needs: dict[str, list[str]]  # by stage, in the order of dvc.yaml: those whose outputs it depends on
    status: dict[str, list[Any]]  # of the stages that it would run, as `dvc status --json` gives it


def ask(pipeline: Pipeline) -> Answer:
    """Ask DVC for the graph and for what is stale.

    Raises Busy while a `dvc` runs a stage, and ResgridError for files that DVC cannot use.
    """
    clear_stale_rwlock(pipeline)
    content = read_lock(lock := pipeline.folder / "dvc.lock")
    graph, status = _dvc(pipeline, "dag", "--dot"), _dvc(pipeline, "status", "--json", "dvc.yaml")
    (dot, why), (answer, error) = graph.communicate(), status.communicate()
    if graph.returncode:
        raise _unusable(pipeline, why)
    needs: dict[str, list[str]] = {}
    for line in dot.splitlines():
        match line.strip(";").replace('"', "").split(" -> "):  # names with a colon are other pipelines'
            case [stage] if line.startswith('"') and ":" not in stage:
                needs[stage] = []
            case [earlier, stage] if stage in needs:
                needs[stage].append(earlier)
    if status.returncode:
        holders = [f"process {pid} ({command})" for pid, command in lock_holders(pipeline).items()]
        if not holders:
            raise _unusable(pipeline, error)
        raise Busy(f"{pipeline.folder}: DVC is busy with {', '.join(holders)}; see `resgrid status`.")
    if read_lock(lock) == content:  # nobody has written it
        keep(pipeline, content)
    return Answer(needs, {name.rpartition(":")[2]: each for name, each in json.loads(answer).items()})


def _unusable(pipeline: Pipeline, reason: str) -> ResgridError:
    places = (pipeline.folder / name for name in ("data", "runs", "dvc.lock"))
    if path := denied(pipeline.root / ".dvc/tmp", *places):
        return ResgridError(f"Permission denied: {path}. It belongs to another user, or its mode is wrong.")
    hint = next((way for words, way in ERROR_HINTS.items() if words in reason), "")
    return ResgridError(f"{pipeline.folder / 'dvc.yaml'}: DVC cannot use it: {reason.strip()[-2000:]}{hint}")


def _dvc(pipeline: Pipeline, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DVC_COMMAND, *arguments],
        cwd=pipeline.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cache_folder(root: Path) -> Path:
    """Where DVC keeps its files for the project in `root`: `dvc cache dir` may have put it elsewhere."""
    return root / dvc(root, "cache", "dir").strip().splitlines()[-1]
