"""The training loop on real handwritten digits: what it learns, repeats, freezes, refuses and survives."""

from __future__ import annotations

import copy
import hashlib
import math
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from resgrid.config import Engine, Recipe, parse_params
from resgrid.data.batches import Batches
from resgrid.data.dataset import Split
from resgrid.errors import ResgridError
from resgrid.grid import Cell, find_cell
from resgrid.models import ARCHITECTURES, build_model
from resgrid.models.classifier import Classifier
from resgrid.optimizers import OPTIMIZERS
from resgrid.training import device as devices
from resgrid.training.device import Execution
from resgrid.training.engine import (
    Epoch,
    Outcome,
    Totals,
    TrainingData,
    fit,
    make_step,
    score,
    stream_seed,
)
from resgrid.training.optimizers import build_optimizer

RAW = YAML(typ="safe").load(Path(__file__).parents[1] / "params.yaml")
PARAMS = parse_params(
    RAW | {"grid": RAW["grid"] | {"architectures": [*ARCHITECTURES], "optimizers": [*OPTIMIZERS]}}
)
CPU = torch.device("cpu")
BF16 = (
    devices.choose_precision(Engine(precision="auto", compile="never", scored_epochs="all"), CPU)
    is torch.bfloat16
)
PLAIN = {
    "epochs": 1,
    "batch_size": 16,
    "schedule": {"name": "constant"},
    "warmup": {"steps": 0, "factor": 1.0},
    "time_decay": 0.0,
    "augmentation": {"flip": False, "crop_padding": 2, "rotation_degrees": 5.0, "shift_fraction": 0.0},
}
MEAN, STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)
# Ten steps that do not yet amplify the rounding of bf16.
LOW_RATE = {"sgd": 2e-4, "adam": 2e-6, "rmsprop": 2e-6, "adagrad": 2e-5, "adamw": 2e-6}


def digits(first: int, last: int) -> Split:
    """scikit-learn's images number `first` to `last`, each pixel a square of 4x4."""
    found = load_digits()
    pixels = (found.images[first:last] * 15).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return Split(
        images=torch.from_numpy(pixels)[..., None].repeat(1, 1, 1, 3),
        labels=torch.from_numpy(found.target[first:last]),
    )


def data(num_train: int = 48, num_test: int = 32, num_validation: int = 0) -> TrainingData:
    return TrainingData(
        train=digits(0, num_train),
        test=digits(1000, 1000 + num_test),
        validation=digits(1300, 1300 + num_validation) if num_validation else None,
        mean=MEAN,
        std=STD,
    )


def cell(
    cell_id: str = "resnet20-sgd-0",
    precision: str = "fp32",
    lr: float | None = None,
    compile: str = "never",
    scored_epochs: str = "all",
    **recipe: Any,
) -> Cell:
    found = find_cell(PARAMS, cell_id)
    changed = Recipe.model_validate(found.recipe.model_dump() | PLAIN | recipe)
    optimizer = found.optimizer.model_copy(update={"lr": lr or found.optimizer.lr})
    engine = Engine(precision=precision, compile=compile, scored_epochs=scored_epochs)
    return found.model_copy(update={"recipe": changed, "optimizer": optimizer, "engine": engine})


def new_model(trained: Cell) -> Classifier:
    torch.manual_seed(stream_seed(trained.seed, "weights"))
    return build_model(trained.architecture, 10, trained.recipe.dropout)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def run(training: Generator[Epoch, None, Outcome]) -> tuple[list[Epoch], Outcome]:
    epochs = []
    while True:
        try:
            epochs.append(next(training))
        except StopIteration as end:
            return epochs, end.value


