"""Optimizers and depths compared in pairs, and which differences are significant, in sentences.

Only completed cells are compared: optimizers within an architecture, depths within an optimizer. With several
seeds the seed is the replicate, and the intervals say what other trainings would give on these test images.
With one seed nothing is known of other trainings: the intervals are then over test images, and of these
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

Pair = tuple[tuple[str, str], tuple[str, str]]  # two groups, by architecture and optimizer


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
    p_holm: float = 1.0  # among all comparisons, by Holm's method
    num_comparisons: int = 1  # that are tested together

    @property
    def is_significant(self) -> bool:
        return self.difference.excludes_zero and self.p_holm <= 1 - LEVEL

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


def compare(groups: Sequence[Group]) -> dict[str, list[Comparison]]:
    """The comparisons of optimizers over architectures and of depths over optimizers, tested together.

    Each depth is compared with the next shallower one of its family, the deepest also with the shallowest.
    Pairs that have no completed cells in common are left out, and those with one seed where others have
    more, since only the others tell of other trainings.
    """
    completed = {(each.architecture, each.optimizer): each.completed for each in groups if each.completed}
    architectures = list(dict.fromkeys(each.architecture for each in groups))
    optimizers = list(dict.fromkeys(each.optimizer for each in groups))
    families: dict[str, list[Comparison]] = {"Optimizers": [], "Depths": []}

    def add(what: str, first: str, second: str, pairs: dict[str, Pair]) -> None:
        both = {name: [completed.get(key, []) for key in pair] for name, pair in pairs.items()}
        most = max(min(map(len, pair)) for pair in both.values())
        both = {name: pair for name, pair in both.items() if min(map(len, pair)) >= min(most, 2)}
        if most == 0:
            return
        sides = [side for pair in both.values() for side in pair]
        epochs = sorted({result.metrics["epochs"] for side in sides for result in side if result.metrics})
        families[what].append(
            Comparison(
                first=first,
                second=second,
                over=list(both),
                num_seeds=min(map(len, sides)),
                epochs=" and ".join(map(str, epochs)),
                difference=_difference(sides),
            )
        )

    for first, second in combinations(optimizers, 2):
        add("Optimizers", first, second, {a: ((a, first), (a, second)) for a in architectures})
    for family in dict.fromkeys(map(family_of, architectures)):
        depths = [name for name in architectures if family_of(name) == family]
        steps = list(pairwise(depths))
        for shallow, deep in [*steps, (depths[0], depths[-1])] if len(steps) > 1 else steps:
            add("Depths", deep, shallow, {o: ((deep, o), (shallow, o)) for o in optimizers})
    adjusted = iter(p := holm([each.difference.p for family in families.values() for each in family]))
    return {
        what: [replace(each, p_holm=next(adjusted), num_comparisons=len(p)) for each in family]
        for what, family in families.items()
    }


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


def _of(what: str, comparisons: list[Comparison]) -> list[str]:
    """A sentence for each significant difference in a family, and one for the others of each basis."""
    others: dict[str, list[Comparison]] = {}
    sentences = []
    for c in comparisons:
        circumstances = f"({c.difference.basis}; {c.epochs} epochs"
        if not c.is_significant:
            others.setdefault(f"{c.reason} {circumstances}).", []).append(c)
            continue
        first, second = (c.first, c.second) if c.difference.estimate > 0 else (c.second, c.first)
        ahead = f"{first} is ahead of {second}"
        if c.num_seeds == 1:
            ahead = f"The models of {first} are ahead of those of {second}"
        low, estimate, high = sorted(abs(100 * value) for value in c.difference[:3])
        sentences.append(
            f"{ahead} by {estimate:.2f} points ({low:.2f} to {high:.2f}) over {', '.join(c.over)} "
            f"{circumstances}; p {_p(c.p_holm)})."
        )
    if len(comparisons) > 1 and not sentences:
        names = list(dict.fromkeys(name for c in comparisons for name in (c.first, c.second)))
        bases = " or ".join(dict.fromkeys(c.difference.basis for c in comparisons))
        ties = " In some, the seeds tie." if any("tie" in c.reason for c in comparisons) else ""
        return [
            f"{', '.join(names[:-1])} and {names[-1]} do not differ significantly: none of the "
            f"{len(comparisons)} differences between {what} is significant after correction for "
            f"{comparisons[0].num_comparisons} comparisons (smallest p "
            f"{_p(min(c.p_holm for c in comparisons))}; over {bases}).{ties}"
        ]
    for reason, equal in others.items():
        pairs = "; ".join(f"{c.first} and {c.second}" for c in equal)
        sentences.append(f"{pairs} do not differ significantly{reason}")
    return sentences


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"
