"""A model as the table that the originals print: layer, output shape, parameters, and three totals.

Layers have the names and the grouping of Keras's `model.summary()`: a stage of residual units is one row,
a convolution of VGG-16 with its ReLU, BN and dropout another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resgrid.models import ARCHITECTURES, build_model, family_of


@dataclass(frozen=True)
class Row:
    """One layer; `output_shape` is (height, width, channels) or (features,), without the batch."""

    layer: str
    type: str | None  # none is given for VGG-16, whose rows are groups
    output_shape: tuple[int, ...]
    params: int

    def as_dict(self) -> dict[str, Any]:
        kind = {"type": self.type} if self.type else {}
        return {"layer": self.layer, **kind, "output_shape": list(self.output_shape), "params": self.params}


@dataclass(frozen=True)
class Summary:
    architecture: str
    rows: tuple[Row, ...]
    total: int
    trainable: int
    non_trainable: int

    def as_dict(self) -> dict[str, Any]:
        """What JSON shows of it: family, blocks, layers, and the three totals."""
        entry = ARCHITECTURES.get(self.architecture)
        return {
            "family": family_of(self.architecture),
            **({"blocks": list(entry.blocks)} if entry else {}),
            "layers": [row.as_dict() for row in self.rows],
            "total": self.total,
            "trainable": self.trainable,
            "non_trainable": self.non_trainable,
        }

    def table(self) -> str:
        """Lines of text, without an end of line after the last."""
        cells = [("Layer (type)", "Output shape", "Parameters")]
        for row in self.rows:
            name = f"{row.layer} ({row.type})" if row.type else row.layer
            cells.append((name, str(row.output_shape).replace(",)", ")"), f"{row.params:,}"))
        wide = [max(len(line[column]) for line in cells) for column in range(3)]
        head, *lines = [f"{a:<{wide[0]}}   {b:<{wide[1]}}   {c:>{wide[2]}}" for a, b, c in cells]
        rule = "-" * len(head)
        totals = {"Total": self.total, "Trainable": self.trainable, "Non-trainable": self.non_trainable}
        ends = [f"{kind} parameters: {number:,}" for kind, number in totals.items()]
        return "\n".join([self.architecture, rule, head, rule, *lines, rule, *ends])


def summarize(
    architecture: str,
    num_classes: int = 10,
    dropout: float | tuple[float, float, float] = 0.0,
    pipeline: Path = Path(),
) -> Summary:
    """The table of a model that is trained end to end, torch's generator left as it was."""
    # A real model, for on the meta device its forward would import torch._dynamo, which takes 4 s.
    with torch.random.fork_rng(devices=[]):
        model = build_model(architecture, num_classes, dropout, pipeline).eval()
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    for module in model.modules():
        module.register_forward_hook(lambda module, _, output: shapes.update({module: _shape(output)}))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))

    rows = []
    for layer, kind, path in _layers(architecture, model):
        module = model.get_submodule(path)
        if module in shapes:  # else the code of somebody else does not call it
            rows.append(Row(layer, kind, shapes[module], count_parameters(module)[0]))
    if family_of(architecture) in ("cifar_resnet", "vgg"):
        # The softmax that ends the Keras models; here the loss has it.
        kind = "Activation" if family_of(architecture) == "cifar_resnet" else None
        rows.append(Row("activation", kind, shapes[model], 0))
    total, trainable, non_trainable = count_parameters(model)
    return Summary(architecture, tuple(rows), total, trainable, non_trainable)


def count_parameters(model: nn.Module) -> tuple[int, int, int]:
    """(total, trainable, non-trainable) as Keras counts: running means and variances are not trainable,
    nor is a parameter that is frozen; a batch norm's counter of batches is not counted."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    total = sum(parameter.numel() for parameter in parameters) + statistics
    return total, trainable, total - trainable


def _shape(output: Tensor) -> tuple[int, ...]:
    shape = tuple(output.shape[1:])
    return (*shape[1:], shape[0])  # (C, H, W) as (H, W, C); (C,) as it is


# Keras's names for torch's layers; others go by torch's.
_KERAS = {
    "AvgPool2d": "AveragePooling2D",
    "BatchNorm2d": "BatchNormalization",
    "Conv2d": "Conv2D",
    "Linear": "Dense",
    "MaxPool2d": "MaxPooling2D",
}


def _layers(architecture: str, model: nn.Module) -> Iterator[tuple[str, str | None, str]]:
    """Each row's name and type in Keras, and the module of ours that it is."""
    family = family_of(architecture)
    seen: Counter[str] = Counter()
    for part, module in model.named_children():
        # A part that is no sequence of layers is a row by itself.
        children = module.named_children() if isinstance(module, nn.Sequential) else [("", module)]
        for child, layer in children:
            kind = _KERAS.get(type(layer).__name__, type(layer).__name__)
            # Keras's CIFAR ResNets and VGG-16 are known by their tables, which have these as parts of others.
            if kind == "ReLU" or (family == "cifar_resnet" and kind in ("AdaptiveAvgPool2d", "Flatten")):
                continue
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
            number = seen[name]
            seen[name] += 1
            path = f"{part}.{child}".rstrip(".")
            if family != "vgg":
                yield f"{name}_{number}" if number else name, kind, path
                continue
            if child == "dropout2":  # one layer with dropout1 in Keras, so one row
                continue
            # Numbers 0 to 12 are inside the 13 groups.
            inner = {
                "sequential": "conv_bn_relu",
                "dropout": "dropout_13",
                "batch_norm1d": "batch_normalization_13",
            }
            name = inner.get(name, name)
            yield f"{name}_{number}" if number else name, None, path
