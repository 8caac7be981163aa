"""What the grid says: every figure and sentence of the report, before it is drawn.

Only completed cells are compared: optimizers within an architecture, depths within an optimizer. With several
seeds the seed is the replicate, and the intervals say what other trainings would give on these test images.
With one seed nothing can be said of other trainings: the intervals are then over test images, and of these
trained weights alone.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from resgrid import __version__
from resgrid.data.dataset import Meta, Split
from resgrid.evaluation import Predictions, Result
from resgrid.grid import Cell, flat
from resgrid.models import family_of, place_of
from resgrid.optimizers import OPTIMIZERS
from resgrid.progress import duration
from resgrid.provenance import git_commit
from resgrid.report.ensembles import Ensemble
from resgrid.report.leaderboard import leaderboard
from resgrid.report.published import differing, publication
from resgrid.report.statistics import (
    LEVEL,
    Bounds,
    Floats,
    Interval,
    holm,
    over_images,
    over_seeds,
    pareto_front,
    wilson,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Group:
    """The replicates of an architecture with an optimizer: cells that differ in their seed alone."""

    architecture: str
    optimizer: str
    results: list[Result]  # a result a seed, also those that did not complete

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.optimizer}"

    @property
    def completed(self) -> list[Result]:
        return [result for result in self.results if result.status == "completed"]

    @property
    def accuracy(self) -> Interval | None:
        """Of the mean over completed cells: over seeds, or over test images where there is one."""
        return mean_accuracy(self.completed)

    def mean(self, key: str) -> float:
        """Of a figure in run.json or timing.json, over completed cells."""
        return float(np.mean([((r.metrics or {}) | (r.timing or {}))[key] for r in self.completed]))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much more accurate `first` is than `second`, where both were trained."""

    first: str
    second: str
    over: list[str]  # the architectures, or the optimizers, that the mean is over
    num_seeds: int  # of the cell with the fewest; 1: the interval is over test images
    epochs: str  # `20`, or `200 and 250`
    difference: Interval | None  # None: they have no completed cells in common
    p: float = 1.0  # among all comparisons, by Holm's method

    @property
    def is_told(self) -> bool:
        """Whether one of the two can be said to be ahead."""
        return self.difference is not None and self.difference.excludes_zero and self.p <= 1 - LEVEL

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return "no cells in common"
        if self.is_told:
            ahead = self.first if self.difference.estimate > 0 else self.second
            return f"{ahead} is ahead" if self.num_seeds > 1 else f"the models of {ahead} are ahead"
        if not self.difference.excludes_zero:
            return "no difference can be told"
        if self.difference.p == 1:
            return "no difference can be told, since the seeds tie"
        return "no difference can be told among so many"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure, and what was measured here; to be compared only where nothing differs."""

    group: Group
    accuracy: float
    measured: Interval
    differences: list[str]  # between their data and recipes

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
    ensembles: list[Ensemble]
    no_ensembles: list[str]  # why there are no others, a sentence each
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


def find(
    results: list[Result],
    test: Split,
    meta: Meta,
    name: str,
    device: str,
    ensembles: Sequence[Ensemble] = (),
    no_ensembles: Sequence[str] = (),
) -> Findings:
    """All that the report says of `results`, scored on `test` on `device`, and of their ensembles."""
    frame = leaderboard(results, meta)
    groups = _groups([result for result in results if result.cell.study is None])
    optimizers, depths = _optimizers(groups), _depths(groups)
    compared = _tested_together(optimizers + depths)
    return Findings(
        name=name,
        meta=meta,
        test=test,
        results=results,
        frame=frame,
        groups=groups,
        optimizers=compared[: len(optimizers)],
        depths=compared[len(optimizers) :],
        published=_published(groups, meta),
        studies=_studies(results),
        ensembles=list(ensembles),
        no_ensembles=list(no_ensembles),
        made=_made(results, meta, device),
    )


def _groups(results: list[Result]) -> list[Group]:
    replicates: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        replicates.setdefault((result.cell.architecture, result.cell.optimizer.name), []).append(result)
    return [
        Group(architecture=architecture, optimizer=optimizer, results=replicates[architecture, optimizer])
        for architecture in sorted(dict.fromkeys(name for name, _ in replicates), key=place_of)
        for optimizer in OPTIMIZERS
        if (architecture, optimizer) in replicates
    ]


# --- comparisons ------------------------------------------------------------------------------------


def mean_accuracy(results: list[Result]) -> Interval | None:
    """The mean accuracy of completed cells that differ in their seed alone; None of no cell."""
    if not results:
        return None
    correct = np.stack([_correct(result) for result in results])  # (seeds, test images)
    num_seeds, num_images = correct.shape
    if num_seeds == 1:
        return of_one_model(int(correct.sum()), num_images)
    interval = _interval(over_seeds([correct.mean(1)], [1], 1 / num_images), f"{num_seeds} seeds")
    return interval._replace(low=max(interval.low, 0), high=min(interval.high, 1))


def of_one_model(num_correct: int, num_images: int) -> Interval:
    """The accuracy of one trained model, or of one ensemble, over test images."""
    low, high = wilson(num_correct, num_images)
    return Interval(num_correct / num_images, low, high, float("nan"), f"{num_images:,} test images")


def _optimizers(groups: list[Group]) -> list[Comparison]:
    grid = {(group.optimizer, group.architecture): group for group in groups}
    optimizers = list(dict.fromkeys(group.optimizer for group in groups))
    architectures = list(dict.fromkeys(group.architecture for group in groups))
    return [
        _compare(first, second, [(a, grid.get((first, a)), grid.get((second, a))) for a in architectures])
        for first, second in combinations(optimizers, 2)
    ]


def _depths(groups: list[Group]) -> list[Comparison]:
    """Each architecture against the next shallower one of its family, the deepest also against the first."""
    grid = {(group.architecture, group.optimizer): group for group in groups}
    comparisons = []
    for family in dict.fromkeys(family_of(group.architecture) for group in groups):
        depths = list(dict.fromkeys(g.architecture for g in groups if family_of(g.architecture) == family))
        pairs = [*pairwise(depths), (depths[0], depths[-1])] if len(depths) > 2 else list(pairwise(depths))
        for shallow, deep in pairs:
            both = [(o, grid.get((deep, o)), grid.get((shallow, o))) for o in OPTIMIZERS]
            comparisons.append(_compare(deep, shallow, both))
    return comparisons


def _compare(first: str, second: str, both: Sequence[tuple[str, Group | None, Group | None]]) -> Comparison:
    """`first` against `second` in each place that has completed cells of both.

    Places with one seed are left out where others have more: only those tell of other trainings.
    """
    pairs = {
        name: (one.completed, other.completed)
        for name, one, other in both
        if one is not None and other is not None and one.completed and other.completed
    }
    replicated = {name: pair for name, pair in pairs.items() if min(map(len, pair)) > 1}
    pairs = replicated or pairs
    results = [result for pair in pairs.values() for side in pair for result in side]
    epochs = sorted({result.metrics["epochs"] for result in results if result.metrics})
    return Comparison(
        first=first,
        second=second,
        over=list(pairs),
        num_seeds=min((len(side) for pair in pairs.values() for side in pair), default=0),
        epochs=" and ".join(map(str, epochs)),
        difference=_difference(list(pairs.values())) if pairs else None,
    )


def _difference(pairs: list[tuple[list[Result], list[Result]]]) -> Interval:
    """The mean over `pairs` (each of as much weight) of how much more accurate the first side is.

    The architectures or optimizers of the pairs are taken as given, not as drawn from many: the mean is over
    these. So the seed is the replicate. Where all cells have the same seeds, each seed gives one value, the
    mean of its differences over the pairs, which may depend on each other; then Student's t over the seeds.
    Else all cells count as independent, in an unpaired comparison.

    With one seed on a side there is no replicate: then it is over test images, of one model a cell, with the
    same seed if there is one that both have.
    """
    sides = [{r.cell.seed: _correct(r) for r in side} for pair in pairs for side in pair]  # first, second, …
    num_images = len(next(iter(sides[0].values())))
    counts = sorted({len(side) for side in sides})
    weights = np.array([1, -1] * len(pairs)) / len(pairs)
    if counts[0] == 1:
        values = np.zeros(num_images)
        for first, second in zip(sides[::2], sides[1::2], strict=True):
            common = sorted(first.keys() & second.keys())
            one, other = (side[common[0] if common else min(side)] for side in (first, second))
            values += (one - other) / len(pairs)
        bounds = over_images(values.sum(), (values**2).sum(), num_images, len(pairs))
        return _interval(bounds, f"{num_images:,} test images, one seed")
    if all(side.keys() == sides[0].keys() for side in sides):
        by_seed = weights @ [[side[seed].mean() for seed in sides[0]] for side in sides]  # (seeds,)
        bounds = over_seeds([by_seed], [1], 1 / (num_images * len(pairs)))
        return _interval(bounds, f"{counts[0]} seeds, paired")
    samples = [np.array([correct.mean() for correct in side.values()]) for side in sides]
    span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    return _interval(over_seeds(samples, weights.tolist(), 1 / num_images), f"{span} seeds, unpaired")


def _tested_together(comparisons: list[Comparison]) -> list[Comparison]:
    adjusted = iter(holm([c.difference.p for c in comparisons if c.difference is not None]))
    return [c if c.difference is None else replace(c, p=next(adjusted)) for c in comparisons]


def _interval(bounds: Bounds, basis: str) -> Interval:
    estimate, low, high, p = map(float, bounds)
    return Interval(estimate, low, high, p, basis)


def _correct(result: Result) -> Floats:
    assert result.predictions is not None  # of every completed cell
    return result.predictions.correct.astype(np.float64)  # (test images,)


def _published(groups: list[Group], meta: Meta) -> list[Published]:
    rows = []
    for group in groups:
        measured, published = group.accuracy, publication(group.results[0].cell, meta)
        if measured and published:
            differences = differing(group.completed[0].cell, meta, published)
            rows.append(
                Published(
                    group=group, accuracy=published.accuracy, measured=measured, differences=differences
                )
            )
    return rows


# --- studies ----------------------------------------------------------------------------------------


def _studies(results: list[Result]) -> list[Study]:
    """Studies by what differs between their cells and the grid's cell of the same name and seed."""
    grid = {_kin(result.cell): result for result in results if result.cell.study is None}
    factors: dict[str, dict[tuple[str, str, int], list[Level]]] = {}
    for result in results:
        if result.cell.study is None:
            continue
        own, kin = flat(result.cell.numbers), _kin(result.cell)
        base = grid.get(kin)
        common = flat(base.cell.numbers) if base else own
        differing = [key for key in common | own if common.get(key) != own.get(key)]
        factor = differing[0] if differing else "study"
        if "approach" in differing:  # a frozen base comes with weights and statistics of its own
            factor = "approach"
        series = factors.setdefault(factor, {}).setdefault(kin, [])
        if base and not series:
            series.append(_level(base, common.get(factor, "the grid's"), []))
        also = [f"{key} {_text(own.get(key))}" for key in differing if key != factor]
        series.append(_level(result, own.get(factor, result.cell.study), also))
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


