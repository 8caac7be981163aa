"""What the grid says: every figure and sentence of the report, before they are drawn and printed.

`reports/findings.json` is all of it as data; the page, `report.md`, the terminal and the README's block are
made of the same.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from resgrid import __version__
from resgrid.data.dataset import Meta, Split
from resgrid.evaluation import Predictions, Result, load_logits
from resgrid.grid import flat
from resgrid.progress import duration
from resgrid.report.comparisons import Comparison, Group, answer, compare, group, mean_accuracy
from resgrid.report.leaderboard import by_optimizer, leaderboard, missing
from resgrid.report.rates import choose_rates, sentences
from resgrid.report.statistics import Interval, pareto_front
from resgrid.run_status import started_at


@dataclass(frozen=True, kw_only=True)
class Study:
    """A cell of its own, beside the grid's cell of the same architecture, optimizer and seed."""

    cell: str
    status: str
    differs: str  # in what from the grid's cell; empty if there is none
    accuracy: Interval | None
    base: str | None
    base_accuracy: Interval | None


class Findings:
    """All that the report says of `results`, scored on `test` on `device`.

    `predictions` is the folder with the logits that `evaluate` wrote; without it nothing is averaged.
    """

    def __init__(
        self,
        results: list[Result],
        test: Split,
        meta: Meta,
        name: str,
        device: str,
        predictions: Path | None = None,
    ) -> None:
        self.results, self.test, self.meta, self.name = results, test, meta, name
        self.frame = leaderboard(results, meta, test.labels.numpy())
        choices = choose_rates(
            self.frame,
            num_validation=meta.num_images.get("validation", 0),
            num_test=meta.num_images["test"],
            num_classes=len(meta.class_names),
        )
        self.rates = [choice for choice in choices if len(choice.curve) > 1]  # none without factors
        self.factors = {f"{each.architecture}-{each.optimizer}": each.factor for each in self.rates}
        self.rate_sentences = sentences(self.rates)
        self.missing = missing(self.frame)
        self.table = by_optimizer(self.frame, self.factors)
        self.groups = group(results, self.factors)
        self.families = compare(self.groups)  # by what is compared
        self.answer = answer(self.groups, self.families)
        self.ensembles = self._ensembles(predictions)
        self.studies = _studies(results)
        self.made = how_it_was_made(results, meta, device)

    @property
    def comparisons(self) -> list[Comparison]:
        return [each for family in self.families.values() for each in family]

    @property
    def trained(self) -> list[Group]:
        """Those with a completed cell."""
        return [group for group in self.groups if group.completed]

    @property
    def scored(self) -> list[tuple[Result, Predictions]]:
        """Every cell whose weights were scored, in the order of the leaderboard."""
        results = {result.cell.id: result for result in self.results}
        ordered = [results[cell] for cell in self.frame["cell"]]
        return [(result, result.predictions) for result in ordered if result.predictions is not None]

    def front(self, cost: str) -> list[Group]:
        """The groups that nothing beats in accuracy at as little `cost`, a key of metrics or timing."""
        groups = self.trained
        front = pareto_front([g.mean(cost) for g in groups], [g.mean("test_accuracy") for g in groups])
        return [groups[place] for place in front]

    @property
    def question(self) -> str:
        """What the grid asks."""
        kinds = {
            "architecture": list(dict.fromkeys(each.architecture for each in self.groups)),
            "optimizer": list(dict.fromkeys(each.optimizer for each in self.groups)),
        }
        asked = " and ".join(f"which {kind} ({', '.join(of)})" for kind, of in kinds.items() if len(of) > 1)
        counts, seeds = self.meta.num_images, len({r.cell.seed for each in self.groups for r in each.results})
        sizes = sorted({len(each.curve) for each in self.rates if each.not_chosen is None})
        chosen = f", each at the best of {' or '.join(map(str, sizes))} rates, chosen on "
        chosen += f"{counts.get('validation', 0):,} validation images"
        return (
            f"Asked: {asked or 'how accurate a network'} is the most accurate on {counts['train']:,} "
            f"training and {counts['test']:,} test images of {len(self.meta.class_names)} classes "
            f"({self.meta.source}), with {seeds} seed{'s' if seeds != 1 else ''} a cell"
            f"{chosen if sizes else ''}."
        )

    @property
    def baseline(self) -> str:
        """What needs no network: to answer with the largest class each time."""
        counts = np.bincount(self.test.labels.numpy(), minlength=len(self.meta.class_names))
        largest = self.meta.class_names[int(counts.argmax())]
        return (
            f"Baseline: whoever always answers {largest}, the largest class of the test split, is right for "
            f"{100 * counts.max() / counts.sum():.2f} %."
        )

    def _ensembles(self, predictions: Path | None) -> dict[str, float]:
        """By group of several seeds: the accuracy (0-1) of the mean of their networks' probabilities."""
        accuracy, labels = {}, self.test.labels.numpy()
        for each in self.trained:
            cells = [result.cell.id for result in each.completed]
            if predictions and len(cells) > 1:
                logits = (load_logits(predictions, cell, "test").astype(np.float64) for cell in cells)
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
            "missing": self.missing,
            "table": self.table.to_dict(orient="index"),
            "groups": [
                {
                    "architecture": each.architecture,
                    "optimizer": each.optimizer,
                    "cells": {result.cell.id: result.status for result in each.results},
                    "accuracy": _plain(each.accuracy) if each.completed else None,
                    "ensemble_accuracy": self.ensembles.get(each.name),
                }
                for each in self.groups
            ],
            "comparisons": [
                {"of": what.lower(), "significant": each.is_significant} | _plain(each)
                for what, family in self.families.items()
                for each in family
            ],
            "rate_sentences": self.rate_sentences,
            "rates": _plain(self.rates),
            "studies": _plain(self.studies),
            "weights_sha256": {
                result.cell.id: (result.metrics or {}).get("weights_sha256") for result, _ in self.scored
            },
            "made": self.made,
        }


