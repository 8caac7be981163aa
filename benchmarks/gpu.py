"""Training steps on a GPU, in at most five minutes: `make bench-gpu`, which writes results-gpu.md.

Needs torch, NumPy, pydantic, ruamel.yaml and safetensors; for the standard loop torchvision and Pillow as
well. Images are random bytes, as many as CIFAR-10 has: a step takes as long whatever they show. What there is
no time for, or fails, says so in its place, and what was measured before is kept. `--dry` goes through all of
it on the CPU, in seconds and with figures that mean nothing: no minute on a card is lost to a typing error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

import convolutions  # noqa: E402

from resgrid import mps  # noqa: E402
from resgrid.config import load_params  # noqa: E402
from resgrid.data.batches import Batches  # noqa: E402
from resgrid.data.dataset import Split  # noqa: E402
from resgrid.grid import Cell, expand, find_cell  # noqa: E402
from resgrid.models import build_model  # noqa: E402
from resgrid.training import graph  # noqa: E402
from resgrid.training.device import Execution, choose_device, choose_precision, device_name  # noqa: E402
from resgrid.training.engine import Totals, make_step  # noqa: E402
from resgrid.training.graph import GraphedStep  # noqa: E402
from resgrid.training.optimizers import build_optimizer, set_learning_rate  # noqa: E402

PARAMS = load_params(HERE.parent / "params.yaml")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SHARES = (  # processes, how their steps are computed, under MPS or not
    (1, "graphed", False), (8, "graphed", True), (8, "eager", True), (4, "graphed", True),
    (4, "graphed", False), (8, "eager", False), (1, "eager", False),
)  # fmt: skip
# Cold, on 16 cores of an H200's machine, ResNet-20 and 18 took 18 and 16 s to compile, ResNet-110 75.
COMPILED = {"resnet20": 30.0, "resnet18": 30.0, "vgg16": 30.0, "resnet110": 85.0}
START_SECONDS = 40.0  # for processes to begin; the first on a fresh machine takes 13


class Size:
    """How much is measured."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.images, self.steps, self.seconds = (64, 1, 0.1) if dry else (50_000, 100, 5.0)
        self.shares = ((1, "graphed", False), (2, "eager", True)) if dry else SHARES
        self.shares_compiled = (2 if dry else 8, "compiled", True)
        self.batches = 1 if dry else 30  # of the standard loop

    def cell(self, architecture: str) -> Cell:
        cell = find_cell(PARAMS, f"{architecture}-sgd-0")
        recipe = cell.recipe.model_copy(update={"batch_size": 8} if self.dry else {})
        return cell.model_copy(update={"recipe": recipe})


