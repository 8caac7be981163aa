"""Weights of other programs as weights files of this project: Keras's HDF5, and PyTorch's state dicts.

Both formats can do harm: an HDF5 file can point at other files and declare arrays of any size, and a pickle
can run a program. So shapes are checked before a value is read, and nothing but arrays is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from resgrid.config import FAMILIES, Architecture, Triple
from resgrid.errors import ResgridError
from resgrid.models import build_model
from resgrid.weights import WeightsInfo, check_shapes, expected_shapes, save_weights

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# What the originals normalised CIFAR-10 by: one figure for all channels, on the 0-255 scale; and by channel.
KERAS_MEAN: Triple = (120.7076 / 255,) * 3
KERAS_STD: Triple = (64.1501 / 255,) * 3
TORCH_MEAN: Triple = (0.4914, 0.4822, 0.4465)
TORCH_STD: Triple = (0.2023, 0.1994, 0.2010)


# --- Keras ----------------------------------------------------------------------------------------


def import_keras(
    source: Path,
    architecture: Architecture,
    out: Path,
    class_names: Sequence[str] | None = None,
    mean: Triple = KERAS_MEAN,
    std: Triple = KERAS_STD,
) -> WeightsInfo:
    """Convert what Keras's `save_weights` or `save` wrote (`.h5`) for a CIFAR ResNet or VGG-16.

    Without `class_names` they are CIFAR-10's; `mean` and `std` are what the training normalised by.

    Raises ResgridError: for a file that is missing, not HDF5, not self-contained, or of another model.
    """
    info = _info(architecture, class_names, mean, std)
    if FAMILIES[architecture] == "wide_resnet":
        raise ResgridError(
            f"{source}: the Keras original has no {architecture}. Name one of "
            f"{', '.join(name for name, family in FAMILIES.items() if family != 'wide_resnet')}."
        )
    _must_exist(source)
    try:
        with h5py.File(source, "r") as file:
            root = _member(source, file, "model_weights") if "model_weights" in list(file) else file
            if not isinstance(root, h5py.Group) or "layer_names" not in root.attrs:
                raise ResgridError(
                    f"{source}: this HDF5 file holds no weights as Keras 2 writes them (no layer_names). "
                    "Save it with model.save_weights(FILE, save_format='h5')."
                )
            arrays = _match(source, _layers(source, root, set()), info)
            check_shapes(source, {name: _torch_shape(array.shape) for name, array in arrays.items()}, info)
            tensors = {name: _read(source, array) for name, array in arrays.items()}
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ResgridError(
            f"{source}: cannot be read as HDF5 ({error}). Take a whole .h5 file of Keras weights."
        ) from None
    return _save(tensors, info, out)


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
        shapes = [_torch_shape(layer.arrays["kernel"].shape) for layer in kernels]
        raise ResgridError(
            f"{source}: it holds {len(kernels)} convolutions or dense layers and {len(norms)} batch norms, "
            f"where {info.architecture} has {len(kernel_names)} and {len(norm_names)}." + _hint(shapes, info)
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


# --- PyTorch --------------------------------------------------------------------------------------


def import_torch(
    source: Path,
    architecture: Architecture,
    out: Path,
    class_names: Sequence[str] | None = None,
    mean: Triple = TORCH_MEAN,
    std: Triple = TORCH_STD,
) -> WeightsInfo:
    """Convert a state dict that `torch.save` wrote, bare or under `state_dict`, `net` or `model`.

    Taken are this project's own names, and for the wide ResNets also the customary ones (`conv1`,
    `layer1.0.bn1`, `linear`) and any others whose tensors are the same in the same order. Elsewhere order
    proves nothing: the twins that normalise before the ReLU or after it have the same shapes.

    Raises ResgridError: for a file that is missing, cut, holds more than tensors, or of another model.
    """
    info = _info(architecture, class_names, mean, std)
    _must_exist(source)
    tensors = _rename(_state_dict(source), info)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        check_shapes(source, shapes, info)
    except ResgridError as error:
        raise ResgridError(f"{error}{_hint(list(shapes.values()), info)}") from None
    return _save({name: tensor.float() for name, tensor in tensors.items()}, info, out)


def _state_dict(source: Path) -> dict[str, Tensor]:
    """The floating-point tensors of `source` by name, unwrapped, less the batch norms' counters."""
    try:
        content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or broken pickle can end in any exception
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {asked[1]}" if asked else f"{type(error).__name__} while reading it"
        raise ResgridError(
            f"{source}: this is no file of tensors alone ({what}), and nothing else is read, since a pickle "
            "can run programs. Save it with torch.save(model.state_dict(), FILE)."
        ) from None
    for key in ("state_dict", "net", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ResgridError(
            f"{source}: it holds a {type(content).__name__}, not a state dict. "
            "Save it with torch.save(model.state_dict(), FILE)."
        )
    tensors = {}
    for key, value in content.items():
        name = str(key)
        if name.endswith("num_batches_tracked"):
            continue
        if not _is_plain(value):
            raise ResgridError(
                f"{source}: {name!r} is no dense tensor of floats, so this is no state dict of weights. "
                "Save it with torch.save(model.state_dict(), FILE)."
            )
        tensors[name] = value
    if all(name.startswith("module.") for name in tensors):  # as DataParallel saves it
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
        and value.is_floating_point()
    )


