"""The command line: `resgrid COMMAND`.

Each command imports what it needs when it runs: `resgrid cells` pays for no torch, and `resgrid --help` for
nothing but argparse.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from resgrid import __version__
from resgrid.errors import ResgridError
from resgrid.models import ARCHITECTURES
from resgrid.normalizations import NORMALIZATIONS
from resgrid.overview import EXAMPLES, overview
from resgrid.progress import show_messages

if TYPE_CHECKING:
    from resgrid.commands import grid, models, stages

UNWRITABLE = (  # a person can put it right
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip


class _Commands:
    """The functions of a module of `commands`, which is imported when one of them runs, not before."""

    def __init__(self, module: str) -> None:
        self._module = f"resgrid.commands.{module}"

    def __getattr__(self, name: str) -> Callable[[argparse.Namespace], int | None]:
        return partial(_run, self._module, name)


def _run(module: str, name: str, options: argparse.Namespace) -> int | None:
    status: int | None = getattr(importlib.import_module(module), name)(options)
    return status


if not TYPE_CHECKING:
    grid, models, stages = map(_Commands, ("grid", "models", "stages"))


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
        options = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int | None] = options.run
        return run(options) or 0
    except ResgridError as error:
        print(f"resgrid: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("resgrid: stopped. The same command goes on.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:  # where there is torch and little else
        print(f"resgrid: this command needs the package {error.name}: `make install`.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `resgrid cells | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        place = f": {error.filename}" if error.filename else ""
        print(f"resgrid: {error.strerror}{place}. Check its owner and mode, and its disk.", file=sys.stderr)
        return 1


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ResgridError(f"{message}. `{self.prog} --help` shows what it takes.")


class _Root(_Parser):
    """Lists its commands in groups, which argparse has no way to."""

    def format_help(self) -> str:
        return overview(self.texts)

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.texts: dict[str, str] = {}  # what each command does, in a line


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: there must be at least one")
    return int(text)


def _parser() -> _Root:
    parser = _Root(prog="resgrid")
    parser.add_argument("--version", action="version", version=f"resgrid {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        example = "such as:\n  " + EXAMPLES.get(name, f"resgrid {name}").replace("\n", "\n  ")
        form = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, epilog=example, formatter_class=form)
        sub.set_defaults(run=run)
        parser.texts[name] = text
        return sub

    def json_flag(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON and nothing else")

    sub = command(
        "cells", grid.cells, "List every cell of the grid and its studies; --json: with all its numbers"
    )
    json_flag(sub)

    sub = command(
        "set", grid.set_numbers, "Edit params.yaml: the same number in many places, comments and layout kept"
    )
    sub.add_argument(
        "assignments",
        nargs="+",
        metavar="KEY=VALUE",
        help="such as 'recipes.*.epochs=10' or tuning.resnet20.sgd.lr=0.05; * matches any name",
    )
    sub.add_argument("--dry-run", action="store_true", help="only show the lines that would change")

    command("download", stages.download, "Fetch the raw images and check them (a DVC stage)")
    command(
        "preprocess", stages.preprocess, "Make one compact file a split from the raw images (a DVC stage)"
    )
    sub = command("train", stages.train, "Train one cell (a DVC stage), or several side by side")
    sub.add_argument(
        "cells",
        nargs="+",
        metavar="CELL",
        help="ids, such as resnet20-adam-0, or patterns such as 'resnet20-*', in order; "
        "`resgrid cells` lists them",
    )
    sub.add_argument("--slots", type=_count, help="cells at once (default: 1)")
    sub.add_argument(
        "--hours", type=float, help="then what runs is ended, to go on later (default: until all are done)"
    )
    sub.add_argument(
        "--afresh",
        action="store_true",
        help="anew from the first epoch, though an earlier start was cut off",
    )
    _device_option(sub)
    sub = command("take-in", stages.take_in, "Take results from a copied project into this pipeline")
    sub.add_argument("folder", type=Path, help="the copied project's folder, or its runs/")
    sub = command(
        "evaluate", stages.evaluate, "Score every trained cell afresh and compare them (a DVC stage)"
    )
    _device_option(sub)

    sub = command("compare", grid.compare, "Show the comparison that `evaluate` made")
    json_flag(sub)
    sub = command("sync", grid.sync, "Give every current cell its complete run in MLflow")
    sub.add_argument(
        "--rebuild",
        action="store_true",
        help="into a new experiment, as after the folder was moved or copied; the one before is renamed",
    )
    json_flag(sub)
    sub = command("gc", grid.gc, "Delete what interrupted and former work has left; tell what the rest takes")
    sub.add_argument("--dry-run", action="store_true", help="only tell")
    json_flag(sub)
    sub = command("ui", grid.ui, "Open MLflow's pages on the pipeline's store (syncs first)")
    sub.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default: %(default)s)")

    sub = command("plan", grid.plan, "Say what would run and why, and how long it should take")
    sub.add_argument("--pipeline", type=Path, default=Path(), help="its folder (default: this one)")
    sub.add_argument(
        "--slots", type=_count, help="cells at once (default: as many as the machine is good for)"
    )
    sub.add_argument(
        "--measure", action="store_true", help="time a training step of each architecture that would train"
    )
    json_flag(sub)
    sub = command("status", grid.status, "Show the state of every cell; --watch: until what runs has ended")
    sub.add_argument("--pipeline", type=Path, default=Path(), help="its folder (default: this one)")
    sub.add_argument("--watch", action="store_true", help="show it anew every two seconds; Ctrl-C leaves it")
    json_flag(sub)
    sub = command("up", grid.up, "Start Prefect, MLflow and a worker on this machine; Ctrl-C ends them")
    for service, port in (("prefect", 4200), ("mlflow", 5000)):
        sub.add_argument(
            f"--{service}-port",
            type=int,
            default=port,
            help="on 127.0.0.1; the next free one if it is taken (default: %(default)s)",
        )

    sub = command("worker", grid.worker, "Train cells of a work pool on this machine; Ctrl-C ends it")
    sub.add_argument(
        "--pool",
        default="pool",
        help="train-all -p where=POOL places cells there (default: %(default)s)",
    )
    sub.add_argument(
        "--slots", type=_count, help="cells at once (default: as many as the machine is good for)"
    )
    sub.add_argument("--name", help="by which Prefect shows it (default: this machine's)")

    sub = command("predict", models.predict, "Say what pictures show, with the champion or any other weights")
    sub.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE_OR_FOLDER")
    _model_option(sub, "--model", default="champion")
    sub.add_argument("--top", type=_count, default=3, help="classes of each picture (default: %(default)s)")
    json_flag(sub)
    _device_option(sub)
    sub = command(
        "export", models.export, "Write a trained model for other programs, and check that it agrees"
    )
    _model_option(sub, "model", metavar="CELL")
    sub.add_argument(
        "--format",
        required=True,
        choices=("onnx", "pt2"),
        help="a program from RGB images on the 0-1 scale to probabilities; pt2 is torch.export's",
    )
    sub.add_argument("--out", type=Path, help="the file to write (default: CELL.FORMAT in this folder)")
    sub = command("init", models.init, "Make a pipeline's folder for images of your own")
    sub.add_argument("folder", type=Path, help="the folder to make")
    sub.add_argument(
        "--data",
        type=Path,
        help="pictures in train/<class>/ and test/<class>/, or in <class>/; CIFAR-10 or CIFAR-100; a folder "
        "or an archive of that (without it, the dvc.yaml that another version made is written anew)",
    )

    sub = command("summary", models.summary, "Print an architecture's table of layers and parameters")
    sub.add_argument("model", help=f"{', '.join(ARCHITECTURES)}, or the name of one of your own")
    json_flag(sub)

    sub = command("import", models.import_weights, "Make a weights file of Keras's or PyTorch's weights")
    sub.add_argument("file", type=Path, help="of Keras (.h5, .keras, .weights.h5) or PyTorch, or safetensors")
    sub.add_argument("--model", required=True, choices=tuple(ARCHITECTURES), help="its architecture")
    sub.add_argument("--out", required=True, type=Path, help="the weights file to write (.safetensors)")
    sub.add_argument(
        "--class-names", nargs="+", metavar="NAME", help="in the order of its outputs (default: CIFAR-10's)"
    )
    sub.add_argument(
        "--normalization",
        choices=tuple(NORMALIZATIONS),
        help="of the images it was trained on (default: keras for a file of Keras, kuangliu for others)",
    )
    for name in ("mean", "std"):
        sub.add_argument(
            f"--{name}",
            nargs=3,
            type=float,
            metavar=("R", "G", "B"),
            help="of the same, in place of a name, on the 0-1 scale",
        )
    sub.add_argument(
        "--key", help="which of several sets of weights in a PyTorch file, such as state_dict_ema"
    )
    sub.add_argument("--data", type=Path, help="labelled images to score it on at once, as for `score`")
    _device_option(sub)
    sub.set_defaults(split="test", json=False)

    sub = command("score", models.score, "Score a weights file on labelled images, in fp32")
    sub.add_argument("file", type=Path, help="a weights file (.safetensors)")
    sub.add_argument(
        "--data",
        required=True,
        type=Path,
        help="CIFAR-10 or CIFAR-100, pictures in <split>/<class>/, an archive of that, or data/processed",
    )
    sub.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    json_flag(sub)
    _device_option(sub)

    sub = command("doctor", grid.doctor, "Say what this machine offers and what stands in the way")
    json_flag(sub)
    return parser


def _model_option(sub: argparse.ArgumentParser, name: str, **keywords: Any) -> None:
    text = (
        "champion (the best cell, as `resgrid sync` found it), a cell's id, a weights file, or a models:/ URI"
    )
    sub.add_argument(name, help=f"{text} (default: champion)" if "default" in keywords else text, **keywords)


def _device_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps (default: $RESGRID_DEVICE, else auto)")
