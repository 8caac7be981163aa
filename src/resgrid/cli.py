"""The command line: `resgrid COMMAND`.

Each command imports what it needs when it runs: `resgrid cells` pays for no torch, and `resgrid --help` for
nothing but argparse.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from resgrid import __version__
from resgrid.errors import ResgridError
from resgrid.models import ARCHITECTURES
from resgrid.normalizations import NORMALIZATIONS
from resgrid.progress import show_messages

UNWRITABLE = (  # a person can put it right
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. A person's mistake ends with one message and status 1."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _terminated)
    sys.unraisablehook = _unraisable
    _claim("tasks")
    show_messages()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no UTF-8: it is printed as it is
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        options = make_parser().parse_args(arguments)
        return resolve_name(f"resgrid.commands.{options.function}")(options) or 0
    except ResgridError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "stopped. The same command goes on.", 130
    except ModuleNotFoundError as error:  # where there is torch and little else
        ours = (error.name or "").startswith("resgrid.")
        # Ours: a family whose module an entry in models/ misspells.
        message = str(error) if ours else f"this command needs the package {error.name}: `make install`."
        status = 1
    except BrokenPipeError:  # `resgrid cells | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        place = f": {error.filename}" if error.filename else ""
        message, status = f"{error.strerror}{place}. Check its owner and mode, and its disk.", 1
    print(f"resgrid: {message}", file=sys.stderr)
    return status


def _claim(name: str) -> None:
    """Have `import name` find the package beside this one, whatever PYTHONPATH has under that name."""
    places = Path(__file__).parents[1:3]  # in an environment, in a checkout
    spec = PathFinder.find_spec(name, [str(place) for place in places])
    if name not in sys.modules and spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _terminated(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinds, so that what is open is closed and recorded as ended


def _unraisable(ignored: sys.UnraisableHookArgs) -> None:
    """A signal that comes while Python runs a callback of its own, as in an import, is given once more."""
    if ignored.exc_type is SystemExit:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        _unraisable_before(ignored)


_unraisable_before = sys.unraisablehook


# --- what each command takes ------------------------------------------------------------------------

Option = tuple[str, dict[str, Any]]  # of argparse's add_argument


class Command:
    """One command: its function, such as `grid.cells` in `resgrid.commands`, and its line in the help.

    `example` has lines that can be typed, where the bare name is none.
    """

    def __init__(self, function: str, text: str, *options: Option, example: str = "") -> None:
        self.function, self.text, self.options, self.example = function, text, options, example


def _option(name: str, text: str, **keywords: Any) -> Option:
    return name, {"help": text, **keywords}


def _flag(name: str, text: str) -> Option:
    return _option(name, text, action="store_true")


def _port(name: str, port: int) -> Option:
    return _option(name, "on 127.0.0.1 (default: %(default)s)", type=int, default=port)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: there must be at least one")
    return int(text)


AS_JSON = _flag("--json", "print JSON and nothing else")
DRY_RUN = _flag("--dry-run", "only show what would change")
DEVICE = _option("--device", "auto, cpu, cuda, cuda:1 or mps (default: $RESGRID_DEVICE, else auto)")
PIPELINE = _option("--pipeline", "its folder (default: this one)", type=Path, default=Path())
SLOTS = _option("--slots", "cells at once (default: as many as the machine is good for)", type=_count)
FIGURES: dict[str, Any] = {"nargs": 3, "type": float, "metavar": ("R", "G", "B")}
LABELLED = "CIFAR-10 or CIFAR-100, pictures in <split>/<class>/, an archive of that, or data/processed"
MODEL = "champion (the best cell, by `resgrid sync`), a cell's id, a weights file, or a models:/ URI"

BEGIN = {
    "init": Command(
        "models.init",
        "Make a pipeline's folder for images of your own",
        _option("folder", "the folder to make", type=Path),
        _option("--data", "as for `score`, or in <class>/ alone (without it: a new dvc.yaml)", type=Path),
        example="resgrid init pets --data ~/pictures/pets",
    ),
    "doctor": Command("grid.doctor", "Say what this machine offers and what stands in the way", AS_JSON),
    "cells": Command("grid.cells", "List every cell of the grid and its studies", AS_JSON),
    "set": Command(
        "grid.set_numbers",
        "Edit params.yaml: the same number in many places, comments and layout kept",
        _option("assignments", "* in a key matches any name", nargs="+", metavar="KEY=VALUE"),
        DRY_RUN,
        example="resgrid set tuning.resnet20.sgd.lr=0.05\nresgrid set 'recipes.*.epochs=10' --dry-run",
    ),
    "plan": Command(
        "grid.plan",
        "Say what would run and why, and how long it should take",
        PIPELINE,
        SLOTS,
        _flag("--measure", "time a step of each architecture that would train"),
        AS_JSON,
        example="resgrid plan --pipeline examples/digits",
    ),
}
STAGES = {
    "download": Command("stages.download", "Fetch the raw images and check them"),
    "preprocess": Command("stages.preprocess", "Make one compact file a split from the raw images"),
    "train": Command(
        "stages.train",
        "Train one cell, or several side by side",
        _option("cells", "ids or patterns, in order", nargs="+", metavar="CELL"),
        _option("--slots", "cells at once (default: 1)", type=_count),
        _option("--hours", "what still runs then is ended, to go on another time", type=float),
        _flag("--afresh", "anew from the first epoch, though an earlier start was cut off"),
        DEVICE,
        example="resgrid train resnet20-sgd-0 --afresh\nresgrid train 'resnet20-*' --slots 6 --hours 8",
    ),
    "evaluate": Command("stages.evaluate", "Score every trained cell afresh and compare them", DEVICE),
}
RUN = {
    "up": Command(
        "grid.up",
        "Start Prefect, MLflow and a worker on this machine; Ctrl-C ends them",
        _port("--prefect-port", 4200),
        _port("--mlflow-port", 5000),
        example="resgrid up --prefect-port 4300 --mlflow-port 5100",
    ),
    "status": Command(
        "grid.status",
        "Show the state of every cell; --watch: until what runs has ended",
        PIPELINE,
        _flag("--watch", "show it anew every two seconds; Ctrl-C leaves it"),
        AS_JSON,
        example="resgrid status --watch --pipeline examples/digits",
    ),
    "worker": Command(
        "grid.worker",
        "Train cells of a work pool on this machine; Ctrl-C ends it",
        _option("--pool", "its name, as in train-all's `where` (default: %(default)s)", default="pool"),
        SLOTS,
        _option("--name", "by which Prefect shows it (default: this machine's)"),
        example="resgrid worker --pool pool --slots 4",
    ),
    "take-in": Command(
        "stages.take_in",
        "Take results from a copied project into this pipeline",
        _option("folder", "the copied project's folder, or its runs/", type=Path),
        example="resgrid take-in ~/from-the-cluster/resgrid",
    ),
}
RESULTS = {
    "compare": Command("grid.compare", "Show the comparison that `evaluate` made", AS_JSON),
    "ui": Command(
        "grid.ui",
        "Open MLflow's pages on the pipeline's store (syncs first)",
        _port("--port", 5000),
        example="resgrid ui --port 5100",
    ),
    "sync": Command(
        "grid.sync",
        "Give every current cell its complete run in MLflow",
        _flag("--rebuild", "into a new experiment, as after the folder has moved; the old one is renamed"),
        AS_JSON,
    ),
    "gc": Command(
        "grid.gc",
        "Delete what interrupted and former work has left, and say what the rest takes",
        DRY_RUN,
        AS_JSON,
        example="resgrid gc --dry-run",
    ),
}
MODELS = {
    "predict": Command(
        "models.predict",
        "Say what pictures show, with the champion or any other weights",
        _option("pictures", "files or folders", nargs="+", type=Path, metavar="PICTURE_OR_FOLDER"),
        _option("--model", f"{MODEL} (default: champion)", default="champion"),
        _option("--top", "classes of each picture (default: %(default)s)", type=_count, default=3),
        AS_JSON,
        DEVICE,
        example="resgrid predict photo.jpg holiday/\nresgrid predict photo.jpg --model best.safetensors",
    ),
    "score": Command(
        "models.score",
        "Score a weights file on labelled images, in fp32",
        _option("file", "a weights file (.safetensors)", type=Path),
        _option("--data", LABELLED, required=True, type=Path),
        _option("--split", "train, validation or test (default: %(default)s)", default="test"),
        AS_JSON,
        DEVICE,
        example="resgrid score mine.safetensors --data ~/cifar-10-python.tar.gz",
    ),
    "export": Command(
        "models.export",
        "Write a trained model for other programs, and check that it agrees",
        _option("model", MODEL, metavar="CELL"),
        _option(
            "--format", "RGB images on the 0-1 scale to probabilities", required=True, choices=("onnx", "pt2")
        ),
        _option("--out", "the file to write (default: CELL.FORMAT in this folder)", type=Path),
        example="resgrid export champion --format onnx",
    ),
    "import": Command(
        "models.import_weights",
        "Make a weights file of Keras's or PyTorch's weights",
        _option("file", "of Keras (.h5, .keras, .weights.h5) or PyTorch, or safetensors", type=Path),
        _option("--model", "its architecture", required=True, choices=ARCHITECTURES),
        _option("--out", "the weights file to write (.safetensors)", required=True, type=Path),
        _option("--class-names", "in its outputs' order (default: CIFAR-10's)", nargs="+", metavar="NAME"),
        _option(
            "--normalization",
            "of its images (default: keras of Keras, else kuangliu)",
            choices=NORMALIZATIONS,
        ),
        _option("--mean", "of its images, in place of a name, on the 0-1 scale", **FIGURES),
        _option("--std", "likewise", **FIGURES),
        _option("--key", "which of several sets of weights in a PyTorch file, such as state_dict_ema"),
        _option("--data", "labelled images to score it on at once, as for `score`", type=Path),
        DEVICE,
        example="resgrid import checkpoint.pt --model resnet18 --out mine.safetensors",
    ),
    "summary": Command(
        "models.summary",
        "Print an architecture's table of layers and parameters",
        _option("model", f"{', '.join(ARCHITECTURES)}, or the name of one of your own"),
        AS_JSON,
        example="resgrid summary vgg16",
    ),
}
GROUPS = {
    "Begin": BEGIN, "Stages, which `dvc repro` runs": STAGES, "Run": RUN, "Results": RESULTS,
    "Models": MODELS,
}  # fmt: skip
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ResgridError(f"{message}. `{self.prog} --help` shows what it takes.")


class _Root(_Parser):
    """Lists its commands in groups, which argparse has no way to."""

    def format_help(self) -> str:
        text = (
            "usage: resgrid COMMAND …\n\nArchitectures x optimizers, compared. In a folder with a "
            "params.yaml:\n  resgrid plan; dvc repro; resgrid compare\n"
        )
        for title, group in GROUPS.items():
            lines = (f"  {name:13} {command.text}\n" for name, command in group.items())
            text += f"\n{title}:\n{''.join(lines)}"
        return f"{text}\n`resgrid COMMAND --help` has its options and examples.\n"


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `function` in what it returns names the one to run."""
    parser = _Root(prog="resgrid")
    parser.add_argument("--version", action="version", version=f"resgrid {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            description=command.text,
            epilog="such as:\n  " + (command.example or f"resgrid {name}").replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for option, keywords in command.options:
            sub.add_argument(option, **keywords)
        sub.set_defaults(function=command.function)
    return parser
