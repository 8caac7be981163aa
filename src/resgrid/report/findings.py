"""What the grid says: every figure and sentence of the report, before it is drawn.

Only completed cells are compared. All comparisons are paired: optimizers within an architecture, depths
within an optimizer, both within a seed, and on the same test images.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch

from resgrid import __version__
from resgrid.config import FAMILIES, Architecture, OptimizerName
from resgrid.data.dataset import Meta, Split
from resgrid.evaluation import Predictions, Result
from resgrid.grid import Cell
from resgrid.progress import duration
from resgrid.provenance import git_commit
from resgrid.report.leaderboard import leaderboard
from resgrid.report.published import published_accuracy
from resgrid.report.statistics import Bootstrap, Interval, pareto_front

ROUGH_SEEDS = 5  # with fewer, a deviation over seeds is hardly more than a guess


@dataclass(frozen=True, kw_only=True)
class Group:
    """The replicates of an architecture with an optimizer: cells that differ in their seed alone."""

    architecture: Architecture
    optimizer: OptimizerName
    results: list[Result]  # a result a seed, also those that did not complete
    accuracy: Interval | None  # of the mean over completed cells

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.optimizer}"

    @property
    def completed(self) -> list[Result]:
        return [result for result in self.results if result.status == "completed"]

    def mean(self, key: str) -> float:
        """Of a figure in run.json or timing.json, over completed cells."""
        return float(np.mean([((r.metrics or {}) | (r.timing or {}))[key] for r in self.completed]))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much more accurate `first` is than `second`, where both were trained."""

    first: str
    second: str
    over: list[str]  # the architectures, or the optimizers, that the mean is over
    num_seeds: int  # of that with the fewest
    difference: Interval | None  # None: they have no completed cells in common

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "no cells in common"
        if not self.difference.excludes_zero:
            return "no difference can be told"
        return f"{self.first if self.difference.estimate > 0 else self.second} is ahead"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure beside what was measured here."""

    group: Group
    accuracy: float
    measured: Interval

    @property
    def difference(self) -> float:
        return self.measured.estimate - self.accuracy

    @property
    def within(self) -> bool:
        return self.measured.contains(self.accuracy)


@dataclass(frozen=True, kw_only=True)
class Level:
    """One value of what a study varies, and the cell that was trained with it."""

    text: str
    value: float | None  # where the factor is a number
    result: Result
    accuracy: Interval | None
    also: list[str]  # what else differs from the grid's cell


@dataclass(frozen=True, kw_only=True)
class Series:
    """Levels of a factor in otherwise equal cells, the grid's own among them."""

    name: str
    levels: list[Level]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What becomes of the accuracy when one thing varies."""

    factor: str
    series: list[Series]


@dataclass(frozen=True, kw_only=True)
class Findings:
    name: str
    meta: Meta
    test: Split
    results: list[Result]
    frame: pd.DataFrame  # the leaderboard
    groups: list[Group]
    optimizers: list[Comparison]
    depths: list[Comparison]
    published: list[Published]
    studies: list[Study]
    made: dict[str, str]  # how the report came about

    @property
    def scored(self) -> list[tuple[Result, Predictions]]:
        """Every cell whose weights were scored, in the order of the leaderboard."""
        place = {cell: place for place, cell in enumerate(self.frame["cell"])}
        held = [(result, result.predictions) for result in self.results if result.predictions is not None]
        return sorted(held, key=lambda pair: place[pair[0].cell.id])

    @property
    def trained(self) -> list[Group]:
        """Those with a completed cell."""
        return [group for group in self.groups if group.completed]

    def front(self, cost: str) -> list[Group]:
        """The groups that nothing beats in accuracy at as little `cost`, a key of metrics or timing."""
        groups = self.trained
        front = pareto_front([g.mean(cost) for g in groups], [g.mean("test_accuracy") for g in groups])
        return [groups[place] for place in front]


def find(results: list[Result], test: Split, meta: Meta, name: str, device: str) -> Findings:
    """All that the report says of `results`, scored on the split `test` on `device`."""
    frame = leaderboard(results, meta.source)
    bootstrap = Bootstrap(
        {
            result.cell.id: result.predictions.correct
            for result in results
            if result.status == "completed" and result.predictions is not None
        }
    )
    groups = _groups([result for result in results if result.cell.study is None], bootstrap)
    return Findings(
        name=name,
        meta=meta,
        test=test,
        results=results,
        frame=frame,
        groups=groups,
        optimizers=_optimizers(groups, bootstrap),
        depths=_depths(groups, bootstrap),
        published=_published(groups, meta.source),
        studies=_studies(results, bootstrap),
        made=_made(results, meta, device),
    )


def _groups(results: list[Result], bootstrap: Bootstrap) -> list[Group]:
    held: dict[tuple[Architecture, OptimizerName], list[Result]] = {}
    for result in results:
        held.setdefault((result.cell.architecture, result.cell.optimizer.name), []).append(result)
    groups = []
    for architecture in FAMILIES:
        for optimizer in get_args(OptimizerName):
            if replicates := held.get((architecture, optimizer)):
                cells = [result.cell.id for result in replicates if result.status == "completed"]
                groups.append(
                    Group(
                        architecture=architecture,
                        optimizer=optimizer,
                        results=replicates,
                        accuracy=bootstrap.mean(cells) if cells else None,
                    )
                )
    return groups


def _optimizers(groups: list[Group], bootstrap: Bootstrap) -> list[Comparison]:
    held = {(group.optimizer, group.architecture): group for group in groups}
    optimizers = list(dict.fromkeys(group.optimizer for group in groups))
    return [
        _compare(
            first, second, [(a, held.get((first, a)), held.get((second, a))) for a in FAMILIES], bootstrap
        )
        for first, second in combinations(optimizers, 2)
    ]


def _depths(groups: list[Group], bootstrap: Bootstrap) -> list[Comparison]:
    """Each architecture against the next shallower one of its family, the deepest also against the first."""
    held = {(group.architecture, group.optimizer): group for group in groups}
    comparisons = []
    for family in dict.fromkeys(FAMILIES.values()):
        depths = list(dict.fromkeys(g.architecture for g in groups if FAMILIES[g.architecture] == family))
        pairs = [*pairwise(depths), (depths[0], depths[-1])] if len(depths) > 2 else list(pairwise(depths))
        for shallow, deep in pairs:
            both = [(o, held.get((deep, o)), held.get((shallow, o))) for o in get_args(OptimizerName)]
            comparisons.append(_compare(deep, shallow, both, bootstrap))
    return comparisons


def _compare(
    first: str, second: str, both: Sequence[tuple[str, Group | None, Group | None]], bootstrap: Bootstrap
) -> Comparison:
    pairs: dict[str, list[tuple[str, str]]] = {}
    for name, one, other in both:
        if one is None or other is None:
            continue
        seeds = {result.cell.seed: result.cell.id for result in other.completed}
        same = [(r.cell.id, seeds[r.cell.seed]) for r in one.completed if r.cell.seed in seeds]
        if same:
            pairs[name] = same
    return Comparison(
        first=first,
        second=second,
        over=list(pairs),
        num_seeds=min(map(len, pairs.values()), default=0),
        difference=bootstrap.difference(list(pairs.values())) if pairs else None,
    )


def _published(groups: list[Group], source: str) -> list[Published]:
    found = []
    for group in groups:
        accuracy = published_accuracy(source, group.architecture, group.optimizer)
        if accuracy is not None and group.accuracy is not None:
            found.append(Published(group=group, accuracy=accuracy, measured=group.accuracy))
    return found


# --- studies ----------------------------------------------------------------------------------------


def _studies(results: list[Result], bootstrap: Bootstrap) -> list[Study]:
    """Studies by what differs between their cells and the grid's cell of the same name and seed."""
    grid = {_kin(result.cell): result for result in results if result.cell.study is None}
    factors: dict[str, dict[tuple[str, str, int], list[Level]]] = {}
    for result in results:
        if result.cell.study is None:
            continue
        own, kin = _settings(result.cell), _kin(result.cell)
        base = grid.get(kin)
        common = _settings(base.cell) if base else own
        differing = [key for key in common | own if common.get(key) != own.get(key)]
        factor = differing[0] if differing else "study"
        if "approach" in differing:  # a frozen base comes with weights and statistics of its own
            factor = "approach"
        series = factors.setdefault(factor, {}).setdefault(kin, [])
        if base and not series:
            series.append(_level(base, common.get(factor, "the grid's"), [], bootstrap))
        also = [f"{key} {_text(own.get(key))}" for key in differing if key != factor]
        series.append(_level(result, own.get(factor, result.cell.study), also, bootstrap))
    return [
        Study(
            factor=factor.replace("_", " "),
            series=[
                Series(name=f"{architecture}-{optimizer}-{seed}", levels=sorted(levels, key=_by_value))
                for (architecture, optimizer, seed), levels in by_kin.items()
            ],
        )
        for factor, by_kin in factors.items()
    ]


