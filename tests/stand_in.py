"""A stand-in for a CUDA graph, which runs on any machine.

A replay overwrites the gradients in place. The stand-in does so by setting them to zero and calling the
function: whatever replaces a tensor that a graph would read, or adds to what it would overwrite, shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from resgrid.training import engine, graph
from resgrid.training.device import Execution, choose_execution
from resgrid.training.graph import GraphedStep


def install(patch: pytest.MonkeyPatch) -> list[GraphedStep]:
    """Graph trainings on the CPU as well, by the stand-in; the list gets each of their steps."""
    captured: list[GraphedStep] = []

    def capture(step: GraphedStep) -> Callable[[], None]:
        captured.append(step)
        state = torch.get_rng_state()
        try:
            step.eager()  # gives the gradients their memory, and moves statistics, totals and the generator
        finally:
            torch.set_rng_state(state)

        def replay() -> None:
            step.optimizer.zero_grad(set_to_none=False)
            step.work()

        return replay

    patch.setattr(graph, "capture", capture)
    graph_on_cpu(patch)
    return captured


def graph_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let the CPU count as a device whose steps are graphed unless `fit` is told otherwise."""

    def graphed(*arguments: Any) -> Execution:
        return replace(choose_execution(*arguments), graphed=True)

    patch.setattr(engine, "choose_execution", graphed)
