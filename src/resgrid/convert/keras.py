"""Keras's weights: `.h5` of Keras 2, `.keras` and `.weights.h5` of Keras 3."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from resgrid.data import archives
from resgrid.errors import ResgridError
from resgrid.filetype import unreadable
from resgrid.models import build_model
from resgrid.weights import WeightsInfo, check_shapes

GROUPS = ("model_weights/", "layers/", "_layer_checkpoint_dependencies/", "")  # Keras 2; 3 in two versions; 2
WEIGHTS = "model.weights.h5"  # in a .keras archive

# What torch calls the kinds of array in Keras, and what Keras 3 numbers in a convolution and in a batch norm.
NAMES = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias", "moving_mean": "running_mean",
         "moving_variance": "running_var"}  # fmt: skip
NUMBERED = (("kernel", "bias"), ("gamma", "beta", "moving_mean", "moving_variance"))

Layer = dict[str, h5py.Dataset]  # by kind: kernel, bias, gamma, …


def read_keras(source: Path, info: WeightsInfo) -> dict[str, Tensor]:
    """The tensors of `info`'s model, by their names here; raises ResgridError as `import_weights` does."""
    try:
        content: Path | io.BytesIO = source
        if zipfile.is_zipfile(source):
            content = io.BytesIO(dict(archives.contents(source, {WEIGHTS}))[WEIGHTS])
        with h5py.File(content, "r") as file:
            arrays = _match(source, _layers(file), info)
            shapes = {name: tuple(each.shape[i] for i in _axes(each)) for name, each in arrays.items()}
            check_shapes(source, shapes, info)
            return {name: _read(source, array) for name, array in arrays.items()}
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise unreadable(source, "a Keras (HDF5) file", error, "Copy or save it again.") from None


def _layers(file: h5py.File) -> list[Layer]:
    """The layers in the order of the network, by their names alone.

    Keras numbers layers as they are made (`sequential`, `sequential_1`, …, `res_net_unit_10`), while a file
    may list them by name. Beside groups of layers, such as stages, a single layer comes first if it sees the
    three channels of the image, and else last: it belongs to the head.
    """
    arrays: Layer = {}

    def keep(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            arrays[name] = item

    file.visititems(keep)  # each object once; links are not followed
    group = next(group for group in GROUPS if any(name.startswith(group) for name in arrays) or not group)
    layers: dict[tuple[str, ...], Layer] = {}
    for name, array in arrays.items():
        path = name.removeprefix(group).partition(":")[0].split("/")
        if name.startswith(group) and array.dtype.kind not in "iu":  # those are states of random numbers
            layers.setdefault(tuple(path[:-1]), {})[path[-1]] = array
    for parts, layer in layers.items():
        if "0" in layer:
            kinds = NUMBERED[layer["0"].ndim == 1]
            layers[parts] = {kinds[int(number)]: layer[number] for number in layer}
    shared = next((i for i, each in enumerate(zip(*layers, strict=False)) if len(set(each)) > 1), 0)
    sizes = Counter(parts[shared : shared + 1] for parts in layers)

    def place(parts: tuple[str, ...]) -> tuple[int, list[str | int]]:
        kernel = layers[parts].get("kernel")
        is_first = kernel is not None and kernel.shape[2:3] == (3,)
        is_single = sizes[parts[shared : shared + 1]] == 1
        natural = re.split(r"([0-9]+)", "/".join(parts))
        return 0 if is_first else 1 + is_single, [int(each) if each.isdecimal() else each for each in natural]

    return [layers[parts] for parts in sorted(layers, key=place)]


def _match(source: Path, layers: list[Layer], info: WeightsInfo) -> dict[str, h5py.Dataset]:
    """Each array by the name that its tensor has here: kernels and batch norms each in their order."""
    for layer in layers:
        if unknown := layer.keys() - NAMES.keys():
            name = layer[min(unknown)].name
            raise ResgridError(f"{source}: it holds {name}, which no layer of {info.architecture} has.")
    kernels = [layer for layer in layers if "kernel" in layer]
    norms = [layer for layer in layers if "kernel" not in layer]
    with torch.device("meta"):
        modules = dict(build_model(info.architecture, len(info.class_names)).named_modules())
    kernel_names = [name for name, each in modules.items() if isinstance(each, nn.Conv2d | nn.Linear)]
    norm_names = [name for name, each in modules.items() if isinstance(each, nn.BatchNorm2d | nn.BatchNorm1d)]
    if (len(kernels), len(norms)) != (len(kernel_names), len(norm_names)):
        raise ResgridError(
            f"{source}: it holds {len(kernels)} convolutions or dense layers and {len(norms)} batch norms, "
            f"where {info.architecture} has {len(kernel_names)} and {len(norm_names)}. Is it another model?"
        )
    return {
        f"{name}.{NAMES[kind]}": array
        for name, layer in zip(kernel_names + norm_names, kernels + norms, strict=True)
        for kind, array in layer.items()
    }


def _axes(array: h5py.Dataset) -> tuple[int, ...]:
    """Keras's axes in torch's order: of (height, width, in, out), (in, out) or (channels,)."""
    return (3, 2, 0, 1) if array.ndim == 4 else tuple(range(array.ndim))[::-1]


def _read(source: Path, array: h5py.Dataset) -> Tensor:
    """An array whose shape was checked, as torch lays it out."""
    is_bomb = array.chunks and np.prod(array.chunks, dtype=object) > array.size
    if array.dtype.kind != "f" or array.is_virtual or array.external or is_bomb:
        raise ResgridError(f"{source}: {array.name} is no plain array of floats. Save the model again.")
    return torch.from_numpy(array[()].astype(np.float32)).permute(_axes(array))
