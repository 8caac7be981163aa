"""The command line: `resgrid COMMAND`.

Each command imports what it needs when it runs: `resgrid --help` and `resgrid cells` pay for no torch.
"""

from __future__ import annotations

import argparse
import csv
import errno
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from resgrid import __version__
from resgrid.config import NORMALIZATIONS, load_params, read_yaml
from resgrid.errors import ResgridError
from resgrid.grid import expand, find_cell
from resgrid.models import ARCHITECTURES
from resgrid.overview import EXAMPLES, overview
from resgrid.progress import Progress, amount
from resgrid.schema import Triple
from resgrid.stage_record import recorded

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from resgrid.config import Params
    from resgrid.grid import Cell
    from resgrid.predict import Prediction
    from resgrid.training.engine import Scores
    from resgrid.weights import WeightsInfo

# The folders of a pipeline, beside its params.yaml.
RAW = Path("data/raw")
PROCESSED = Path("data/processed")
RUNS = Path("runs")
REPORTS = Path("reports")
LOCK = Path("dvc.lock")


UNWRITABLE = (  # a person can put it right
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. A person's mistake ends with one message and status 1."""
    signal.signal(signal.SIGTERM, _terminated)
    _claim("tasks")
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
        print("resgrid: stopped. The same command starts again.", file=sys.stderr)
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
        place = f"{error.filename}: " if error.filename else ""
        print(f"resgrid: {place}{error.strerror}. Check the folder and its disk.", file=sys.stderr)
        return 1


def _claim(name: str) -> None:
    """Have `import name` find the package beside this one, whatever PYTHONPATH has under that name."""
    places = Path(__file__).parents[1:3]  # in an environment, in a checkout
    spec = PathFinder.find_spec(name, [str(place) for place in places])
    if name not in sys.modules and spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _terminated(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds, so that what is open is closed and recorded as ended


class _Parser(argparse.ArgumentParser):
    completed: ClassVar[dict[str, object]] = {}  # "path" and "cell", in shtab's terms

    def add_argument(self, *names: Any, **keywords: Any) -> argparse.Action:
        action = super().add_argument(*names, **keywords)
        kind = "path" if keywords.get("type") is Path else names[0].removesuffix("s")
        if kind in self.completed:
            action.complete = self.completed[kind]  # type: ignore[attr-defined]
        return action

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

    def json_flag(sub: argparse._ActionsContainer) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON and nothing else")

    sub = command(
        "cells", _cells, "List every cell of the grid and its studies; --json: with all its numbers"
    )
    json_flag(sub)

    sub = command("set", _set, "Edit params.yaml: the same number in many places, comments and layout kept")
    sub.add_argument(
        "assignments",
        nargs="*",
        metavar="KEY=VALUE",
        help="such as 'recipes.*.epochs=10' or tuning.resnet20.sgd.lr=0.05; * matches any name",
    )
    sub.add_argument("--dry-run", action="store_true", help="only show the lines that would change")

    command("download", _download, "Fetch the raw images and check them (a DVC stage)")
    command("preprocess", _preprocess, "Make one compact file a split from the raw images (a DVC stage)")
    sub = command("train", _train, "Train one cell (a DVC stage)")
    sub.add_argument("cell", help="a cell's id, such as resnet20-adam-0; `resgrid cells` lists them")
    sub.add_argument(
        "--afresh",
        action="store_true",
        help="anew from the first epoch, though an earlier start was cut off",
    )
    _device_option(sub)
    sub = command("train-list", _train_list, "Train cells side by side where there is torch and little else")
    sub.add_argument(
        "cells", nargs="+", metavar="CELL", help="ids or patterns such as 'resnet20-*', in order"
    )
    sub.add_argument("--slots", type=int, default=1, help="cells at once (default: %(default)s)")
    sub.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="then what runs is ended, to go on later"
    )
    sub.add_argument(
        "--pack", type=Path, metavar="FILE", help="write what comes of it to FILE.000, FILE.001 …"
    )
    sub = command("take-in", _take_in, "Take results of `resgrid train-list --pack` into this pipeline")
    sub.add_argument("parts", nargs="+", type=Path, metavar="FILE", help="all parts: FILE.000, FILE.001 …")
    sub = command("evaluate", _evaluate, "Score every trained cell afresh and compare them (a DVC stage)")
    _device_option(sub)

    sub = command("compare", _compare, "Show the comparison that `evaluate` made")
    json_flag(sub)
    sub = command("cost", _cost, "Estimate how long the grid would take on this machine")
    sub.add_argument("--images", type=_count, help="training images (those of the data unless given)")
    json_flag(sub)
    _device_option(sub)
    sub = command("sync", _sync, "Give every current cell its complete run in MLflow")
    json_flag(sub)
    sub = command("gc", _gc, "Delete what interrupted and former work has left; tell what the rest takes")
    sub.add_argument("--dry-run", action="store_true", help="only tell")
    json_flag(sub)
    sub = command("ui", _ui, "Open MLflow's pages on the pipeline's store (syncs first)")
    sub.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default: %(default)s)")

    sub = command("plan", _plan, "Say what would run and why, how long it should take, and the disk it needs")
    sub.add_argument("--pipeline", type=Path, default=Path(), help="its folder (default: this one)")
    sub.add_argument(
        "--slots", type=_count, help="cells at once (default: as many as the machine is good for)"
    )
    json_flag(sub)
    sub = command("status", _status, "Show a running grid; --watch: with curves, until it ends")
    sub.add_argument("--pipeline", type=Path, default=Path(), help="its folder (default: this one)")
    sub.add_argument("--watch", action="store_true", help="show it anew every two seconds; Ctrl-C leaves it")
    json_flag(sub)
    sub = command("up", _up, "Start Prefect, MLflow and a worker on this machine; Ctrl-C ends them")
    for service, port in (("prefect", "4200"), ("mlflow", "5000")):
        variable = f"RESGRID_{service.upper()}_PORT"
        sub.add_argument(
            f"--{service}-port",
            type=int,
            default=os.environ.get(variable, port),
            help=f"on 127.0.0.1; the next free one if it is taken (default: ${variable}, else {port})",
        )

    sub = command("notify", _notify, "Be told when a grid has ended or a cell has failed")
    sub.add_argument(
        "url",
        nargs="?",
        help="a webhook (Slack, Discord, any that takes JSON), or an address as Apprise writes it, such as "
        "mailtos://user:password@gmail.com",
    )
    sub.add_argument("--remove", action="store_true", help="be told no more")

    sub = command("worker", _worker, "Train cells of a work pool on this machine; Ctrl-C ends it")
    sub.add_argument(
        "--pool",
        default="pool",
        help="train-all -p where=POOL places cells there (default: %(default)s)",
    )
    sub.add_argument(
        "--slots", type=_count, help="cells at once (default: as many as the machine is good for)"
    )
    sub.add_argument("--name", help="by which Prefect shows it (default: this machine's)")

    sub = command("predict", _predict, "Say what pictures show, with the champion or any other weights")
    sub.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE_OR_FOLDER")
    _model_option(sub, "--model", default="champion")
    sub.add_argument("--top", type=_count, default=3, help="classes of each picture (default: %(default)s)")
    form = sub.add_mutually_exclusive_group()
    json_flag(form)
    form.add_argument("--csv", action="store_true", help="print CSV: a row a class, or one with an error")
    _device_option(sub)
    sub = command("export", _export, "Write a trained model for other programs, and check that it agrees")
    _model_option(sub, "model", metavar="CELL")
    sub.add_argument(
        "--format",
        required=True,
        choices=("onnx", "pt2", "pt", "safetensors"),
        help="onnx and pt2 (torch.export): programs from RGB images on the 0-1 scale to probabilities; "
        "pt: a plain state dict; safetensors: a weights file",
    )
    sub.add_argument("--out", type=Path, help="the file to write (default: CELL.FORMAT in this folder)")
    sub = command("init", _init, "Make a pipeline's folder for images of your own")
    sub.add_argument("folder", type=Path, help="the folder to make")
    sub.add_argument(
        "--data",
        required=True,
        type=Path,
        help="pictures in train/<class>/ and test/<class>/, or in <class>/; CIFAR-10 or CIFAR-100; a folder "
        "or an archive of that",
    )

    sub = command("summary", _summary, "Print an architecture's table of layers and parameters")
    sub.add_argument("model", help=f"{', '.join(ARCHITECTURES)}, or the name of one of your own")
    sub.add_argument("--num-classes", type=_count, default=10, help="(default: %(default)s)")
    json_flag(sub)

    for kind, files, assumed in (
        ("keras", "a Keras file (.h5, .keras, .weights.h5)", "keras"),
        ("torch", "a PyTorch checkpoint or a safetensors file", "kuangliu"),
    ):
        sub = command(f"import-{kind}", _import, f"Make a weights file of {files}")
        sub.add_argument("file", type=Path, help=files)
        sub.add_argument("--model", required=True, choices=tuple(ARCHITECTURES), help="its architecture")
        sub.add_argument("--out", required=True, type=Path, help="the weights file to write (.safetensors)")
        sub.add_argument(
            "--class-names",
            nargs="+",
            metavar="NAME",
            help="in the order of its outputs (default: CIFAR-10's)",
        )
        sub.add_argument(
            "--normalization",
            choices=tuple(NORMALIZATIONS),
            help=f"of the images it was trained on (default: {assumed})",
        )
        for name in ("mean", "std"):
            sub.add_argument(
                f"--{name}",
                nargs=3,
                type=float,
                metavar=("R", "G", "B"),
                help="of the same, in place of a name, on the 0-1 scale",
            )
        if kind == "torch":
            sub.add_argument(
                "--key", help="which of several sets of weights in the file, such as state_dict_ema"
            )
        sub.add_argument("--data", type=Path, help="labelled images to score it on at once, as for `score`")
        _device_option(sub)
        sub.set_defaults(kind=kind, split="test", json=False)

    sub = command("score", _score, "Score a weights file on labelled images, in fp32")
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

    sub = command("doctor", _doctor, "Say what this machine offers and what stands in the way")
    json_flag(sub)
    sub = command("completion", _completion, "Print a shell's completion of these commands")
    sub.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"))
    return parser


