"""How often the report's 95 % intervals hold the truth: `python benchmarks/intervals.py`, ten seconds.

For each setting 10,000 data sets are drawn from a known truth. Prints the tables of benchmarks/intervals.md.
Accuracies of seeds are normal around means that are drawn from 90 to 97 %, so that the truth lies anywhere
between two counts of images.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pandas as pd
from tabulate import tabulate

from resgrid.report.statistics import LEVEL, Bounds, Floats, over_images, over_seeds, wilson

NUM_DATA_SETS = 10_000
SEEDS = (2, 3, 5, 10)
EXACT = 10**12  # so many test images that seeds never tie
# Test images, and the deviation of an accuracy over seeds; of 360 images one is worth 0.28 %.
SETTINGS = ((EXACT, 0.0047), (10_000, 0.0025), (360, 0.001), (360, 0.0025), (360, 0.0047), (360, 0.01))
NUM_ARCHITECTURES = 4  # in a mean over architectures

# How many points the mean accuracy at factors 1, 3, 0.3, 0.1, 10 lies below the best: as near as equals are
# taken, so that the first of several maxima is the one that the report chooses.
CURVES = {"peaked": (0.0, 0.3, 1.0, 3.0, 8.0), "flat": (0.0, 0.0, 0.0, 0.0, 0.0)}
NUM_OPTIMIZERS = 5  # so ten comparisons


def over_trainings(num_data_sets: int = NUM_DATA_SETS) -> pd.DataFrame:
    """By setting: the `coverage` of intervals over seeds, and how often equals differ by the test."""
    random = np.random.default_rng(0)

    def draw(truth: Floats, deviation: float, num_seeds: int, num_test: int) -> Floats:
        accuracy = truth[..., None] + deviation * random.standard_normal((*truth.shape, num_seeds))
        return np.round(accuracy * num_test) / num_test

    def experiment(kind: str, n: int, deviation: float, num_test: int, equal: bool) -> tuple[Bounds, Floats]:
        first = random.uniform(0.90, 0.97, (NUM_ARCHITECTURES, num_data_sets))
        second = first if equal else random.uniform(0.90, 0.97, first.shape)
        one, truth, resolution = first[0], first[0] - second[0], 1 / num_test
        match kind:
            case "mean":
                return over_seeds([draw(one, deviation, n, num_test)], [1], resolution), one
            case "difference, paired":
                values = draw(one, deviation, n, num_test) - draw(second[0], deviation, n, num_test)
                return over_seeds([values], [1], resolution), truth
            case "difference, unpaired":
                samples = [draw(one, deviation, n, num_test), draw(second[0], deviation, n, num_test)]
                return over_seeds(samples, [1, -1], resolution), truth
            case "difference, unpaired, from 2 seeds of twice the deviation":
                samples = [draw(one, deviation, n, num_test), draw(second[0], 2 * deviation, 2, num_test)]
                return over_seeds(samples, [1, -1], resolution), truth
            case "mean difference of 4 architectures, paired":
                values = draw(first, deviation, n, num_test) - draw(second, deviation, n, num_test)
                bounds = over_seeds([values.mean(0)], [1], resolution / NUM_ARCHITECTURES)
                return bounds, (first - second).mean(0)
            case "mean difference of 4 architectures, unpaired":
                samples = [*draw(first, deviation, n, num_test), *draw(second, deviation, n, num_test)]
                weights = np.repeat([1, -1], NUM_ARCHITECTURES) / NUM_ARCHITECTURES
                return over_seeds(samples, weights.tolist(), resolution), (first - second).mean(0)
        raise ValueError(kind)

    rows = []
    for kind in (
        "mean",
        "difference, paired",
        "mean difference of 4 architectures, paired",
        "difference, unpaired",
        "difference, unpaired, from 2 seeds of twice the deviation",
        "mean difference of 4 architectures, unpaired",
    ):
        for num_test, deviation in SETTINGS:
            for n in SEEDS:
                setting = {"interval": kind, "test images": num_test, "deviation": deviation, "seeds": n}
                covered = coverage(*experiment(kind, n, deviation, num_test, equal=False))
                rows.append(setting | {"coverage": covered, "false": float("nan")})
                if "difference" in kind:
                    rows[-1]["false"] = false(experiment(kind, n, deviation, num_test, equal=True)[0])
    return pd.DataFrame(rows)


def over_test_images(num_data_sets: int = NUM_DATA_SETS) -> pd.DataFrame:
    """The same for intervals over test images."""
    random = np.random.default_rng(0)
    rows = []
    for num_test in (360, 10_000):
        for low, high in ((0.5, 0.9), (0.9, 0.97), (0.97, 0.995)):
            truth = random.uniform(low, high, num_data_sets)
            counts = random.binomial(num_test, truth)
            ends = {count: wilson(count, num_test) for count in np.unique(counts).tolist()}
            bounds = np.array([ends[count] for count in counts.tolist()])
            held = (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
            rows.append(
                {
                    "interval": f"one model of {100 * low:g} to {100 * high:g} %, Wilson",
                    "test images": num_test,
                    "coverage": 100 * held.mean(),
                }
            )
        for num_pairs in (1, 4):
            for share in (0.02, 0.05, 0.1):
                bounds, truth = _pairs(random, num_data_sets, num_test, num_pairs, share, equal=False)
                same, _ = _pairs(random, num_data_sets, num_test, num_pairs, share, equal=True)
                what = "two models" if num_pairs == 1 else f"mean of {num_pairs} pairs of models"
                rows.append(
                    {
                        "interval": f"{what} that disagree on {100 * share:g} % of images, paired",
                        "test images": num_test,
                        "coverage": coverage(bounds, truth),
                        "false": false(same),
                    }
                )
    return pd.DataFrame(rows)


def _pairs(
    random: np.random.Generator, num_data_sets: int, num_test: int, num_pairs: int, share: float, equal: bool
) -> tuple[Bounds, Floats]:
    """Pairs of models of which one alone is right on `share` of the images: on equally many, or not."""
    ahead = np.full(num_data_sets, 0.5) if equal else random.uniform(0.2, 0.8, num_data_sets)
    # An image's value goes by how many of the pairs disagree on it, each way.
    ways = [(plus, minus) for plus in range(num_pairs + 1) for minus in range(num_pairs + 1 - plus)]
    probabilities = np.stack(
        [
            math.comb(num_pairs, plus)
            * math.comb(num_pairs - plus, minus)
            * (share * ahead) ** plus
            * (share * (1 - ahead)) ** minus
            * (1 - share) ** (num_pairs - plus - minus)
            for plus, minus in ways
        ],
        axis=-1,
    )
    counts = random.multinomial(num_test, probabilities)  # (data sets, ways)
    values = np.array([(plus - minus) / num_pairs for plus, minus in ways])
    bounds = over_images(counts @ values, counts @ values**2, num_test, num_pairs)
    return bounds, share * (2 * ahead - 1)


def at_chosen_rates(num_data_sets: int = NUM_DATA_SETS) -> pd.DataFrame:
    """The same where the rate is chosen by validation accuracy, as `resgrid.report.rates` does.

    By setting: `coverage` of the interval of the test accuracy at the chosen rate, for other trainings at
    that rate; `optimism`, how many points the figure lies above that truth on the mean, on test and on
    validation images; `best`, how often the truly best rate is chosen. Of ten comparisons of five optimizers
    with the same curve by Holm's method: how often one is `false`, which holds of the two chosen rates that
    are equal or the other way round, and how often there is `any`, also of two rates that truly differ.

    Seeds deviate by 0.25 points; there are 5,000 validation and 10,000 test images. What distinguishes the
    validation images from all images is left out: it moves the choice too, but for reasons that the test
    images do not share, so this is the worse case.
    """
    random = np.random.default_rng(0)
    rows = []
    for curve, falls in CURVES.items():
        for shared in (False, True):
            for n in (3, 5):
                top = random.uniform(0.90, 0.95, (num_data_sets, 1, 1, 1))
                truth = top - np.array(falls)[:, None] / 100  # (data sets, 1, factors, 1)
                luck = 0.0025 * random.standard_normal((num_data_sets, NUM_OPTIMIZERS, len(falls), n))
                apart = 0.0025 * random.standard_normal(luck.shape)
                validation = np.rint((truth + (luck if shared else apart)) * 5_000)  # whole images
                test = np.rint((truth + luck) * 10_000) / 10_000
                best = validation.sum(-1).argmax(-1)[..., None, None]  # (data sets, optimizers, 1, 1)
                chosen = np.take_along_axis(test, best, 2)[:, :, 0]  # (data sets, optimizers, seeds)
                seen = np.take_along_axis(validation, best, 2)[:, :, 0] / 5_000
                mean = np.take_along_axis(np.broadcast_to(truth, (*test.shape[:3], 1)), best, 2)[:, :, 0, 0]
                pairs = list(combinations(range(NUM_OPTIMIZERS), 2))
                differences = [over_seeds([chosen[:, i] - chosen[:, j]], [1], 1 / 10_000) for i, j in pairs]
                p = np.array([each.p for each in differences])  # (pairs, data sets)
                steps = np.arange(len(pairs), 0, -1)[:, None]
                holm = np.maximum.accumulate(np.sort(p, 0) * steps)  # as `statistics.holm`, for many sets
                found = np.take_along_axis(holm, p.argsort(0).argsort(0), 0) <= 1 - LEVEL
                signs = np.sign(np.array([each.estimate for each in differences]))
                wrong = signs != np.sign(np.array([mean[:, i] - mean[:, j] for i, j in pairs]))
                rows.append(
                    {
                        "curve": curve,
                        "luck": "shared" if shared else "apart",
                        "seeds": n,
                        "coverage": coverage(over_seeds([chosen], [1], 1 / 10_000), mean),
                        "optimism": 100 * float((chosen.mean(-1) - mean).mean()),
                        "on validation": 100 * float((seen.mean(-1) - mean).mean()),
                        "best": 100 * float((best == 0).mean()) if curve == "peaked" else float("nan"),
                        "false of ten": 100 * float((found & wrong).any(0).mean()),
                        "any of ten": 100 * float(found.any(0).mean()),
                    }
                )
    return pd.DataFrame(rows)


def coverage(bounds: Bounds, truth: Floats) -> float:
    """The share of `bounds`, in %, that hold `truth`."""
    return 100 * float(((bounds.low <= truth) & (truth <= bounds.high)).mean())


def false(of_equals: Bounds) -> float:
    """The share, in %, of comparisons of equals whose test finds a difference."""
    return 100 * float((of_equals.p <= 1 - LEVEL).mean())


def table(frame: pd.DataFrame) -> str:
    """`frame` as Markdown: `95.1 (4.9)` is the coverage, and how often equals test as different."""
    shown = frame.copy()
    shown["test images"] = ["endless" if count == EXACT else f"{count:,}" for count in frame["test images"]]
    figures = zip(frame["coverage"], frame["false"], strict=True)
    shown["coverage"] = [f"{c:.1f}" + ("" if math.isnan(f) else f" ({f:.1f})") for c, f in figures]
    shown = shown.drop(columns="false")
    if "seeds" in shown:
        shown["deviation"] = [f"{100 * deviation:g} %" for deviation in frame["deviation"]]
        keys = ["interval", "test images", "deviation"]
        wide = {key: rows.set_index("seeds")["coverage"] for key, rows in shown.groupby(keys, sort=False)}
        rows = [[*key, *(wide[key][n] for n in SEEDS)] for key in wide]
        shown = pd.DataFrame(rows, columns=[*keys, *(f"{n} seeds" for n in SEEDS)])
    align = ["left"] + ["right"] * (len(shown.columns) - 1)
    return tabulate(
        shown.to_numpy().tolist(), list(shown.columns), "pipe", colalign=align, disable_numparse=True
    )


if __name__ == "__main__":
    print(table(over_trainings()))
    print()
    print(table(over_test_images()))
    print()
    print(
        at_chosen_rates().to_markdown(index=False, floatfmt=("", "", "", ".1f", ".2f", ".2f", ".0f", ".1f"))
    )
