"""ResGrid's training and scoring against the standard loop (standard_loop.py): `make bench`.

Both sides are processes that live through the whole of a row and take turns, so that the machine's moods hit
both; each figure is the median of its rounds, each ratio the median of the rounds' ratios. Images are real
(scikit-learn's handwritten digits as 32x32 RGB), batches 128, augmentation crop and flip on both sides.
ResGrid computes as it would for that cell's full training on CIFAR-10.

A second table says how much of a step of each architecture is convolutions (convolutions.py). Writes
results.md and results.json. `make bench-gpu` is gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
BATCH = 128
CIFAR_IMAGES = 50_000
# Batches a round of the standard loop: a few seconds each on two cores.
BATCHES = {"resnet20": 12, "resnet18": 2, "vgg16": 3, "resnet110": 3}
NAMES = {"resnet20": "ResNet-20", "resnet18": "ResNet-18", "vgg16": "VGG-16", "resnet110": "ResNet-110"}
YARDSTICK_ROUNDS, YARDSTICK_BATCHES = 3, 5  # of the table of steps and convolutions
STEPS_TEXT = """Seconds of a whole training step, divided by seconds of its convolutions alone: the same
shapes, precision and layout, forward and both gradients, each shape timed by itself (the median of five), in
turn with the steps in one process. 1 would be a step in which nothing else takes any time."""


@dataclass(frozen=True)
class Row:
    """One line of the table; speeds in images/s, times in s."""

    name: str
    baseline: float
    ours: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    rounds: int
    unit: str


@dataclass(frozen=True)
class Step:
    """One line of the second table: milliseconds of a training step, and of its convolutions alone."""

    architecture: str
    batch: int
    step: float
    convolutions: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    rounds: int


# --- the two sides, each in a process of its own ----------------------------------------------------


def digits(num: int):
    import numpy as np
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images * 15).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    index = np.arange(num) % len(pixels)
    return np.repeat(pixels[index][..., None], 3, axis=3), found.target[index]


def serve(measure) -> None:
    """Run `measure` for each line on stdin, and print what it returns."""
    measure()  # the first touch of everything is not counted
    print("ready", flush=True)
    for _ in sys.stdin:
        print(measure(), flush=True)


def standard(architecture: str, what: str, batches: int) -> None:
    sys.path.insert(0, str(HERE))
    import standard_loop
    import torch

    from resgrid.config import load_params
    from resgrid.grid import find_cell
    from resgrid.models import build_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cell = find_cell(load_params(HERE.parent / "params.yaml"), f"{architecture}-sgd-0")
    model = build_model(architecture, 10, cell.recipe.dropout).to(device)
    for name, module in model.named_modules():  # torch's own, as people have them
        if type(module).__name__ == "Dropout" and type(module).__module__.startswith("resgrid"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, torch.nn.Dropout(module.rate))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    train, test = standard_loop.loaders(*digits(batches * BATCH), BATCH, device)

    def measure() -> float:
        began = time.perf_counter()
        if what == "train":
            *_, images = standard_loop.train(model, train, optimizer, device)
        else:
            *_, images = standard_loop.test(model, test, device)
        return images / (time.perf_counter() - began)

    serve(measure)


def ours(architecture: str, what: str, batches: int, keep: bool = True) -> None:
    cell, device, execution = _as_in_training(architecture, keep)
    data = _data(batches)
    from resgrid.models import build_model
    from resgrid.training.engine import fit, score

    model = build_model(architecture, 10, cell.recipe.dropout)
    if what == "train":
        training = fit(cell, model, data, device)
        serve(lambda: next(training).images_per_second)
        return

    def measure() -> float:
        began = time.perf_counter()
        score(model, data.train, data.mean, data.std, device, execution.precision)
        return len(data.train.labels) / (time.perf_counter() - began)

    serve(measure)


def yardstick(architecture: str, rounds: int, batches: int) -> None:
    """Print milliseconds of a training step and of its convolutions alone, a pair a round, as JSON."""
    cell, device, execution = _as_in_training(architecture)
    sys.path.insert(0, str(HERE))
    import convolutions

    from resgrid.models import build_model
    from resgrid.training.engine import fit

    training = fit(cell, build_model(architecture, 10, cell.recipe.dropout), _data(batches), device)
    next(training)  # the first touch of everything is not counted
    alone = build_model(architecture, 10, cell.recipe.dropout)
    pairs = []
    for _ in range(rounds):
        step = next(training).seconds / batches
        pairs.append((1e3 * step, 1e3 * convolutions.seconds(alone, BATCH, device, execution.precision)))
    print(json.dumps(pairs))


KINDS = {  # of torch's operations, the first that matches
    "convolutions": "conv",
    "matrix products": "mm|linear|baddbmm",
    "batch norm": "batch_norm",
    "ReLU": "relu|threshold|clamp_min",
    "pooling": "pool|mean",
    "dropout": "Dropout|bernoulli|random_|bitwise|shift",
    "additions, copies, padding": "add|sum|copy|clone|pad|fill|zero|cat|_to_|empty|mul|where|index",
    "optimizer": "Optimizer|_foreach|_fused",
}


def profile(architecture: str, batches: int) -> None:
    """Print what a training step's time is made of, in per cent, as a line of a Markdown table."""
    from collections import Counter

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from resgrid.models import build_model
    from resgrid.training.engine import fit

    cell, device, _ = _as_in_training(architecture)
    training = fit(cell, build_model(architecture, 10, cell.recipe.dropout), _data(batches), device)
    next(training)
    with profiled(activities=[ProfilerActivity.CPU]) as run:
        next(training)
    shares = Counter[str]()
    for operation in run.key_averages():
        kind = next((kind for kind, words in KINDS.items() if re.search(words, operation.key)), "other")
        shares[kind] += operation.self_cpu_time_total
    total = shares.total()
    figures = " | ".join(f"{100 * shares[kind] / total:.0f}" for kind in (*KINDS, "other"))
    print(f"| {architecture} | {figures} |")