def test_fp32_training_is_the_textbook_loop():
    """The same batches through a loop of a dozen plain lines give the same weights, bit for bit."""
    trained = cell(epochs=2, weight_decay=0.0, schedule={"name": "drop", "every_epochs": 1, "factor": 0.5})
    given = data()
    model = new_model(trained)
    epochs, _ = run(fit(trained, model, given, CPU))

    plain = new_model(trained).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    draws = torch.Generator().manual_seed(stream_seed(0, "batches"))
    batches = Batches(given.train, trained.recipe.augmentation, 16, MEAN, STD, draws)
    for epoch, lr in zip(epochs, (0.1, 0.05), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        losses, correct = [], 0
        for images, labels in batches:
            logits = plain.train()(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            correct += int((logits.argmax(1) == labels).sum())
        assert epoch.learning_rate == lr
        assert epoch.train_loss == pytest.approx(sum(losses) / 3, rel=1e-6)
        assert epoch.train_accuracy == correct / 48
    assert not differing(model.state_dict(), plain.state_dict())


def test_the_score_is_the_mean_over_images_and_not_over_batches():
    model = new_model(cell())
    split = digits(0, 530)  # a batch of 500 and one of 30
    found = score(model, split, MEAN, STD, CPU)
    pixels = (split.images.numpy() / 255 - 0.3) / 0.35
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)).double().numpy()
    log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = split.labels.numpy()
    assert found.num_images == 530
    assert found.loss == pytest.approx(-log_probability[np.arange(530), labels].mean(), rel=1e-5)
    assert found.accuracy == (logits.argmax(axis=1) == labels).mean()


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("bf16", marks=[pytest.mark.long, pytest.mark.skipif(not BF16, reason="no bf16")])],
)
def test_a_learnable_problem_is_learnt(precision):
    trained = cell(precision=precision, epochs=3, schedule={"name": "cosine", "final_factor": 0.0})
    model = new_model(trained)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # the architecture's own 0.01 needs hundreds of steps to follow
    epochs, outcome = run(fit(trained, model, data(num_train=480, num_test=200), CPU))
    losses = [epoch.train_loss for epoch in epochs]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < math.log(10) + 0.5
    assert losses[-1] < 0.6
    assert outcome.status == "completed"
    assert epochs[-1].train_accuracy > 0.8
    assert outcome.test.accuracy > 0.6


def test_epochs_count_steps_and_carry_the_rate_of_their_last_step():
    trained = cell(epochs=3, time_decay=0.5)
    epochs, outcome = run(fit(trained, new_model(trained), data(num_train=35), CPU))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert [epoch.step for epoch in epochs] == [2, 4, 6]  # 35 images are two batches of 16
    assert [epoch.learning_rate for epoch in epochs] == pytest.approx([0.1 / 1.5, 0.1 / 2.5, 0.1 / 3.5])
    assert outcome.epochs == tuple(epochs)
    assert outcome.cause is None
    assert all(epoch.seconds > 0 for epoch in epochs)
    assert epochs[0].images_per_second == pytest.approx(32 / epochs[0].seconds)


def test_every_step_is_told_with_the_images_done():
    told: list[tuple[int, int]] = []
    trained = cell(epochs=2)
    run(
        fit(
            trained,
            new_model(trained),
            data(num_train=50),
            CPU,
            lambda done, total: told.append((done, total)),
        )
    )
    assert told == [(16, 48), (32, 48), (48, 48)] * 2


class _Reads(TorchDispatchMode):
    """Counts the operations that make the CPU wait for a GPU: `item`, and sizes that depend on values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_the_device_within_an_epoch():
    trained = cell()
    model = new_model(trained).train()
    totals = Totals(CPU)
    step = make_step(trained, model, build_optimizer(trained, model), totals, Execution(torch.float32))
    draws = torch.Generator().manual_seed(0)
    batches = Batches(data().train, trained.recipe.augmentation, 16, MEAN, STD, draws)
    with _Reads() as reads:
        for images, labels in batches:
            step(images, labels)
        assert reads.count == 0
        totals.read(3, 48)
        assert reads.count == 2  # loss and correct answers, once an epoch


def test_the_streams_of_a_seed_differ_from_each_other_and_from_the_next_seeds():
    seeds = [stream_seed(seed, stream) for seed in range(100) for stream in ("weights", "batches", "dropout")]
    first = [torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in seeds]
    assert len(set(seeds)) == len(set(first)) == 300


def test_another_seed_gives_other_weights_order_and_dropout():
    zero, one = (cell("resnet10-sgd-0", batch_size=8).model_copy(update={"seed": seed}) for seed in (0, 1))
    assert differing(new_model(zero).state_dict(), new_model(one).state_dict())
    model = new_model(zero)
    other = copy.deepcopy(model)
    a, _ = run(fit(zero, model, data(num_train=16, num_test=8), CPU))
    b, _ = run(fit(one, other, data(num_train=16, num_test=8), CPU))
    assert a[0].train_loss != b[0].train_loss


def digests() -> list[str]:
    """Of the weights that some short trainings on two threads give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    trained = []
    for name, batch in (("resnet20-sgd-0", 16), ("resnet10-adam-0", 4)):
        for precision in ("fp32", "bf16") if BF16 else ("fp32",):
            one = cell(name, precision, batch_size=batch)
            model = new_model(one)
            run(fit(one, model, data(num_train=3 * batch, num_test=16), CPU))
            content = b"".join(
                tensor.contiguous().numpy().tobytes() for tensor in model.state_dict().values()
            )
            trained.append(hashlib.sha256(content).hexdigest())
    torch.set_num_threads(threads)
    return trained


