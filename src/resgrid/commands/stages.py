"""The stages, as `dvc repro` runs them, and cells trained on a machine with torch alone."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

from resgrid.commands import PROCESSED, RAW, REPORTS
from resgrid.commands.grid import show
from resgrid.config import load_params
from resgrid.grid import choose, expand, find_cell
from resgrid.progress import Progress
from resgrid.project import project_root
from resgrid.provenance import check_code, check_links, check_lock
from resgrid.stage_record import RECORD_ONLY, NoResult, recorded


def _refuse_if_in_vain() -> None:
    """Compute nothing where a result made elsewhere is only to be taken over, or where DVC records none."""
    if os.environ.get(RECORD_ONLY):
        raise NoResult(
            "not run here: a worker's result was to be taken from the DVC remote, which has none of these "
            "params, data and code."
        )
    if os.environ.get("DVC_STAGE"):
        check_links(Path())


@recorded()
def download(options: argparse.Namespace) -> None:
    _refuse_if_in_vain()
    from resgrid.cost import announce
    from resgrid.data.fetch import download, known_num_train

    params = load_params()
    if num_train := known_num_train(params.data):
        announce(params, num_train)
    with Progress("download", None, "B") as progress:
        download(params.data, RAW, progress.update)


@recorded()
def preprocess(options: argparse.Namespace) -> None:
    _refuse_if_in_vain()
    from resgrid.cost import announce
    from resgrid.data.fetch import known_num_train
    from resgrid.data.preprocess import preprocess

    params = load_params()
    with Progress("preprocess", None, "images") as progress:
        meta = preprocess(params.data, params.preprocess, RAW, PROCESSED, progress.update)
    counts = ", ".join(f"{count:,} {split}" for split, count in meta.num_images.items())
    print(f"{counts} images of {len(meta.class_names)} classes")
    if not known_num_train(params.data):
        announce(params, meta.num_images["train"])


def train(options: argparse.Namespace) -> int | None:
    is_one = len(options.cells) == 1 and not any(mark in options.cells[0] for mark in "*?[")
    if not is_one or options.slots or options.hours is not None:
        return _train_side_by_side(options)
    _train_one(options)
    return None


@recorded()
def _train_one(options: argparse.Namespace) -> None:
    _refuse_if_in_vain()
    params = load_params()
    cell = find_cell(params, options.cells[0])
    check_lock(Path())
    check_code(Path())
    with recorded(by_hand=cell.stage):
        from resgrid.train_cell import train

        train(cell, params.name, options.device, options.afresh)


def _train_side_by_side(options: argparse.Namespace) -> int:
    from resgrid.offline import train_side_by_side

    cells = choose(load_params(), options.cells)
    seconds = math.inf if options.hours is None else 3600 * options.hours
    passed_on = ["--afresh"] if options.afresh else []
    passed_on += ["--device", options.device] if options.device else []
    missing = train_side_by_side(cells, project_root(), options.slots or 1, seconds, passed_on)
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are trained.")
    return 1 if missing else 0


def take_in(options: argparse.Namespace) -> int:
    from resgrid.data.dataset import load_meta
    from resgrid.dvc.pipeline import dvc
    from resgrid.offline import take_in

    digest = load_meta(PROCESSED).digest
    taken, refused = take_in(options.folder.resolve(), load_params(), digest, project_root())
    if taken:
        dvc(Path(), "commit", "--force", *(cell.stage for cell in taken))
        print(f"Recorded in dvc.lock: {', '.join(cell.id for cell in taken)}.")
        print("`resgrid sync` gives them their runs in MLflow, `dvc repro -s evaluate` compares them.")
    for line in refused:
        print(f"resgrid: refused: {line}", file=sys.stderr)
    return 1 if refused else 0


@recorded()
def evaluate(options: argparse.Namespace) -> None:
    params = load_params()

    from resgrid.data.dataset import load_meta, load_split
    from resgrid.evaluation import evaluate
    from resgrid.report.findings import Findings
    from resgrid.report.page import write_report
    from resgrid.run_status import find_runs
    from resgrid.training.device import choose_device, device_name

    meta = load_meta(PROCESSED)
    test = load_split(PROCESSED, "test")
    validation = load_split(PROCESSED, "validation") if "validation" in meta.num_images else None
    cells, predictions, results = expand(params), REPORTS / "predictions", []
    shutil.rmtree(predictions, ignore_errors=True)  # of cells that are no more
    device = choose_device(options.device)
    with Progress("evaluate", len(cells), "cells") as progress:
        for run in find_runs(cells, Path()):
            results.append(evaluate(run, test, device, validation, predictions))
            progress.update(len(results))
    predictions.mkdir(parents=True, exist_ok=True)  # an output of the stage, also where nothing was scored
    findings = Findings(results, test, meta, params.name, device_name(device), predictions)
    write_report(findings, REPORTS)
    show(findings.frame, findings.as_dict())
    print(f"\nThe report: {REPORTS / 'index.html'}, a page for any browser")