def _as_in_training(architecture: str, keep: bool = True):
    """The cell as its full training on CIFAR-10 computes it, with crop and flip; its device and execution."""
    from resgrid.allocator import keep_freed_memory

    if keep:
        keep_freed_memory()
    from resgrid.config import Engine, Recipe, load_params
    from resgrid.grid import find_cell
    from resgrid.training.device import choose_device, choose_execution

    device = choose_device()
    cell = find_cell(load_params(HERE.parent / "params.yaml"), f"{architecture}-sgd-0")
    execution = choose_execution(cell, CIFAR_IMAGES, device)
    same = {"flip": True, "crop_padding": 4, "rotation_degrees": 0.0, "shift_fraction": 0.0}
    recipe = cell.recipe.model_dump() | {"batch_size": BATCH, "epochs": 10_000, "augmentation": same}
    engine = Engine(
        precision=execution.precision_name,
        compile="always" if execution.compiled else "never",
        scored_epochs="all",
    )
    changed = {"recipe": Recipe.model_validate(recipe), "engine": engine}
    return cell.model_copy(update=changed), device, execution


def _data(batches: int):
    import torch

    from resgrid.data.dataset import Split
    from resgrid.training.engine import TrainingData

    images, labels = (torch.from_numpy(part) for part in digits(batches * BATCH))
    few = Split(images[:100], labels[:100])
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return TrainingData(train=Split(images, labels), test=few, validation=None, mean=mean, std=std)


# --- the table --------------------------------------------------------------------------------------