class Training:
    """A cell on random images: `step()` is all of a training step, with its batch and its learning rate."""

    def __init__(self, cell: Cell, size: Size, device: torch.device, execution: Execution) -> None:
        self.cell, self.device = cell, device
        self.model = build_model(cell.architecture, 10, cell.recipe.dropout).to(device)
        self.model.to(memory_format=torch.channels_last).train()
        images = torch.randint(256, (size.images, 32, 32, 3), dtype=torch.uint8, device=device)
        split = Split(images, torch.randint(10, (size.images,), device=device))
        draws = torch.Generator(device).manual_seed(0)
        recipe = cell.recipe
        self.batches = Batches(split, recipe.augmentation, recipe.batch_size, MEAN, STD, draws)
        self.optimizer = build_optimizer(cell, self.model)
        self.update = make_step(cell, self.model, self.optimizer, Totals(device), execution)
        self.next = self._endless()

    def _endless(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from self.batches

    def step(self) -> None:
        set_learning_rate(self.optimizer, 1e-4)
        self.update(*next(self.next))

    def seconds(self, work: Callable[[], None], num: int) -> float:
        """Of one `work`, the mean of `num` after some that are not counted."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            for _ in range(min(num, 10)):
                work()
            self.wait()
            began = time.perf_counter()
            for _ in range(num):
                work()
            self.wait()
        return (time.perf_counter() - began) / num

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# --- what is measured -------------------------------------------------------------------------------


def steps(architecture: str, size: Size, device: torch.device, precision: torch.dtype) -> dict[str, float]:
    """Milliseconds of an eager step, a graphed one, its replay and its convolutions; GiB reserved."""
    cell = size.cell(architecture)
    if device.type == "cuda":
        gc.collect()  # the graph before this one, whose memory would count here
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    graphed = Training(cell, size, device, Execution(precision, graphed=True))
    assert isinstance(graphed.update, GraphedStep)
    whole = graphed.seconds(graphed.step, size.steps)
    assert graphed.update.graphed, "the capture failed; see above"
    replay = graphed.seconds(graphed.update._replay, size.steps)
    reserved = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else 0.0
    eager = Training(cell, size, device, Execution(precision))
    slow = eager.seconds(eager.step, max(1, size.steps // 2))
    cpu = build_model(architecture, 10, cell.recipe.dropout)
    alone = convolutions.seconds(cpu, cell.recipe.batch_size, device, precision)
    return {
        "batch": cell.recipe.batch_size,
        "eager_ms": 1e3 * slow,
        "graphed_ms": 1e3 * whole,
        "replay_ms": 1e3 * replay,
        "convolutions_ms": 1e3 * alone,
        "gib": reserved,
    }


def compiled(architecture: str, size: Size, device: torch.device, precision: torch.dtype) -> dict[str, float]:
    """Milliseconds of a graphed step with forward and loss by torch.compile; seconds until the first."""
    torch.compiler.reset()
    began = time.perf_counter()
    execution = Execution(precision, compiled=not size.dry, graphed=True)
    training = Training(size.cell(architecture), size, device, execution)
    training.seconds(training.step, 1)
    first = time.perf_counter() - began
    return {"graphed_ms": 1e3 * training.seconds(training.step, size.steps), "first_step_s": first}


def shared(num: int, kind: str, under_mps: bool, size: Size) -> float:
    """Images/s of `num` processes that train ResNet-20 at once, summed."""
    command = [sys.executable, str(Path(__file__)), "--child", kind, *(["--dry"] if size.dry else [])]
    with mps.daemon() if under_mps else nullcontext({}) as variables:
        if under_mps and not variables and not size.dry:
            raise RuntimeError("no MPS here, or a daemon runs already")
        processes = [
            subprocess.Popen(
                command, env=os.environ | variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(num)
        ]
        # A process that hangs is not waited for.
        timer = threading.Timer(START_SECONDS + size.seconds, lambda: [p.kill() for p in processes])
        timer.start()
        try:
            for process in processes:
                if process.stdout.readline() != "ready\n":
                    raise RuntimeError("a process did not start; see above")
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            return sum(float(process.stdout.readline()) for process in processes)
        finally:
            for process in processes:
                with suppress(BrokenPipeError):
                    process.stdin.close()
            for process in processes:
                process.wait()
            timer.cancel()


def child(kind: str, size: Size, device: torch.device, precision: torch.dtype) -> None:
    torch.set_num_threads(1)
    execution = Execution(precision, compiled=kind == "compiled" and not size.dry, graphed=kind != "eager")
    training = Training(size.cell("resnet20"), size, device, execution)
    training.seconds(training.step, 1 if size.dry else 30)
    print("ready", flush=True)
    sys.stdin.readline()
    began, done = time.perf_counter(), 0
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        while time.perf_counter() - began < size.seconds:
            for _ in range(1 if size.dry else 50):
                training.step()
                done += 1
            training.wait()
    print(done * training.cell.recipe.batch_size / (time.perf_counter() - began), flush=True)


def standard(size: Size, device: torch.device) -> float:
    """Images/s of the loop that everybody copies, with ResNet-20."""
    import standard_loop

    cell = size.cell("resnet20")
    model = build_model("resnet20", 10, cell.recipe.dropout).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    num = size.batches * cell.recipe.batch_size
    images = torch.randint(256, (num, 32, 32, 3), dtype=torch.uint8).numpy()
    train, _ = standard_loop.loaders(
        images, torch.randint(10, (num,)).numpy(), cell.recipe.batch_size, device
    )
    *_, done = standard_loop.train(model, train, optimizer, device)  # starts the workers
    began = time.perf_counter()
    *_, done = standard_loop.train(model, train, optimizer, device)
    return done / (time.perf_counter() - began)


# --- the page ---------------------------------------------------------------------------------------


class Page:
    """What was measured so far, written anew after each figure."""

    def __init__(self, out: Path, size: Size, device: torch.device, precision: torch.dtype) -> None:
        self.out, self.size = out, size
        self.machine = {
            "device": device_name(device),
            "driver": _driver(),
            "cores": str(os.cpu_count()),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "precision": "bf16" if precision is torch.bfloat16 else "fp32",
            "command": "make bench-gpu",
        }
        self.steps: dict[str, Any] = {}
        self.shares: list[tuple[int, str, bool, Any]] = []
        self.standard: Any = "not measured"
        self.compiled: dict[str, Any] = {}

    def save(self) -> None:
        content = {
            "machine": self.machine, "steps": self.steps, "shares": self.shares, "standard": self.standard,
            "compiled": self.compiled,
        }  # fmt: skip
        (self.out / "results-gpu.json").write_text(json.dumps(content, indent=2) + "\n")
        (self.out / "results-gpu.md").write_text("\n".join(self._lines()) + "\n")

    def _lines(self) -> Iterator[str]:
        yield "# Training steps on a GPU\n\nWritten by `make bench-gpu`; read with [notes.md](notes.md).\n"
        yield from (f"- {key}: {value}" for key, value in self.machine.items())
        yield (
            "\n## One cell alone\n\nA step is all of it: batch, learning rate, forward, loss, backward, "
            "optimizer. The last ratio is a graphed step's seconds by those of its convolutions alone, "
            "captured as well.\n\n"
            "| | batch | eager, ms | graphed, ms | of it replay | convolutions alone | images/s, eager "
            "| graphed | ratio | step / convolutions | GiB reserved |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for name, row in self.steps.items():
            yield f"| {name} | {row} |" if isinstance(row, str) else _row(name, row)
        yield "\n## ResNet-20 cells that share the card, images/s summed\n"
        yield "| | images/s | by one graphed alone |\n|---|---|---|"
        alone = next((v for n, kind, _, v in self.shares if (n, kind) == (1, "graphed")), None)
        for num, kind, under_mps, value in self.shares:
            name = f"{num} {kind}" + (" under MPS" if under_mps else " without MPS" if num > 1 else "")
            ratio = f"{value / alone:.2f}" if isinstance(value, float) and isinstance(alone, float) else ""
            yield f"| {name} | {_number(value)} | {ratio} |"
        yield f"| the standard loop | {_number(self.standard)} | |"
        yield (
            "\n## Forward and loss by torch.compile, inside the graph (`engine.compile: always`)\n\n"
            "| | graphed, ms | compiled and graphed | ratio | first step after, s |\n|---|---|---|---|---|"
        )
        for name, row in self.compiled.items():
            if isinstance(row, str):
                yield f"| {name} | {row} | | | |"
                continue
            plain = self.steps.get(name)
            plain = plain["graphed_ms"] if isinstance(plain, dict) else float("nan")
            figures = f"{plain:.2f} | {row['graphed_ms']:.2f} | {plain / row['graphed_ms']:.2f}"
            yield f"| {name} | {figures} | {row['first_step_s']:.0f} |"
        yield from self._hours()

    def _hours(self) -> Iterator[str]:
        """Of training the grid of params.yaml on 50,000 images, without scoring."""
        cells = [cell for cell in expand(PARAMS) if cell.study is None]
        if any(not isinstance(self.steps.get(cell.architecture), dict) for cell in cells):
            return

        def hours(key: str) -> float:
            return sum(
                cell.recipe.epochs * (50_000 // cell.recipe.batch_size) * self.steps[cell.architecture][key]
                for cell in cells
            ) / 3.6e6  # fmt: skip

        text = (
            f"The {len(cells)} cells of params.yaml take {hours('eager_ms'):.1f} h eager one after another, "
        )
        text += f"{hours('graphed_ms'):.1f} h graphed"
        sums = {(num, kind, under): v for num, kind, under, v in self.shares if isinstance(v, float)}
        eight, one = sums.get((8, "graphed", True)), sums.get((1, "graphed", False))
        if eight and one:
            text += f", and {hours('graphed_ms') * one / eight:.1f} h eight at once under MPS"
            text += " if all gained as ResNet-20"
        yield f"\n## The grid that follows\n\n{text}. Scoring comes on top."


def _row(name: str, row: dict[str, float]) -> str:
    eager, graphed = (1e3 * row["batch"] / row[key] for key in ("eager_ms", "graphed_ms"))
    return (
        f"| {name} | {row['batch']} | {row['eager_ms']:.2f} | {row['graphed_ms']:.2f} "
        f"| {row['replay_ms']:.2f} | {row['convolutions_ms']:.2f} | {eager:,.0f} | {graphed:,.0f} "
        f"| {graphed / eager:.2f} | {row['graphed_ms'] / row['convolutions_ms']:.2f} | {row['gib']:.2f} |"
    )


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def _driver() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def measure(page: Page, size: Size, device: torch.device, precision: torch.dtype, deadline: float) -> None:
    def attempt(what: str, work: Callable[[], Any], least: float) -> Any:
        """What `work` returns, or why there is nothing."""
        if deadline - time.monotonic() < least:
            result: Any = "no time left"
        else:
            try:
                result = work()
            except Exception as error:  # the other figures are worth having all the same
                result = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"{deadline - time.monotonic():5.0f} s left  {what}: {result}", flush=True)
        return result

    def share(num: int, kind: str, under_mps: bool) -> None:
        value = attempt(
            f"{num} {kind}{' under MPS' * under_mps}", lambda: shared(num, kind, under_mps, size), 15
        )
        page.shares.append((num, kind, under_mps, value))
        page.save()

    # The shares first, while this process has no context of its own on the card.
    for each in size.shares:
        share(*each)
    for name in PARAMS.grid.architectures:
        if size.dry and page.steps:
            page.steps[name] = page.steps["resnet20"]
        else:
            page.steps[name] = attempt(name, lambda name=name: steps(name, size, device, precision), 5)
        page.save()
    page.standard = attempt("standard loop", lambda: standard(size, device), 15)
    page.save()
    for name, cold in COMPILED.items():
        if size.dry and page.compiled:
            break
        least = 0 if size.dry else cold
        page.compiled[name] = attempt(
            f"{name} compiled", lambda n=name: compiled(n, size, device, precision), least
        )
        page.save()
        if name == "resnet20":  # now that what was compiled is cached
            share(*size.shares_compiled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry", action="store_true", help="everything once on the CPU; the figures mean nothing"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for results-gpu.md")
    parser.add_argument("--seconds", type=float, default=280.0, help="at most (default: %(default)s)")
    parser.add_argument("--child", choices=("eager", "graphed", "compiled"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    size = Size(options.dry)
    device = choose_device("cpu" if options.dry else "auto")
    if device.type != "cuda" and not options.dry:
        sys.exit("bench-gpu: there is no GPU here; `make bench` measures the CPU.")
    if options.dry:
        graph.capture = lambda step: step.eager
    precision = choose_precision(PARAMS.engine, device)
    if options.child:
        child(options.child, size, device, precision)
        return
    measure(Page(options.out, size, device, precision), size, device, precision, deadline)
    print(f"{options.out / 'results-gpu.md'} is written")


if __name__ == "__main__":
    main()
