"""The leaderboard: a row a cell, beside what was published of it, and the tables that a person reads.

All accuracies are in 0-1, measured on the test split with the weights of the last epoch. The best epoch
stands beside it, marked as what it is: an epoch that was chosen by looking at the test split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from resgrid.data.dataset import Meta
from resgrid.errors import ResgridError
from resgrid.evaluation import Result
from resgrid.grid import Cell
from resgrid.models import place_of
from resgrid.optimizers import OPTIMIZERS
from resgrid.project import read_json, read_yaml
from resgrid.report.statistics import Ints, calibration_error
from resgrid.run_status import STATUSES, Run

MEASURED = (  # of run.json, as they stand there
    "train_accuracy", "train_loss", "epochs", "num_parameters", "num_trainable", "validation_accuracy",
    "validation_loss", "best_test_accuracy", "best_epoch",
)  # fmt: skip
CIFAR10_IMAGES = {"train": 50_000, "test": 10_000}  # all of which the original experiments used


def leaderboard(results: list[Result], meta: Meta, labels: Ints) -> pd.DataFrame:
    """A row a cell, best first: completed ones by test accuracy, then the others by their status.

    `labels` (N,) are the test split's. A cell that is stale, or of other data, stands there with the numbers
    that it was trained with.
    """
    present = [meta.class_names[label] for label in np.unique(labels)]
    return _ranked(pd.DataFrame([_row(result, meta, present) for result in results]))


def _ranked(frame: pd.DataFrame) -> pd.DataFrame:
    order = frame["status"].map(STATUSES.index)
    ranked = frame.assign(order=order).sort_values(
        ["order", "test_accuracy", "test_loss", "cell"], ascending=[True, False, True, True], kind="stable"
    )
    return ranked.drop(columns="order").reset_index(drop=True)


def _row(result: Result, meta: Meta | None, classes: Sequence[str] = ()) -> dict[str, Any]:
    cell, metrics, timing = result.cell, result.metrics or {}, result.timing or {}
    scores, predictions = result.scores, result.predictions
    published = published_accuracy(cell, meta) if meta else None
    return {
        "cell": cell.id,
        "architecture": cell.architecture,
        "optimizer": cell.optimizer.name,
        "seed": metrics.get("seed", cell.seed),
        "status": result.status,
        "test_accuracy": scores.accuracy if scores else metrics.get("test_accuracy"),
        "test_loss": scores.loss if scores else metrics.get("test_loss"),
        **{key: metrics.get(key) for key in MEASURED},
        "published_accuracy": published,
        "difference": scores.accuracy - published if scores and published else None,
        "study": cell.study,
        "rate_factor": cell.rate_factor,
        "approach": metrics.get("approach", cell.recipe.approach),
        "initial_weights": metrics.get("initial_weights"),
        "learning_rate": metrics.get("learning_rate", cell.optimizer.lr),
        "batch_size": metrics.get("batch_size", cell.recipe.batch_size),
        "cause": result.cause,
        "train_seconds": timing.get("train_seconds"),
        "images_per_second": timing.get("images_per_second"),
        "device": timing.get("device_name"),
        "precision": timing.get("precision"),
        "threads": timing.get("threads"),
        "weights_sha256": metrics.get("weights_sha256"),
        "calibration_error": predictions and calibration_error(predictions.confidence, predictions.correct),
        "remark": _remarks(result, meta, classes),
    }


@cache
def _published() -> dict[str, tuple[float, dict[str, Any]]]:
    """Accuracy (0-1, of a single run) and stated settings, by `resnet20-sgd`, of the original experiments."""
    experiments = read_yaml(Path(__file__).with_name("published.yaml")).values()
    return {
        name: (accuracy, each["settings"])
        for each in experiments
        for name, accuracy in each["accuracy"].items()
    }


def published_accuracy(cell: Cell, meta: Meta) -> float | None:
    """What was published for the grid's own cell, where it has the same data and every stated setting."""
    accuracy, settings = _published().get(f"{cell.architecture}-{cell.optimizer.name}", (None, {}))
    counts = {split: meta.num_images.get(split) for split in CIFAR10_IMAGES}
    own = {"learning_rate": cell.optimizer.lr} | cell.optimizer.settings.model_dump()
    own = json.loads(json.dumps(own | cell.recipe.model_dump()))  # tuples become lists, as in YAML
    is_same = (
        meta.source == "cifar10"
        and counts == CIFAR10_IMAGES
        and all(
            own[key] == ((own[key] or {}) | stated if isinstance(stated, dict) else stated)
            for key, stated in settings.items()
        )
    )
    return accuracy if cell.is_base and is_same else None


