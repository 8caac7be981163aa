"""Trained models and weights: pictures, other programs, other people's weights."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from resgrid.commands import PROCESSED, RUNS
from resgrid.errors import ResgridError
from resgrid.normalizations import NORMALIZATIONS
from resgrid.schema import Triple

if TYPE_CHECKING:
    from torch import nn

    from resgrid.training.engine import Scores
    from resgrid.weights import WeightsInfo


def predict(options: argparse.Namespace) -> int:
    from resgrid.predict import find_pictures, predict
    from resgrid.training.device import choose_device

    passed_over: Counter[str] = Counter()
    files = find_pictures(options.pictures, passed_over)
    model, info, name = _model(options.model)
    if not options.json:
        print(f"{name}: {info.architecture}, {len(info.class_names)} classes", file=sys.stderr)
    rows, count, failed = [], 0, 0
    for each in predict(model, info, files, choose_device(options.device), options.top):
        count, failed = count + 1, failed + (each.error is not None)
        if options.json:
            rows.append(each.as_dict())
        elif each.error:
            print(f"resgrid: {each.error}", file=sys.stderr)
        else:
            print(f"{each.file}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in each.top))
    if options.json:
        print(json.dumps(rows, indent=2))
    if failed:
        print(f"resgrid: {failed:,} of {count:,} pictures could not be read.", file=sys.stderr)
    if kinds := ", ".join(f"{number:,} × {kind}" for kind, number in passed_over.items() if number):
        print(f"resgrid: passed over: {kinds}.", file=sys.stderr)
    return 1 if failed else 0


def _model(name: str) -> tuple[nn.Module, WeightsInfo, str]:
    """What `--model` means, by `find_weights`, and what to call it."""
    from resgrid import tracking
    from resgrid.weights import load_model

    weights, origin_of_weights = tracking.find_weights(name, RUNS)
    return *load_model(weights), origin_of_weights


def export(options: argparse.Namespace) -> None:
    from resgrid.data.sources import truncate
    from resgrid.export import export, images_to_compare

    model, info, origin_of_weights = _model(options.model)
    name = Path(options.model).stem if Path(options.model).is_file() else options.model.rpartition("/")[2]
    out = options.out or Path(f"{name}.{options.format}")
    images, origin = images_to_compare(PROCESSED)
    difference = export(model, info, options.format, out, images)
    print(
        f"{out}: {out.stat().st_size / 1e6:,.1f} MB, made from {origin_of_weights}\n"
        "It takes RGB images, float32 (N, 3, 32, 32) on the 0–1 scale, to probabilities "
        f"(N, {len(info.class_names)}), in the order {truncate(info.class_names)}.\n"
        f"On {len(images)} {origin} it differs from the model by {difference:.1e} of probability at most."
    )


def init(options: argparse.Namespace) -> None:
    from resgrid.scaffold import init

    print(init(options.folder, options.data))


def summary(options: argparse.Namespace) -> None:
    from resgrid.summary import summarize

    summary = summarize(options.model)
    print(json.dumps(summary.as_dict(), indent=2) if options.json else summary.table())


def import_weights(options: argparse.Namespace) -> None:
    """Convert; say what was checked, what had to be assumed, and how to find out whether that is right."""
    from resgrid.convert import import_weights

    given = _normalization(options)
    info = import_weights(options.file, options.model, options.out, options.class_names, given, options.key)
    mean, std = (f"({', '.join(f'{value:.4g}' for value in values)})" for values in (info.mean, info.std))
    print(
        f"{options.out}: {info.architecture} from {options.file}\n"
        "Checked: the names, shapes and types of its tensors. No file of weights says how the network "
        "computes with them, in which order its classes are, or what normalised its images.\n"
        f"Images will be normalised by mean {mean} and deviation {std}"
        f"{'' if given else ', which is assumed: --normalization or --mean and --std name others'}."
    )
    if options.data is None:
        print(f"See whether it is right: resgrid score {shlex.quote(str(options.out))} --data IMAGES")
    elif _print_scores(options.out, options.data, options.device).accuracy < 2 / len(info.class_names):
        print(
            "That is about as good as guessing. The file may be of another network with the same shapes, or "
            "of other classes or another order of them, or its images were normalised by other figures."
        )


def _normalization(options: argparse.Namespace) -> tuple[Triple, Triple] | None:
    """Mean and deviation as they were given; None if they were not."""
    given = [tuple(figures) for figures in (options.mean, options.std) if figures]
    if len(given) == 1 or (given and options.normalization):
        raise ResgridError("--normalization: give either its name, or both --mean and --std.")
    if given:
        return given[0], given[1]
    return NORMALIZATIONS[options.normalization] if options.normalization else None


def score(options: argparse.Namespace) -> None:
    _print_scores(options.file, options.data, options.device, options.split, options.json)


def _print_scores(
    weights: Path, data: Path, device: str | None, split: str = "test", as_json: bool = False
) -> Scores:
    from resgrid.evaluation import score_file
    from resgrid.training.device import choose_device

    scores = score_file(weights, data, split, choose_device(device))
    text = f"accuracy {100 * scores.accuracy:.2f} %   loss {scores.loss:.4f}   {scores.num_images:,} images"
    print(json.dumps(asdict(scores)) if as_json else text)
    return scores
