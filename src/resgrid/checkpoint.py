"""A training's state on disk after each epoch, so that one that was cut off goes on from there.

A checkpoint is one file: a line with its SHA-256, a line of JSON (whose it is, and the epochs so far), and
safetensors: weights, optimizer state and generators. It is written aside, synced and renamed, in turn over
one of two, so that the one before is whole whatever happens; one whose checksum is wrong is refused.

It belongs to one cell's exact configuration, its data, the code that trains it, and the kind of device; no
other training reads it. It lies outside the outputs, which DVC deletes before a command runs, and stays until
dvc.lock lists what came of the training.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn, optim

from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.models import own_file
from resgrid.project import write_whole
from resgrid.provenance import code_digest

MAGIC = "resgrid checkpoint 2"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    owner: dict[str, str]
    started: int  # when the training first began: microseconds since the epoch
    threads: int
    epochs: list[dict[str, Any]]  # the fields of each `Epoch`
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one training: what an earlier start has left, and those to come.

    `num_epochs` are done already, `started` is when the first of them began, and `refused` names the files
    that were damaged.
    """

    def __init__(
        self, folder: Path, cell: Cell, data_digest: str, device: torch.device, execution: str
    ) -> None:
        """`execution` says how steps are computed, such as `bf16, eager`."""
        self.owner = {
            "cell": cell.digest,
            "data": data_digest,
            "code": code_digest(own=own_file(cell.architecture)),
            "device": device.type,
            "execution": execution,
            "torch": torch.__version__,
        }
        self.digest = f"sha256:{hashlib.sha256(json.dumps(self.owner).encode()).hexdigest()}"
        stem = f"{cell.id}.{self.digest.removeprefix('sha256:')[:16]}"
        self._folder, self._device = folder, device
        self._slots = [folder / f"{stem}.0", folder / f"{stem}.1"]
        self._done = folder / f"{stem}.done"
        # With a second team of OpenMP threads libgomp lets both sleep between operations, and training with
        # batches of 16 goes at half its speed from then on: this thread computes alone.
        self._thread = ThreadPoolExecutor(1, "checkpoint", torch.set_num_threads, (1,))
        self._writing: Future[None] | None = None

        self.refused: list[str] = []
        found = [self._read(path) for path in self._slots]
        epochs = [len(each.epochs) if each else -1 for each in found]
        self._turn = 1 - epochs.index(max(epochs))  # of the slot that is written next
        self._latest = found[1 - self._turn]
        self.num_epochs = max(0, *epochs)
        self.started = self._latest.started if self._latest else time.time_ns() // 1000

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The epochs of an earlier start, until `restore` takes them."""
        return self._latest.epochs if self._latest else []

    @property
    def latest(self) -> Path | None:
        """The file of the last checkpoint that is whole on the disk."""
        path = self._slots[1 - self._turn]
        return path if path.exists() else None

    def adopt(self, path: Path) -> bool:
        """Go on from `path`, of this training on another machine, if it is further than what is here."""
        found = self._read(path)
        if found is None or len(found.epochs) <= self.num_epochs:
            return False
        write_whole(self._slots[self._turn], path.read_bytes(), synced=True)
        self._turn = 1 - self._turn
        self._latest, self.num_epochs, self.started = found, len(found.epochs), found.started
        return True

    def restore(
        self, model: nn.Module, optimizer: optim.Optimizer, draws: torch.Generator
    ) -> list[dict[str, Any]]:
        """Put all of them into the state after the last epoch, if there is one; the epochs so far.

        On the CPU the number of threads is the earlier start's too, as far as there are cores: with another,
        the same sums round differently.
        """
        checkpoint, self._latest = self._latest, None
        if checkpoint is None:
            return []
        if self._device.type == "cpu":
            torch.set_num_threads(min(checkpoint.threads, _num_cores()))
        state = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.")}
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        _restore_optimizer(optimizer, checkpoint.tensors)
        draws.set_state(checkpoint.tensors["generator.batches"])
        _global_generator(self._device).set_state(checkpoint.tensors["generator.dropout"])
        return checkpoint.epochs

    def save(
        self,
        epochs: Sequence[Mapping[str, Any]],
        model: nn.Module,
        optimizer: optim.Optimizer,
        draws: torch.Generator,
    ) -> None:
        """Take a copy of the state after the last of `epochs`, and write it while training goes on.

        Raises ResgridError where the checkpoint before this one could not be written.
        """
        self.flush()
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        tensors["generator.batches"] = draws.get_state()
        tensors["generator.dropout"] = _global_generator(self._device).get_state()
        checkpoint = Checkpoint(
            owner=self.owner,
            started=self.started,
            threads=torch.get_num_threads(),
            epochs=[dict(epoch) for epoch in epochs],
            tensors={name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()},
        )
        self._writing = self._thread.submit(self._write, checkpoint)

    def flush(self) -> None:
        """Wait until the last checkpoint is on the disk; raises ResgridError if it cannot be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finished(self, timing: Path) -> None:
        """Note what came of the training, by a file of its run that no other training writes alike.

        By it `leftovers.forget_recorded` sees that DVC has recorded this very training.
        """
        digest = hashlib.md5(timing.read_bytes(), usedforsecurity=False).hexdigest()
        write_whole(self._done, digest.encode(), synced=True)

    def _read(self, path: Path) -> Checkpoint | None:
        try:
            checkpoint = read(path)
            if checkpoint.owner != self.owner:
                raise ResgridError(f"{path}: it belongs to another training.")
        except FileNotFoundError:
            return None
        except (OSError, ResgridError) as error:
            self.refused.append(str(error))
            return None
        return checkpoint

    def _write(self, checkpoint: Checkpoint) -> None:
        path = self._slots[self._turn]
        try:
            write_whole(path, *encode(checkpoint), synced=True)
        except OSError as error:
            before = len(checkpoint.epochs) - 1
            raise ResgridError(
                f"{path}: the checkpoint after epoch {before + 1} cannot be written: {error.strerror}. Check "
                f"the folder and the space on its disk; the same command then goes on after epoch {before}."
            ) from None
        self._turn = 1 - self._turn


