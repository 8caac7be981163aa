"""What the grid says: every figure and sentence of the report, before they are drawn and printed.

`reports/findings.json` is all of it as data; the page, `report.md`, the terminal and the README's block are
made of the same.
"""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from resgrid import __version__
from resgrid.data.dataset import Meta, Split
from resgrid.evaluation import Predictions, Result, load_logits
from resgrid.grid import Cell, flat
from resgrid.progress import duration
from resgrid.report.comparisons import Comparison, Group, answer, compare, group, how_to_read, mean_accuracy
from resgrid.report.leaderboard import by_optimizer, leaderboard, missing
from resgrid.report.published import as_text, differing, publication
from resgrid.report.rates import RateChoice, choose_rates, sentences
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
class StudyPoint:
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
    """All that the report says of `results`, scored on `test` on `device`.

    `predictions` is the folder with the logits that `evaluate` kept; without it nothing is averaged.
    """

    results: list[Result]
    test: Split
    meta: Meta
    name: str
    device: str
    predictions: Path | None = None
    ensembles: dict[str, float] = field(init=False)  # group: accuracy (0-1) of its seeds' mean probabilities

    def __post_init__(self) -> None:
        self.frame = leaderboard(self.results, self.meta, self.test.labels.numpy())
        counts = self.meta.num_images
        choices = choose_rates(
            self.frame,
            num_validation=counts.get("validation", 0),
            num_test=counts["test"],
            num_classes=len(self.meta.class_names),
        )
        self.rates = [choice for choice in choices if len(choice.curve) > 1]  # none without factors
        self.factors = {f"{each.architecture}-{each.optimizer}": each.factor for each in self.rates}
        self.rate_sentences = sentences(self.rates)
        self.table = by_optimizer(self.frame, self.factors)
        self.groups = group(self.results, self.factors)
        optimizers, depths = compare(self.groups)
        self.families = {"Optimizers": optimizers, "Depths": depths}
        num_test = self.meta.num_images["test"]
        self.answer = answer(self.groups, self.families)
        self.how_to_read = how_to_read(self.groups, self.comparisons, num_test)
        self.ensembles = self._ensembles()
        self.published = _published(self.groups, self.meta)
        self.studies = _studies(self.results)
        self.made = how_it_was_made(self.results, self.meta, self.device)

    @property
    def comparisons(self) -> list[Comparison]:
        return [each for family in self.families.values() for each in family]

    @property
    def question(self) -> str:
        """What the grid asks."""
        kinds = {
            "architecture": list(dict.fromkeys(each.architecture for each in self.groups)),
            "optimizer": list(dict.fromkeys(each.optimizer for each in self.groups)),
        }
        asked = " and ".join(f"which {kind} ({', '.join(of)})" for kind, of in kinds.items() if len(of) > 1)
        counts, seeds = self.meta.num_images, len({r.cell.seed for each in self.groups for r in each.results})
        images = f"{counts['train']:,} training and {counts['test']:,} test images"
        return (
            f"Asked: {asked or 'how accurate a network'} is the most accurate on {images} of "
            f"{len(self.meta.class_names)} classes ({self.meta.source}), with "
            f"{seeds} seed{'s' if seeds != 1 else ''} a cell{self._chosen_on}."
        )

    @property
    def _chosen_on(self) -> str:
        sizes = sorted({len(each.curve) for each in self.rates if each.not_chosen is None})
        images = self.meta.num_images.get("validation", 0)
        of = " or ".join(map(str, sizes))
        return f", each at the best of {of} rates, chosen on {images:,} validation images" if sizes else ""

    @property
    def baseline(self) -> str:
        """What needs no network: to answer with the largest class each time."""
        counts = np.bincount(self.test.labels.numpy(), minlength=len(self.meta.class_names))
        largest = self.meta.class_names[int(counts.argmax())]
        return (
            f"Baseline: whoever always answers {largest}, the largest class of the test split, is right for "
            f"{100 * counts.max() / counts.sum():.2f} %."
        )

    def _ensembles(self) -> dict[str, float]:
        if self.predictions is None:
            return {}
        accuracy, labels = {}, self.test.labels.numpy()
        for each in self.trained:
            cells = [result.cell.id for result in each.completed]
            if len(cells) > 1:
                logits = (load_logits(self.predictions, cell, "test").astype(np.float64) for cell in cells)
                mean = np.mean([softmax(each, axis=1) for each in logits], axis=0)  # (N, classes)
                accuracy[each.name] = float((mean.argmax(1) == labels).mean())
        return accuracy

    def as_dict(self) -> dict[str, Any]:
        """What `findings.json` holds: accuracies and their differences in 0–1."""
        return {
            "name": self.name,
            "question": self.question,
            "baseline": self.baseline,
            "answer": self.answer,
            "how_to_read": self.how_to_read,
            "missing": missing(self.frame),
            "table": self.table.to_dict(orient="index"),
            "groups": [
                {
                    "architecture": each.architecture,
                    "optimizer": each.optimizer,
                    "cells": {result.cell.id: result.status for result in each.results},
                    "accuracy": _interval(each.accuracy) if each.completed else None,
                    "ensemble_accuracy": self.ensembles.get(each.name),
                }
                for each in self.groups
            ],
            "comparisons": [
                {
                    "of": what.lower(),
                    "first": each.first,
                    "second": each.second,
                    "over": each.over,
                    "epochs": each.epochs,
                    "num_seeds": each.num_seeds,
                    "difference": _interval(each.difference),
                    "p_holm": each.p,
                    "significant": each.is_significant,
                }
                for what, family in self.families.items()
                for each in family
            ],
            "rate_sentences": self.rate_sentences,
            "rates": [_rate(each) for each in self.rates],
            "studies": [
                {
                    "factor": each.factor,
                    "series": each.series,
                    "value": each.text,
                    "cell": each.result.cell.id,
                    "status": each.result.status,
                    "accuracy": _interval(each.accuracy) if each.accuracy else None,
                }
                for each in self.studies
            ],
            "weights_sha256": {
                result.cell.id: result.metrics.get("weights_sha256")
                for result in self.results
                if result.scores and result.metrics
            },
            "made": self.made,
        }

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


