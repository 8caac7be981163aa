"""Slots: how many cells train at once on this machine, and what each of them may use.

Cores are divided, never shared: two processes of two threads on two cores reach 0.55 times the images/s of
one alone, while two of one thread each reach 1.2 times those of one of two. So on the CPU there are as many
slots as cores and cells, and the threads of one are cores // slots. On a GPU a small network leaves most of
the card idle, so under MPS several cells share it, as many as its free memory holds. Without MPS processes
take turns on a card and gain nothing (see `resgrid.mps`), so each card has one.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resgrid import mps
from resgrid.cost import CUDA_GIB
from resgrid.errors import ResgridError
from resgrid.project import available_memory, num_cores

GIB = 2**30
CPU_BYTES = int(1.5 * GIB)  # of a training process: torch, the data and the activations of a batch
CUDA_CONTEXT_BYTES = int(0.6 * GIB)  # what each process takes of a card before it holds a tensor


@dataclass(frozen=True)
class Slot:
    """A share of the machine, for one cell at a time."""

    name: str  # such as `cpu 1/2` or `cuda:0 3/8`
    threads: int
    card: str | None = None
    sharing: int = 1  # slots on that card, with this one

    @property
    def on_card(self) -> int | None:
        """How many cells share its card; None of a slot on the CPU."""
        return self.sharing if self.card else None

    @property
    def env(self) -> dict[str, str]:
        """The variables by which the cell's process keeps to it."""
        env = {"RESGRID_THREADS": str(self.threads)}
        if self.card is not None:
            env |= {
                "CUDA_VISIBLE_DEVICES": self.card,
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the driver's order
                "RESGRID_DEVICE": "cuda",  # of which the process sees this one; cuda:1 would be a second
                "RESGRID_SHARING": str(self.sharing),
            }
        return env


def share(
    num_cells: int,
    footprints: Mapping[str, int] | None = None,
    architectures: Sequence[str] = (),
    slots: int | None = None,
) -> list[Slot]:
    """The slots for `num_cells` cells: `slots` of them, or as many as this machine is good for.

    `footprints` are measured peaks of what torch took of a card, in bytes. Raises ResgridError for no slots.
    """
    if slots is not None and slots < 1:
        raise ResgridError(f"slots={slots}: must be at least 1, or not given.")
    cores = num_cores()
    if devices := mps.cards():
        known = {name: int(gib * GIB) for name, gib in CUDA_GIB.items()} | dict(footprints or {})
        most = max(known.values())
        each = max((known.get(name, most) for name in architectures), default=most) + CUDA_CONTEXT_BYTES
        limit = mps.MAX_SHARING if mps.available() else 1
        rooms = [max(1, min(limit, card.free_bytes // each)) for card in devices]
        if slots is None:
            # A process of its own launches the kernels of each cell, and needs a core to do so.
            slots = max(1, min(sum(rooms), num_cells, max(cores, len(devices))))
        else:
            rooms = [-(-slots // len(devices))] * len(devices)
        # One on each card, then a second on each: the first cells to start are the longest, and they spread.
        turns = sorted((turn, card) for card, room in enumerate(rooms) for turn in range(room))[:slots]
        sharing, threads = Counter(card for _, card in turns), max(1, cores // slots)
        names = [card.name for card in devices]
        return [
            Slot(f"cuda:{names[i]} {turn + 1}/{sharing[i]}", threads, names[i], sharing[i])
            for turn, i in turns
        ]
    if slots is None:
        # Metal's one queue gains little from sharing, and its memory is the machine's.
        on_metal = sys.platform == "darwin" and os.environ.get("RESGRID_DEVICE") in (None, "", "auto", "mps")
        room = 1 if on_metal else (available_memory() or CPU_BYTES * cores) // CPU_BYTES
        slots = max(1, min(cores, num_cells, room))
    return [Slot(f"cpu {i + 1}/{slots}", max(1, cores // slots)) for i in range(slots)]


def whole_machine() -> Slot:
    """All of it, for a stage that runs alone."""
    return Slot("all cores", num_cores())
