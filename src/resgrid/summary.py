"""A model as the table that the originals print: layer, output shape, parameters, and three totals.

Layers have the names and the grouping of Keras's `model.summary()`: a stage of residual units is one row,
a convolution of VGG-16 with its ReLU, BN and dropout another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resgrid.config import FAMILIES, Architecture
from resgrid.models import build_model, wide_resnet


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
    architecture: Architecture
    rows: tuple[Row, ...]
    total: int
    trainable: int
    non_trainable: int

    def as_dict(self) -> dict[str, Any]:
        """What JSON shows of it: family, blocks of a wide ResNet, layers, and the three totals."""
        blocks = wide_resnet.BLOCKS.get(self.architecture)
        return {
            "family": FAMILIES[self.architecture],
            **({"blocks": list(blocks)} if blocks else {}),
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
        lines = [f"{a:<{wide[0]}}   {b:<{wide[1]}}   {c:>{wide[2]}}" for a, b, c in cells]
        rule = "-" * len(lines[0])
        return "\n".join(
            [
                self.architecture,
                rule,
                lines[0],
                rule,
                *lines[1:],
                rule,
                f"Total parameters: {self.total:,}",
                f"Trainable parameters: {self.trainable:,}",
                f"Non-trainable parameters: {self.non_trainable:,}",
            ]
        )


def summarize(
    architecture: Architecture, num_classes: int = 10, dropout: float | tuple[float, float, float] = 0.0
) -> Summary:
    """The table of a model that is trained end to end, torch's generator left as it was."""
    # A real model, for on the meta device its forward would import torch._dynamo, which takes 4 s.
    with torch.random.fork_rng(devices=[]):
        model = build_model(architecture, num_classes, dropout).eval()
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    for module in model.modules():
        module.register_forward_hook(lambda module, _, output: shapes.update({module: _shape(output)}))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))

    rows = []
    for layer, kind, path in _layers(architecture, model):
        module = model.get_submodule(path)
        rows.append(Row(layer, kind, shapes[module], count_parameters(module)[0]))
    if FAMILIES[architecture] != "wide_resnet":
        # The softmax that ends the Keras models; here the loss has it.
        kind = "Activation" if FAMILIES[architecture] == "cifar_resnet" else None
        rows.append(Row("activation", kind, shapes[model], 0))
    total, trainable, non_trainable = count_parameters(model)
    assert sum(row.params for row in rows) == total
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


def _layers(architecture: Architecture, model: nn.Module) -> list[tuple[str, str | None, str]]:
    """Each row's name and type in Keras, and the module of ours that it is."""
    match FAMILIES[architecture]:
        case "cifar_resnet":
            return [
                ("conv2d", "Conv2D", "base.stem"),
                ("sequential", "Sequential", "base.stage1"),
                ("sequential_1", "Sequential", "base.stage2"),
                ("sequential_2", "Sequential", "base.stage3"),
                ("batch_normalization", "BatchNormalization", "head.norm"),
                ("conv2d_1", "Conv2D", "head.classifier"),
            ]
        case "wide_resnet":  # known by its totals alone; named in the same style
            return [
                ("conv2d", "Conv2D", "base.stem"),
                ("batch_normalization", "BatchNormalization", "base.norm"),
                ("sequential", "Sequential", "base.stage1"),
                ("sequential_1", "Sequential", "base.stage2"),
                ("sequential_2", "Sequential", "base.stage3"),
                ("sequential_3", "Sequential", "base.stage4"),
                ("average_pooling2d", "AveragePooling2D", "head.pool"),
                ("flatten", "Flatten", "head.flatten"),
                ("dense", "Dense", "head.classifier"),
            ]
        case "vgg":
            rows: list[tuple[str, str | None, str]] = []
            seen: Counter[str] = Counter()
            for name, _ in model.get_submodule("base").named_children():
                layer = {"conv": "conv_bn_relu", "pool": "max_pooling2d"}.get(name[:4], name)
                rows.append((f"{layer}_{seen[layer]}" if seen[layer] else layer, None, f"base.{name}"))
                seen[layer] += 1
            # Numbers 0 to 12 are inside the 13 groups. Both dropouts are one layer in Keras, so one row.
            return [
                *rows,
                ("dropout_13", None, "head.dropout1"),
                ("dense", None, "head.dense"),
                ("batch_normalization_13", None, "head.norm"),
                ("dense_1", None, "head.classifier"),
            ]
