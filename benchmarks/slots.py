"""How many cells should share a machine: `python benchmarks/slots.py --slots 1 2 4 8`.

For each number of slots that many processes train the same cell at once, each with its share of the cores
as under train-all; on a GPU all of them share the first card. Printed are the images/s summed over the
processes, in epochs after the first, and their ratio to one slot. Needs torch and the core alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from resgrid.config import load_params
from resgrid.grid import find_cell

ROOT = Path(__file__).parents[1]
WARM_UP = 1  # epochs: compilation, the allocator, the first touch of each page

# Prints `ready`, waits for a line, then trains and prints the images/s of each epoch.
TRAINER = """
import sys
import torch
from resgrid.config import load_params
from resgrid.data.dataset import Split
from resgrid.grid import find_cell
from resgrid.models import build_model
from resgrid.training.device import choose_device
from resgrid.training.engine import TrainingData, fit

architecture, num_images, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cell = find_cell(load_params(), f"{architecture}-adam-0")
cell = cell.model_copy(update={"recipe": cell.recipe.model_copy(update={"epochs": epochs})})
device = choose_device()
torch.manual_seed(0)

def split(num):
    return Split(torch.randint(0, 256, (num, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 10, (num,)))

data = TrainingData(
    train=split(num_images), test=split(100), validation=None, mean=(0.5,) * 3, std=(0.25,) * 3
)
model = build_model(architecture, 10, cell.recipe.dropout)
print("ready", flush=True)
sys.stdin.readline()
for epoch in fit(cell, model, data, device):
    print(epoch.images_per_second, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--images", type=int, default=5_000, help="an epoch (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--rounds", type=int, default=3, help="the numbers of slots take turns (default: %(default)s)"
    )
    options = parser.parse_args()
    find_cell(load_params(ROOT / "params.yaml"), f"{options.architecture}-adam-0")
    cores = os.cpu_count() or 1
    print(
        f"{cores} cores, load {os.getloadavg()[0]:.1f}; {options.architecture}, {options.images} images",
        flush=True,
    )
    speeds: dict[int, list[float]] = {num: [] for num in options.slots}
    for _ in range(options.rounds):
        for num in options.slots:
            speeds[num].append(summed(num, max(1, cores // num), options))
    one = median(speeds[options.slots[0]])
    for num, found in speeds.items():
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        ratio = f"{median(found) / one:.2f} times {options.slots[0]}"
        print(f"{num:2} slots: {median(found):8,.0f} images/s ({spread}), {ratio}")


def summed(num: int, threads: int, options: argparse.Namespace) -> float:
    """Images/s of `num` processes together."""
    command = [sys.executable, "-c", TRAINER, options.architecture, str(options.images), str(options.epochs)]
    env = os.environ | {"RESGRID_THREADS": str(threads)}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(num)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all at once
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    epochs = [[float(line) for line in process.communicate()[0].splitlines()] for process in processes]
    return sum(median(speeds[WARM_UP:]) for speeds in epochs)


if __name__ == "__main__":
    main()
