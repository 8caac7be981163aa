"""What `resgrid status` shows: a row a cell, from the files of records and results alone, and no server."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resgrid.cell_states import WORDS, CellState, GridRun, cell_states, read_grid_run
from resgrid.config import load_params
from resgrid.dvc.pipeline import Pipeline
from resgrid.grid import expand
from resgrid.progress import duration
from resgrid.stage_record import Record, State

REFRESH_SECONDS = 2.0
BETWEEN_SECONDS = 10.0  # at most, that `dvc repro` takes from one stage to the next


@dataclass(frozen=True)
class Status:
    """The cells of a pipeline, and what runs in it, by whichever hand."""

    grid: GridRun | None  # of train-all, at work or killed
    cells: list[CellState]
    running: list[tuple[Record, str]]  # stages at work on this machine, each with its log's last line

    def as_dict(self) -> dict[str, Any]:
        return {
            "train_all": asdict(self.grid) | {"alive": self.grid.is_alive} if self.grid else None,
            "cells": {
                each.cell.id: {"state": each.word, "reason": each.reason, "since": each.since}
                for each in self.cells
            },
            "running": [asdict(record) | {"last_line": line} for record, line in self.running],
        }

    def __str__(self) -> str:
        stages = {record.stage: (record.started, line) for record, line in self.running}
        rows: list[tuple[str, str, float | None, str]] = []
        for each in self.cells:
            _, line = stages.pop(each.cell.stage, (0.0, ""))
            slot = each.at_work.slot if each.at_work else ""
            rows.append((each.cell.id, each.word, each.since, line or slot or each.reason.partition("\n")[0]))
        rows += [(stage, State.RUNNING, *of_stage) for stage, of_stage in stages.items()]
        rows.sort(key=lambda row: (row[1] != State.RUNNING, row[1] != State.QUEUED))  # those at work first
        width, lines = max(len(row[0]) for row in rows), []
        for title, word, since, text in rows:
            lasts = f"for {duration(time.time() - since)}" if since else ""
            lines.append(f"  {title:{width}}  {word:11}  {lasts:14}  {text}".rstrip())
        num = Counter(each.word for each in self.cells)
        words = ", ".join(f"{num[word]} {word}" for word in WORDS if num[word])
        return "\n".join([*self._train_all(), f"{len(self.cells)} cells: {words}.", *lines])

    def _train_all(self) -> list[str]:
        if self.grid is None:
            return [] if self.running else ["Nothing runs now."]
        if not self.grid.is_alive:
            return ["The last train-all was killed. Run it again: what it had finished is kept."]
        since = duration(time.time() - self.grid.started)
        line = f"train-all has been running for {since}; {self.grid.time_left}."
        return [line, *([self.grid.url] if self.grid.url else [])]


def status(pipeline: Pipeline) -> Status:
    """The state of a pipeline now; raises ResgridError for a params.yaml that cannot be used."""
    cells = expand(load_params(pipeline.folder / "params.yaml"))
    running = [each for each in pipeline.records() if each.is_running]
    return Status(
        grid=read_grid_run(pipeline.root, pipeline.folder),
        cells=cell_states(cells, pipeline.folder, pipeline.root),
        running=[(each, _last_line(pipeline.log(each.stage))) for each in running],
    )


def watch(pipeline: Pipeline) -> None:
    """Show the state anew until what runs has ended, or Ctrl-C. A terminal waits for a beginning."""
    from rich.live import Live
    from rich.text import Text

    last = None if sys.stdout.isatty() else -math.inf  # when something ran
    with Live(auto_refresh=False) as screen, suppress(KeyboardInterrupt):
        while True:
            now = status(pipeline)
            lines = str(now).splitlines()[: screen.console.height - 1]
            screen.update(Text("\n".join(lines), overflow="ellipsis", no_wrap=True), refresh=True)
            if now.running or (now.grid and now.grid.is_alive):
                last = time.monotonic()
            if last is not None and time.monotonic() - last > BETWEEN_SECONDS:
                return
            time.sleep(REFRESH_SECONDS)


def _last_line(log: Path) -> str:
    """The last line of a log that is not blank, as far as its last 4 KiB have one."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        text = file.read().decode("utf-8", "replace").rstrip()
        return text.replace("\r", "\n").rpartition("\n")[2]
    return ""