def _remarks(result: Result, meta: Meta | None, classes: Sequence[str]) -> str | None:
    """What a reader has to know of a cell before comparing it with others.

    A model may give one of `classes` to no image, as one that has learned the largest class alone.
    """
    notes, recipe = [], result.cell.recipe
    if meta and result.predictions:
        predicted = {meta.class_names[place] for place in np.unique(result.predictions.classes)}
        if never := [name for name in classes if name not in predicted]:
            more = f" and {len(never) - 10} more" if len(never) > 10 else ""
            notes.append(f"never predicts {', '.join(never[:10])}{more}")
    if recipe.approach == "frozen_base" and recipe.initial_weights.name == "random":
        notes.append(
            "a frozen base with random weights: its batch norms keep the mean 0 and variance 1 they start "
            "with, so they do not normalise these images"
        )
    return "; ".join(notes) or None


def at_rates(frame: pd.DataFrame, factors: Mapping[str, float]) -> pd.DataFrame:
    """The grid's cells at the rates of `factors`, by `resnet20-sgd`; elsewhere the base rate."""
    compared = (frame["architecture"] + "-" + frame["optimizer"]).map(lambda name: factors.get(name, 1.0))
    return frame[frame["study"].isna() & (frame["rate_factor"] == compared)]


def by_optimizer(frame: pd.DataFrame, factors: Mapping[str, float]) -> pd.DataFrame:
    """Architecture x optimizer: test accuracy at the rates of `factors`, as text with its spread over seeds.

    Where several rates were tried, and so `factors` has one, the text names the rate.
    """
    grid = at_rates(frame, factors)
    architectures = sorted(grid["architecture"].unique(), key=place_of)
    optimizers = [name for name in OPTIMIZERS if name in set(grid["optimizer"])]
    table = pd.DataFrame(index=pd.Index(architectures, name="architecture"), columns=optimizers, dtype=object)
    for (architecture, optimizer), cells in grid.groupby(["architecture", "optimizer"]):
        tried = f"{architecture}-{optimizer}" in factors
        rate = f" at {cells['learning_rate'].iloc[0]:g}" if tried else ""
        table.loc[architecture, optimizer] = spread(cells) + rate
    return table


def spread(cells: pd.DataFrame) -> str:
    """`98.12 ± 0.21` of the completed cells among replicates, with the number of those that are not."""
    completed = cells.loc[cells["status"] == "completed", "test_accuracy"] * 100
    text = f"{completed.mean():.2f}" if len(completed) else ""
    if len(completed) > 1:
        text += f" ± {completed.std():.2f}"  # over seeds, with n - 1
    for status in STATUSES[1:]:
        count = int((cells["status"] == status).sum())
        if count:
            text += f" ({count} {status})" if len(cells) > 1 else status
    return text.strip()


def missing(frame: pd.DataFrame) -> list[str]:
    """What is not in the comparisons: how much, and a line for each cell whose reason is known."""
    without = frame[frame["status"].isin(["failed", "missing"])]
    others = frame[frame["status"].isin(["stale", "other data"])]
    lines = []
    if len(without):
        names = ", ".join(without["cell"])
        lines.append(f"Missing: {len(without)} of {len(frame)} cells have no result yet: {names}")
    if len(others):
        names = ", ".join(others["cell"])
        lines.append(f"Not today's: {len(others)} of {len(frame)} cells are left out of comparisons: {names}")
    known = pd.concat([without, others]).dropna(subset="cause")
    for cell, status, cause in known[["cell", "status", "cause"]].itertuples(index=False):
        lines.append(f"{cell}{'' if status == 'missing' else f' {status}'}: {cause}")
    return lines


