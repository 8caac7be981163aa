"""On a GPU: `make test-gpu`. Needs nothing beside it but torch, pytest and what training needs.

With RESGRID_GPU_DRY=1 the same tests run on the CPU, with small batches and a stand-in for the graph: that
keeps them free of mistakes where there is no card.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from resgrid import mps  # noqa: E402
from resgrid.checkpoint import Checkpoints  # noqa: E402
from resgrid.config import Recipe, load_params  # noqa: E402
from resgrid.data.dataset import Split  # noqa: E402
from resgrid.grid import Cell, find_cell  # noqa: E402
from resgrid.models import build_model  # noqa: E402
from resgrid.training.device import choose_execution  # noqa: E402
from resgrid.training.engine import Epoch, Outcome, Totals, TrainingData, fit, score, stream_seed  # noqa: E402

DRY = os.environ.get("RESGRID_GPU_DRY") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda:0")
BATCH = 4 if DRY else 128
STEPS = 2 if DRY else 15  # an epoch
PARAMS = load_params(ROOT / "params.yaml")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

pytestmark = pytest.mark.skipif(
    not DRY and not torch.cuda.is_available(), reason="needs a GPU: `make test-gpu` on a machine with one"
)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    if DRY:
        torch.set_num_threads(1)
        stand_in.install(monkeypatch)
    yield
    torch.set_num_threads(threads)


def cell(cell_id: str, **recipe: Any) -> Cell:
    found = find_cell(PARAMS, cell_id)
    changed = Recipe.model_validate(found.recipe.model_dump() | {"epochs": 2, "batch_size": BATCH} | recipe)
    return found.model_copy(update={"recipe": changed})


def data() -> TrainingData:
    values = torch.Generator().manual_seed(0)

    def split(num: int) -> Split:
        images = torch.randint(256, (num, 32, 32, 3), dtype=torch.uint8, generator=values)
        return Split(images, torch.randint(10, (num,), generator=values))

    return TrainingData(train=split(STEPS * BATCH), test=split(BATCH), validation=None, mean=MEAN, std=STD)


def new_model(trained: Cell) -> Any:
    torch.manual_seed(stream_seed(trained.seed, "weights"))
    return build_model(trained.architecture, 10, trained.recipe.dropout)


def run(training: Generator[Epoch, None, Outcome]) -> tuple[list[Epoch], Outcome]:
    epochs = []
    while True:
        try:
            epochs.append(next(training))
        except StopIteration as end:
            return epochs, end.value


def eager(trained: Cell) -> tuple[list[Epoch], dict[str, Tensor]]:
    """The training without a graph."""
    execution = replace(choose_execution(trained, STEPS * BATCH, DEVICE), graphed=False)
    model = new_model(trained)
    epochs, outcome = run(fit(trained, model, data(), DEVICE, execution=execution))
    assert not outcome.graphed
    return epochs, state(model)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


CELLS = {
    "sgd": cell("resnet20-sgd-0"),
    "adam": cell("resnet20-adam-0"),
    "rmsprop": cell("resnet20-rmsprop-0"),
    "adagrad": cell("resnet20-adagrad-0"),
    "110 layers": cell("resnet110-sgd-0"),
    "dropout": cell("resnet10-adam-0"),
    "vgg": cell("vgg16-sgd-0"),
    "frozen base": cell("resnet20-sgd-0", approach="frozen_base"),
}
if DRY:
    CELLS = {"dropout": CELLS["dropout"]}  # tests/test_graph.py has the others on the CPU


@pytest.mark.parametrize("name", CELLS)
def test_a_graphed_training_is_the_eager_one_bit_for_bit(name):
    trained = CELLS[name]
    expected, weights = eager(trained)
    model = new_model(trained)
    epochs, outcome = run(fit(trained, model, data(), DEVICE))
    assert outcome.graphed
    assert not differing(state(model), weights)
    assert epochs == expected
    assert outcome.test == score(model, data().test, MEAN, STD, DEVICE)  # the last one in fp32


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    trained = cell("resnet10-adam-0", epochs=3)
    whole, model = new_model(trained), new_model(trained)
    expected, _ = run(fit(trained, whole, data(), DEVICE))
    execution = str(choose_execution(trained, STEPS * BATCH, DEVICE))
    kept = Checkpoints(tmp_path, trained, "data", DEVICE, execution)
    training = fit(trained, new_model(trained), data(), DEVICE, checkpoints=kept)
    epochs = [next(training)]
    training.close()
    kept.flush()
    kept = Checkpoints(tmp_path, trained, "data", DEVICE, execution)
    assert kept.num_epochs == 1
    more, outcome = run(fit(trained, model, data(), DEVICE, checkpoints=kept))
    kept.flush()
    assert outcome.graphed
    assert [*epochs, *more] == expected
    assert not differing(state(model), state(whole))


def test_after_a_capture_that_fails_training_is_the_eager_one(monkeypatch, caplog):
    trained = CELLS["dropout"]
    expected, weights = eager(trained)
    add, calls = Totals.add, []

    def reads(totals: Totals, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        calls.append(loss)
        if DRY and len(calls) == 1:
            raise RuntimeError("what a capture raises")
        if not DRY and torch.cuda.is_current_stream_capturing():
            loss.item()  # which no capture allows
        add(totals, loss, logits, labels)

    monkeypatch.setattr(Totals, "add", reads)
    model = new_model(trained)
    epochs, outcome = run(fit(trained, model, data(), DEVICE))
    assert caplog.messages[0].startswith("no CUDA graph, so steps are slower: ")
    assert not outcome.graphed
    assert not differing(state(model), weights)
    assert epochs == expected


def test_of_two_processes_under_mps_one_is_killed_and_the_other_ends_or_goes_on(tmp_path):
    with mps.daemon() as variables:
        if not variables and not DRY:
            pytest.skip("no MPS here, or a daemon runs already")

        def start(name: str) -> subprocess.Popen[bytes]:
            path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
            env = os.environ | variables | {"PYTHONPATH": path}
            with (tmp_path / name).open("w") as file:
                command = [sys.executable, str(Path(__file__)), str(tmp_path / f"{name} kept")]
                return subprocess.Popen(command, env=env, stdout=file)

        def says(name: str) -> str:
            return (tmp_path / name).read_text()

        one, other = start("one"), start("other")
        deadline = time.monotonic() + 120
        while not (says("one") and says("other")) and time.monotonic() < deadline:
            time.sleep(0.05)
        one.kill()
        one.wait()
        if other.wait(120):  # taken along: it goes on from its checkpoint
            print(f"the other one ended with {other.returncode}")
            assert start("other").wait(120) == 0
        assert start("one").wait(120) == 0
        ends = [says(name).splitlines()[-1] for name in ("one", "other")]
        assert all(end.startswith("weights sha256:") for end in ends)
        # That two processes end with the same weights is seen on some cards and promised on none.
        print("the two end alike:", ends[0] == ends[1])


def train_here(folder: Path) -> None:
    trained = cell("resnet20-sgd-0", epochs=3 if DRY else 40)
    execution = str(choose_execution(trained, STEPS * BATCH, DEVICE))
    kept = Checkpoints(folder, trained, "data", DEVICE, execution)
    model = new_model(trained)
    for epoch in fit(trained, model, data(), DEVICE, checkpoints=kept):
        kept.flush()
        print(f"epoch {epoch.epoch}", flush=True)
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in state(model).values())
    print(f"weights sha256:{hashlib.sha256(content).hexdigest()}", flush=True)


if __name__ == "__main__":
    train_here(Path(sys.argv[1]))
