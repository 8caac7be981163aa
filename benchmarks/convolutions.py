"""The convolutions of a training step alone, as a yardstick for the whole step.

A ratio to another loop says how slow that loop is. Seconds of a step divided by seconds of its convolutions
say what all the rest costs: 1 would be a step that does nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

ROUNDS = 5
REPEATS = 10  # in one graph, whose launch would otherwise weigh


class Shape(NamedTuple):
    """A convolution as a training step computes it."""

    input: tuple[int, ...]  # (C, H, W)
    weight: tuple[int, ...]  # (D, C, kh, kw)
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    gradient_of_input: bool  # which the first one has no use for


def shapes(model: nn.Module) -> Counter[Shape]:
    """How often each convolution comes in a step of `model`, which is on the CPU."""
    counted: Counter[Shape] = Counter()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (x,) = inputs
        weight = tuple(module.weight.shape)
        counted[Shape(tuple(x.shape[1:]), weight, module.stride, module.padding, x.requires_grad)] += 1

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model.train()(torch.randn(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return counted


def seconds(model: nn.Module, batch: int, device: torch.device, precision: torch.dtype) -> float:
    """Of all convolutions of one step: forward, and the gradients of input and weight.

    Each shape is timed by itself: channels-last tensors in `precision`, the median of five rounds after one
    that is not counted. On CUDA a round is the replay of a graph that holds ten of them.
    """
    total = 0.0
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        for shape, count in shapes(model).items():
            total += count * _seconds(_work(shape, batch, device, precision), device)
    return total


def _work(shape: Shape, batch: int, device: torch.device, precision: torch.dtype) -> Callable[[], None]:
    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=precision).contiguous(memory_format=torch.channels_last)

    x, weight = drawn(batch, *shape.input), drawn(*shape.weight)
    x.requires_grad_(shape.gradient_of_input)
    weight.requires_grad_()
    of = (x, weight) if shape.gradient_of_input else (weight,)

    def forward() -> torch.Tensor:
        return torch.conv2d(x, weight, None, shape.stride, shape.padding)

    gradient = drawn(*forward().shape)

    def work() -> None:
        torch.autograd.grad(forward(), of, gradient)

    return work


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        work()
        return median(_timed(work) for _ in range(ROUNDS))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATS):
            work()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    replay()
    return median(_timed(replay) for _ in range(ROUNDS)) / REPEATS


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
