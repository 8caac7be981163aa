"""Cells trained where there is torch and little else, and their results taken in where the pipeline is.

On a cluster's node without a network, `train_list` trains a list of cells side by side within a time limit,
and packs what came of each. Here, `take_in` unpacks that, refuses what was not trained with today's params,
data and code, and lets DVC record the rest. A training that was cut off travels as its checkpoint.

Imports nothing that needs more than torch, NumPy, pydantic, ruamel.yaml, safetensors and Pillow.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from resgrid import mps, watch
from resgrid.config import Params
from resgrid.errors import ResgridError
from resgrid.grid import Cell, expand
from resgrid.leftovers import checkpoint_files, checkpoint_folder, delete
from resgrid.models import own_file
from resgrid.provenance import code_digest
from resgrid.run_status import FILES, METRICS, RUN, read_json, run_in, verify_weights

PART_BYTES = 16 * 2**20  # of a pack's parts: more is too much for some ways out of a cluster
TRIES = 3  # of a cell that died, or whose card failed: a neighbour's fault can take it along
GRACE_SECONDS = 20.0  # for a training to write its checkpoint when its time is over
REFRESH_SECONDS = 60.0  # between two looks at what runs

RUNS, LOGS = Path("runs"), Path(".resgrid/logs")
MEMBER = re.compile(rf"runs/[^/]+/({'|'.join(map(re.escape, (*FILES, METRICS)))})|checkpoints/[^/]+\.[01]")


# --- where there is torch ---------------------------------------------------------------------------


def train_list(cells: Sequence[Cell], root: Path, slots: int, seconds: float, pack: Path | None) -> list[str]:
    """Train `cells` of the current folder's pipeline, `slots` at once and in their order, for `seconds`.

    What is then still running is ended, and goes on from its checkpoint another time. With `pack`, what came
    of all of them is written to `<pack>.000` and so on whenever one ends. Returns the ids without a result.
    """
    began, told = time.monotonic(), time.monotonic()
    waiting, running = deque((cell, 1) for cell in cells), dict[subprocess.Popen[bytes], tuple[Cell, int]]()
    done: list[str] = []

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)

    on_card = (os.environ.get("RESGRID_DEVICE") or "auto").startswith(("auto", "cuda"))
    with mps.daemon() if slots > 1 and on_card else nullcontext(dict[str, str]()) as variables:
        try:
            while (waiting or running) and time.monotonic() - began < seconds:
                while waiting and len(running) < slots:
                    cell, number = waiting.popleft()
                    running[_start(cell, slots, variables)] = cell, number
                for process in [process for process in running if process.poll() is not None]:
                    cell, number = running.pop(process)
                    if process.returncode == 0:
                        done.append(cell.id)
                        say(f"{cell.id}: trained, test {_accuracy(cell)}")
                    elif number < TRIES and (process.returncode < 0 or "Error: CUDA error: " in _log(cell)):
                        waiting.append((cell, number + 1))
                        say(f"{cell.id}: ended with {process.returncode}, which can pass: it is tried again")
                    else:
                        say(f"{cell.id}: failed: {_last_line(cell)}")
                    if pack:
                        write_pack(pack, cells, root)
                if time.monotonic() - told > REFRESH_SECONDS:
                    told = time.monotonic()
                    for cell, _ in running.values():
                        say(_last_line(cell))
                time.sleep(0.1)
        finally:
            _end(running)
            for cell, _ in running.values():
                say(f"{cell.id}: cut off; the same command goes on from its last checkpoint")
            if pack:
                write_pack(pack, cells, root)
    return [cell.id for cell in cells if cell.id not in done]


def _start(cell: Cell, slots: int, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"RESGRID_THREADS": str(max(1, cores // slots)), "RESGRID_SHARING": str(slots)}
    environment |= os.environ | variables
    environment[watch.VARIABLE] = watch.describe(os.getpid())  # it ends with this process
    flags = ["-S"] if sys.flags.no_site else []  # as this process was started
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{cell.stage}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *flags, "-m", "resgrid", "train", cell.id],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
        )  # fmt: skip


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Let trainings write their checkpoints and end."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _log(cell: Cell) -> str:
    return (LOGS / f"{cell.stage}.log").read_text(encoding="utf-8", errors="replace")


def _last_line(cell: Cell) -> str:
    return (_log(cell).strip().splitlines() or [f"{cell.id}: nothing said yet"])[-1]


def _accuracy(cell: Cell) -> str:
    return f"{100 * read_json(RUNS / cell.id / RUN)['test_accuracy']:.2f} %"


# --- the pack ---------------------------------------------------------------------------------------


def write_pack(pack: Path, cells: Iterable[Cell], root: Path) -> list[Path]:
    """Results and checkpoints of `cells` as the parts of one tar file: `<pack>.000`, `<pack>.001` and so on.

    A cell without a result has its latest checkpoint in it. Earlier parts of that name are replaced.
    """
    kept = checkpoint_folder(root, Path.cwd().resolve())
    writer = _Parts(pack)
    with tarfile.open(fileobj=writer, mode="w|") as tar:  # type: ignore[call-overload]
        for cell in cells:
            if all((RUNS / cell.id / name).is_file() for name in (*FILES, METRICS)):
                for name in (*FILES, METRICS):
                    _add(tar, RUNS / cell.id / name, f"runs/{cell.id}/{name}")
            elif saved := [path for path in checkpoint_files(kept, cell.id) if path.suffix in (".0", ".1")]:
                latest = max(saved, key=lambda path: path.stat().st_mtime)
                _add(tar, latest, f"checkpoints/{latest.name}")
    return writer.finish()


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    with path.open("rb") as file:  # the very file, though a training may put another in its place meanwhile
        tar.addfile(tar.gettarinfo(arcname=name, fileobj=file), file)


class _Parts:
    """A stream written to files of at most PART_BYTES, which take their names when all are whole."""

    def __init__(self, pack: Path) -> None:
        self.pack, self.paths, self.room = pack, list[Path](), 0
        pack.parent.mkdir(parents=True, exist_ok=True)

    def write(self, content: bytes) -> int:
        rest = memoryview(content)
        while rest:
            if not self.room:
                self.paths.append(self.pack.with_name(f"{self.pack.name}.{len(self.paths):03}.part"))
                self.paths[-1].write_bytes(b"")
                self.room = PART_BYTES
            with self.paths[-1].open("ab") as file:
                file.write(rest[: self.room])
            taken = min(self.room, len(rest))
            self.room, rest = self.room - taken, rest[taken:]
        return len(content)

    def finish(self) -> list[Path]:
        whole = [path.replace(path.with_suffix("")) for path in self.paths]
        for number in range(len(whole), 1000):
            surplus = self.pack.with_name(f"{self.pack.name}.{number:03}")
            if not surplus.exists():
                break
            surplus.unlink()
        return whole


class _Joined(io.RawIOBase):
    """The parts of a pack as one stream."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files = [path.open("rb") for path in paths]
        self.waiting = deque(self.files)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.waiting:
            if count := self.waiting[0].readinto(buffer):
                return count
            self.waiting.popleft()
        return 0

    def close(self) -> None:
        for file in self.files:
            file.close()
        super().close()


