"""What the grid says: every figure of the report, before it is drawn."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from resgrid import __version__
from resgrid.data.dataset import Meta, Split
from resgrid.evaluation import Predictions, Result
from resgrid.grid import Cell, flat
from resgrid.progress import duration
from resgrid.provenance import git_commit
from resgrid.report.comparisons import Group, compare, conclusions, group, mean_accuracy
from resgrid.report.ensembles import Ensemble
from resgrid.report.leaderboard import leaderboard
from resgrid.report.published import as_text, differing, publication
from resgrid.report.statistics import Interval, pareto_front
from resgrid.run_status import started_at


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure, and what was measured here; to be compared only where nothing differs."""

    name: str  # of the architecture with its optimizer
    accuracy: float
    measured: Interval
    differences: list[str]  # between their data and recipes


@dataclass(frozen=True, kw_only=True)
class Level:
    """One value of what a study varies, and the cell that was trained with it."""

    factor: str  # what varies
    series: str  # cells that are equal but for the factor, the grid's own among them
    text: str
    value: float | None  # where the factor is a number
    result: Result
    accuracy: Interval | None
    also: str  # what else differs from the grid's cell


@dataclass
class Findings:
    """All that the report says of `results`, scored on `test` on `device`, and of their ensembles."""

    results: list[Result]
    test: Split
    meta: Meta
    name: str
    device: str
    ensembles: Sequence[Ensemble] = ()
    no_ensembles: Sequence[str] = ()  # why there are no others, a sentence each

    def __post_init__(self) -> None:
        self.frame = leaderboard(self.results, self.meta)
        self.groups = group(self.results)
        self.optimizers, self.depths = compare(self.groups)
        num_test = self.meta.num_images["test"]
        self.conclusions = conclusions(self.groups, self.optimizers, self.depths, num_test)
        self.published = _published(self.groups, self.meta)
        self.studies = _studies(self.results)
        self.made = how_it_was_made(self.results, self.meta, self.device)

    @property
    def scored(self) -> list[tuple[Result, Predictions]]:
        """Every cell whose weights were scored, in the order of the leaderboard."""
        results = {result.cell.id: result for result in self.results}
        ordered = [results[cell] for cell in self.frame["cell"]]
        return [(result, result.predictions) for result in ordered if result.predictions is not None]

    @property
    def trained(self) -> list[Group]:
        """Those with a completed cell."""
        return [group for group in self.groups if group.completed]

    def front(self, cost: str) -> list[Group]:
        """The groups that nothing beats in accuracy at as little `cost`, a key of metrics or timing."""
        groups = self.trained
        front = pareto_front([g.mean(cost) for g in groups], [g.mean("test_accuracy") for g in groups])
        return [groups[place] for place in front]


def _published(groups: list[Group], meta: Meta) -> list[Published]:
    rows = []
    for each in groups:
        published = publication(each.results[0].cell, meta)
        if published and each.completed:
            differences = differing(each.completed[0].cell, meta, published)
            rows.append(
                Published(
                    name=each.name,
                    accuracy=published.accuracy,
                    measured=each.accuracy,
                    differences=differences,
                )
            )
    return rows


# --- studies ----------------------------------------------------------------------------------------


def _studies(results: list[Result]) -> list[Level]:
    """Studies by what differs between their cells and the grid's cell of the same name and seed."""
    grid = {_series(result.cell): result for result in results if result.cell.study is None}
    levels: dict[tuple[str, str], list[Level]] = {}
    for result in results:
        if result.cell.study is None:
            continue
        own, series = flat(result.cell.numbers), _series(result.cell)
        base = grid.get(series)
        common = flat(base.cell.numbers) if base else own
        differing = [key for key in common | own if common.get(key) != own.get(key)]
        factor = differing[0] if differing else "study"
        if "approach" in differing:  # a frozen base comes with weights and statistics of its own
            factor = "approach"
        of_series = levels.setdefault((factor, series), [])
        if base and not of_series:
            of_series.append(_level(base, factor, common.get(factor, "the grid's")))
        also = "; ".join(f"{key} {as_text(own.get(key))}" for key in differing if key != factor)
        of_series.append(_level(result, factor, own.get(factor, result.cell.study), also))
    factors = list(dict.fromkeys(factor for factor, _ in levels))
    return [
        level
        for key in sorted(levels, key=lambda key: factors.index(key[0]))
        for level in sorted(levels[key], key=lambda level: -1.0 if level.value is None else level.value)
    ]


def _series(cell: Cell) -> str:
    return f"{cell.architecture}-{cell.optimizer.name}-{cell.seed}"


def _level(result: Result, factor: str, value: Any, also: str = "") -> Level:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Level(
        factor=factor.replace("_", " "),
        series=_series(result.cell),
        text=as_text(value),
        value=float(value) if is_number else None,
        result=result,
        accuracy=mean_accuracy([result]) if result.status == "completed" else None,
        also=also,
    )


# --- how it was made --------------------------------------------------------------------------------


def how_it_was_made(results: list[Result], meta: Meta, device: str) -> dict[str, str]:
    """The data, code and machines behind the report, by their headings."""
    timings = [result.timing for result in results if result.timing]
    commit, dirty = git_commit()
    counts = ", ".join(f"{count:,} {split}" for split, count in meta.num_images.items())
    made = {"Data": f"{meta.source}: {counts} images of {len(meta.class_names)} classes"}
    if broken := [name for names in meta.left_out.values() for name in names]:
        more = ", …" if len(broken) > 20 else ""
        made["Left out"] = f"{len(broken):,} broken pictures: {', '.join(broken[:20])}{more}"
    made |= {
        "Digest of the data": meta.digest,
        "Commit": commit + (", with changes" if dirty == "true" else ""),
        "Seeds": ", ".join(map(str, sorted({result.cell.seed for result in results}))),
    }
    if timings:
        machines = [f"{t['device_name']}, {t['precision']}, threads: {t['threads']}" for t in timings]
        versions = [
            f"torch {t['torch']}, Python {t['python']}, ResGrid {t['resgrid']}, {t['platform']}"
            for t in timings
        ]
        begun = [datetime.fromtimestamp(started_at(timing) // 10**6, UTC) for timing in timings]
        started = [moment.isoformat() for moment in (min(begun), max(begun))]
        total = duration(sum(timing["train_seconds"] for timing in timings))
        made |= {
            "Trained on": _counted(machines),
            "Trained with": _counted(versions),
            "Training time": f"{total} in sum over {len(timings)} cells, scoring not counted",
            "Begun": f"{started[0]} to {started[-1]}",
        }
    made["Scored with"] = (
        f"torch {torch.__version__}, Python {platform.python_version()}, ResGrid {__version__}, in fp32 on "
        f"{device}, from the weights files"
    )
    return made


def _counted(texts: list[str]) -> str:
    """Each different text once, with its number of cells."""
    return "; ".join(f"{text} ({count} cells)" for text, count in Counter(texts).items())