def _plain(value: Any) -> Any:
    """Dataclasses and intervals as JSON has them; it has no NaN."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Interval):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if value != value else value


def _studies(results: list[Result]) -> list[Study]:
    def key(result: Result) -> tuple[Any, ...]:
        return result.cell.architecture, result.cell.optimizer.name, result.cell.seed

    def accuracy(result: Result | None) -> Interval | None:
        return mean_accuracy([result]) if result and result.status == "completed" else None

    grid, studies = {key(each): each for each in results if each.cell.is_base}, []
    for result in (each for each in results if each.cell.study is not None):
        base, own = grid.get(key(result)), flat(result.cell.numbers)
        others = flat(base.cell.numbers) if base else own
        differing = [name for name in others | own if others.get(name) != own.get(name)]
        differs = "; ".join(
            f"{name.replace('_', ' ')} {_text(own.get(name))} for {_text(others.get(name))}"
            for name in differing
        )
        studies.append(
            Study(
                cell=result.cell.id,
                status=result.status,
                differs=differs,
                accuracy=accuracy(result),
                base=base.cell.id if base else None,
                base_accuracy=accuracy(base),
            )
        )
    return sorted(studies, key=lambda study: study.differs)


def _text(value: Any) -> str:
    """A setting's value as a person reads it: `end to end`, `0.3, 0.4, 0.5`, `none`."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value).replace("_", " ")


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
    made["Digest of the data"] = meta.digest
    made["Seeds"] = ", ".join(map(str, sorted({result.cell.seed for result in results})))
    if timings:
        begun = [datetime.fromtimestamp(started_at(t) // 10**6, UTC).isoformat() for t in timings]
        total = duration(sum(t["train_seconds"] for t in timings))
        made |= {
            "Commit that trained": _counted(
                f"{t.get('commit') or 'unknown'}{', with changes' if t.get('dirty') else ''}" for t in timings
            ),
            "Trained on": _counted(
                f"{t['device_name']}, {t['precision']}, threads: {t['threads']}" for t in timings
            ),
            "Trained with": _counted(
                f"torch {t['torch']}, Python {t['python']}, ResGrid {t['resgrid']}, {t['platform']}"
                for t in timings
            ),
            "Training time": f"{total} in sum over {len(timings)} cells, scoring not counted",
            "Begun": f"{min(begun)} to {max(begun)}",
        }
    made["Scored with"] = (
        f"torch {torch.__version__}, Python {platform.python_version()}, ResGrid {__version__}, in fp32 on "
        f"{device}, from the weights files"
    )
    return made


def _counted(texts: Iterable[str]) -> str:
    """Each different text once, with its number of cells."""
    return "; ".join(f"{text} ({count} cells)" for text, count in Counter(texts).items())
