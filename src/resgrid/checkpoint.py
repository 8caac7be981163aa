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
    """What is kept of one training: what an earlier start has left, then the state after each epoch."""

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

        self._left = left = self._find(lock, afresh)
        self._timing = left.timing if left else None
        self.started = left.started if left else time.time_ns() // 1000
        self.epochs = left.epochs if left else []  # those of an earlier start
        self.num_epochs = len(self.epochs)
        # An earlier start's, as far as there are cores: with others sums round differently.
        self.threads = min(left.threads, num_cores()) if left else None

    def _find(self, lock: Path | None, afresh: bool) -> Checkpoint | None:
        try:
            checkpoint = read(self.path)
            if not afresh and not is_recorded(checkpoint.timing, lock) and checkpoint.owner == self.owner:
                return checkpoint
        except FileNotFoundError:
            return None
        except ResgridError as error:
            log.warning("%s The training begins anew.", error)
        self.path.unlink(missing_ok=True)
        return None

    def restore(
        self, model: nn.Module, optimizer: optim.Optimizer, draws: torch.Generator
    ) -> list[dict[str, Any]]:
        """Put all of them into the state after the last epoch, if there is one; the epochs so far."""
        left, self._left = self._left, None
        if left is None:
            return []
        if self._device.type == "cpu" and self.threads:
            torch.set_num_threads(self.threads)
        state = {name: tensor for name, tensor in left.tensors.items() if name.startswith("model.")}
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in left.tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                like = parameters[int(index)]
                if value.shape == like.shape:
                    # In the parameter's layout, as the optimizer makes it: the same arithmetic, bit by bit.
                    value = torch.empty_like(like, requires_grad=False).copy_(value)
                moments.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        for name, generator in self._generators(draws).items():
            generator.set_state(left.tensors[name])
        return left.epochs

    def save(
        self,
        epochs: Sequence[Mapping[str, Any]],
        model: nn.Module,
        optimizer: optim.Optimizer,
        draws: torch.Generator,
    ) -> None:
        """Take a copy of the state after the last of `epochs`, and write it while training goes on.

        Raises OSError where the checkpoint before this one could not be written.
        """
        self.flush()
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        tensors |= {name: generator.get_state() for name, generator in self._generators(draws).items()}
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
        """Wait until the last checkpoint is on the disk; raises OSError if it cannot be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(self, timing: str) -> str:
        """Keep `timing`, the text of the run's timing.json, with the state after the last epoch.

        Returns it, or the one of an earlier start that had come to its end, whose results DVC did not record.
        Raises OSError where it cannot be written.
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
        write_whole(self.path, *encode(checkpoint), synced=True)

    def _generators(self, draws: torch.Generator) -> dict[str, torch.Generator]:
        """Of order and augmentation; and torch's global one on the device, which dropout draws from."""
        match self._device.type:
            case "cuda":
                dropout = torch.cuda.default_generators[self._device.index or 0]
            case "mps":
                dropout = torch.mps._get_default_mps_generator()
            case _:
                dropout = torch.default_generator
        return {"generator.batches": draws, "generator.dropout": dropout}


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
    head, _, tensors = content.partition(b"\n")
    try:
        if first != f"{MAGIC} {hashlib.sha256(content).hexdigest()}".encode():
            raise ValueError("its checksum is wrong")
        return Checkpoint(**json.loads(head), tensors=load_tensors(tensors))
    except (ValueError, TypeError, SafetensorError) as error:
        raise ResgridError(f"{path}: it is no whole checkpoint of this version: {error}.") from None
