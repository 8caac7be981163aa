"""Optimizers and depths compared in pairs, and which differences are significant, in sentences.

Only completed cells are compared: optimizers within an architecture, depths within an optimizer. With several
seeds the seed is the replicate, and the intervals say what other trainings would give on these test images.
With one seed nothing can be said of other trainings: the intervals are then over test images, and of these
trained weights alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    mean_over_seeds,
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
    num_comparisons: int = 1  # that are tested together

    @property
    def is_significant(self) -> bool:
        return self.difference.excludes_zero and self.p <= 1 - LEVEL

    @property
    def verdict(self) -> str:
        if self.is_significant:
            ahead = self.first if self.difference.estimate > 0 else self.second
            return f"{ahead} is ahead" if self.num_seeds > 1 else f"the models of {ahead} are ahead"
        return f"not significant{self.reason}"

    @property
    def reason(self) -> str:
        """Why a difference whose interval excludes 0 is not significant."""
        if not self.difference.excludes_zero:
            return ""
        if self.difference.p == 1:
            return ", since the seeds tie"
        return f" after correction for {self.num_comparisons} comparisons"


def group(results: Iterable[Result], factors: Mapping[str, float]) -> list[Group]:
    """The grid's cells at the rates of `factors` (by `resnet20-sgd`; else the base rate) among `results`.

    By architecture and optimizer, in the order of their tables.
    """
    replicates: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        cell, key = result.cell, (result.cell.architecture, result.cell.optimizer.name)
        if cell.study is None and cell.rate_factor == factors.get("-".join(key), 1):
            replicates.setdefault(key, []).append(result)
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
    comparisons = [
        replace(each, p=p, num_comparisons=len(adjusted))
        for each, p in zip(comparisons, adjusted, strict=True)
    ]
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
        low, high = wilson(int(correct.sum()), num_images)
        estimate = float(correct.mean())
        return Interval(estimate, low, high, float("nan"), f"{num_images:,} test images")
    return mean_over_seeds(correct.mean(1), num_images)


def _interval(bounds: Bounds, basis: str) -> Interval:
    estimate, low, high, p = map(float, bounds)
    return Interval(estimate, low, high, p, basis)


def _correct(result: Result) -> Floats:
    assert result.predictions is not None  # of every completed cell
    return result.predictions.correct.astype(np.float64)  # (test images,)


# --- sentences --------------------------------------------------------------------------------------


def answer(groups: Sequence[Group], families: dict[str, list[Comparison]]) -> list[str]:
    """Which differences are significant, a plain sentence each, and one for those that are not."""
    if not any(each.completed for each in groups):
        return ["No cell of the grid has completed, so there is nothing to compare yet."]
    if not any(families.values()):
        return [
            "There is nothing to compare yet: no two optimizers have completed cells of one architecture, "
            "and no two depths of one family have them with one optimizer."
        ]
    return [sentence for what, family in families.items() for sentence in _of(what.lower(), family)]


def how_to_read(groups: Sequence[Group], comparisons: Sequence[Comparison], num_test: int) -> list[str]:
    """What the intervals and tests on `num_test` images mean, and what was left out of them."""
    sentences = []
    if any(c.num_seeds > 1 for c in comparisons):
        sentences.append(
            "Intervals over seeds are Student's t: they say where the mean over other trainings lies, on "
            "these test images."
        )
    if any(c.num_seeds == 1 for c in comparisons):
        sentences.append(
            "With one seed the intervals say how a difference between these trained models would move with "
            "other test images, and nothing of another training. Whether the optimizers or depths behind "
            "them differ cannot be concluded: add seeds to grid.seeds."
        )
    if len(comparisons) > 1:
        sentences.append(
            f"The {len(comparisons)} comparisons are tested together: by Holm's method the chance of any "
            "false difference among them is at most 5 %. Each interval is of 95 % for itself, so it may "
            "exclude 0 where the difference is not significant."
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


def _of(what: str, comparisons: list[Comparison]) -> list[str]:
    """A sentence for each significant difference in a family, and one for the others of each basis."""
    if len(comparisons) > 1 and not any(c.is_significant for c in comparisons):
        names = list(dict.fromkeys(name for c in comparisons for name in (c.first, c.second)))
        bases = " or ".join(dict.fromkeys(c.difference.basis for c in comparisons))
        ties = " In some, the seeds tie." if any("tie" in c.reason for c in comparisons) else ""
        return [
            f"{', '.join(names[:-1])} and {names[-1]} do not differ significantly: none of the "
            f"{len(comparisons)} differences between {what} is significant after correction for "
            f"{comparisons[0].num_comparisons} comparisons (smallest p {_p(min(c.p for c in comparisons))}; "
            f"over {bases}).{ties}"
        ]
    sentences = []
    others: dict[str, list[str]] = {}
    for c in comparisons:
        circumstances = f"({c.difference.basis}; {c.epochs} epochs)"
        if not c.is_significant:
            verdict = f"do not differ significantly{c.reason} {circumstances}."
            others.setdefault(verdict, []).append(f"{c.first} and {c.second}")
            continue
        sign = 1 if c.difference.estimate > 0 else -1
        behind = ("" if c.num_seeds > 1 else "those of ") + (c.second if sign > 0 else c.first)
        low, estimate, high = sorted(100 * sign * value for value in c.difference[:3])
        verdict = c.verdict[0].upper() + c.verdict[1:] if c.num_seeds == 1 else c.verdict
        sentences.append(
            f"{verdict} of {behind} by {estimate:.2f} points ({low:.2f} to {high:.2f}) over "
            f"{', '.join(c.over)} {circumstances}."
        )
    return sentences + [f"{'; '.join(names)} {verdict}" for verdict, names in others.items()]


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"