def _model_option(sub: argparse.ArgumentParser, name: str, **keywords: Any) -> None:
    text = (
        "champion (the best cell, as `resgrid sync` found it), a cell's id, an ensemble of the report, "
        "a weights file, or a models:/ URI"
    )
    sub.add_argument(name, help=f"{text} (default: champion)" if "default" in keywords else text, **keywords)


def _device_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps (default: $RESGRID_DEVICE, else auto)")


# --- the grid ---------------------------------------------------------------------------------------


def _cells(options: argparse.Namespace) -> None:

    cells = expand(load_params())
    if options.json:
        told = [
            {"cell": cell.id, "study": cell.study, "changes": cell.changes} | cell.numbers for cell in cells
        ]
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(cell.id for cell in cells))


def _set(options: argparse.Namespace) -> None:
    from resgrid import edit

    path = Path("params.yaml")
    if not options.assignments:
        raise ResgridError("set: name a key and a value, as in 'recipes.*.epochs=10'.")
    old, _ = read_yaml(path)
    new = edit.assign(old, options.assignments)
    print("\n".join(edit.changed_lines(old, new)) or "Nothing changes: these are the values already.")
    if not options.dry_run:
        path.write_text(new, encoding="utf-8")


def _refuse_if_recording() -> None:
    """Where a result made elsewhere is only to be taken over, nothing is computed because it is not there."""
    if os.environ.get("RESGRID_RECORD_ONLY"):
        raise ResgridError(
            "not run here: a worker's result was to be taken from the DVC remote, which has none of these "
            "params, data and code."
        )


