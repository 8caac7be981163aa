"""Data and results on their way between machines: the DVC remote and its run cache."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from resgrid.dvc.pipeline import DVC_COMMAND, Pipeline, dvc
from resgrid.dvc.process import StageFailed, reproduce, run
from resgrid.errors import ResgridError
from resgrid.stage_record import RECORD_ONLY, Fault


def name(pipeline: Pipeline) -> str:
    """DVC's default remote; raises ResgridError if there is none that could do."""
    config = dict(line.split("=", 1) for line in dvc(pipeline.root, "config", "--list").splitlines())
    remote = config.get("core.remote")
    if remote is None:
        raise ResgridError(
            f"{pipeline.root}: DVC has no default remote, by which data and results travel between machines. "
            "`dvc remote add --default NAME URL` adds one; commit .dvc/config, and see docs/cluster.md."
        )
    if config.get(f"remote.{remote}.url", "").startswith("http"):
        raise ResgridError(
            f"{pipeline.root}: the DVC remote {remote!r} is an HTTP server, which holds no run cache. Take a "
            "bucket, SSH, or a folder that all machines see."
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


def record(
    pipeline: Pipeline, stages: Sequence[str], env: Mapping[str, str], stop: threading.Event
) -> Fault | None:
    """Record the results of `stages` from the remote; return None, or the fault if one of them is not here.

    NO_RESULT means that the remote has none of the first stage, or is away (see `answers`). No command of a
    stage runs, so nothing is trained. Raises Stopped after `stop`.
    """
    first, *others = stages
    try:
        reproduce(pipeline, first, {**env, RECORD_ONLY: "1"}, pull=True, stop=stop, others=others)
    except StageFailed as failure:
        return failure.fault or Fault.NO_RESULT
    return None


def answers(pipeline: Pipeline, stage: str) -> bool:
    """Whether the remote can be asked, as for the outputs of `stage`, which have been pushed."""
    try:
        dvc(pipeline.folder, "status", "--cloud", stage)
    except ResgridError:
        return False
    return True
