"""What a command shows while it works: progress with remaining time, and its log messages as plain lines.

rich draws the bar; where it is not installed (a machine with torch and little else) there are plain lines.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from types import TracebackType
from typing import Any, ClassVar, Self

SECONDS_BETWEEN_LINES = 15.0  # in a log, within one long task

log = logging.getLogger(__name__)


class _Messages(logging.Handler):
    """Prints log records on stderr, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        Progress.printed = time.monotonic()
        prefix = "resgrid: " if record.levelno >= logging.WARNING else ""
        line = prefix + self.format(record)
        if Progress.active is not None:
            Progress.active.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


def show_messages() -> None:
    """Show what `resgrid` and `tasks` log, from INFO on; called once by the command line."""
    for name in ("resgrid", "tasks"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(_Messages())


class Progress:
    """Shows how much of `total` units is done.

    `update` may be called at every step: it draws at most ten times a second, and never asks the device
    for a figure.
    """

    active: ClassVar[Any] = None  # the bar on the terminal
    printed: ClassVar[float] = 0.0  # when the last line was printed

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.note = 0, ""
        self._before: int | None = None  # at the first update, from which on the speed counts
        self._started = self._drawn = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return self
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
                refresh_per_second=5,
            )
            self._bar.start()
            Progress.active = self._bar
            self._task = self._bar.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()
            Progress.active = None

    def update(self, done: int, total: int | None = None) -> None:
        """`done` units of the whole are done."""
        now = time.monotonic()
        if self._before is None:  # an earlier start, and the opening of an archive, are no part of the speed
            self._before, self._started = done, now
        self.done, self.total = done, total if total is not None else self.total
        if self._bar is not None and now - self._drawn >= 0.1:
            self._draw()
        elif self._bar is None and now - max(Progress.printed, self._started) >= SECONDS_BETWEEN_LINES:
            log.info("%s: %s", self.title, self)
            Progress.printed = now

    @property
    def speed(self) -> float:
        """Units a second since the start."""
        return (self.done - (self._before or 0)) / max(time.monotonic() - self._started, 1e-9)

    def remaining(self) -> str:
        """`about 2 days left` at the speed so far, or nothing while that is unknown."""
        if not self.total or self._before is None or not self._before < self.done < self.total:
            return ""
        return f"about {duration(max(1.0, (self.total - self.done) / self.speed))} left"

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        text = f"{self}  {self.note}"
        self._bar.update(self._task, completed=self.done, total=self.total, text=text)

    def __str__(self) -> str:
        share = f"{100 * self.done / self.total:.0f} %" if self.total else amount(self.done, self.unit)
        left = f", {self.remaining()}" if self.remaining() else ""
        return f"{share}, {amount(self.speed, self.unit)}/s{left}"


def duration(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `5.1 hours`, `9 days`: as one says it."""
    units = ((90, 1, "second"), (90 * 60, 60, "minute"), (36 * 3600, 3600, "hour"), (math.inf, 86400, "day"))
    size, unit = next((size, unit) for limit, size, unit in units if seconds < limit)
    decimals = 1 if unit == "hour" and seconds < 10 * size else 0
    number = f"{seconds / size:,.{decimals}f}".removesuffix(".0")
    return f"{number} {unit}{'' if number == '1' else 's'}"


def amount(number: float, unit: str) -> str:
    """`1,234 images`, `1 image`, `0.3 images`, or of the unit B `1.2 MB`."""
    if unit != "B":
        text = f"{number:,.{1 if 0 < number < 0.95 else 0}f}"
        return f"{text} {unit.removesuffix('s') if text == '1' else unit}"
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:,.1f} {name}"
    return f"{number:.0f} B"