@recorded()
def _download(options: argparse.Namespace) -> None:
    _refuse_if_recording()
    from resgrid.cost import announce
    from resgrid.data.fetch import download, known_num_train

    params = load_params()
    if num_train := known_num_train(params.data):
        announce(params, num_train)
    with Progress("download", None, "B") as progress:
        download(params.data, RAW, progress.update, progress.say)


@recorded()
def _preprocess(options: argparse.Namespace) -> None:
    _refuse_if_recording()
    from resgrid.cost import announce
    from resgrid.data.fetch import known_num_train
    from resgrid.data.preprocess import preprocess

    params = load_params()
    with Progress("preprocess", None, "images") as progress:

        def on_image(split: str, done: int, total: int) -> None:
            progress.note = split
            progress.update(done, total)

        meta = preprocess(params.data, params.preprocess, RAW, PROCESSED, on_image, progress.say)
    counts = ", ".join(f"{count:,} {split}" for split, count in meta.num_images.items())
    print(f"{counts} images of {len(meta.class_names)} classes: {', '.join(meta.class_names[:12])}")
    if not known_num_train(params.data):
        announce(params, meta.num_images["train"])


@recorded()
def _train(options: argparse.Namespace) -> None:
    _refuse_if_recording()
    from resgrid import provenance

    params = load_params()
    cell = find_cell(params, options.cell)
    provenance.check_lock(Path())
    provenance.check_code(Path())

    from resgrid.run_status import noted_failure

    with noted_failure(RUNS / cell.id):
        _train_cell(options, params, cell)


