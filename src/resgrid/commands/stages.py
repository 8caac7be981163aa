"""The stages, as `dvc repro` runs them, and cells trained on a machine with torch alone."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resgrid.commands import LOCK, PROCESSED, RAW, REPORTS, RUNS
from resgrid.commands.grid import show
from resgrid.config import load_params
from resgrid.grid import expand, find_cell
from resgrid.progress import Progress, amount
from resgrid.project import project_root
from resgrid.stage_record import RECORD_ONLY, NoResult, recorded

if TYPE_CHECKING:
    from resgrid.config import Params
    from resgrid.grid import Cell


log = logging.getLogger(__name__)


def _refuse_if_in_vain() -> None:
    """Compute nothing where a result made elsewhere is only to be taken over, or where DVC records none."""
    from resgrid.provenance import check_links

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

        def on_image(split: str, done: int, total: int) -> None:
            progress.note = split
            progress.update(done, total)

        meta = preprocess(params.data, params.preprocess, RAW, PROCESSED, on_image)
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
    from resgrid import provenance

    params = load_params()
    cell = find_cell(params, options.cells[0])
    provenance.check_lock(Path())
    provenance.check_code(Path())

    with recorded(by_hand=cell.stage):
        _train_cell(options, params, cell)


def _train_cell(options: argparse.Namespace, params: Params, cell: Cell) -> None:
    from resgrid import leftovers, tracking, watch
    from resgrid.allocator import keep_freed_memory
    from resgrid.checkpoint import Checkpoints
    from resgrid.data.dataset import load_meta
    from resgrid.train import choose_threads, show_history, train_cell, write_metrics
    from resgrid.training.device import choose_device, choose_execution, device_name
    from resgrid.training.engine import Epoch

    watch.watch()
    keep_freed_memory()
    root = project_root()
    cache = root / ".resgrid/cache/inductor"  # of torch.compile, shared by all cells
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    device = choose_device(options.device)
    meta = load_meta(PROCESSED)
    weights = tracking.fetch_weights(cell.recipe.initial_weights)
    execution = choose_execution(cell, meta.num_images["train"], device)
    kept = leftovers.checkpoint_folder(root, Path.cwd().resolve())
    checkpoints = Checkpoints(kept, cell, meta.digest, device, str(execution), LOCK, options.afresh)
    threads = choose_threads(device, checkpoints.threads)
    epochs, finished = cell.recipe.epochs, checkpoints.num_epochs
    num_images = meta.num_images["train"] // cell.recipe.batch_size * cell.recipe.batch_size  # an epoch
    epochs_so_far = [Epoch(**epoch) for epoch in checkpoints.epochs]
    with (
        tracking.LiveRun(params.name, cell, meta.digest, checkpoints.started, checkpoints.epochs) as run,
        Progress(cell.id, epochs * num_images, "images") as progress,
    ):
        log.info("%s  %s on %s, %s", cell.id, execution, device_name(device), amount(threads, "threads"))
        if cell.engine.compile == "always" and not execution.compiled:
            log.info("%s  is not compiled: there is no C++ compiler with Python's headers here", cell.id)
        if finished:
            log.info("%s  goes on after epoch %d/%d", cell.id, finished, epochs)
            progress.begin(finished * num_images)

        def on_step(images: int, images_an_epoch: int) -> None:
            progress.update(finished * images_an_epoch + images)

        best, is_slow = 0.0, False
        for epoch in train_cell(cell, PROCESSED, RUNS / cell.id, device, on_step, weights, checkpoints):
            finished = epoch.epoch
            run.log_epochs([asdict(each) for each in epochs_so_far])  # their checkpoint is on the disk by now
            epochs_so_far.append(epoch)
            show_history(RUNS / cell.id, epochs_so_far)
            test = None if epoch.test_accuracy is None else f"{100 * epoch.test_accuracy:.2f} %"
            progress.note = f"epoch {epoch.epoch}/{epochs}" + (f", test {test}" if test else "")
            log.info(
                f"{cell.id}  epoch {epoch.epoch:3}/{epochs}  loss {epoch.train_loss:.4f}  "
                f"train {100 * epoch.train_accuracy:6.2f} %  {f'test {test:>8}  ' if test else ''}"
                f"{epoch.images_per_second:,.0f} images/s  {progress.remaining()}".rstrip()
            )
            best = max(best, epoch.images_per_second)
            if not is_slow and epoch.images_per_second < best / 4:
                is_slow = True
                log.warning(
                    "%s has fallen to a quarter of its best speed: other programs use what it computes on. "
                    "End them; or stop this and begin anew with fewer threads, which wait less for one "
                    "another: RESGRID_THREADS=1 resgrid train %s --afresh",
                    cell.id, cell.id,
                )  # fmt: skip
        write_metrics(RUNS / cell.id, params.name)
        run.complete(RUNS / cell.id)


def _train_side_by_side(options: argparse.Namespace) -> int:
    from resgrid.grid import choose
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

    from resgrid.data.dataset import Split, load_meta, load_split
    from resgrid.evaluation import evaluate
    from resgrid.report.findings import Findings
    from resgrid.report.page import write_report
    from resgrid.run_status import find_runs
    from resgrid.training.device import choose_device, device_name

    meta = load_meta(PROCESSED)
    names = [name for name in ("test", "validation") if name in meta.num_images]
    splits: dict[str, Split] = {name: load_split(PROCESSED, name) for name in names}
    cells, kept = expand(params), REPORTS / "predictions"
    shutil.rmtree(kept, ignore_errors=True)  # of cells that are no more
    device = choose_device(options.device)
    with Progress("evaluate", len(cells), "cells") as progress:
        results = []
        for run in find_runs(cells, Path()):
            results.append(evaluate(run, splits["test"], device, splits.get("validation"), kept))
            progress.update(len(results))
    kept.mkdir(parents=True, exist_ok=True)  # an output of the stage, also where nothing was scored
    findings = Findings(results, splits["test"], meta, params.name, device_name(device), kept)
    write_report(findings, REPORTS)
    show(findings.frame, findings.as_dict())
    print(f"\nThe report: {REPORTS / 'index.html'}, a page for any browser")
