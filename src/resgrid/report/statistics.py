"""Statistics of accuracies: intervals, tests, calibration, confusion, Pareto fronts.

Arrays and nothing else: which cells are compared with which stands in `findings`. `benchmarks/intervals.py`
shows by simulation that the intervals cover what they say; docs/reliability.md has its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]

LEVEL = 0.95  # of every interval
TIED_STEPS = 1.12  # the standard error of tied seeds; see `over_seeds`
NUM_BINS = 15  # of confidence: Guo et al. 2017, section 2


class Bounds(NamedTuple):
    """Estimates, the ends of their intervals, and the p-values of the hypothesis that the truth is 0."""

    estimate: Floats
    low: Floats
    high: Floats
    p: Floats


class Interval(NamedTuple):
    """A figure, its interval at `LEVEL`, and the p-value of the hypothesis that the truth is 0."""

    estimate: float
    low: float
    high: float
    p: float
    basis: str  # what the interval is over, such as `3 seeds` or `360 test images`

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def text(self, sign: str = "") -> str:
        """`97.77 (96.10 to 99.16)`, in %, or of a difference with the `sign` `+` in percentage points."""
        estimate, low, high = (f"{100 * value:{sign}.2f}" for value in self[:3])
        return f"{estimate} ({low} to {high})"


def over_seeds(samples: Sequence[Floats], weights: Sequence[float], resolution: float) -> Bounds:
    """Student's t interval of Σ weights[i] · mean(samples[i]) over trainings, on the same test images.

    `samples[i]` is (..., nᵢ), nᵢ ≥ 2: a value a seed, in multiples of `resolution` (1 / test images). The
    samples are independent of each other. One sample gives the t interval of its mean (of paired
    differences, the paired one); two with the weights 1 and -1 Welch's; more, the same for any contrast
    (Welch 1947, The Generalization of 'Student's' Problem). The degrees of freedom are Satterthwaite's for
    samples of one size, where that errs on the safe side, and the fewest of any sample for unequal ones:
    Satterthwaite's would cover 88 to 90 % with 10 seeds against 2.

    Seeds may tie, as accuracies are counts of images; then their spread is 0 and known no better than to the
    resolution. The smallest spread above 0 that n seeds can show (one of them an image off) has a standard
    error of resolution / n, a step of their mean. Tied seeds are given `TIED_STEPS` of it, with the normal
    quantile since nothing is estimated (a type B uncertainty: JCGM 100:2008, G.4.3). The factor is
    calibrated: by simulation the interval then holds wherever the truth lies between two steps. Where all
    samples tie, the interval stands on that assumption alone, so p is 1: it allows no conclusion.
    """
    estimate, variance, uncertainty, tied = (np.zeros(samples[0].shape[:-1]) for _ in range(4))
    for values, weight in zip(samples, weights, strict=True):
        n = values.shape[-1]
        tie = np.ptp(values, -1) < resolution / 2
        measured = values.var(-1, ddof=1) / n
        share = weight**2 * np.where(tie, (TIED_STEPS * resolution / n) ** 2, measured)
        estimate = estimate + weight * values.mean(-1)
        variance = variance + share
        uncertainty = uncertainty + np.where(tie, 0, share**2 / (n - 1))
        tied = tied + tie
    fewest, most = (pick(values.shape[-1] for values in samples) for pick in (min, max))
    with np.errstate(divide="ignore"):
        freedom = variance**2 / uncertainty  # infinite where all samples tie
    if fewest < most:
        freedom = np.where(tied == len(samples), freedom, fewest - 1)
    error = np.sqrt(variance)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    p = np.where(tied == len(samples), 1.0, 2 * stats.t.sf(np.abs(estimate) / error, freedom))
    return Bounds(estimate, estimate - half, estimate + half, p)


def mean_over_seeds(accuracies: Floats, num_images: int) -> Interval:
    """The mean of accuracies, a value a seed (≥ 2), with its interval, which ends at 0 and 1."""
    estimate, low, high, p = map(float, over_seeds([accuracies], [1], 1 / num_images))
    return Interval(estimate, max(low, 0), min(high, 1), p, f"{len(accuracies)} seeds")


def over_images(total: Floats, squares: Floats, num_images: int, num_pairs: int = 1) -> Bounds:
    """The mean over test images of how much better the first of two trained models is, for other images.

    An image counts 1 where the first alone is right, -1 where the second alone is; with `num_pairs` pairs of
    models its value is the mean over the pairs. `total` and `squares` (both (...)) are the sums over the
    images of these values and of their squares.

    The interval is Agresti & Min 2005 (Simple improved confidence intervals for comparing matched
    proportions): half an image is added to each of the four outcomes, so that no interval has zero width.
    p is that of McNemar's exact test for one pair; for a mean over several the interval's own, a normal one.
    """
    n = num_images + 2
    centre = total / n
    error = np.sqrt(((squares + 1 / num_pairs) / n - centre**2) / n)
    half = stats.norm.ppf((1 + LEVEL) / 2) * error
    if num_pairs == 1:
        fewer = np.rint((squares - np.abs(total)) / 2)
        p = np.minimum(1, 2 * stats.binom.cdf(fewer, np.rint(squares), 0.5))
    else:
        p = 2 * stats.norm.sf(np.abs(centre) / error)
    return Bounds(total / num_images, centre - half, centre + half, p)


def wilson(num_correct: int, num_images: int) -> tuple[float, float]:
    """The ends of Wilson's score interval (1927) for the accuracy of a trained model on other test images."""
    low, high = stats.binomtest(num_correct, num_images).proportion_ci(LEVEL, "wilson")
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """`p` adjusted so that all tests together have the level of one (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.sort(p) * np.arange(len(order), 0, -1)).clip(max=1)
    return [float(value) for value in adjusted]


class Reliability(NamedTuple):
    """Predictions in equal bins of confidence (Guo et al. 2017); of the bins with any."""

    confidence: Floats  # mean of each bin
    accuracy: Floats
    num_images: Ints


def reliability(confidence: Floats, correct: Bools, num_bins: int = NUM_BINS) -> Reliability:
    """Accuracy by confidence (both (N,)) in `num_bins` equal bins, each with its upper edge."""
    bins = np.clip(np.ceil(confidence.astype(np.float64) * num_bins).astype(int) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    occupied = count > 0
    return Reliability(
        np.bincount(bins, confidence, num_bins)[occupied] / count[occupied],
        np.bincount(bins, correct, num_bins)[occupied] / count[occupied],
        count[occupied],
    )


def calibration_error(confidence: Floats, correct: Bools, num_bins: int = NUM_BINS) -> float:
    """The expected calibration error (0-1), over all images: Guo et al. 2017, On Calibration of Modern Neural
    Networks, equation 3."""
    bins = reliability(confidence, correct, num_bins)
    return float(np.abs(bins.accuracy - bins.confidence) @ bins.num_images / bins.num_images.sum())


def confusion(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """Counts (classes, classes): a row a true class, a column a predicted one."""
    pairs = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def pareto_front(cost: Sequence[float], value: Sequence[float]) -> list[int]:
    """The places, by rising cost, of what nothing beats: nothing that costs as little is worth more, and
    nothing that is worth as much costs less. Equals are all on it."""
    points = list(zip(cost, value, strict=True))
    return [
        place
        for place in sorted(range(len(points)), key=lambda place: (cost[place], -value[place]))
        if not any(c <= cost[place] and v >= value[place] and (c, v) != points[place] for c, v in points)
    ]