def _train_cell(options: argparse.Namespace, params: Params, cell: Cell) -> None:
    from resgrid import leftovers, tracking, watch
    from resgrid.allocator import keep_freed_memory
    from resgrid.checkpoint import Checkpoints
    from resgrid.data.dataset import load_meta
    from resgrid.train import show_history, train_cell, write_metrics
    from resgrid.training.device import choose_device, choose_execution, device_name
    from resgrid.training.engine import Epoch

    watch.watch()
    keep_freed_memory()
    cache = tracking.project_root() / ".resgrid/cache/inductor"  # of torch.compile, shared by all cells
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    device = choose_device(options.device)
    meta = load_meta(PROCESSED)
    weights = tracking.fetch_weights(cell.recipe.initial_weights)
    kept = leftovers.checkpoint_folder(tracking.project_root(), Path.cwd().resolve())
    leftovers.forget_recorded(kept, LOCK)
    if options.afresh:
        leftovers.delete(leftovers.checkpoint_files(kept, cell.id))
    execution = choose_execution(cell, meta.num_images["train"], device)
    checkpoints = Checkpoints(kept, cell, meta.digest, device, str(execution))
    with tracking.shared_checkpoints(params.name, cell, checkpoints.digest, kept) as others:
        elsewhere = [checkpoints.adopt(path) for path in others]
    epochs, finished = cell.recipe.epochs, checkpoints.num_epochs
    num_images = meta.num_images["train"] // cell.recipe.batch_size * cell.recipe.batch_size  # an epoch
    with (
        tracking.LiveRun(params.name, cell, meta.digest, checkpoints.digest, finished) as run,
        Progress(cell.id, epochs * num_images, "images") as progress,
    ):
        progress.say(f"{cell.id}  {execution} on {device_name(device)}; curves: `resgrid status --watch`")
        if cell.engine.compile == "always" and not execution.compiled:
            progress.say(f"{cell.id}  is not compiled: there is no C++ compiler with Python's headers here")
        for damaged in checkpoints.refused:
            progress.say(f"{cell.id}  {damaged} The one before it is used.")
        if finished:
            origin = ", which another machine has reached" if any(elsewhere) else ""
            progress.say(f"{cell.id}  goes on after epoch {finished}/{epochs}{origin}")
            progress.begin(finished * num_images)

        def on_step(images: int, images_an_epoch: int) -> None:
            progress.update(finished * images_an_epoch + images)

        epochs_so_far = [Epoch(**epoch) for epoch in checkpoints.epochs]
        for epoch in train_cell(cell, PROCESSED, RUNS / cell.id, device, on_step, weights, checkpoints):
            finished = epoch.epoch
            epochs_so_far.append(epoch)
            show_history(RUNS / cell.id, epochs_so_far)
            run.log_epoch(epoch)
            run.share_checkpoint(checkpoints.latest)
            test = None if epoch.test_accuracy is None else f"{100 * epoch.test_accuracy:.2f} %"
            progress.note = f"epoch {epoch.epoch}/{epochs}" + (f", test {test}" if test else "")
            progress.say(
                f"{cell.id}  epoch {epoch.epoch:3}/{epochs}  loss {epoch.train_loss:.4f}  "
                f"train {100 * epoch.train_accuracy:6.2f} %  {f'test {test:>8}  ' if test else ''}"
                f"{epoch.images_per_second:,.0f} images/s  {progress.remaining()}".rstrip()
            )
        write_metrics(RUNS / cell.id, params.name)
        run.complete(RUNS / cell.id)


