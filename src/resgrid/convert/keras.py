"""Keras's weights, of versions 2 and 3."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from resgrid.config import NORMALIZATIONS
from resgrid.convert import OF_KERAS, described
from resgrid.errors import ResgridError
from resgrid.filetype import HDF5, KERAS, identify, refuse
from resgrid.models import ARCHITECTURES, build_model, family_of
from resgrid.schema import Triple
from resgrid.weights import WeightsInfo, check_shapes, filled, save_weights


def import_keras(
    source: Path,
    architecture: str,
    out: Path,
    class_names: Sequence[str] | None = None,
    normalization: tuple[Triple, Triple] = NORMALIZATIONS["keras"],
) -> WeightsInfo:
    """Convert Keras's weights for a CIFAR ResNet or VGG-16: `.h5` of Keras 2, `.keras` or `.weights.h5` of 3.

    Without `class_names` they are CIFAR-10's; `normalization` is mean and deviation of the training.

    Raises ResgridError: for a file that is missing, of another kind, not self-contained, or of another model.
    """
    info = described(architecture, class_names, normalization)
    if architecture not in (known := [a for a in ARCHITECTURES if family_of(a) in OF_KERAS]):
        raise ResgridError(
            f"{source}: the Keras original has no {architecture}. Name one of {', '.join(known)}."
        )
    kind = identify(source)
    if kind not in (HDF5, KERAS):
        raise refuse(source, kind, "a Keras file (.h5, .keras or .weights.h5)")
    try:
        with h5py.File(_weights_member(source) if kind is KERAS else source, "r") as file:
            arrays = _match(source, _layers(source, _weights_group(source, file), set()), info)
            check_shapes(source, {name: _torch_shape(array.shape) for name, array in arrays.items()}, info)
            tensors = {name: _read(source, array) for name, array in arrays.items()}
    except (OSError, RuntimeError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ResgridError(
            f"{source}: the Keras file is cut or damaged ({error}). Copy or save it again."
        ) from None
    save_weights(out, filled(info, tensors), info)
    return info


MAX_WEIGHTS_BYTES = 2**30  # of the weights in a .keras file: eighteen times VGG-16's


def _weights_member(source: Path) -> io.BytesIO:
    """The HDF5 file in a `.keras` archive."""
    with zipfile.ZipFile(source) as archive:
        member = archive.getinfo("model.weights.h5")
        if member.file_size > MAX_WEIGHTS_BYTES:
            raise ResgridError(
                f"{source}: its weights have {member.file_size:,} bytes, too many for a model."
            )
        return io.BytesIO(archive.read(member))


def _weights_group(source: Path, file: h5py.File) -> h5py.Group:
    """The group below which a Keras file has its layers."""
    # Keras 2, and 3 in two versions
    for name in ("model_weights", "layers", "_layer_checkpoint_dependencies"):
        if name in list(file):
            return _member(source, file, name)
    if "layer_names" not in file.attrs:
        raise ResgridError(
            f"{source}: this HDF5 file holds no layers as Keras writes them. "
            "Save the model with model.save_weights('FILE.weights.h5')."
        )
    return file


@dataclass(frozen=True)
class _Layer:
    path: str
    arrays: dict[str, h5py.Dataset]  # by kind: kernel, bias, gamma, ...


# Kinds of array in Keras, and what torch calls them.
_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

# What Keras 3 numbers in a convolution or dense layer, and in a batch norm.
_NUMBERED = (
    {"0": "kernel", "1": "bias"},
    {"0": "gamma", "1": "beta", "2": "moving_mean", "3": "moving_variance"},
)


def _layers(source: Path, group: h5py.Group, seen: set[int]) -> list[_Layer]:
    """The layers below `group` in the order of the network, told from their names alone.

    Keras numbers layers as they are made (`sequential`, `sequential_1`, ..., `res_net_unit_10`), while a
    file may list them by name. Beside groups of layers, such as stages, a single layer comes first if it
    sees the three channels of the image, and else last: it belongs to the head.
    """
    arrays: dict[str, h5py.Dataset] = {}
    parts: list[list[_Layer]] = []
    for name in sorted(group, key=_natural):
        member = _member(source, group, name)
        address = h5py.h5o.get_info(member.id).addr
        if address in seen or member.name.count("/") > 12:
            raise ResgridError(f"{source}: {member.name} leads in a circle, or too deep for a Keras model.")
        seen.add(address)
        if isinstance(member, h5py.Group):
            parts.append(_layers(source, member, seen))
        else:
            arrays[name.partition(":")[0]] = member
    if any(len(part) > 1 for part in parts):
        parts.sort(key=_rank)
    if group.name.endswith("/vars"):  # Keras 3 numbers them; a state of random numbers is of integers
        arrays = {number: array for number, array in arrays.items() if array.dtype.kind not in "iu"}
        numbered = _NUMBERED["0" in arrays and arrays["0"].ndim == 1]
        arrays = {numbered.get(number, number): array for number, array in arrays.items()}
    own = [_Layer(group.name, arrays)] if arrays else []
    return own + [layer for part in parts for layer in part]


def _member(source: Path, group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ResgridError(
            f"{source}: {name!r} in {group.name} is a link, perhaps out of the file. Copy the "
            "file with what it links to: h5repack or model.save_weights."
        )
    member = group[name]
    if isinstance(member, h5py.Group) or (isinstance(member, h5py.Dataset) and member.shape is not None):
        return member
    raise ResgridError(
        f"{source}: {member.name} is neither a group nor an array. Take a file of Keras weights."
    )


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _rank(part: list[_Layer]) -> int:
    if len(part) != 1:
        return 1
    kernel = part[0].arrays.get("kernel")
    return 0 if kernel is not None and kernel.shape[2:3] == (3,) else 2


def _match(source: Path, layers: list[_Layer], info: WeightsInfo) -> dict[str, h5py.Dataset]:
    """Each array by the name that its tensor has here: kernels and batch norms each in their order."""
    for layer in layers:
        if unknown := layer.arrays.keys() - _NAMES.keys():
            raise ResgridError(
                f"{source}: {layer.path} holds {min(unknown)!r}, which no layer of {info.architecture} has."
            )
    kernels = [layer for layer in layers if "kernel" in layer.arrays]
    norms = [layer for layer in layers if "kernel" not in layer.arrays]

    with torch.device("meta"):
        model = build_model(info.architecture, len(info.class_names))
    modules = dict(model.named_modules())
    kernel_names = [name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    norm_names = [
        name for name, module in modules.items() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
    ]
    if (len(kernels), len(norms)) != (len(kernel_names), len(norm_names)):
        raise ResgridError(
            f"{source}: it holds {len(kernels)} convolutions or dense layers and {len(norms)} batch norms, "
            f"where {info.architecture} has {len(kernel_names)} and {len(norm_names)}. Is it another model?"
        )
    return {
        f"{name}.{_NAMES[kind]}": array
        for name, layer in zip(kernel_names + norm_names, kernels + norms, strict=True)
        for kind, array in layer.arrays.items()
    }


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:  # (height, width, in, out) to (out, in, height, width)
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1]  # (in, out) to (out, in); (channels,) as it is


def _read(source: Path, array: h5py.Dataset) -> Tensor:
    """An array whose shape was checked, as torch lays it out."""
    if array.dtype.kind != "f":
        raise ResgridError(f"{source}: {array.name} is of type {array.dtype}, but weights are floats.")
    if array.is_virtual or array.external:
        raise ResgridError(f"{source}: {array.name} has its values in another file, which is not read.")
    if array.chunks and np.prod(array.chunks, dtype=object) > array.size:
        raise ResgridError(f"{source}: {array.name} has chunks {array.chunks}, larger than itself.")
    values = torch.from_numpy(array[()].astype(np.float32))
    return values.permute(3, 2, 0, 1) if values.ndim == 4 else values.t()