def _kin(cell: Cell) -> tuple[str, str, int]:
    return cell.architecture, cell.optimizer.name, cell.seed


def _settings(cell: Cell) -> dict[str, Any]:
    """What makes the cell, flat: `schedule.factor` and the like."""
    flat: dict[str, Any] = {"learning_rate": cell.optimizer.lr}
    for key, value in cell.recipe.model_dump().items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}".removesuffix(".name"): each for name, each in value.items()}
        else:
            flat[key] = value
    return flat


def _level(result: Result, value: Any, also: list[str], bootstrap: Bootstrap) -> Level:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Level(
        text=_text(value),
        value=float(value) if is_number else None,
        result=result,
        accuracy=bootstrap.mean([result.cell.id]) if result.status == "completed" else None,
        also=also,
    )


def _by_value(level: Level) -> float:
    return -1.0 if level.value is None else level.value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "none" if value is None else str(value).replace("_", " ")


# --- sentences --------------------------------------------------------------------------------------


def points(difference: Interval) -> str:
    """`+0.41 (+0.12 to +0.70)`, in percentage points."""
    estimate, low, high = (f"{100 * value:+.2f}" for value in difference)
    return f"{estimate} ({low} to {high})"


def conclusions(findings: Findings) -> list[str]:
    """What can and what cannot be concluded, a plain sentence each."""
    compared = [c for c in findings.optimizers + findings.depths if c.difference is not None]
    num_test = findings.meta.num_images["test"]
    said = []
    if not findings.trained:
        return ["No cell of the grid has completed, so there is nothing to compare yet."]
    if not compared:
        said.append(
            "There is nothing to compare yet: no two optimizers have completed cells of one architecture, "
            "and no two depths of one family have them with one optimizer."
        )
    else:
        said.append(_on_seeds(min(c.num_seeds for c in compared)))
        for what, comparisons in (("optimizers", findings.optimizers), ("depths", findings.depths)):
            said += _on(what, [c for c in comparisons if c.difference is not None])
        if len(compared) > 1:
            said.append(
                f"These are {len(compared)} intervals of 95 %: where nothing differs, one in twenty still "
                "leaves out zero."
            )
    left_out = [r.cell.id for g in findings.groups for r in g.results if r.status != "completed"]
    if left_out:
        said.append(
            f"{len(left_out)} of the grid's {sum(len(g.results) for g in findings.groups)} cells did not "
            "complete and are left out of the comparisons, which flatters whatever they belong to."
        )
    said.append(f"One of the {num_test:,} test images is worth {100 / num_test:.2g} points.")
    return said


