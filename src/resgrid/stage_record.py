"""How the command of a stage began and ended: a JSON file for each in `.resgrid/state/<pipeline>/`.

`dvc` ends with the same status whatever went wrong. So each stage's command leaves this itself, whoever runs
it; Prefect's flows and `resgrid status` read it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from resgrid import watch
from resgrid.errors import ConnectionLost, OutOfMemory, ResgridError
from resgrid.project import write_whole
from resgrid.provenance import experiment

RECORD_ONLY = "RESGRID_RECORD_ONLY"  # a stage's command refuses to run: DVC is only to record a result
SLOT = "RESGRID_SLOT"  # the share of the machine that the command was given, for people to read

Fault = Literal["memory", "connection", "card"]  # those that can pass by themselves


@dataclass(frozen=True)
class Record:
    """The latest run of a stage's command."""

    stage: str
    by: str  # the process, by `watch.describe`
    started: float  # seconds since the epoch
    ended: float | None = None
    status: Literal["running", "good", "fault", "stopped"] = "running"
    fault: Fault | None = None
    why: str = ""  # for the person who has to put it right
    slot: str = ""

    @property
    def is_running(self) -> bool:
        return self.status == "running" and watch.alive(self.by)

    @property
    def seconds(self) -> float | None:
        """How long it took, if it came to a good end."""
        return self.ended - self.started if self.ended and self.status == "good" else None


def state_file(root: Path, pipeline: Path, name: str) -> Path:
    """Where the record of a stage lies, or another state of the pipeline in a project."""
    return root / ".resgrid/state" / pipeline.relative_to(root) / f"{name}.json"


def read_record(root: Path, pipeline: Path, stage: str) -> Record | None:
    found = read_state(state_file(root, pipeline, stage))
    with suppress(TypeError):  # of an earlier version
        return Record(**found)
    return None


@contextmanager
def recorded() -> Iterator[None]:
    """Leave a record of what is done within, if DVC runs it as a stage of the project itself."""
    root, stage = os.environ.get("DVC_ROOT"), os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    if not root or not stage or experiment():
        yield
        return
    file = state_file(Path(root).resolve(), Path.cwd().resolve(), stage)
    begun = Record(stage, watch.describe(os.getpid()), time.time(), slot=os.environ.get(SLOT, ""))
    with suppress(OSError):  # a disk that is full or cannot be written, which is told elsewhere
        write_state(file, asdict(begun))
    end = replace(begun, status="good")
    try:
        yield
    except Exception as error:
        why = str(error) if isinstance(error, ResgridError) else f"{type(error).__name__}: {error}"
        end = replace(begun, status="fault", fault=_fault(error), why=why)
        raise
    except BaseException:  # told to end
        end = replace(begun, status="stopped")
        raise
    finally:
        with suppress(OSError):
            write_state(file, asdict(replace(end, ended=time.time())))


def _fault(error: Exception) -> Fault | None:
    if isinstance(error, MemoryError | OutOfMemory):
        return "memory"
    if type(error).__name__ == "AcceleratorError":  # torch's: of a client of a shared card, or its neighbour
        return "card"
    return "connection" if isinstance(error, ConnectionError | ConnectionLost | TimeoutError) else None


def write_state(path: Path, content: Mapping[str, object]) -> None:
    """Replace a JSON file at once, so that nobody reads half of it."""
    write_whole(path, json.dumps(content, indent=1).encode())


def read_state(path: Path) -> Any:
    """What `write_state` wrote; None if there is nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