def _train_list(options: argparse.Namespace) -> int:
    from resgrid.grid import choose
    from resgrid.offline import train_list
    from resgrid.tracking import project_root

    if options.slots < 1:
        raise ResgridError(f"--slots {options.slots}: must be 1 or more.")
    cells = choose(load_params(), options.cells)
    limit = options.time_limit if options.time_limit is not None else float("inf")
    missing = train_list(cells, project_root(), options.slots, limit, options.pack)
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are trained.")
    return 1 if missing else 0


def _take_in(options: argparse.Namespace) -> int:
    from resgrid.data.dataset import load_meta
    from resgrid.offline import take_in
    from resgrid.tracking import project_root

    taken, refused = take_in(options.parts, load_params(), load_meta(PROCESSED).digest, project_root())
    if taken:
        print(f"Recorded in dvc.lock: {', '.join(taken)}.")
        print("`resgrid sync` gives them their runs in MLflow, `dvc repro evaluate` compares them.")
    for line in refused:
        print(f"resgrid: refused: {line}", file=sys.stderr)
    return 1 if refused else 0


@recorded()
def _evaluate(options: argparse.Namespace) -> None:

    params = load_params()

    from resgrid.data.dataset import Split, load_meta, load_split
    from resgrid.evaluation import evaluate
    from resgrid.report.ensembles import assemble, write_ensembles
    from resgrid.report.files import write_report
    from resgrid.report.findings import Findings
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
    labels = {name: split.labels.numpy() for name, split in splits.items()}
    ensembles, why_not = assemble(results, kept, labels)
    scored_on = device_name(device)
    findings = Findings(results, splits["test"], meta, params.name, scored_on, ensembles, why_not)
    write_report(findings, REPORTS)
    write_ensembles(ensembles, results, Path())
    _show(findings.frame)
    print(f"\nThe report: {REPORTS / 'index.html'}, a page for any browser")


def _compare(options: argparse.Namespace) -> None:
    from resgrid.report.leaderboard import read_leaderboard
    from resgrid.results import load

    read_leaderboard(REPORTS)  # without one there is no comparison
    frame = load().results
    if options.json:
        print(frame.to_json(orient="records", indent=2))
    else:
        _show(frame)


def _show(frame: pd.DataFrame) -> None:
    """The comparison on the terminal, and what is missing from it."""
    from resgrid.report.leaderboard import by_optimizer, missing, readable, text_table

    print("\nTest accuracy in %, with the weights of the last epoch:\n")
    print(text_table(by_optimizer(frame).reset_index()))
    print()
    print(text_table(readable(frame)))
    if lines := missing(frame):
        print("\n" + "\n  ".join(lines))


def _cost(options: argparse.Namespace) -> None:
    from resgrid.cost import estimate, sentence
    from resgrid.data.dataset import load_meta
    from resgrid.training.device import choose_device

    params = load_params()
    num_train = options.images or load_meta(PROCESSED).num_images["train"]
    device = choose_device(options.device)
    seconds = estimate(params, num_train, device)
    if options.json:
        print(json.dumps({"seconds": sum(seconds.values()), "cells": seconds}, indent=2))
    else:
        print(sentence(seconds, device))


def _sync(options: argparse.Namespace) -> int:
    from resgrid import leftovers, tracking

    params = load_params()
    kept = leftovers.checkpoint_folder(tracking.project_root(), Path.cwd().resolve())
    leftovers.forget_recorded(kept, LOCK)
    with Progress("sync", None, "cells") as progress:
        report = tracking.sync(params, Path.cwd(), progress.update)
    print(json.dumps(report.as_dict(), indent=2) if options.json else report)
    return 1 if report.failed else 0


