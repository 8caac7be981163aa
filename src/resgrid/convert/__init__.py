"""Weights of other programs as weights files of this project: Keras's files, and PyTorch's checkpoints.

Both formats can do harm: an HDF5 file can point at other files and declare arrays of any size, and a pickle
can run a program. So shapes are checked before a value is read, and nothing but arrays is read: every other
object of a checkpoint becomes an inert placeholder.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from resgrid.errors import ResgridError
from resgrid.schema import Triple
from resgrid.weights import WeightsInfo

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

OF_KERAS = ("cifar_resnet", "vgg")  # the families of its original


def described(
    architecture: str, class_names: Sequence[str] | None, normalization: tuple[Triple, Triple]
) -> WeightsInfo:
    """What the weights file will say of itself; without `class_names` they are CIFAR-10's.

    Raises ResgridError: for impossible figures.
    """
    names = CIFAR10_CLASSES if class_names is None else tuple(class_names)
    mean, std = normalization
    try:
        return WeightsInfo(architecture=architecture, class_names=names, mean=mean, std=std)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ResgridError(f"{key}: {problem['msg']} (it is {problem['input']!r})") from None