def test_the_same_cell_in_two_processes_gives_the_same_weights_bit_for_bit():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_engine as t; print(*t.digests())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    here = digests()
    assert len(set(here)) == len(here) >= 2
    assert done.stdout.split() == here


@pytest.mark.parametrize("architecture", ["resnet20", "vgg16"])
def test_a_frozen_base_keeps_its_weights_and_statistics_bit_for_bit(architecture):
    trained = cell(f"{architecture}-sgd-0", approach="frozen_base", batch_size=16)
    model = new_model(trained)
    before = state(model)
    _, outcome = run(fit(trained, model, data(num_train=32, num_test=16), CPU))
    changed = differing(before, model.state_dict())
    assert outcome.status == "completed"
    assert not {name for name in changed if name.startswith("base.")}
    # All of the head has moved: weights, biases, and its own running statistics.
    assert changed == {name for name in before if name.startswith("head.")}


def test_end_to_end_moves_every_weight_and_statistic():
    trained = cell()
    model = new_model(trained)
    before = state(model)
    run(fit(trained, model, data(), CPU))
    assert differing(before, model.state_dict()) == set(before)


def test_the_validation_split_is_scored_when_there_is_one():
    trained = cell(epochs=2)
    model = new_model(trained)
    given = data(num_validation=50)
    epochs, outcome = run(fit(trained, model, given, CPU))
    assert given.validation is not None
    assert outcome.validation == score(model, given.validation, MEAN, STD, CPU)
    assert outcome.validation.num_images == 50
    assert (epochs[-1].validation_loss, epochs[-1].validation_accuracy) == (
        outcome.validation.loss,
        outcome.validation.accuracy,
    )
    assert epochs[0].validation_loss != epochs[1].validation_loss
    without, outcome = run(fit(trained, new_model(trained), data(), CPU))
    assert outcome.validation is None
    assert {(epoch.validation_loss, epoch.validation_accuracy) for epoch in without} == {(None, None)}


@pytest.mark.skipif(not BF16, reason="this CPU has no bf16 arithmetic")
def test_the_last_epoch_alone_is_scored_in_fp32():
    trained = cell(precision="bf16", epochs=2)
    model = new_model(trained)
    given = data()
    training = fit(trained, model, given, CPU)
    first = next(training)
    bf16, fp32 = (score(model, given.test, MEAN, STD, CPU, kind) for kind in (torch.bfloat16, torch.float32))
    assert bf16.loss != fp32.loss
    assert first.test_loss == bf16.loss
    epochs, outcome = run(training)
    assert epochs[-1].test_loss == outcome.test.loss == score(model, given.test, MEAN, STD, CPU).loss


def test_scoring_the_last_epoch_alone_gives_the_same_weights_and_the_same_outcome():
    every, last = cell(epochs=3), cell(epochs=3, scored_epochs="last")
    models = [new_model(every), new_model(last)]
    given = data(num_validation=50)
    (often, expected), (once, outcome) = (
        run(fit(trained, model, given, CPU)) for trained, model in zip((every, last), models, strict=True)
    )
    assert not differing(models[0].state_dict(), models[1].state_dict())
    assert [epoch.train_loss for epoch in once] == [epoch.train_loss for epoch in often]
    assert [epoch.test_loss is None for epoch in once] == [True, True, False]
    assert [epoch.validation_accuracy is None for epoch in once] == [True, True, False]
    assert once[-1] == often[-1]
    assert (outcome.test, outcome.validation) == (expected.test, expected.validation)


def test_divergence_at_once_brings_the_initial_weights_back():
    trained = cell(lr=1e30, epochs=3)
    model = new_model(trained)
    initial = state(model)
    epochs, outcome = run(fit(trained, model, data(), CPU))
    assert epochs == []
    assert outcome.status == "diverged"
    assert outcome.cause == (
        "the training loss was not finite at the end of epoch 1 of 3, at a learning rate of 1e+30; "
        "the weights are the initial ones."
    )
    assert not differing(initial, model.state_dict())
    assert outcome.test == score(new_model(trained), data().test, MEAN, STD, CPU)


def test_divergence_later_brings_back_the_weights_of_the_last_finite_epoch():
    # Three steps an epoch: from the third epoch on the rate is 1e30 times as high.
    explosion = {"name": "piecewise", "boundaries": (6,), "factors": (1.0, 1e30)}
    trained = cell(epochs=4, schedule=explosion)
    model = new_model(trained)
    given = data(num_validation=20)
    training = fit(trained, model, given, CPU)
    next(training)
    second = next(training)
    kept = state(model)
    epochs, outcome = run(training)
    assert epochs == []
    assert outcome.status == "diverged"
    assert outcome.cause is not None
    assert outcome.cause.endswith("at a learning rate of 1e+29; the weights are those of epoch 2.")
    assert outcome.epochs[-1] == second
    assert not differing(kept, model.state_dict())
    assert given.validation is not None
    assert outcome.test == score(model, given.test, MEAN, STD, CPU)
    assert outcome.validation == score(model, given.validation, MEAN, STD, CPU)


def test_a_weight_that_is_not_finite_is_a_divergence_although_the_losses_are_finite():
    trained = cell(weight_decay=0.0)
    model = new_model(trained)
    with torch.no_grad():  # ReLU makes 0 of it, so that neither a loss nor a gradient shows it
        model.get_parameter("base.stage1.1.norm2.bias")[3] = -math.inf
    _, outcome = run(fit(trained, model, data(), CPU))
    assert outcome.status == "diverged"
    assert outcome.cause is not None
    assert outcome.cause.startswith("a weight was not finite at the end of epoch 1 of 1")
    assert math.isfinite(outcome.test.loss)


def test_more_images_a_batch_than_there_are_is_refused_with_key_and_numbers():
    trained = cell(batch_size=128)
    with pytest.raises(ResgridError, match=r"^recipes\.resnet20\.batch_size: 128 is more than the 48 images"):
        next(fit(trained, new_model(trained), data(), CPU))


def test_a_studys_recipe_is_named_as_the_studys():
    trained = cell("batch-128", batch_size=128)
    with pytest.raises(
        ResgridError, match=r"^studies\.batch-128\.batch_size: 128 is more than the 48 images"
    ):
        next(fit(trained, new_model(trained), data(), CPU))