def _gc(options: argparse.Namespace) -> None:
    from resgrid import leftovers, tracking

    params = load_params()
    root, pipeline = tracking.project_root(), Path.cwd().resolve()

    def shown(path: Path) -> str:  # DVC's cache may be elsewhere
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    digest = None
    if (PROCESSED / "meta.json").is_file():
        from resgrid.data.dataset import load_meta

        digest = load_meta(PROCESSED).digest
    found = leftovers.find_leftovers(root, pipeline, expand(params), digest)
    if not options.dry_run:
        leftovers.delete(each.path for each in found)
    taken = leftovers.usage(root, pipeline)
    if options.json:
        content = {
            "deleted": not options.dry_run,
            "leftovers": [
                {"path": shown(each.path), "bytes": each.num_bytes, "why": each.why} for each in found
            ],
            "bytes": taken,
        }
        print(json.dumps(content, indent=2))
        return
    for each in found:
        print(f"{amount(each.num_bytes, 'B'):>9}  {shown(each.path)}: {each.why}")
    total = amount(sum(each.num_bytes for each in found), "B")
    print(
        f"{total} {'can be' if options.dry_run else 'were'} deleted\n" if found else "Nothing is left over\n"
    )
    for place, num_bytes in taken.items():
        print(f"{amount(num_bytes, 'B'):>9}  {place}")
    print("`dvc gc --workspace` empties DVC's cache of what no current result is made of.")


def _ui(options: argparse.Namespace) -> None:
    from resgrid import tracking

    _sync(argparse.Namespace(json=False))
    tracking.serve(options.port, load_params().name)


def _plan(options: argparse.Namespace) -> None:
    from tasks.plan import make_plan
    from tasks.stage import Pipeline

    plan = make_plan(Pipeline.find(options.pipeline), options.slots)
    print(json.dumps(plan.as_dict(), indent=2) if options.json else plan)


def _status(options: argparse.Namespace) -> None:
    from resgrid.run_status import STATUSES, find_runs
    from tasks.publish import status
    from tasks.stage import Pipeline

    pipeline = Pipeline.find(options.pipeline)
    if options.watch:
        from tasks.live import watch

        watch(pipeline)
        return
    now = status(pipeline)
    runs = find_runs(expand(load_params(pipeline.folder / "params.yaml")), pipeline.folder)
    if options.json:
        results = {run.cell.id: {"status": run.status, "reason": run.reason} for run in runs}
        print(json.dumps(now.as_dict() | {"results": results}, indent=2))
        return
    counts = Counter(run.status for run in runs)
    print(now)
    print("Results: " + ", ".join(f"{counts[each]} {each}" for each in STATUSES if counts[each]) + ".")
    for run in runs:
        if run.status in ("stale", "other data"):
            print(f"  {run.cell.id}: {run.reason}")


def _up(options: argparse.Namespace) -> int:
    from tasks.services import up

    return up(Path.cwd(), prefect_port=options.prefect_port, mlflow_port=options.mlflow_port)


def _notify(options: argparse.Namespace) -> None:
    from tasks.notify import notify, remove

    if bool(options.url) == options.remove:
        raise ResgridError("notify: give either an address to send to, or --remove.")
    print(remove(Path.cwd()) if options.remove else notify(Path.cwd(), options.url))


def _worker(options: argparse.Namespace) -> int:
    from tasks.worker import work

    return work(Path.cwd(), options.pool, options.slots, options.name)


# --- this machine -----------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from resgrid.doctor import examine

    findings = []
    for each in examine():
        findings.append(each)
        if not options.json:
            mark = {"good": " ", "note": "·", "problem": "!"}[each.level]
            print(f"{mark} {each.what:<16} {each.value}")
            if each.advice:
                print(f"{'':18} → {each.advice}")
    if options.json:
        print(json.dumps([asdict(each) for each in findings], indent=2))
    return 1 if any(each.level == "problem" for each in findings) else 0


def _completion(options: argparse.Namespace) -> None:
    import shtab

    _Parser.completed = {"path": shtab.FILE, "cell": shtab.cmd("resgrid cells 2>/dev/null")}
    print(shtab.complete(_parser(), options.shell))


# --- a trained model --------------------------------------------------------------------------------


