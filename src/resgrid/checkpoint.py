"""A training's state on disk after each epoch, so that one that was cut off goes on from there.

One file a training, `<cell>.<digest>`, replaced at once: a line with its SHA-256, a line of JSON (whose it
is, when it began, the epochs so far), and safetensors: weights, optimizer state and generators. Its last form
holds the text of the run's timing.json as well. Where the MD5 of that stands in the pipeline's dvc.lock, DVC
has recorded this very training, and a start trains anew. Any other start goes on from the file, and where no
epoch is left, writes the results alone: also under `dvc repro --force`, which a command cannot see.

It belongs to one cell's exact configuration, its data, the code that trains it, and the kind of device; no
other training reads it. It lies outside the outputs, which DVC deletes before a command runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn, optim

from resgrid.errors import ResgridError
from resgrid.gc import is_recorded
from resgrid.grid import Cell
from resgrid.models import own_file
from resgrid.project import num_cores, write_whole
from resgrid.provenance import code_digest

log = logging.getLogger(__name__)

MAGIC = "resgrid checkpoint 3"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    owner: dict[str, str]
    started: int  # when the training first began: microseconds since the epoch
    threads: int
    epochs: list[dict[str, Any]]  # the fields of each `Epoch`
    timing: str | None  # the run's timing.json, once the training is done
    tensors: dict[str, Tensor]


class Checkpoints:
    """What is kept of one training: what an earlier start has left, and the state after each further epoch.

    `num_epochs` are done already and `started` is when the first of them began.
    """

    def __init__(
        self,
        folder: Path,
        cell: Cell,
        data_digest: str,
        device: torch.device,
        execution: str,
        lock: Path | None = None,
        afresh: bool = False,
    ) -> None:
        """`execution` says how steps are computed, such as `bf16, eager`; `lock` is the pipeline's dvc.lock.

        What is there is deleted where the training begins anew: it is recorded there, damaged, or `afresh`.
        """
        self.owner = {
            "cell": cell.digest,
            "data": data_digest,
            "code": code_digest(own=own_file(cell.architecture)),
            "device": device.type,
            "execution": execution,
            "torch": torch.__version__,
        }
        digest = hashlib.sha256(json.dumps(self.owner).encode()).hexdigest()
        self.path = folder / f"{cell.id}.{digest[:16]}"
        self._device = device
        # With a second team of OpenMP threads libgomp lets both sleep between operations, and training with
        # batches of 16 goes at half its speed from then on: this thread computes alone.
        self._thread = ThreadPoolExecutor(1, "checkpoint", torch.set_num_threads, (1,))
        self._writing: Future[None] | None = None

        self._left = self._find(lock, afresh)
        self.num_epochs = len(self._left.epochs) if self._left else 0
        self.started = self._left.started if self._left else time.time_ns() // 1000
        self._timing = self._left.timing if self._left else None

    def _find(self, lock: Path | None, afresh: bool) -> Checkpoint | None:
        try:
            checkpoint = read(self.path)
        except FileNotFoundError:
            return None
        except ResgridError as error:
            log.warning("%s The training begins anew.", error)
        else:
            if not afresh and not is_recorded(checkpoint.timing, lock) and checkpoint.owner == self.owner:
                return checkpoint
        self.path.unlink(missing_ok=True)
        return None

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The epochs of an earlier start, until `restore` takes them."""
        return self._left.epochs if self._left else []

    @property
    def threads(self) -> int | None:
        """Those of an earlier start, as far as there are cores: with others sums round differently."""
        return min(self._left.threads, num_cores()) if self._left else None

    def restore(
        self, model: nn.Module, optimizer: optim.Optimizer, draws: torch.Generator
    ) -> list[dict[str, Any]]:
        """Put all of them into the state after the last epoch, if there is one; the epochs so far.

        On the CPU the number of threads is the earlier start's too.
        """
        if self._device.type == "cpu" and self.threads:
            torch.set_num_threads(self.threads)
        checkpoint, self._left = self._left, None
        if checkpoint is None:
            return []
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
        self._timing = None
        checkpoint = Checkpoint(
            owner=self.owner,
            started=self.started,
            threads=torch.get_num_threads(),
            epochs=[dict(epoch) for epoch in epochs],
            timing=None,
            tensors={name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()},
        )
        self._writing = self._thread.submit(self._write, checkpoint)

    def flush(self) -> None:
        """Wait until the last checkpoint is on the disk; raises ResgridError if it cannot be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(self, timing: str) -> str:
        """Keep `timing`, the text of the run's timing.json, with the state after the last epoch.

        Returns it, or the one of an earlier start that had come to its end, whose results DVC did not record.
        Raises ResgridError where it cannot be written.
        """
        self.flush()
        if self._timing is not None:
            return self._timing
        if self.path.exists():  # it does not where the first epoch diverged
            last = read(self.path)
            if last.started == self.started:  # and not of another start of this training, at the same time
                self._write(replace(last, timing=timing))
        return timing

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            write_whole(self.path, *encode(checkpoint), synced=True)
        except OSError as error:
            raise ResgridError(
                f"{self.path}: the checkpoint after epoch {len(checkpoint.epochs)} cannot be written: "
                f"{error.strerror}. Check the folder and the space on its disk; the same command then goes "
                "on from the checkpoint before it."
            ) from None


def encode(checkpoint: Checkpoint) -> tuple[bytes, bytes, bytes]:
    """The parts of its file, one after the other; not joined, for that would be another copy of them."""
    head = {name: value for name, value in vars(checkpoint).items() if name != "tensors"}
    tensors = save_tensors({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    head_line = json.dumps(head, allow_nan=False).encode() + b"\n"
    sha256 = hashlib.sha256(head_line)
    sha256.update(tensors)
    return f"{MAGIC} {sha256.hexdigest()}\n".encode(), head_line, tensors


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`; raises ResgridError for one that is torn or altered."""
    first, _, content = path.read_bytes().partition(b"\n")
    if first != f"{MAGIC} {hashlib.sha256(content).hexdigest()}".encode():
        raise ResgridError(f"{path}: it is no whole checkpoint of this version: its checksum is wrong.")
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
        if not name.startswith("optimizer."):
            continue
        _, index, key = name.split(".", 2)
        number = int(index)
        if number in present:
            present[number][key].copy_(value)
        elif value.shape == parameters[number].shape:
            # In the layout of the parameter, as the optimizer makes it: the same arithmetic, bit by bit.
            value = torch.empty_like(parameters[number], requires_grad=False).copy_(value)
        state.setdefault(number, {})[key] = value
    if not present:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _global_generator(device: torch.device) -> torch.Generator:
    """The one that dropout draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator
