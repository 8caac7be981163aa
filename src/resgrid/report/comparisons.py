"""Optimizers and depths compared in pairs, and what can be concluded of them, in sentences.

Only completed cells are compared: optimizers within an architecture, depths within an optimizer. With several
seeds the seed is the replicate, and the intervals say what other trainings would give on these test images.
With one seed nothing can be said of other trainings: the intervals are then over test images, and of these
trained weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np

from resgrid.evaluation import Result
from resgrid.models import family_of, place_of
from resgrid.optimizers import OPTIMIZERS
from resgrid.report.statistics import (
    LEVEL,
    Bounds,
    Floats,
    Interval,
    holm,
    over_images,
    over_seeds,
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
    def accuracy(self) -> Interval:
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
    difference: Interval
    p: float = 1.0  # among all comparisons, by Holm's method

    @property
    def is_told(self) -> bool:
        """Whether one of the two can be said to be ahead."""
        return self.difference.excludes_zero and self.p <= 1 - LEVEL

    @property
    def verdict(self) -> str:
        if self.is_told:
            ahead = self.first if self.difference.estimate > 0 else self.second
            return f"{ahead} is ahead" if self.num_seeds > 1 else f"the models of {ahead} are ahead"
        if not self.difference.excludes_zero:
            return "no difference can be told"
        if self.difference.p == 1:
            return "no difference can be told, since the seeds tie"
        return "no difference can be told among so many"


def group(results: Iterable[Result]) -> list[Group]:
    """The grid's cells among `results`, by architecture and optimizer, in the order of their tables."""
    replicates: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.cell.study is None:
            replicates.setdefault((result.cell.architecture, result.cell.optimizer.name), []).append(result)
    optimizers = list(OPTIMIZERS)
    return [
        Group(architecture=architecture, optimizer=optimizer, results=replicates[architecture, optimizer])
        for architecture, optimizer in sorted(
            replicates, key=lambda key: (place_of(key[0]), optimizers.index(key[1]))
        )
    ]


def compare(groups: Sequence[Group]) -> tuple[list[Comparison], list[Comparison]]:
    """The comparisons of optimizers over architectures and of depths over optimizers, tested together.

    Each depth is compared with the next shallower one of its family, the deepest also with the shallowest.
    Pairs that have no completed cells in common are left out.
    """
    completed = {(each.architecture, each.optimizer): each.completed for each in groups if each.completed}
    architectures = list(dict.fromkeys(each.architecture for each in groups))
    optimizers = list(dict.fromkeys(each.optimizer for each in groups))
    comparisons = []
    for first, second in combinations(optimizers, 2):
        pairs = {a: ((a, first), (a, second)) for a in architectures}
        comparisons += _compare(first, second, pairs, completed)
    num_of_optimizers = len(comparisons)
    for family in dict.fromkeys(map(family_of, architectures)):
        depths = [name for name in architectures if family_of(name) == family]
        steps = list(pairwise(depths))
        for shallow, deep in [*steps, (depths[0], depths[-1])] if len(steps) > 1 else steps:
            pairs = {o: ((deep, o), (shallow, o)) for o in optimizers}
            comparisons += _compare(deep, shallow, pairs, completed)
    adjusted = holm([comparison.difference.p for comparison in comparisons])
    comparisons = [replace(each, p=p) for each, p in zip(comparisons, adjusted, strict=True)]
    return comparisons[:num_of_optimizers], comparisons[num_of_optimizers:]


def _compare(
    first: str,
    second: str,
    pairs: dict[str, tuple[tuple[str, str], tuple[str, str]]],
    completed: dict[tuple[str, str], list[Result]],
) -> list[Comparison]:
    """`first` against `second` in each of `pairs` that has completed cells of both; empty if none has.

    Pairs with one seed are left out where others have more: only those tell of other trainings.
    """
    both = {
        name: (completed[a], completed[b]) for name, (a, b) in pairs.items() if {a, b} <= completed.keys()
    }
    both = {name: pair for name, pair in both.items() if min(map(len, pair)) > 1} or both
    if not both:
        return []
    sides = [side for pair in both.values() for side in pair]
    epochs = sorted({result.metrics["epochs"] for side in sides for result in side if result.metrics})
    return [
        Comparison(
            first=first,
            second=second,
            over=list(both),
            num_seeds=min(map(len, sides)),
            epochs=" and ".join(map(str, epochs)),
            difference=_difference(sides),
        )
    ]