def _predict(options: argparse.Namespace) -> int:
    from resgrid.predict import find_pictures, predict
    from resgrid.training.device import choose_device

    passed_over: Counter[str] = Counter()
    files = find_pictures(options.pictures, passed_over)
    model, info = _model(options.model)
    device = choose_device(options.device)
    if not (options.json or options.csv):
        print(f"{options.model}: {info.architecture}, {len(info.class_names)} classes", file=sys.stderr)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if options.csv:
        writer.writerow(("file", "rank", "class", "probability", "error"))
    count = failed = 0
    for count, each in enumerate(predict(model, info, files, device, options.top), start=1):
        failed += each.error is not None
        if options.json:
            print("[\n" if count == 1 else ",\n", json.dumps(each.as_dict()), sep="", end="")
        elif options.csv:
            writer.writerows(_csv_rows(each))
        elif each.error:
            print(f"resgrid: {each.error}", file=sys.stderr)
        else:
            print(f"{each.file}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in each.top))
    if options.json:
        print("\n]")
    if failed:
        print(f"resgrid: {failed:,} of {count:,} pictures could not be read.", file=sys.stderr)
    if kinds := ", ".join(f"{number:,} × {kind}" for kind, number in passed_over.items() if number):
        print(f"resgrid: passed over: {kinds}.", file=sys.stderr)
    return 1 if failed else 0


def _model(name: str) -> tuple[nn.Module, WeightsInfo]:
    """What `--model` means: an ensemble, or whatever `find_weights` finds."""
    from resgrid import tracking
    from resgrid.report.ensembles import is_ensemble, load_ensemble
    from resgrid.weights import load_model

    return load_ensemble(name) if is_ensemble(name) else load_model(tracking.find_weights(name, RUNS))


def _csv_rows(each: Prediction) -> list[tuple[object, ...]]:
    if each.error:
        return [(each.file, "", "", "", each.error)]
    return [(each.file, rank, name, value, "") for rank, (name, value) in enumerate(each.top, start=1)]


def _export(options: argparse.Namespace) -> None:
    from resgrid.export import export, images_to_compare

    model, info = _model(options.model)
    name = Path(options.model).stem if Path(options.model).is_file() else options.model.rpartition("/")[2]
    out = options.out or Path(f"{name}.{options.format}")
    images, origin = images_to_compare(PROCESSED)
    difference = export(model, info, options.format, out, images)
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB of {options.model}")
    if difference is not None:
        print(
            f"On {len(images)} {origin} it differs from the model by {difference:.1e} of probability at most."
        )


def _init(options: argparse.Namespace) -> None:
    from resgrid.scaffold import init

    print(init(options.folder, options.data))


# --- models and weights -----------------------------------------------------------------------------


def _summary(options: argparse.Namespace) -> None:
    from resgrid.summary import summarize

    summary = summarize(options.model, options.num_classes)
    print(json.dumps(summary.as_dict(), indent=2) if options.json else summary.table())


def _import(options: argparse.Namespace) -> None:
    """Convert; say what was checked, what had to be assumed, and how to find out whether that is right."""
    from resgrid.convert import import_keras, import_torch
    from resgrid.weights import load_weights

    given = _normalization(options)
    arguments = (options.file, options.model, options.out, options.class_names)
    if options.kind == "keras":
        import_keras(*arguments, given or NORMALIZATIONS["keras"])
    else:
        import_torch(*arguments, given or NORMALIZATIONS["kuangliu"], options.key, print)
    info, tensors = load_weights(options.out)
    print(
        f"{options.out}: {info.architecture} from {options.file}\n"
        f"Checked: the names, shapes and types of its {len(tensors)} tensors. No file of weights says how "
        "the network computes with them, in which order its classes are, or what normalised its images.\n"
        f"Images will be normalised by mean {_figures(info.mean)} and deviation {_figures(info.std)}"
        f"{'' if given else ', which is assumed: --normalization or --mean and --std name others'}."
    )
    if options.data is None:
        print(f"See whether it is right: resgrid score {shlex.quote(str(options.out))} --data IMAGES")
    elif _print_scores(options.out, options).accuracy < 2 / len(info.class_names):
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


def _figures(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _score(options: argparse.Namespace) -> None:
    _print_scores(options.file, options)


def _print_scores(weights: Path, options: argparse.Namespace) -> Scores:
    from resgrid.evaluation import score_file
    from resgrid.training.device import choose_device

    def note(text: str) -> None:
        print(f"resgrid: {text}", file=sys.stderr)

    scores = score_file(weights, options.data, options.split, choose_device(options.device), note)
    if options.json:
        print(json.dumps(asdict(scores)))
    else:
        print(
            f"accuracy {100 * scores.accuracy:.2f} %   loss {scores.loss:.4f}   {scores.num_images:,} images"
        )
    return scores