def _level(result: Result, value: Any, also: list[str]) -> Level:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return Level(
        text=_text(value),
        value=float(value) if is_number else None,
        result=result,
        accuracy=mean_accuracy([result]) if result.status == "completed" else None,
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
    estimate, low, high = (f"{100 * value:+.2f}" for value in difference[:3])
    return f"{estimate} ({low} to {high})"


def conclusions(findings: Findings) -> list[str]:
    """What can and what cannot be concluded, a plain sentence each."""
    compared = [c for c in findings.optimizers + findings.depths if c.difference is not None]
    num_test = findings.meta.num_images["test"]
    if not findings.trained:
        return ["No cell of the grid has completed, so there is nothing to compare yet."]
    sentences = []
    if not compared:
        sentences.append(
            "There is nothing to compare yet: no two optimizers have completed cells of one architecture, "
            "and no two depths of one family have them with one optimizer."
        )
    for comparisons in (findings.optimizers, findings.depths):
        sentences += _of(comparisons)
    if any(c.num_seeds > 1 for c in compared):
        sentences.append(
            "Intervals over seeds are Student's t: they say where the mean over other trainings lies, on "
            "these test images."
        )
    if any(c.num_seeds == 1 for c in compared):
        sentences.append(
            "With one seed the intervals say how a difference between these trained models would move with "
            "other test images, and nothing of another training. Whether the optimizers or depths behind "
            "them differ cannot be concluded: add seeds to grid.seeds."
        )
    if len(compared) > 1:
        sentences.append(
            f"The {len(compared)} comparisons are tested together: by Holm's method the chance of any false "
            "difference among them is at most 5 %. Each interval is of 95 % for itself, so it may leave out "
            "0 where no difference can be told."
        )
    left_out = [r.cell.id for g in findings.groups for r in g.results if r.status != "completed"]
    if left_out:
        sentences.append(
            f"{len(left_out)} of the grid's {sum(len(g.results) for g in findings.groups)} cells have "
            "no completed run of today's numbers, data and code. They are left out of the comparisons, which "
            "flatters whatever they belong to."
        )
    sentences.append(f"One of the {num_test:,} test images is worth {100 / num_test:.2g} points.")
    return sentences


def _of(comparisons: list[Comparison]) -> list[str]:
    """A sentence for each difference that can be told, and one for the others of each basis."""
    sentences = []
    others: dict[tuple[str, str], list[str]] = {}
    for c in comparisons:
        if c.difference is None:
            continue
        circumstances = f"{c.difference.basis}; {c.epochs} epochs"
        if not c.is_told:
            others.setdefault((c.verdict, circumstances), []).append(f"{c.first} and {c.second}")
            continue
        sign = 1 if c.difference.estimate > 0 else -1
        behind = ("" if c.num_seeds > 1 else "those of ") + (c.second if sign > 0 else c.first)
        low, estimate, high = sorted(100 * sign * value for value in c.difference[:3])
        sentences.append(
            f"Over {', '.join(c.over)} ({circumstances}) {c.verdict} of {behind} by {estimate:.2f} points "
            f"({low:.2f} to {high:.2f})."
        )
    for (verdict, circumstances), names in others.items():
        sentences.append(f"Between {'; '.join(names)} {verdict} ({circumstances}).")
    return sentences


# --- how it was made --------------------------------------------------------------------------------


def _left_out(meta: Meta) -> dict[str, str]:
    """The pictures that could not be read, where they were to be left out."""
    names = [name for held in meta.left_out.values() for name in held]
    if not names:
        return {}
    return {"Left out": f"{len(names):,} broken pictures: {', '.join(names[:20])}{', …' * (len(names) > 20)}"}


def _made(results: list[Result], meta: Meta, device: str) -> dict[str, str]:
    timings = [result.timing for result in results if result.timing]
    digests = {result.metrics["data_digest"] for result in results if result.metrics}
    commit, dirty = git_commit()
    made = {
        "Data": f"{meta.source}: "
        + ", ".join(f"{count:,} {split}" for split, count in meta.num_images.items())
        + f" images of {len(meta.class_names)} classes",
        **_left_out(meta),
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
