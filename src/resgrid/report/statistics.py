"""What can be said of accuracies: bootstrap intervals, calibration, confusion, Pareto fronts.

Arrays and nothing else: which cells are compared with which stands in `findings`.

Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13 (percentile intervals); McCarthy
& Snowden 1985, The Bootstrap and Finite Population Sampling (draws of n - 1, so that the variance of a mean
of few is not understated); Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer[Any]]

LEVEL = 0.95  # of every interval
NUM_RESAMPLES = 2000
NUM_BINS = 15  # of confidence: Guo et al. 2017, section 2


class Interval(NamedTuple):
    """A figure and where it would lie for other test images and other seeds, with probability `LEVEL`."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


class Bootstrap:
    """Accuracies of cells that were scored on the same images, under resampling of images and of seeds.

    The images are drawn once, for all cells alike, so that differences are paired: an image that is hard for
    both of two cells says nothing about which is better. The same cells always give the same figures.
    """

    def __init__(self, correct: Mapping[str, Bools], num_resamples: int = NUM_RESAMPLES) -> None:
        """`correct[cell]` is (N,): whether each test image was classified rightly."""
        self.num_resamples = num_resamples
        if not correct:
            self._accuracy: dict[str, Floats] = {}
            return
        right = np.stack(list(correct.values()))  # (cells, N)
        num_images = right.shape[1]
        random = np.random.default_rng(0)
        sums = [right.sum(1)]
        for _ in range(num_resamples):
            counts = np.bincount(random.integers(0, num_images, num_images), minlength=num_images)
            sums.append(right @ counts)
        accuracy = np.stack(sums) / num_images  # (1 + resamples, cells); the first are the measured ones
        self._accuracy = dict(zip(correct, accuracy.T, strict=True))

    def mean(self, cells: Sequence[str]) -> Interval:
        """The mean accuracy of `cells`, which differ in their seed alone."""
        return self._interval([[self._accuracy[cell] for cell in cells]])

    def difference(self, groups: Sequence[Sequence[tuple[str, str]]]) -> Interval:
        """How much more accurate the first of two is than the second: the mean of `groups`, each of as much
        weight and each a mean over pairs of cells (a pair a seed). Seeds are drawn within their group."""
        accuracy = self._accuracy
        return self._interval([[accuracy[first] - accuracy[second] for first, second in g] for g in groups])

    def _interval(self, groups: list[list[Floats]]) -> Interval:
        random = np.random.default_rng(1)
        measured, resampled = [], []
        rows = np.arange(1, self.num_resamples + 1)
        for group in groups:
            values = np.stack(group)  # (seeds, 1 + resamples)
            num_seeds = len(values)
            drawn = random.integers(0, num_seeds, (max(num_seeds - 1, 1), self.num_resamples))
            measured.append(values[:, 0].mean())
            resampled.append(values[drawn, rows].mean(0))
        outside = (1 - LEVEL) / 2
        low, high = np.quantile(np.mean(resampled, 0), [outside, 1 - outside])
        return Interval(float(np.mean(measured)), float(low), float(high))


class Reliability(NamedTuple):
    """Predictions in equal bins of confidence; of the bins that hold any."""

    confidence: Floats  # mean of each bin
    accuracy: Floats
    num_images: Ints


def reliability(confidence: Floats, correct: Bools, num_bins: int = NUM_BINS) -> Reliability:
    """Accuracy by confidence (both (N,)) in `num_bins` equal bins, each with its upper edge."""
    bins = np.clip(np.ceil(confidence.astype(np.float64) * num_bins).astype(int) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    held = count > 0
    return Reliability(
        np.bincount(bins, confidence, num_bins)[held] / count[held],
        np.bincount(bins, correct, num_bins)[held] / count[held],
        count[held],
    )


def calibration_error(confidence: Floats, correct: Bools, num_bins: int = NUM_BINS) -> float:
    """The expected calibration error (0-1): by how much confidence and accuracy differ, over all images."""
    bins = reliability(confidence, correct, num_bins)
    return float(np.abs(bins.accuracy - bins.confidence) @ bins.num_images / bins.num_images.sum())


def confusion(labels: Ints, predicted: Ints, num_classes: int) -> Ints:
    """Counts (classes, classes): a row a true class, a column a predicted one."""
    pairs = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def pareto_front(cost: Sequence[float], value: Sequence[float]) -> list[int]:
    """The places, by rising cost, of what nothing beats: nothing that costs as little is worth more, and
    nothing that is worth as much costs less. Equals are all on it."""
    front: list[int] = []
    for place in sorted(range(len(cost)), key=lambda i: (cost[i], -value[i])):
        last = front[-1] if front else None
        if (
            last is None
            or value[place] > value[last]
            or (cost[place], value[place]) == (cost[last], value[last])
        ):
            front.append(place)
    return front