class Side:
    """One of the two processes, or several that work at once."""

    def __init__(self, side: str, architecture: str, what: str, batches: int, processes: int = 1) -> None:
        threads = max(1, (os.cpu_count() or 1) // processes)
        env = os.environ | {"RESGRID_THREADS": str(threads)}
        self.processes = [
            subprocess.Popen(
                _command(side, architecture, what, batches),
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(processes)
        ]
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", f"{side} {architecture} {what} did not start"

    def measure(self) -> float:
        """Images/s, summed over the processes."""
        for process in self.processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(float(process.stdout.readline()) for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
            process.wait()


def _command(side: str, architecture: str, what: str, batches: int) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--side", side, architecture, what, str(batches)]


def speed_row(name: str, architecture: str, what: str, batches: int, rounds: int, processes: int = 1) -> Row:
    """Both sides in turn. The standard loop is always one process: several only get in each other's way."""
    factor = 4 if what == "score" else 1
    baseline = Side("standard", architecture, what, batches * factor)
    own = Side("ours", architecture, what, batches * factor * 2, processes)
    pairs = [(baseline.measure(), own.measure()) for _ in range(rounds)]
    baseline.close()
    own.close()
    ratios = [fast / slow for slow, fast in pairs]
    return Row(
        name=name,
        baseline=round(median(slow for slow, _ in pairs), 1),
        ours=round(median(fast for _, fast in pairs), 1),
        ratio=round(median(ratios), 2),
        lowest_ratio=round(min(ratios), 2),
        highest_ratio=round(max(ratios), 2),
        rounds=rounds,
        unit="images/s",
    )


def allocator_rows(rounds: int) -> None:
    """Print images/s with glibc's allocator as it is, and told to keep freed memory, in turn."""
    for architecture, batches in BATCHES.items():
        for what in ("train", "score"):
            num = 2 * batches * (4 if what == "score" else 1)
            sides = [Side(side, architecture, what, num) for side in ("default allocator", "ours")]
            pairs = [[side.measure() for side in sides] for _ in range(rounds)]
            for side in sides:
                side.close()
            default, kept = (median(each) for each in zip(*pairs, strict=True))
            ratios = sorted(kept / default for default, kept in pairs)
            print(
                f"| {NAMES[architecture]}, {what} | {default:,.1f} | {kept:,.1f} | {median(ratios):.2f} "
                f"| {ratios[0]:.2f}–{ratios[-1]:.2f} ({rounds}) |",
                flush=True,
            )


def start_row(rounds: int) -> Row:
    """Seconds from the start of a process to the end of its first training step, file caches warm."""
    times: dict[str, list[float]] = {"standard": [], "ours": []}
    for _ in range(rounds + 1):
        for side, found in times.items():
            began = time.perf_counter()
            process = subprocess.Popen(
                _command(side, "resnet20", "train", 1),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout.readline() == "ready\n"  # printed after the first step
            found.append(time.perf_counter() - began)
            process.wait()
    slow, fast = times["standard"][1:], times["ours"][1:]
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return Row(
        name="first training step after process start, warm",
        baseline=round(median(slow), 1),
        ours=round(median(fast), 1),
        ratio=round(median(ratios), 2),
        lowest_ratio=round(min(ratios), 2),
        highest_ratio=round(max(ratios), 2),
        rounds=rounds,
        unit="s",
    )


def step_row(architecture: str, rounds: int, batches: int) -> Step:
    """Both by one process of its own, in turn."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--side",
        "yardstick",
        architecture,
        str(rounds),
        str(batches),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    pairs = json.loads(done.stdout)
    ratios = [step / alone for step, alone in pairs]
    return Step(
        architecture=architecture,
        batch=BATCH,
        step=round(median(step for step, _ in pairs), 1),
        convolutions=round(median(alone for _, alone in pairs), 1),
        ratio=round(median(ratios), 2),
        lowest_ratio=round(min(ratios), 2),
        highest_ratio=round(max(ratios), 2),
        rounds=rounds,
    )


def measure_all(rounds: int) -> list[Row]:
    rows = []

    def add(row: Row) -> None:
        rows.append(row)
        print(f"{row.name:48} {row.baseline:9,.1f} {row.ours:9,.1f} {row.ratio:6.2f} x", flush=True)

    for architecture, batches in BATCHES.items():
        add(speed_row(f"{NAMES[architecture]} training", architecture, "train", batches, rounds))
    for architecture, batches in BATCHES.items():
        add(speed_row(f"{NAMES[architecture]} evaluation", architecture, "score", batches, rounds))
    add(speed_row("2 ResNet-20 cells at once, summed", "resnet20", "train", 12, rounds, processes=2))
    add(start_row(rounds))
    return rows


def measure_steps(architectures: Sequence[str], rounds: int, batches: int) -> list[Step]:
    steps = []
    for architecture in architectures:
        steps.append(row := step_row(architecture, rounds, batches))
        print(f"{architecture:48} {row.step:9,.1f} {row.convolutions:9,.1f} {row.ratio:6.2f} x", flush=True)
    return steps


def machine() -> dict[str, str]:
    import torch

    from resgrid.training.device import choose_device, choose_precision, device_name

    device = choose_device()
    from resgrid.config import load_params

    precision = choose_precision(load_params(HERE.parent / "params.yaml").engine, device)
    return {
        "device": device_name(device),
        "cores": str(os.cpu_count()),
        "bf16": str(precision is torch.bfloat16),
        "amx": str(bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()}, {' '.join(platform.libc_ver())}",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def write(folder: Path, found: dict[str, str], rows: list[Row], steps: list[Step]) -> None:
    content = {
        "machine": found,
        "rows": [asdict(row) for row in rows],
        "steps": [asdict(step) for step in steps],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = ["# Speed against the standard loop\n"]
    lines += ["Written by `make bench`; read with [notes.md](notes.md).\n"]
    lines += [f"- {key}: {value}" for key, value in found.items()]
    lines += ["", "| | standard loop | ResGrid | ratio | rounds' ratios |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.baseline:,.1f} {row.unit} | {row.ours:,.1f} | {row.ratio:.2f} "
            f"| {row.lowest_ratio:.2f}–{row.highest_ratio:.2f} ({row.rounds}) |"
        )
    if steps:
        lines += ["", "## A step beside its convolutions alone\n", STEPS_TEXT, ""]
        lines += ["| | step, ms | convolutions, ms | ratio | rounds' ratios |", "|---|---|---|---|---|"]
    for step in steps:
        lines.append(
            f"| {step.architecture}, batch {step.batch} | {step.step:,.1f} | {step.convolutions:,.1f} "
            f"| {step.ratio:.2f} | {step.lowest_ratio:.2f}–{step.highest_ratio:.2f} ({step.rounds}) |"
        )
    (folder / "results.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--dry", type=Path, metavar="FOLDER", help="ResNet-20's step alone, once, into FOLDER"
    )
    parser.add_argument(
        "--allocator", action="store_true", help="with and without keeping freed memory (allocator.py)"
    )
    parser.add_argument(
        "--profile", metavar="ARCHITECTURE", help="what a step's time is made of, by torch's profiler"
    )
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)  # whose, which, what, how many batches
    options = parser.parse_args()
    if options.side:
        side, architecture, what, batches = options.side
        if side == "yardstick":
            yardstick(architecture, int(what), int(batches))
        else:
            if side == "standard":
                standard(architecture, what, int(batches))
            else:
                ours(architecture, what, int(batches), keep=side == "ours")
        return
    if options.allocator:
        allocator_rows(options.rounds)
        return
    if options.profile:
        print(f"| | {' | '.join(KINDS)} | other |\n|---|{'---|' * (len(KINDS) + 1)}")
        profile(options.profile, YARDSTICK_BATCHES)
        return
    if options.dry:
        write(options.dry, machine(), [], measure_steps(["resnet20"], 1, 1))
        return
    from resgrid.config import load_params

    found = machine()
    rows = measure_all(options.rounds)
    write(
        HERE,
        found,
        rows,
        measure_steps(
            list(load_params(HERE.parent / "params.yaml").grid.architectures),
            YARDSTICK_ROUNDS,
            YARDSTICK_BATCHES,
        ),
    )


if __name__ == "__main__":
    main()