def encode(checkpoint: Checkpoint) -> tuple[bytes, bytes, bytes]:
    """The parts of its file, one after the other; not joined, for that would be another copy of them."""
    head = {name: value for name, value in vars(checkpoint).items() if name != "tensors"}
    tensors = save_tensors({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    told = json.dumps(head, allow_nan=False).encode() + b"\n"
    sha256 = hashlib.sha256(told)
    sha256.update(tensors)
    return f"{MAGIC} {sha256.hexdigest()}\n".encode(), told, tensors


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`; raises ResgridError for one that is torn or altered."""
    first, _, content = path.read_bytes().partition(b"\n")
    if first != f"{MAGIC} {hashlib.sha256(content).hexdigest()}".encode():
        raise ResgridError(f"{path}: it is no whole checkpoint: its checksum is wrong.")
    head, _, tensors = content.partition(b"\n")
    try:
        return Checkpoint(**json.loads(head), tensors=load_tensors(tensors))
    except (ValueError, TypeError, SafetensorError) as error:
        raise ResgridError(f"{path}: it is no checkpoint of this version ({error}).") from None


def _restore_optimizer(optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """In place where there is state already, for a compiled step may hold its addresses."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    present: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    for number, values in state.items():
        for key, value in values.items():
            if number in present:
                present[number][key].copy_(value)
            elif value.shape == parameters[number].shape:
                # In the layout of the parameter, as the optimizer makes it: the same arithmetic, bit by bit.
                values[key] = torch.empty_like(parameters[number], requires_grad=False).copy_(value)
    if not present:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _global_generator(device: torch.device) -> torch.Generator:
    """The one that dropout draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator
