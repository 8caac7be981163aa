"""One training loop for every cell, as a generator: a record an epoch, and at its end the outcome.

Arithmetic is bf16 autocast over fp32 weights where the device is good at it, in channels-last layout. Within
an epoch the CPU never waits for the device: the data set lies there, draws are made there, and loss and
correct answers are summed there, to be read once.

Repeating a run: a cell's seed gives independent streams for the initial weights, for order and augmentation,
and for dropout. On the CPU the same cell with the same number of threads gives the same weights bit for bit.
On CUDA it gives the same initial weights and the same draws, but not the same bits: cuDNN picks algorithms by
timing them, and some backward kernels add in whatever order they finish.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from resgrid.data.batches import Batches, in_order
from resgrid.data.dataset import Split
from resgrid.errors import OutOfMemory, ResgridError
from resgrid.grid import Cell
from resgrid.models.classifier import Classifier
from resgrid.schema import Triple
from resgrid.training.device import Execution, choose_execution
from resgrid.training.graph import GraphedStep
from resgrid.training.optimizers import build_optimizer, set_learning_rate
from resgrid.training.schedules import lr_factor

NO_MEMORY = "out of memory|can't allocate memory|not enough memory|STATUS_ALLOC_FAILED"  # torch's, cuDNN's
SCORING_BATCH = 500  # images; the figures' last digits depend on it

OnStep = Callable[[int, int], None]  # images done in this epoch, images in an epoch


class Checkpoints(Protocol):
    """Where a training's state is saved after each epoch, so that another start can continue from there."""

    def restore(
        self, model: nn.Module, optimizer: optim.Optimizer, draws: torch.Generator
    ) -> list[dict[str, Any]]:
        """Put all of them into the state after the last epoch saved; returns the fields of each `Epoch`."""

    def save(
        self,
        epochs: Sequence[Mapping[str, Any]],
        model: nn.Module,
        optimizer: optim.Optimizer,
        draws: torch.Generator,
    ) -> None:
        """Save the state after the last of `epochs`."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a cell is trained and scored on, wherever it lies; statistics on the 0–1 scale."""

    train: Split
    test: Split
    validation: Split | None
    mean: Triple
    std: Triple


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Mean cross-entropy and accuracy (0–1) over `num_images` images."""

    loss: float
    accuracy: float
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The figures of one epoch, in the order of history.csv; accuracies in 0–1."""

    epoch: int  # from 1
    step: int  # optimizer steps so far
    learning_rate: float  # of the epoch's last step
    train_loss: float  # mean over the epoch's batches, each before its step
    train_accuracy: float
    test_loss: float | None  # None: not scored after this epoch
    test_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float = field(compare=False)  # of the training part alone, without the scoring
    images_per_second: float = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended; the model then has the weights that `test` and `validation` were scored with."""

    status: Literal["completed", "diverged"]
    cause: str | None  # of a divergence, as a sentence
    epochs: tuple[Epoch, ...]  # all that were yielded: those before a divergence
    test: Scores  # in fp32: a fresh scoring of the weights on this device repeats the last digit
    validation: Scores | None
    graphed: bool  # whether the steps of this start were replays of a CUDA graph


def stream_seed(seed: int, stream: Literal["weights", "batches", "dropout"]) -> int:
    """A seed for one use of random numbers, independent of the same cell's others.

    32 bits, since torch's generator on the CPU ignores all above.
    """
    key = ("weights", "batches", "dropout").index(stream)
    return int(np.random.SeedSequence(seed, spawn_key=(key,)).generate_state(1, np.uint32)[0])


def fit(
    cell: Cell,
    model: Classifier,
    data: TrainingData,
    device: torch.device,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    execution: Execution | None = None,
) -> Generator[Epoch, None, Outcome]:
    """Train `model` in place as `cell` says: yields an `Epoch` after each, and returns the `Outcome`.

    After every epoch, or the last alone (`engine.scored_epochs`), the model is scored on the test split, and
    on the validation split if there is one, in the precision of training; after the last one in fp32, so that
    its figures are the outcome's. Where a loss or a weight is not finite at the end of an epoch, training has
    diverged: that epoch is not yielded, the model gets back the weights it had before it, and these are
    scored in fp32.

    `on_step` is called after every step, without waiting for the device. Dropout draws from torch's global
    generator, which is seeded here: do not run two of these in turn in one process. `execution` is as
    `choose_execution` returns it, unless given.

    With `checkpoints`, training continues after the last epoch that an earlier start saved there, yields the
    epochs that follow, and saves them. On the CPU the outcome is bit for bit that of one start alone.

    Raises ResgridError if the training split has fewer images than a batch, or the memory is too small.
    """
    recipe = cell.recipe
    if len(data.train.labels) < recipe.batch_size:
        raise ResgridError(
            f"{cell.key('batch_size')}: {recipe.batch_size} is more than the {len(data.train.labels)} "
            f"images of the training split; write {len(data.train.labels)} or less."
        )
    with _explained_memory_error(cell, device):
        execution = execution or choose_execution(cell, len(data.train.labels), device)
        _place(model, device)
        model.base.requires_grad_(recipe.approach == "end_to_end")
        optimizer = build_optimizer(cell, model)
        totals = Totals(device)
        step = make_step(cell, model, optimizer, totals, execution)

        train, test = _on(data.train, device), _on(data.test, device)
        validation = None if data.validation is None else _on(data.validation, device)
        draws = torch.Generator(device).manual_seed(stream_seed(cell.seed, "batches"))
        batches = Batches(train, recipe.augmentation, recipe.batch_size, data.mean, data.std, draws)
        num_images = len(batches) * recipe.batch_size
        torch.manual_seed(stream_seed(cell.seed, "dropout"))

        def scores(split: Split, precision: torch.dtype) -> Scores:
            return score(model, split, data.mean, data.std, device, precision)

        epochs: list[Epoch] = []
        if checkpoints is not None:
            epochs = [Epoch(**fields) for fields in checkpoints.restore(model, optimizer, draws)]
        finite = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # of the last epoch
        steps, lr = (epochs[-1].step, epochs[-1].learning_rate) if epochs else (0, 0.0)
        for number in range(len(epochs) + 1, recipe.epochs + 1):
            started = time.perf_counter()
            model.train()
            if recipe.approach == "frozen_base":
                model.base.eval()  # its batch norms use and keep the statistics they came with
            # With torch's default for CUDA that fp32 convolutions may round their inputs to TF32.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
                for done, (images, labels) in enumerate(batches, start=1):
                    lr = cell.optimizer.lr * lr_factor(
                        recipe, steps, len(batches), recipe.epochs * len(batches)
                    )
                    set_learning_rate(optimizer, lr)
                    step(images, labels)
                    steps += 1
                    if on_step is not None:
                        on_step(done * recipe.batch_size, num_images)
            train_loss, train_accuracy = totals.read(len(batches), num_images)  # waits for the device
            seconds = time.perf_counter() - started

            test_scores = validation_scores = None
            if number == recipe.epochs or cell.engine.scored_epochs == "all":
                scoring = torch.float32 if number == recipe.epochs else execution.precision
                test_scores = scores(test, scoring)
                validation_scores = None if validation is None else scores(validation, scoring)
            losses = {"training": train_loss}
            losses |= {"test": test_scores.loss} if test_scores else {}
            losses |= {"validation": validation_scores.loss} if validation_scores else {}
            broken = [f"the {name} loss" for name, loss in losses.items() if not math.isfinite(loss)]
            if broken or not _all_finite(model):
                model.load_state_dict(finite)
                return Outcome(
                    status="diverged",
                    cause=f"{(broken or ['a weight'])[0]} was not finite at the end of epoch {number} of "
                    f"{recipe.epochs}, at a learning rate of {lr:g}; the weights are "
                    + (f"those of epoch {number - 1}." if epochs else "the initial ones."),
                    epochs=tuple(epochs),
                    test=scores(test, torch.float32),
                    validation=None if validation is None else scores(validation, torch.float32),
                    graphed=isinstance(step, GraphedStep) and step.graphed,
                )
            for name, tensor in model.state_dict().items():
                finite[name].copy_(tensor)
            epochs.append(
                Epoch(
                    epoch=number,
                    step=steps,
                    learning_rate=lr,
                    train_loss=train_loss,
                    train_accuracy=train_accuracy,
                    test_loss=test_scores.loss if test_scores else None,
                    test_accuracy=test_scores.accuracy if test_scores else None,
                    validation_loss=validation_scores.loss if validation_scores else None,
                    validation_accuracy=validation_scores.accuracy if validation_scores else None,
                    seconds=seconds,
                    images_per_second=num_images / seconds,
                )
            )
            if checkpoints is not None:
                checkpoints.save([asdict(epoch) for epoch in epochs], model, optimizer, draws)
            yield epochs[-1]

    last = epochs[-1]  # it was scored, with the weights as they are now
    assert last.test_loss is not None and last.test_accuracy is not None  # noqa: PT018
    test_scores = Scores(loss=last.test_loss, accuracy=last.test_accuracy, num_images=len(data.test.labels))
    validation_scores = None
    if data.validation is not None:
        assert last.validation_loss is not None and last.validation_accuracy is not None  # noqa: PT018
        validation_scores = Scores(
            loss=last.validation_loss,
            accuracy=last.validation_accuracy,
            num_images=len(data.validation.labels),
        )
    return Outcome(
        status="completed",
        cause=None,
        epochs=tuple(epochs),
        test=test_scores,
        validation=validation_scores,
        graphed=isinstance(step, GraphedStep) and step.graphed,
    )


class Totals:
    """Sums over an epoch's steps, on the device, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """The mean loss of a batch, its logits (B, classes) and labels (B,)."""
        self.loss += loss.detach()
        self.correct += (logits.detach().argmax(1) == labels).sum()

    def read(self, num_batches: int, num_images: int) -> tuple[float, float]:
        """Mean loss and accuracy since the last reading. Waits for the device."""
        loss, correct = self.loss.item() / num_batches, self.correct.item() / num_images
        self.loss.zero_()
        self.correct.zero_()
        return loss, correct


def make_step(
    cell: Cell, model: Classifier, optimizer: optim.Optimizer, totals: Totals, execution: Execution
) -> Callable[[Tensor, Tensor], None]:
    """One optimizer step on images (B, 3, 32, 32) and labels (B,), all of it on the device.

    Shapes never change and nothing is read back, so that it can be compiled and captured as it stands.
    """
    trains_base = cell.recipe.approach == "end_to_end"
    bf16 = execution.precision is torch.bfloat16

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            with torch.set_grad_enabled(trains_base):
                features = model.base(images)
            logits = model.head(features).float()  # (B, classes)
        return F.cross_entropy(logits, labels), logits

    if execution.compiled:
        forward = torch.compile(forward, dynamic=False)  # and with it what backward does

    def work(images: Tensor, labels: Tensor) -> None:
        loss, logits = forward(images, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        totals.add(loss, logits, labels)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        work(images, labels)
        optimizer.step()

    if execution.graphed:
        return GraphedStep(work, optimizer, [*model.buffers(), totals.loss, totals.correct])
    return step


def score(
    model: nn.Module,
    split: Split,
    mean: Triple,
    std: Triple,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Scores:
    """Mean cross-entropy and accuracy of `model` on all of `split`, in order.

    Moves the model to `device` and leaves it in eval mode. In fp32 nothing is rounded to less (no TF32) and
    no algorithm is picked by timing: the same weights on the same device with the same number of threads
    score the same to the last digit.
    """
    _place(model, device).eval()
    losses, corrects = [], []
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        for images, labels in in_order(_on(split, device), mean, std, SCORING_BATCH):
            logits = model(images).float()  # (B, classes)
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            corrects.append((logits.argmax(1) == labels).sum())
    num_images = len(split.labels)
    return Scores(  # summed on the CPU in float64, which MPS has not
        loss=torch.stack(losses).cpu().double().sum().item() / num_images,
        accuracy=torch.stack(corrects).sum().item() / num_images,
        num_images=num_images,
    )


def _place(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).to(memory_format=torch.channels_last)


def _on(split: Split, device: torch.device) -> Split:
    return Split(images=split.images.to(device), labels=split.labels.to(device))


def _all_finite(model: nn.Module) -> bool:
    """Of weights and running statistics. Waits for the device, once."""
    finite = [tensor.isfinite().all() for tensor in model.state_dict().values()]
    return bool(torch.stack(finite).all())


@contextmanager
def _explained_memory_error(cell: Cell, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError, and not used on the CPU
        reason = re.search(rf"[^.\n]*({NO_MEMORY})[^\n]*", str(error))
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not reason:
            raise
        raise OutOfMemory(
            f"{cell.key('batch_size')}: the memory of {device} is too small for {cell.architecture} "
            f"with batches of {cell.recipe.batch_size} images; write a smaller batch_size, or end what else "
            f"uses the memory. torch says: {reason[0].strip() if reason else 'out of memory'}"
        ) from None
