"""Cells trained where there is torch and little else, and results that are brought from there.

What `train_side_by_side` leaves on a node without a network is brought home by any copy (`rsync`, `tar`);
`take_in` takes from it what was trained with today's params, data and code, and DVC records it. A training
that was interrupted travels as its checkpoint.

Imports nothing that needs more than torch, NumPy, pydantic, ruamel.yaml, safetensors and Pillow.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from resgrid import mps, watch
from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.gc import checkpoint_files, checkpoint_folder, checkpoint_head, delete
from resgrid.grid import Cell, expand
from resgrid.models import own_file
from resgrid.project import num_cores, read_json
from resgrid.provenance import code_digest
from resgrid.run_status import FILES, METRICS, RUN, run_in, verify_weights
from resgrid.stage_record import Record, State, read_record

TRIES = 3  # of a cell that died, or whose card failed: a neighbour's fault can take it along
GRACE_SECONDS = 20.0  # for a training to write its checkpoint when its time is over
RUNS, LOGS = Path("runs"), Path(".resgrid/logs")

log = logging.getLogger(__name__)


# --- where there is torch ---------------------------------------------------------------------------


def train_side_by_side(
    cells: Sequence[Cell], root: Path, slots: int, seconds: float, options: Sequence[str] = ()
) -> list[str]:
    """Train `cells` of the current folder's pipeline, `slots` at once and in their order, for `seconds`.

    What still runs then is ended, and goes on from its checkpoint another time. `options` are those of
    `resgrid train`. Returns the ids of the cells without a result.
    """
    began = time.monotonic()
    waiting, running = deque((cell, 1) for cell in cells), dict[subprocess.Popen[bytes], tuple[Cell, int]]()
    done: list[str] = []

    def report(cell: Cell, what: str) -> None:
        log.info("%6.0f s  %s: %s", time.monotonic() - began, cell.id, what)

    on_card = (os.environ.get("RESGRID_DEVICE") or "auto").startswith(("auto", "cuda"))
    with mps.daemon() if slots > 1 and on_card else nullcontext(dict[str, str]()) as variables:
        try:
            while (waiting or running) and time.monotonic() - began < seconds:
                while waiting and len(running) < slots:
                    cell, tries = waiting.popleft()
                    running[_start(cell, root, slots, variables, options)] = cell, tries
                for process in [process for process in running if process.poll() is not None]:
                    cell, tries = running.pop(process)
                    record = read_record(root, Path.cwd().resolve(), cell.stage)
                    if process.returncode == 0:
                        done.append(cell.id)
                        accuracy = read_json(RUNS / cell.id / RUN)["test_accuracy"]
                        report(cell, f"trained, test {100 * accuracy:.2f} %")
                    elif tries < TRIES and _is_transient(record):
                        waiting.append((cell, tries + 1))
                        report(cell, f"ended with {process.returncode}, which may pass: it is tried again")
                    else:
                        why = record.why if record and record.why else f"status {process.returncode}"
                        report(cell, f"failed: {why} ({LOGS / cell.stage}.log)")
                time.sleep(0.1)
        finally:
            for process in running:
                process.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
            for process, (cell, _) in running.items():
                watch.end_group(process, max(0.0, deadline - time.monotonic()))
                report(cell, "interrupted; the same command goes on from its last checkpoint")
    return [cell.id for cell in cells if cell.id not in done]


def _is_transient(record: Record | None) -> bool:
    """Whether a training may do better when it is tried again: killed, or by its fault's kind."""
    if record is None or record.status == State.RUNNING:  # its process is gone, and has left no other word
        return True
    return bool(record.fault and record.fault.transient)