def _difference(results: list[list[Result]]) -> Interval:
    """The mean over pairs of sides (the first, the second, the first, …) of how far the first is ahead.

    The architectures or optimizers of the pairs are taken as given, not as drawn from many: the mean is over
    these. So the seed is the replicate. Where all cells have the same seeds, each seed gives one value, the
    mean of its differences over the pairs, which may depend on each other; then Student's t over the seeds.
    Else all cells count as independent, in an unpaired comparison.

    With one seed on a side there is no replicate: then it is over test images, of one model a cell, with the
    same seed if there is one that both have.
    """
    sides = [{result.cell.seed: _correct(result) for result in side} for side in results]
    num_images, num_pairs = len(next(iter(sides[0].values()))), len(sides) // 2
    counts = sorted({len(side) for side in sides})
    weights = np.array([1, -1] * num_pairs) / num_pairs
    if counts[0] == 1:
        values = np.zeros(num_images)
        for first, second in zip(sides[::2], sides[1::2], strict=True):
            common = sorted(first.keys() & second.keys())
            one, other = (side[common[0] if common else min(side)] for side in (first, second))
            values += (one - other) / num_pairs
        bounds = over_images(values.sum(), (values**2).sum(), num_images, num_pairs)
        return _interval(bounds, f"{num_images:,} test images, one seed")
    if all(side.keys() == sides[0].keys() for side in sides):
        by_seed = weights @ [[side[seed].mean() for seed in sides[0]] for side in sides]  # (seeds,)
        bounds = over_seeds([by_seed], [1], 1 / (num_images * num_pairs))
        return _interval(bounds, f"{counts[0]} seeds, paired")
    samples = [np.array([correct.mean() for correct in side.values()]) for side in sides]
    span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    return _interval(over_seeds(samples, weights.tolist(), 1 / num_images), f"{span} seeds, unpaired")


def mean_accuracy(results: Sequence[Result]) -> Interval:
    """The mean accuracy of completed cells, at least one, that differ in their seed alone."""
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


def _interval(bounds: Bounds, basis: str) -> Interval:
    estimate, low, high, p = map(float, bounds)
    return Interval(estimate, low, high, p, basis)


def _correct(result: Result) -> Floats:
    assert result.predictions is not None  # of every completed cell
    return result.predictions.correct.astype(np.float64)  # (test images,)


# --- sentences --------------------------------------------------------------------------------------


def conclusions(
    groups: Sequence[Group], optimizers: list[Comparison], depths: list[Comparison], num_test: int
) -> list[str]:
    """What can and what cannot be concluded on `num_test` test images, a plain sentence each."""
    if not any(each.completed for each in groups):
        return ["No cell of the grid has completed, so there is nothing to compare yet."]
    compared = optimizers + depths
    sentences = [*_of(optimizers), *_of(depths)]
    if not compared:
        sentences.append(
            "There is nothing to compare yet: no two optimizers have completed cells of one architecture, "
            "and no two depths of one family have them with one optimizer."
        )
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
    num_cells = sum(len(each.results) for each in groups)
    num_completed = sum(len(each.completed) for each in groups)
    if num_completed < num_cells:
        sentences.append(
            f"{num_cells - num_completed} of the grid's {num_cells} cells have no completed run of today's "
            "numbers, data and code. They are left out of the comparisons, which flatters whatever they "
            "belong to."
        )
    return [*sentences, f"One of the {num_test:,} test images is worth {100 / num_test:.2g} points."]


def _of(comparisons: list[Comparison]) -> list[str]:
    """A sentence for each difference that can be told, and one for the others of each basis."""
    sentences = []
    others: dict[str, list[str]] = {}
    for c in comparisons:
        circumstances = f"({c.difference.basis}; {c.epochs} epochs)"
        if not c.is_told:
            others.setdefault(f"{c.verdict} {circumstances}.", []).append(f"{c.first} and {c.second}")
            continue
        sign = 1 if c.difference.estimate > 0 else -1
        behind = ("" if c.num_seeds > 1 else "those of ") + (c.second if sign > 0 else c.first)
        low, estimate, high = sorted(100 * sign * value for value in c.difference[:3])
        sentences.append(
            f"Over {', '.join(c.over)} {circumstances} {c.verdict} of {behind} by {estimate:.2f} points "
            f"({low:.2f} to {high:.2f})."
        )
    return sentences + [f"Between {'; '.join(names)} {verdict}" for verdict, names in others.items()]
