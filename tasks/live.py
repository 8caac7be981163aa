"""`resgrid status --watch`: the running grid and its curves in the terminal, anew every two seconds."""

from __future__ import annotations

import csv
import math
import shutil
import sys
import time
from pathlib import Path

from resgrid.dvc.pipeline import Pipeline
from tasks.publish import Status, results, status

REFRESH_SECONDS = 2.0
BETWEEN_SECONDS = 10.0  # at most, that `dvc repro` takes from one stage to the next
COLOURS = ("cyan", "orange", "green", "magenta", "red", "blue")  # of more curves, nobody tells which is which
PLOT_LINES = 16


def watch(pipeline: Pipeline) -> None:
    """Until what runs has ended, or Ctrl-C. Before anything runs, a terminal waits; others are told once."""
    from rich.live import Live
    from rich.text import Text

    last = None if sys.stdout.isatty() else -math.inf  # when something ran
    with Live(auto_refresh=False) as screen:
        try:
            while True:
                now = status(pipeline)
                text = f"{now}\n{results(pipeline, now)[1]}\n"
                if now.alive or now.running:
                    last = time.monotonic()
                    text += f"\n{curves(pipeline, now)}"
                elif last is None:
                    text += "\nWaiting for something to run; Ctrl-C ends this."
                screen.update(Text.from_ansi(text), refresh=True)
                if last and time.monotonic() - last > BETWEEN_SECONDS:
                    return
                time.sleep(REFRESH_SECONDS)
        except KeyboardInterrupt:
            return


def curves(pipeline: Pipeline, now: Status) -> str:
    """Test accuracy, or where epochs are not scored training loss, of the cells that run, as text.

    They come from `runs/<cell>/history.csv`, which training writes after each epoch. Of a grid whose cells
    train in a work pool there are none here.
    """
    import plotext

    cells = [record.stage.partition("@")[2] for record, _ in now.running if "@" in record.stage][
        : len(COLOURS)
    ]
    histories = {cell: _history(pipeline.folder / "runs" / cell / "history.csv") for cell in cells}
    histories = {cell: rows for cell, rows in histories.items() if rows}
    if not histories:
        return "Curves appear after the first epoch of a cell that runs here."
    scored = all(row["test_accuracy"] for rows in histories.values() for row in rows)
    column, title = ("test_accuracy", "test accuracy, %") if scored else ("train_loss", "training loss")
    columns = min(100, shutil.get_terminal_size().columns)
    figure = plotext.figure.clear().theme("colorless").plot_size(columns, PLOT_LINES).title(title)
    drawn = []
    for (cell, rows), colour in zip(histories.items(), COLOURS, strict=False):
        values = [float(row[column]) * (100 if scored else 1) for row in rows]
        marker = plotext.marker("braille", colour)
        figure.draw(figure.signal(range(1, len(rows) + 1), values, marker=marker).lines().label(cell))
        drawn += values
    last = max(map(len, histories.values()))
    figure.ruler("x").ticks(sorted({round(1 + part * (last - 1) / 6) for part in range(7)}))
    corner = (min(drawn), "bottom") if scored else (max(drawn), "top")  # where curves rise or fall away from
    figure.legend(x=last, y=corner[0], ha="right", va=corner[1], relative=True)
    text: str = figure.build().string()
    return text


def _history(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    except FileNotFoundError:
        return []