def _interval(interval: Interval) -> dict[str, Any]:
    values = interval._asdict()
    return {key: None if value != value else value for key, value in values.items()}  # NaN is not JSON


def _rate(choice: RateChoice) -> dict[str, Any]:
    return {
        "architecture": choice.architecture,
        "optimizer": choice.optimizer,
        "factor": choice.factor,
        "learning_rate": choice.chosen.learning_rate,
        "not_chosen": choice.not_chosen and choice.not_chosen.name.lower(),
        "missing": list(choice.missing),
        "bracket": choice.bracket and choice.bracket.name.lower(),
        "to_try": list(choice.to_try),
        "plateau": list(choice.plateau),
        "seeds": list(choice.seeds),
        "curve": [asdict(point) for point in choice.curve],
        "expected_test_accuracy": [_interval(each) for each in choice.expected],
        "one_seed_cost": choice.one_seed_cost,
    }


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


def _studies(results: list[Result]) -> list[StudyPoint]:
    """Studies by what differs between their cells and the grid's cell of the same name and seed."""
    grid = {_series(result.cell): result for result in results if result.cell.is_base}
    points: dict[tuple[str, str], list[StudyPoint]] = {}
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
        of_series = points.setdefault((factor, series), [])
        if base and not of_series:
            of_series.append(_point(base, factor, common.get(factor, "the grid's")))
        also = "; ".join(f"{key} {as_text(own.get(key))}" for key in differing if key != factor)
        of_series.append(_point(result, factor, own.get(factor, result.cell.study), also))
    factors = list(dict.fromkeys(factor for factor, _ in points))
    return [
        point
        for key in sorted(points, key=lambda key: factors.index(key[0]))
        for point in sorted(points[key], key=lambda point: -1.0 if point.value is None else point.value)
    ]


def _series(cell: Cell) -> str:
    return f"{cell.architecture}-{cell.optimizer.name}-{cell.seed}"


def _point(result: Result, factor: str, value: Any, also: str = "") -> StudyPoint:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return StudyPoint(
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
    counts = ", ".join(f"{count:,} {split}" for split, count in meta.num_images.items())
    made = {"Data": f"{meta.source}: {counts} images of {len(meta.class_names)} classes"}
    if broken := [name for names in meta.left_out.values() for name in names]:
        more = ", …" if len(broken) > 20 else ""
        names = ", ".join(broken[:20])
        made["Left out"] = f"{len(broken):,} pictures, broken or in two classes: {names}{more}"
    for kind, equal in meta.duplicates.items():
        heading = f"Equal pictures {kind.replace('_', ' ')}"
        made[heading] = f"{equal.num_images:,}, such as {', '.join(equal.first)}"
    made |= {
        "Digest of the data": meta.digest,
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
            "Commit that trained": _counted([_commit(timing) for timing in timings]),
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


def _commit(timing: dict[str, Any]) -> str:
    """The commit that a run was trained with, which its timing.json names: today's may be another."""
    changes = ", with changes" if timing.get("dirty") else ""
    return f"{timing.get('commit') or 'unknown'}{changes}"


def _counted(texts: list[str]) -> str:
    """Each different text once, with its number of cells."""
    return "; ".join(f"{text} ({count} cells)" for text, count in Counter(texts).items())
