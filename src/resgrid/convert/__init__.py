"""Weights of other programs as weights files of this project: Keras's, PyTorch's, bare safetensors.

HDF5 can point at other files and declare arrays of any size, and a pickle can run a program. So shapes are
checked before a value is read, and of a pickle nothing but arrays is read: all else becomes a stand-in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from resgrid.convert.keras import read_keras
from resgrid.convert.pytorch import read_torch
from resgrid.errors import ResgridError
from resgrid.filetype import first_bytes, is_keras
from resgrid.normalizations import NORMALIZATIONS
from resgrid.schema import Triple
from resgrid.weights import WeightsInfo, check_finite, load_into_model, save_weights

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def import_weights(
    source: Path,
    architecture: str,
    out: Path,
    class_names: Sequence[str] | None = None,
    normalization: tuple[Triple, Triple] | None = None,
    key: str | None = None,
) -> WeightsInfo:
    """Make a weights file of `source`, whose content tells who wrote it; returns what `out` says of itself.

    Without `class_names` they are CIFAR-10's. `normalization` is mean and deviation of the training; without,
    Keras's or PyTorch's original's. `key` picks one of several sets of weights in a PyTorch file.
    Raises ResgridError: for a file that cannot be read, weights of another model, several sets that differ
    without a `key`, and numbers that are not finite.
    """
    from_keras = is_keras(first_bytes(source))
    mean, std = normalization or NORMALIZATIONS["keras" if from_keras else "kuangliu"]
    names = CIFAR10_CLASSES if class_names is None else tuple(class_names)
    try:
        info = WeightsInfo(architecture=architecture, class_names=names, mean=mean, std=std)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ResgridError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    tensors = read_keras(source, info) if from_keras else read_torch(source, info, key)
    check_finite(source, tensors)
    save_weights(out, load_into_model(info, tensors), info)
    return info