def _on_seeds(num_seeds: int) -> str:
    if num_seeds == 1:
        return (
            "With one seed the intervals say how the figures would move with other test images, and not how "
            "with another seed. So a difference is one between these trained weights; whether it is one "
            "between the optimizers or depths behind them cannot be concluded: add seeds to grid.seeds."
        )
    text = f"With {num_seeds} seeds the intervals cover other test images and other seeds"
    if num_seeds < ROUGH_SEEDS:
        return (
            f"{text}, but a spread over so few seeds is itself known roughly: take an interval that leaves "
            "out zero by little as a hint, and not as proof."
        )
    return f"{text}: a difference whose interval leaves out zero is one between the optimizers or depths."


def _on(what: str, comparisons: list[Comparison]) -> list[str]:
    ahead = [c for c in comparisons if c.difference and c.difference.excludes_zero]
    if not comparisons:
        return []
    if not ahead:
        return [f"Between the {what} no difference can be told."]
    told = []
    for comparison in ahead:
        assert comparison.difference is not None
        first, second = comparison.first, comparison.second
        if comparison.difference.estimate < 0:
            first, second = second, first
        told.append(f"{first} is ahead of {second} by {100 * abs(comparison.difference.estimate):.2f} points")
    others = len(comparisons) - len(ahead)
    rest = f"; for the other {others} no difference can be told" if others else ""
    return [f"Of the {what}, on the mean over cells: {', '.join(told)}{rest}."]


# --- how it was made --------------------------------------------------------------------------------


def _made(results: list[Result], meta: Meta, device: str) -> dict[str, str]:
    timings = [result.timing for result in results if result.timing]
    digests = {result.metrics["data_digest"] for result in results if result.metrics}
    commit, dirty = git_commit()
    made = {
        "Data": f"{meta.source}: "
        + ", ".join(f"{count:,} {split}" for split, count in meta.num_images.items())
        + f" images of {len(meta.class_names)} classes",
        "Digest of the data": meta.digest,
        "Commit": commit + (", with changes" if dirty == "true" else ""),
        "Seeds": ", ".join(map(str, sorted({result.cell.seed for result in results}))),
    }
    if digests - {meta.digest}:
        made["Caution"] = "some cells were trained on other data than they were scored on"
    if timings:
        machines = [
            f"{t['device_name']}, {t['precision']}, {t['threads']} thread{'s' if t['threads'] > 1 else ''}"
            for t in timings
        ]
        total = sum(timing["train_seconds"] for timing in timings)
        started = sorted(timing["started"] for timing in timings)
        made |= {
            "Trained on": _counted(machines),
            "Trained with": _counted(
                f"torch {t['torch']}, Python {t['python']}, ResGrid {t['resgrid']}, {t['platform']}"
                for t in timings
            ),
            "Training time": f"{duration(total)} in sum over {len(timings)} cells, scoring not counted",
            "Begun": started[0]
            if started[0] == started[-1]
            else f"{started[0]} (first), {started[-1]} (last)",
        }
    made["Scored with"] = (
        f"torch {torch.__version__}, Python {platform.python_version()}, ResGrid {__version__}, in fp32 on "
        f"{device}, from the weights files"
    )
    return made


def _counted(texts: Iterable[str]) -> str:
    """Each different text once, with how often where there are several."""
    counts = Counter(texts)
    return "; ".join(f"{text} ({count} cells)" if len(counts) > 1 else text for text, count in counts.items())