TOO_LARGE = """
import re, resource, sys, torch
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_engine import cell, data, fit, new_model, ResgridError, CPU
used = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
trained, given = cell(batch_size=512), data(num_train=1200)
model = new_model(trained)
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, -1))
try:
    next(fit(trained, model, given, CPU))
except ResgridError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep to RLIMIT_AS")
def test_too_little_memory_names_the_batch_size():
    code = TOO_LARGE.format(folder=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.startswith(
        "recipes.resnet20.batch_size: the memory of cpu is too small for resnet20 with batches of 512 images"
    ), done.stderr


# --- the device --------------------------------------------------------------------------------------


def test_the_device_is_the_one_that_is_named(monkeypatch):
    monkeypatch.setenv("RESGRID_DEVICE", "cpu")
    assert devices.choose_device() == torch.device("cpu")
    monkeypatch.setenv("RESGRID_DEVICE", "toaster")
    assert devices.choose_device("cpu") == torch.device("cpu")  # an argument goes before the variable
    with pytest.raises(
        ResgridError, match=r"^RESGRID_DEVICE=toaster: no device has that name. This machine has .*cpu"
    ):
        devices.choose_device()


def test_a_device_that_is_absent_is_refused_with_what_there_is(monkeypatch):
    monkeypatch.delenv("RESGRID_DEVICE", raising=False)
    with pytest.raises(
        ResgridError, match=r"^device=cuda:99: this machine has no such device. This machine has .*cpu"
    ):
        devices.choose_device("cuda:99")


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.delenv("RESGRID_DEVICE", raising=False)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert devices.choose_device().type == devices.choose_device("auto").type == best


def test_threads_are_set_and_nonsense_is_refused(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("RESGRID_THREADS", "1")
        devices.choose_device("cpu")
        assert torch.get_num_threads() == 1
        for text in ("two", "0", "-1", "1.5"):
            monkeypatch.setenv("RESGRID_THREADS", text)
            with pytest.raises(ResgridError, match=rf"^RESGRID_THREADS={text}: must be a whole number"):
                devices.choose_device("cpu")
    finally:
        torch.set_num_threads(before)


def every_pair():
    """All pairs; in the short form ResNet-20 with every optimizer, and the smallest net of each other kind."""
    short_pairs = {("resnet20", optimizer) for optimizer in OPTIMIZERS} | {
        ("resnet10", "sgd"), ("vgg16", "adagrad"), ("resnet20v1", "adamw"),
    }  # fmt: skip
    for architecture in ARCHITECTURES:
        for optimizer in OPTIMIZERS:
            short = (architecture, optimizer) in short_pairs
            yield pytest.param(architecture, optimizer, marks=() if short else pytest.mark.long)


@pytest.mark.skipif(not BF16, reason="this CPU has no bf16 arithmetic")
@pytest.mark.parametrize(("architecture", "optimizer"), list(every_pair()))
def test_ten_fast_steps_lose_as_much_as_ten_plain_ones(architecture, optimizer):
    """Fast: as `fit` computes them here. Plain: fp32, NCHW, torch's own modules, weights and dropout masks equal.

    The mean differences seen were half of the tolerance at most. VGG-16's is larger: batch norms over 64 values
    (16 images of 2x2) follow each other there, and make 2.5 % of bf16's 0.4 % before the first step.
    """
    rates = {"dropout": (0.0, 0.0, 0.0)} if architecture == "vgg16" else {"dropout": 0.0}
    given = cell(f"{architecture}-{optimizer}-0", precision="bf16", lr=LOW_RATE[optimizer], **rates)
    losses = {}
    for kind, execution in (("fast", Execution(torch.bfloat16)), ("plain", Execution(torch.float32))):
        model = new_model(given).train()
        if kind == "fast":
            model.to(memory_format=torch.channels_last)
        totals = Totals(CPU)
        step = make_step(given, model, build_optimizer(given, model), totals, execution)
        draws = torch.Generator().manual_seed(0)
        batches = Batches(digits(0, 160), given.recipe.augmentation, 16, MEAN, STD, draws)
        losses[kind] = []
        for images, labels in batches:
            step(images if kind == "fast" else images.contiguous(), labels)
            losses[kind].append(totals.read(1, 16)[0])
    apart = [abs(fast - plain) / plain for fast, plain in zip(losses["fast"], losses["plain"], strict=True)]
    assert sum(apart) / 10 < (0.15 if architecture == "vgg16" else 0.015)
    assert apart[0] < (0.05 if architecture == "vgg16" else 0.005)
    assert losses["plain"][0] != losses["plain"][-1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("fp32", 1e-3),
        pytest.param("bf16", 1e-2, marks=pytest.mark.skipif(not BF16, reason="no bf16 arithmetic")),
    ],
)
def test_compiled_steps_give_the_losses_of_eager_ones(precision, tolerance):
    """Up to rounding: fused operations round less often. At a large rate two trainings part from there on."""
    losses = {}
    for compile in ("never", "always"):
        trained = cell(precision=precision, compile=compile, epochs=2, lr=1e-3)
        epochs, _ = run(fit(trained, new_model(trained), data(), CPU))
        losses[compile] = [epoch.train_loss for epoch in epochs]
    assert losses["always"] == pytest.approx(losses["never"], rel=tolerance)
    assert losses["always"] != losses["never"]  # else nothing was compiled


def test_what_is_compiled_goes_by_the_work_of_the_cell_and_the_machine(monkeypatch):
    few, enough = cell(compile="auto", epochs=5), cell(compile="auto", epochs=6)
    wide = cell("resnet18-sgd-0", compile="auto", epochs=6)
    monkeypatch.setattr(devices, "_can_compile", lambda: True)
    monkeypatch.setattr(devices, "_has_amx", lambda: True)
    chosen = [devices.choose_execution(given, 50_000, CPU).compiled for given in (few, enough, wide)]
    assert chosen == [False, True, False]
    monkeypatch.setattr(devices, "_has_amx", lambda: False)
    assert not devices.choose_execution(enough, 50_000, CPU).compiled


def test_without_a_compiler_or_pythons_headers_steps_are_eager(monkeypatch, tmp_path):
    """Both are looked for where they would be; none is run here, so files of those names will do."""
    asked = cell(compile="always")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert not devices.choose_execution(asked, 48, CPU).compiled
    (tmp_path / "g++").touch(mode=0o755)
    assert not devices.choose_execution(asked, 48, CPU).compiled
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    assert devices.choose_execution(asked, 48, CPU).compiled
    (tmp_path / "g++").unlink()
    assert not devices.choose_execution(asked, 48, CPU).compiled


def test_precision_is_as_asked_and_auto_goes_by_the_cpus_instructions():
    assert (
        devices.choose_precision(Engine(precision="fp32", compile="never", scored_epochs="all"), CPU)
        is torch.float32
    )
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("the instructions are read from /proc/cpuinfo here")
    native = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpuinfo.read_text().split()))
    assert native == BF16
    if native:
        assert (
            devices.choose_precision(Engine(precision="bf16", compile="never", scored_epochs="all"), CPU)
            is torch.bfloat16
        )
    else:
        with pytest.raises(ResgridError, match=r"^engine\.precision: bf16, but .* has no bf16 arithmetic"):
            devices.choose_precision(Engine(precision="bf16", compile="never", scored_epochs="all"), CPU)