def _start(
    cell: Cell, root: Path, slots: int, variables: Mapping[str, str], options: Sequence[str]
) -> subprocess.Popen[bytes]:
    environment = {"RESGRID_THREADS": str(max(1, num_cores() // slots)), "RESGRID_SHARING": str(slots)}
    environment |= os.environ | variables
    environment |= {
        watch.VARIABLE: watch.describe(os.getpid()),  # it ends with this process
        "DVC_ROOT": str(root),  # these two as DVC sets them, so that the training leaves the stage's record
        "DVC_STAGE": cell.stage,
    }
    flags = ["-S"] if sys.flags.no_site else []  # as this process was started
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{cell.stage}.log").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *flags, "-m", "resgrid", "train", cell.id, *options],
            env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0,
        )  # fmt: skip


# --- where the pipeline is --------------------------------------------------------------------------


def take_in(folder: Path, params: Params, data_digest: str, root: Path) -> tuple[list[Cell], list[str]]:
    """Take results and checkpoints from `folder`, a copied project or its runs/, into the current pipeline.

    A result goes to runs/<cell>, unless it was trained with other params, data or code than today's; DVC is
    to record it. The checkpoint of a cell without a result goes where `resgrid train` looks for it. Returns
    the cells that were taken, and a line for each that was refused. Raises ResgridError for a folder without
    runs.
    """
    cells = {cell.id: cell for cell in expand(params)}
    here = Path.cwd().resolve()
    inside = here.relative_to(root)
    # In the copy, as here: of the whole project, or of the pipeline's folder alone; there without a .dvc.
    runs = next((each for each in (folder / inside / RUNS, folder / RUNS) if each.is_dir()), folder)
    usual = ".resgrid/checkpoints"
    places = (folder / usual / inside, folder / inside / usual, folder / usual)
    checkpoints = next((place for place in places if place.is_dir()), folder / usual)
    results = sorted(path.parent for path in runs.glob(f"*/{RUN}"))
    if not results and not checkpoints.is_dir():
        raise ResgridError(f"{folder}: holds no results: name a copied project's folder, or its runs/.")
    taken, refused = [], list[str]()
    (root / ".resgrid").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / ".resgrid", prefix="take-in-") as aside:
        for source in results:
            cell = cells.get(source.name)
            why = "params.yaml has no such cell" if cell is None else refusal(source, cell, data_digest)
            if cell is None or why:
                refused.append(f"{source.name}: {why}")
                continue
            copy = Path(aside, cell.id)  # first, so that a run folder is never half of each
            copy.mkdir()
            for name in (*FILES, METRICS):
                shutil.copy2(source / name, copy / name)
            delete([RUNS / cell.id])
            RUNS.mkdir(exist_ok=True)
            copy.replace(RUNS / cell.id)
            delete(checkpoint_files(checkpoint_folder(root, here), cell.id))  # of an earlier start here
            taken.append(cell)
    waiting = sorted(set(cells) - {source.name for source in results})
    for cell_id in take_checkpoints(checkpoints, checkpoint_folder(root, here), waiting):
        log.info("%s: its checkpoint, from which the same training goes on", cell_id)
    return taken, refused


def refusal(folder: Path, cell: Cell, data_digest: str) -> str | None:
    """Why the result in `folder` is none of `cell` as params.yaml, data and code are today."""
    if missing := [name for name in (*FILES, METRICS) if not (folder / name).is_file()]:
        return f"its {missing[0]} is missing: copy the folder once more"
    run = run_in(folder, cell, data_digest, code_digest(own=own_file(cell.architecture)))
    if run.record is None or not run.is_current:
        return run.reason
    try:
        verify_weights(folder, run.record, cell.stage)
    except ResgridError:
        return "its weights are damaged: copy the folder once more"
    return None


def take_checkpoints(source: Path, target: Path, cells: Iterable[str]) -> list[str]:
    """Copy the checkpoints of `cells` from one folder to another, but not over one that is further.

    Returns the ids of the cells of which there were any.
    """
    taken = []
    for cell_id in cells:
        for path in checkpoint_files(source, cell_id):
            if _num_epochs(path) > _num_epochs(target / path.name):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target / path.name)
                taken.append(cell_id)
    return list(dict.fromkeys(taken))


def _num_epochs(checkpoint: Path) -> int:
    return len(checkpoint_head(checkpoint).get("epochs", ()))
