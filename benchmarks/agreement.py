"""What the fast engine computes, beside plain fp32: `python benchmarks/agreement.py`, half an hour.

200 steps of batch 128 from the same weights, with the same images and dropout masks; and a short real
training to its end with five seeds each way, so that a difference can be seen against the noise of seeds.
Images are scikit-learn's handwritten digits. Writes agreement.md.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from statistics import mean, stdev

import torch
from speed import digits

from resgrid.config import Params, Recipe, load_params
from resgrid.data.batches import Batches
from resgrid.data.dataset import Split
from resgrid.grid import Cell, find_cell
from resgrid.models import build_model
from resgrid.training.device import Execution, choose_device, choose_execution, device_name
from resgrid.training.engine import Totals, TrainingData, fit, make_step, stream_seed
from resgrid.training.optimizers import build_optimizer

HERE = Path(__file__).parent
MEAN, STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)
BATCH = 128
TEST_IMAGES = 357
RATE = {"resnet20": 0.05, "resnet10": 0.02}


def images(first: int, last: int) -> Split:
    pixels, labels = (part[first:last] for part in digits(1797))
    return Split(images=torch.from_numpy(pixels.copy()), labels=torch.from_numpy(labels.copy()))


def losses(
    cell: Cell, execution: Execution, channels_last: bool, steps: int, device: torch.device
) -> list[float]:
    """The loss before each of `steps` steps."""
    torch.manual_seed(stream_seed(cell.seed, "weights"))
    model = build_model(cell.architecture, 10, cell.recipe.dropout).to(device).train()
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    totals = Totals(device)
    step = make_step(cell, model, build_optimizer(cell, model), totals, execution)
    draws = torch.Generator(device).manual_seed(stream_seed(cell.seed, "batches"))
    batches = Batches(images(0, 1440), cell.recipe.augmentation, BATCH, MEAN, STD, draws)
    torch.manual_seed(stream_seed(cell.seed, "dropout"))
    found: list[float] = []
    while len(found) < steps:
        for batch, labels in batches:
            step(batch if channels_last else batch.contiguous(), labels)
            found.append(totals.read(1, BATCH)[0])
    return found[:steps]


def curve_row(params: Params, architecture: str, steps: int, device: torch.device) -> str:
    cell = find_cell(params, f"{architecture}-sgd-0")
    changed = cell.recipe.model_dump() | {"batch_size": BATCH}
    optimizer = cell.optimizer.model_copy(update={"lr": RATE[architecture]})
    cell = cell.model_copy(update={"recipe": Recipe.model_validate(changed), "optimizer": optimizer})
    execution = choose_execution(cell, 50_000, device)
    fast = losses(cell, execution, True, steps, device)
    plain = losses(cell, Execution(torch.float32), False, steps, device)
    apart = [abs(a - b) / b for a, b in zip(fast, plain, strict=True)]
    tenth = steps // 10
    return (
        f"| {architecture}, {execution} | {mean(apart[:10]):.2%} "
        f"| {mean(fast[:tenth]):.4f}, {mean(plain[:tenth]):.4f} "
        f"| {mean(fast[-tenth:]):.4f}, {mean(plain[-tenth:]):.4f} |"
    )


def accuracies(params: Params, precision: str, seeds: int, device: torch.device) -> list[float]:
    """The demo's ResNet-20 with Adam, trained to its end with each seed: test accuracies in %."""
    given = TrainingData(
        train=images(0, 1797 - TEST_IMAGES),
        test=images(1797 - TEST_IMAGES, 1797),
        validation=None,
        mean=MEAN,
        std=STD,
    )
    found = []
    for seed in range(seeds):
        cell = find_cell(params, "resnet20-adam-0")
        engine = cell.engine.model_copy(update={"precision": precision})
        cell = cell.model_copy(update={"seed": seed, "engine": engine})
        torch.manual_seed(stream_seed(seed, "weights"))
        model = build_model(cell.architecture, 10, cell.recipe.dropout)
        *_, last = fit(cell, model, given, device)
        assert last.test_accuracy is not None
        found.append(100 * last.test_accuracy)
    return found


def accuracy_row(name: str, found: list[float]) -> str:
    return (
        f"| {name} | {mean(found):.2f} ± {stdev(found):.2f} | {', '.join(f'{each:.2f}' for each in found)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    device = choose_device()
    own = load_params(HERE.parent / "params.yaml")
    demo = load_params(HERE.parent / "examples/digits/params.yaml")
    lines = [
        "# The fast engine beside plain fp32",
        "",
        "Written by `python benchmarks/agreement.py`. Plain: fp32, NCHW, eager, from the same weights, with "
        "the same images and dropout masks.",
        "",
        f"- device: {device_name(device)}, {torch.get_num_threads()} threads",
        f"- torch: {torch.__version__}, Python {platform.python_version()}",
        "",
        f"## {options.steps} steps of batch {BATCH}, SGD",
        "",
        "| fast | apart in the first 10 steps (mean, relative) | loss over the first tenth: fast, plain "
        "| loss over the last tenth: fast, plain |",
        "|---|---|---|---|",
    ]
    for architecture in RATE:
        lines.append(curve_row(own, architecture, options.steps, device))
        print(lines[-1], flush=True)
    lines += [
        "",
        "## Accuracy at the end",
        "",
        f"The demo's ResNet-20 with Adam, five epochs, {TEST_IMAGES} test images (one is 0.28 points), "
        f"{options.seeds} seeds: mean ± deviation over seeds.",
        "",
        "| | test accuracy, % | each seed |",
        "|---|---|---|",
    ]
    for name, precision in (("fast (bf16 where the device is good at it)", "auto"), ("fp32", "fp32")):
        lines.append(accuracy_row(name, accuracies(demo, precision, options.seeds, device)))
        print(lines[-1], flush=True)
    (HERE / "agreement.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