# --- where the pipeline is --------------------------------------------------------------------------


def take_in(
    parts: Sequence[Path], params: Params, data_digest: str, root: Path
) -> tuple[list[str], list[str]]:
    """Take the packs that consist of these `parts` into the current folder's pipeline.

    A result goes to runs/<cell> and is recorded in dvc.lock, unless it was trained with other params, data or
    code than today's; a checkpoint goes where `resgrid train` looks for it. Returns the ids of the cells that
    were taken, and a line for each that was refused. Raises ResgridError for packs that
    cannot be read, and where DVC cannot record.
    """
    cells = {cell.id: cell for cell in expand(params)}
    kept = checkpoint_folder(root, Path.cwd().resolve())
    taken: list[Cell] = []
    refused: list[str] = []
    (root / ".resgrid").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root / ".resgrid", prefix="take-in-") as name:
        aside = Path(name)
        _unpack(parts, aside)
        for folder in sorted((aside / "runs").glob("*")):
            cell = cells.get(folder.name)
            why = "params.yaml has no such cell" if cell is None else refusal(folder, cell, data_digest)
            if cell is None or why:
                refused.append(f"{folder.name}: {why}")
                continue
            delete([RUNS / cell.id])
            RUNS.mkdir(exist_ok=True)
            folder.replace(RUNS / cell.id)
            delete(checkpoint_files(kept, cell.id))  # of a start of the same cell here, which is now done
            taken.append(cell)
        for checkpoint in sorted((aside / "checkpoints").glob("*")):
            kept.mkdir(parents=True, exist_ok=True)
            checkpoint.replace(kept / checkpoint.name)
            print(
                f"{checkpoint.name.partition('.')[0]}: its checkpoint, from which the same training goes on"
            )
    if taken:
        _record(taken)
    return [cell.id for cell in taken], refused


def refusal(folder: Path, cell: Cell, data_digest: str) -> str | None:
    """Why the result in `folder` is none of `cell` as params.yaml, data and code are today."""
    if missing := [name for name in (*FILES, METRICS) if not (folder / name).is_file()]:
        return f"its {missing[0]} is missing: bring all parts of the pack"
    run = run_in(folder, cell, data_digest, code_digest(own=own_file(cell.architecture)))
    if run.record is None or not run.is_current:
        return run.reason
    try:
        verify_weights(folder, run.record, cell.stage)
    except ResgridError:
        return "its weights are damaged: bring the pack once more"
    return None


def _unpack(parts: Sequence[Path], folder: Path) -> None:
    """The files of a pack that it may hold, and no others, beneath `folder`."""
    packs: dict[str, list[Path]] = {}
    for path in sorted(parts):
        if not re.fullmatch(r"\.\d{3}", path.suffix) or not path.is_file():
            raise ResgridError(f"{path}: is no part of a pack; name its files, which end in .000 and so on.")
        packs.setdefault(path.stem, []).append(path)
    for name, paths in packs.items():
        try:
            with io.BufferedReader(_Joined(paths)) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is None or not MEMBER.fullmatch(member.name):
                        raise ResgridError(f"{name}: holds {member.name}, which no pack does.")
                    target = folder / member.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        shutil.copyfileobj(content, file)
        except tarfile.TarError as error:
            raise ResgridError(f"{name}: the pack is damaged or lacks a part ({error}).") from None


def _record(cells: Sequence[Cell]) -> None:
    from resgrid.dvc.pipeline import dvc  # here, for a machine with torch alone has no DVC

    try:
        dvc(Path.cwd(), "commit", "--force", *(cell.stage for cell in cells))
    except ResgridError as error:
        names = ", ".join(cell.id for cell in cells)
        raise ResgridError(
            f"{names}: the files are in runs/, but DVC does not record them. {error}"
        ) from None