def as_of_now(frame: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """The leaderboard that `evaluate` wrote, with the status that each cell has by now.

    The figures of a cell that has been trained since are those of its training.
    """
    rows: dict[Any, dict[Any, Any]] = {row["cell"]: row for row in frame.to_dict(orient="records")}
    now = []
    for run in runs:
        row = rows.get(run.cell.id, {})
        if run.record is None or row.get("weights_sha256") != run.record["weights_sha256"]:
            timing = read_json(run.folder / "timing.json") if run.record else None
            row = _row(Result(cell=run.cell, status=run.status, metrics=run.record, timing=timing), None)
            if run.record:
                row["remark"] = "scored by its training: `dvc repro -s evaluate` compares it"
        now.append(row | {"status": run.status, "cause": run.reason, "rate_factor": run.cell.rate_factor})
    return _ranked(pd.DataFrame(now))


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that a person compares, as text; those in which nothing stands are left out."""

    def text(column: str, form: str, times: int = 1) -> pd.Series[str]:
        return frame[column].map(lambda value: "" if pd.isna(value) else format(times * value, form))

    test = text("test_accuracy", ".2f", 100)
    is_other = frame["status"].isin(["stale", "other data"])  # its figures are those of its own numbers
    marked = frame["status"].mask(is_other, test + " " + frame["status"])
    best = text("best_test_accuracy", ".2f", 100) + " @ " + text("best_epoch", ".0f")
    return _without_empty(
        pd.DataFrame(
            {
                "cell": frame["cell"],
                "rate": text("learning_rate", "g").where(frame["weights_sha256"].notna(), ""),
                "validation %": text("validation_accuracy", ".2f", 100),
                "test %": test.where(frame["status"] == "completed", marked),
                "test loss": text("test_loss", ".4f"),
                "train %": text("train_accuracy", ".2f", 100),
                "best % @ epoch": best.where(frame["best_epoch"].notna(), ""),
                "epochs": text("epochs", ".0f"),
                "parameters": text("num_parameters", ",.0f"),
                "seconds": text("train_seconds", ",.1f"),
                "images/s": text("images_per_second", ",.0f"),
                "published %": text("published_accuracy", ".2f", 100),
                "difference": text("difference", "+.2f", 100),
                "remark": frame["remark"].fillna(""),
            }
        )
    )


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.loc[:, (frame != "").any()]


def text_table(frame: pd.DataFrame, form: str = "simple") -> str:
    """`frame` of texts as a table in one of tabulate's formats: words left, figures right."""
    frame = _without_empty(frame.fillna("").astype(str))
    align = ["right" if frame[name].str.contains(r"^[-+]?\d").any() else "left" for name in frame]
    rows = frame.to_numpy().tolist()
    return tabulate(rows, headers=list(frame.columns), tablefmt=form, colalign=align, disable_numparse=True)


def headline(frame: pd.DataFrame, factors: Mapping[str, float]) -> dict[str, Any]:
    """The figures for `dvc metrics show`: how much there is, and the best at the rates that are compared."""
    counts = frame["status"].value_counts()
    head: dict[str, Any] = {
        "cells": len(frame),
        "completed": int(counts.get("completed", 0)),
        "diverged": int(counts.get("diverged", 0)),
        "stale": int(counts.get("stale", 0) + counts.get("other data", 0)),
        "missing": int(counts.get("missing", 0) + counts.get("failed", 0)),
    }
    is_compared = frame["study"].notna() | frame["cell"].isin(at_rates(frame, factors)["cell"])
    for best in frame[is_compared & (frame["status"] == "completed")].head(1).to_dict("records"):
        head |= {"best_cell": best["cell"], "best_cell_test_accuracy": best["test_accuracy"]}
    return head


def read_leaderboard(reports: Path) -> pd.DataFrame:
    """The `leaderboard.csv` that `evaluate` wrote; raises ResgridError if there is none."""
    path = reports / "leaderboard.csv"
    if not path.is_file():
        raise ResgridError(
            f"{path}: there is no comparison yet. `dvc repro` trains and compares; "
            "`dvc repro -s evaluate` compares what is trained."
        )
    return pd.read_csv(path, dtype=dict.fromkeys(("study", "cause", "device", "remark"), "string"))


def read_findings(reports: Path) -> dict[str, Any]:
    """The `findings.json` that `evaluate` wrote; raises ResgridError if it cannot be read."""
    return read_json(reports / "findings.json", "`dvc repro -s evaluate` makes it.")
