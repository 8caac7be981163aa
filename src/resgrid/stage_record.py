"""What became of the latest attempt at each stage: a JSON file in `.resgrid/state/<pipeline>/`.

`dvc` ends with the same status whatever went wrong. So each stage's command, and nobody else, writes here how
it began and how it ended, whoever runs it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from resgrid import watch
from resgrid.errors import ConnectionLost, OutOfMemory, ResgridError
from resgrid.project import project_root, write_whole
from resgrid.provenance import experiment

RECORD_ONLY = "RESGRID_RECORD_ONLY"  # a stage's command refuses to run: DVC is only to record a result


class State(StrEnum):
    """What an attempt at a stage does. Records have all but `queued`, which train-all's file has."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # by a signal: it goes on where it was


class Fault(StrEnum):
    """Why an attempt failed, where that decides what is done next."""

    MEMORY = "memory"  # too little beside others, perhaps: tried once more alone
    CONNECTION = "connection"
    CARD = "card"
    DVC = "dvc"  # in DVC's own way, not in the command's
    NO_RESULT = "no result"  # RECORD_ONLY was set, and DVC had none to record

    @property
    def transient(self) -> bool:
        """Whether the same attempt may do better a little later."""
        return self in (Fault.CONNECTION, Fault.CARD, Fault.DVC)


class NoResult(ResgridError):
    """A stage's command was about to run where DVC was only to record a result."""


# The words of earlier versions, whose records may still lie here.
_FORMER = {"good": State.DONE, "fault": State.FAILED, "stopped": State.INTERRUPTED}


@dataclass(frozen=True)
class Record:
    """The latest attempt at a stage."""

    stage: str
    by: str  # the process, by `watch.describe`
    started: float  # seconds since the epoch
    ended: float | None = None
    status: State = State.RUNNING
    fault: Fault | None = None
    why: str = ""  # for the person who has to put it right
    last_seconds: float | None = None  # that the latest attempt before this one took which was done

    @property
    def is_running(self) -> bool:
        return self.status == State.RUNNING and watch.alive(self.by)

    @property
    def state(self) -> State:
        """Its status; `interrupted` where its process is gone and has left no other word."""
        return State.INTERRUPTED if self.status == State.RUNNING and not self.is_running else self.status

    @property
    def seconds(self) -> float | None:
        """How long the latest attempt took that was done: this one, or one before it."""
        return self.ended - self.started if self.ended and self.status == State.DONE else self.last_seconds


def state_file(root: Path, pipeline: Path, name: str) -> Path:
    """Where the record of a stage lies, or another state of the pipeline in a project."""
    return root / ".resgrid/state" / pipeline.relative_to(root) / f"{name}.json"


def read_record(root: Path, pipeline: Path, stage: str) -> Record | None:
    """The latest attempt at a stage; None if there was none, or the file is none of ours."""
    content = read_state(state_file(root, pipeline, stage))
    try:
        status = State(_FORMER.get(content["status"], content["status"]))
        fault = Fault(content["fault"]) if content["fault"] else None
        known = {name: value for name, value in content.items() if name in Record.__dataclass_fields__}
        return Record(**known | {"status": status, "fault": fault})
    except (TypeError, KeyError, ValueError):
        return None


def read_records(root: Path, pipeline: Path) -> list[Record]:
    """The latest attempt at each stage of a pipeline that has one."""
    stages = sorted(path.stem for path in state_file(root, pipeline, "").parent.glob("*.json"))
    return [record for stage in stages if (record := read_record(root, pipeline, stage))]


@contextmanager
def recorded(by_hand: str = "") -> Iterator[None]:
    """Leave a record of what is done within, if DVC runs it as a stage of the project itself.

    `by_hand`: the stage that it is without DVC.
    """
    root, stage = os.environ.get("DVC_ROOT"), os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    if by_hand and not stage:
        root, stage = str(project_root()), by_hand
    elif by_hand or not root or not stage or experiment():  # the whole command is recorded, or nothing
        yield
        return
    project, pipeline = Path(root).resolve(), Path.cwd().resolve()
    file, before = state_file(project, pipeline, stage), read_record(project, pipeline, stage)
    begun = Record(
        stage,
        watch.describe(os.getpid()),
        time.time(),
        last_seconds=before.seconds if before else None,
    )
    with suppress(OSError):  # a disk that is full or cannot be written, which others report
        write_state(file, asdict(begun))
    end = replace(begun, status=State.DONE)
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, ResgridError) else f"{type(error).__name__}: {error}"
        end = replace(begun, status=State.FAILED, fault=_fault(error), why=why)
        raise
    except BaseException:  # a signal
        end = replace(begun, status=State.INTERRUPTED)
        raise
    finally:
        with suppress(OSError):
            write_state(file, asdict(replace(end, ended=time.time())))


def _fault(error: Exception) -> Fault | None:
    if isinstance(error, NoResult):
        return Fault.NO_RESULT
    if isinstance(error, MemoryError | OutOfMemory):
        return Fault.MEMORY
    if type(error).__name__ == "AcceleratorError":  # torch's: of a client of a shared card, or its neighbour
        return Fault.CARD
    return Fault.CONNECTION if isinstance(error, ConnectionError | ConnectionLost | TimeoutError) else None


def write_state(path: Path, content: Mapping[str, object]) -> None:
    """Replace a JSON file at once, so that nobody reads half of it."""
    write_whole(path, json.dumps(content, indent=1).encode())


def read_state(path: Path) -> Any:
    """What `write_state` wrote; None if there is nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
