"""Which learning rate each optimizer is compared at: chosen on validation images, with equally many tries.

Every optimizer of an architecture is trained at the same factors times its base rate. The factor with the
highest mean validation accuracy over seeds is chosen; test accuracy is reported there and plays no part in
the choice. So all have the same budget, and nobody mistakes a default for an optimizer (Choi et al. 2019, On
Empirical Comparisons of Optimizers for Deep Learning; Schneider et al. 2019, DeepOBS). Facts and no
sentences; `benchmarks/intervals.py` simulates what intervals at a chosen rate cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import pandas as pd

from resgrid.models import place_of
from resgrid.optimizers import OPTIMIZERS
from resgrid.report.statistics import Floats, Interval, mean_over_seeds

POINTS = 100  # in an accuracy of 1; what lies within one point counts as flat


class NotChosen(Enum):
    """Why an optimizer stays at its base rate."""

    NO_FACTORS = "rates.factors is empty"
    NO_VALIDATION = "preprocess.validation_fraction is 0"
    INCOMPLETE = "not every cell of the architecture has a current result"


class Bracket(Enum):
    """Whether the factors reach beyond the best one on both sides."""

    INSIDE = "the ends are more than a point below it, or diverge"
    REACHES_END = "an end is within a point of it, so the best may lie beyond"
    AT_END = "it is at an end"


@dataclass(frozen=True, kw_only=True)
class RatePoint:
    """An optimizer at one of its rates; a value a seed, in the order of the seeds."""

    factor: float
    learning_rate: float
    validation: tuple[float | None, ...]  # accuracies (0-1); None: diverged, or no current result
    test: tuple[float | None, ...]
    num_diverged: int

    @property
    def validation_accuracy(self) -> float | None:
        """The mean over completed seeds."""
        return _mean(self.validation)

    @property
    def test_accuracy(self) -> float | None:
        """The mean over completed seeds."""
        return _mean(self.test)


@dataclass(frozen=True, kw_only=True)
class RateChoice:
    """The rate at which an optimizer is compared on an architecture, and what is known of the others."""

    architecture: str
    optimizer: str
    seeds: tuple[int, ...]
    curve: tuple[RatePoint, ...]  # by rising factor; the base rate's is among them
    factor: float  # 1, the base rate, where none is chosen
    not_chosen: NotChosen | None  # None: chosen
    missing: tuple[str, ...] = ()  # cells of the architecture without a current result, of any optimizer
    bracket: Bracket | None = None  # this and all that follow: only of a chosen factor
    to_try: tuple[float, ...] = ()  # the factors beyond each end that the best may lie behind
    plateau: tuple[float, ...] = ()  # factors within a point of the chosen one, and contiguous with it
    expected_test_accuracy: tuple[Interval, ...] = ()  # after k of n tries with one seed; [0]: one try
    one_seed_cost: float | None = None  # accuracy at the chosen rate less `expected_test_accuracy[-1]`

    @property
    def chosen(self) -> RatePoint:
        return next(point for point in self.curve if point.factor == self.factor)

    @property
    def base(self) -> RatePoint:
        """At the base rate: described beside the chosen one, never tested."""
        return next(point for point in self.curve if point.factor == 1)


def choose_rates(
    leaderboard: pd.DataFrame, *, num_validation: int, num_test: int, num_classes: int
) -> list[RateChoice]:
    """The rate of each architecture and optimizer of the grid, in the order of their tables.

    `leaderboard` has a row for every cell of params.yaml; the numbers of images are those of the processed
    data, 0 for no validation split. The report, the comparisons, the mean over seeds, DVC's metrics and the
    champion then use the grid's cells at `choice.factor`, and Holm's correction counts these alone.

    Accuracies are compared in whole images, summed over seeds. Ties go to the smallest |log factor|, then to
    the lower factor. A factor with a diverged seed is chosen only if every factor has one; a diverged cell
    counts as a guess, 1 / `num_classes`. Without a validation split, or with a cell of the architecture that
    has no current result, nothing is chosen for it.
    """
    grid = leaderboard[leaderboard["study"].isna()]
    choices = []
    for architecture in sorted(grid["architecture"].unique(), key=place_of):
        cells = grid[grid["architecture"] == architecture]
        missing = tuple(cells.loc[~cells["status"].isin(["completed", "diverged"]), "cell"])
        for optimizer in (name for name in OPTIMIZERS if name in set(cells["optimizer"])):
            rows = cells[cells["optimizer"] == optimizer]
            seeds = tuple(sorted({int(seed) for seed in rows["seed"]}))
            curve = tuple(
                _point(rows[rows["rate_factor"] == factor], seeds)
                for factor in sorted(rows["rate_factor"].unique())
            )
            not_chosen = (
                NotChosen.NO_FACTORS if len(curve) == 1
                else NotChosen.NO_VALIDATION if num_validation == 0
                else NotChosen.INCOMPLETE if missing
                else None
            )  # fmt: skip
            base = RateChoice(
                architecture=architecture, optimizer=optimizer, seeds=seeds, curve=curve, factor=1,
                not_chosen=not_chosen, missing=missing,
            )  # fmt: skip
            choices.append(base if not_chosen else _chosen(base, num_validation, num_test, num_classes))
    return choices


def sentences(choices: Sequence[RateChoice]) -> list[str]:
    """What the choice leaves open: why there is none, and where the best rate may lie beyond those tried."""
    lines: dict[str, None] = {}
    for each in choices:
        name = f"{each.architecture}-{each.optimizer}"
        to_try = f": try {' and '.join(f'{factor:g}' for factor in each.to_try)}." if each.to_try else "."
        line = ""
        if each.not_chosen is NotChosen.NO_VALIDATION:
            line = (
                "No rate is chosen, without validation images: set preprocess.validation_fraction, "
                "such as to 0.1. All is compared at the base rates."
            )
        elif each.not_chosen is NotChosen.INCOMPLETE:
            line = (
                f"{each.architecture} is compared at its base rates: none is chosen before every factor has "
                f"a current result for every seed of every optimizer. Missing: {', '.join(each.missing)}."
            )
        elif each.bracket is Bracket.AT_END:
            line = (
                f"{name}: the best factor, {each.factor:g}, is an end of those tried: not bracketed{to_try}"
            )
        elif each.bracket is Bracket.REACHES_END:
            line = f"{name}: the top reaches the end, so the best may lie beyond{to_try}"
        lines |= {line: None} if line else {}
    return list(lines)


def _point(rows: pd.DataFrame, seeds: Sequence[int]) -> RatePoint:
    by_seed = rows.set_index("seed")

    def values(column: str) -> tuple[float | None, ...]:
        completed = by_seed[column].where(by_seed["status"] == "completed").reindex(list(seeds))
        return tuple(None if pd.isna(value) else float(value) for value in completed)

    return RatePoint(
        factor=float(rows["rate_factor"].iloc[0]),
        learning_rate=float(rows["learning_rate"].iloc[0]),
        validation=values("validation_accuracy"),
        test=values("test_accuracy"),
        num_diverged=int((rows["status"] == "diverged").sum()),
    )


def _chosen(base: RateChoice, num_validation: int, num_test: int, num_classes: int) -> RateChoice:
    """`base` with the choice made; every cell of it has completed or diverged."""
    curve, num_seeds = base.curve, len(base.seeds)
    guess = 1 / num_classes
    images = np.rint(  # (factors, seeds): validation images that are classified correctly
        [[num_validation * (guess if v is None else v) for v in point.validation] for point in curve]
    )
    total = images.sum(1)
    stable = [point.num_diverged == 0 for point in curve]
    nearness = [_nearness(point.factor) for point in curve]
    best = max(range(len(curve)), key=lambda i: (stable[i], total[i], nearness[i]))
    in_plateau = [
        i == best or (stable[i] and POINTS * (total[best] - total[i]) <= num_validation * num_seeds)
        for i in range(len(curve))
    ]
    first = next(i for i in range(best, -1, -1) if i == 0 or not in_plateau[i - 1])
    end = next(i for i in range(best + 1, len(curve) + 1) if i == len(curve) or not in_plateau[i])
    open_ends = [(end, up) for end, up in ((0, False), (len(curve) - 1, True)) if in_plateau[end]]
    bracket = Bracket.REACHES_END if open_ends else Bracket.INSIDE
    if best in (0, len(curve) - 1):
        bracket = Bracket.AT_END
    expected, tuned = _expected(base, images, nearness, num_test, num_classes), curve[best]
    accuracy = tuned.test_accuracy if stable[best] else None
    return replace(
        base,
        factor=tuned.factor,
        bracket=bracket,
        to_try=tuple(factor for end, up in open_ends for factor in _beyond(curve[end].factor, up)),
        plateau=tuple(point.factor for point in curve[first:end]),
        expected_test_accuracy=expected,
        one_seed_cost=None if accuracy is None else accuracy - expected[-1].estimate,
    )


def _nearness(factor: float) -> tuple[float, float]:
    """The larger, the sooner a factor is taken among equals; 0.1 and 10 are equally near to 1."""
    return -round(abs(math.log(factor)), 9), -factor


def _beyond(factor: float, upwards: bool) -> list[float]:
    """The next of 0.001, 0.003, 0.01 … 1000 beyond `factor`; none where params.yaml allows none."""
    series = [float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 3)] + [1000.0]
    return [s for s in series if s > factor][:1] if upwards else [s for s in series if s < factor][-1:]


def _expected(
    base: RateChoice,
    images: Floats,
    nearness: Sequence[tuple[float, float]],
    num_test: int,
    num_classes: int,
) -> tuple[Interval, ...]:
    """Test accuracy at the best by validation of k of the n factors, drawn at random, for k = 1 … n.

    Each seed chooses by itself, as somebody with one training a rate would: Dodge et al. 2019, Show Your
    Work, without replacement. A diverged cell is ranked last. Mean and interval over seeds.
    """
    n = len(base.curve)
    by_seed: list[Floats] = []
    for seed in range(len(base.seeds)):
        tests = [point.test[seed] for point in base.curve]
        order = sorted(
            range(n), key=lambda i: (tests[i] is not None, images[i, seed], nearness[i]), reverse=True
        )
        by_seed.append(np.array([1 / num_classes if (test := tests[i]) is None else test for i in order]))
    ranked = np.array(by_seed)  # (seeds, factors), best by validation first
    intervals = []
    for k in range(1, n + 1):
        weights = np.array([math.comb(n - j, k - 1) / math.comb(n, k) for j in range(1, n + 1)])
        values = ranked @ weights  # (seeds,)
        single = Interval(float(values[0]), math.nan, math.nan, math.nan, "1 seed")
        intervals.append(single if len(values) == 1 else mean_over_seeds(values, num_test))
    return tuple(intervals)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