# The customary names of a wide ResNet's parts, and ours.
_CUSTOMARY = (
    (r"^conv1\.", "base.stem."),
    (r"^bn1\.", "base.norm."),
    (r"^layer", "base.stage"),
    (r"\.bn", ".norm"),
    (r"\.(?:shortcut|downsample)\.0\.", ".shortcut.conv."),
    (r"\.(?:shortcut|downsample)\.1\.", ".shortcut.norm."),
    (r"^(?:linear|fc)\.", "head.classifier."),
)


def _rename(tensors: dict[str, Tensor], info: WeightsInfo) -> dict[str, Tensor]:
    """The same tensors by our names, or as they are where those cannot be told."""
    expected = expected_shapes(info.architecture, len(info.class_names))
    if FAMILIES[info.architecture] != "wide_resnet" or tensors.keys() == expected.keys():
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, ours in _CUSTOMARY:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    if renamed.keys() == expected.keys():
        return renamed
    theirs = [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in tensors.items()]
    if theirs == [(name.rpartition(".")[2], shape) for name, shape in expected.items()]:
        return dict(zip(expected, tensors.values(), strict=True))
    return tensors


# --- both -----------------------------------------------------------------------------------------


def _info(
    architecture: Architecture, class_names: Sequence[str] | None, mean: Triple, std: Triple
) -> WeightsInfo:
    names = CIFAR10_CLASSES if class_names is None else tuple(class_names)
    try:
        return WeightsInfo(architecture=architecture, class_names=names, mean=mean, std=std)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ResgridError(f"{key}: {problem['msg']} (it is {problem['input']!r})") from None


def _must_exist(source: Path) -> None:
    if not source.is_file():
        raise ResgridError(f"{source}: there is no such file to convert.")


def _hint(shapes: Sequence[tuple[int, ...]], info: WeightsInfo) -> str:
    """Which architecture's kernels have these shapes, if one has."""
    kernels = sorted(shape for shape in shapes if len(shape) > 1)
    for architecture in FAMILIES:
        expected = expected_shapes(architecture, len(info.class_names)).values()
        if architecture != info.architecture and kernels == sorted(s for s in expected if len(s) > 1):
            return f" These look like the weights of {architecture}."
    return ""


def _save(tensors: dict[str, Tensor], info: WeightsInfo, out: Path) -> WeightsInfo:
    with torch.device("meta"):
        model = build_model(info.architecture, len(info.class_names))
    model.load_state_dict(tensors, assign=True)
    save_weights(out, model, info)
    return info
