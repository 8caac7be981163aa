"""What DVC says of a pipeline: which stages are stale, their graph, where its cache is, what the remote has.

Data and results travel between machines by the DVC remote and its run cache.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resgrid.dvc.lock import clear_stale_rwlock, keep, lock_holders, read_lock
from resgrid.dvc.pipeline import DVC_COMMAND, Pipeline, dvc
from resgrid.dvc.process import StageFailed, reproduce, run
from resgrid.errors import ResgridError
from resgrid.project import denied
from resgrid.stage_record import RECORD_ONLY, Fault

GIT_HINT = ". Run `git init` there, or have DVC work without git by `dvc config --local core.no_scm true`."


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
    reason = reason.strip()[-2000:] + (GIT_HINT if "not a git repository" in reason else "")
    return ResgridError(f"{pipeline.folder / 'dvc.yaml'}: DVC cannot use it: {reason}")


def _dvc(pipeline: Pipeline, *arguments: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*DVC_COMMAND, *arguments], cwd=pipeline.folder, text=True, **pipes)


def cache_folder(root: Path) -> Path:
    """Where DVC keeps its files for the project in `root`: `dvc cache dir` may have put it elsewhere."""
    return root / dvc(root, "cache", "dir").strip().splitlines()[-1]


# --- the remote -------------------------------------------------------------------------------------


def remote_name(pipeline: Pipeline) -> str:
    """DVC's default remote; raises ResgridError if there is none."""
    config = dict(line.split("=", 1) for line in dvc(pipeline.root, "config", "--list").splitlines())
    remote = config.get("core.remote")
    if remote is None:
        raise ResgridError(
            f"{pipeline.root}: DVC has no default remote, by which data and results travel between machines. "
            "`dvc remote add --default NAME URL` adds one; commit .dvc/config, and see docs/cluster.md."
        )
    return remote


def push(pipeline: Pipeline, what: Sequence[str], stop: threading.Event, log: str = "push") -> None:
    """`dvc push` with the arguments `what`; raises a transient StageFailed if the remote does not take it.

    With `--run-cache` DVC pushes all entries, and exits with 0 although some were not taken: only its log,
    which is called `log`, says so.
    """
    file = pipeline.log(log)
    code, tail = run([*DVC_COMMAND, "push", *what], pipeline.folder, {}, file, stop)
    if code or any(line.startswith("ERROR: ") for line in tail):
        raise StageFailed("push", "the DVC remote does not take it", tail, file, Fault.CONNECTION)


def record(pipeline: Pipeline, stages: Sequence[str], stop: threading.Event) -> Fault | None:
    """Record the results of `stages` from the remote; return None, or the fault if one of them is not here.

    NO_RESULT means that the remote has none of the first stage, or is away (see `remote_answers`). No command
    of a stage runs, so nothing is trained. Raises Stopped after `stop`.
    """
    first, *others = stages
    try:
        reproduce(pipeline, first, {RECORD_ONLY: "1"}, pull=True, stop=stop, others=others)
    except StageFailed as failure:
        return failure.fault or Fault.NO_RESULT
    return None


def remote_answers(pipeline: Pipeline, stage: str) -> bool:
    """Whether the remote can be asked, as for the outputs of `stage`, which have been pushed."""
    try:
        dvc(pipeline.folder, "status", "--cloud", stage)
    except ResgridError:
        return False
    return True
