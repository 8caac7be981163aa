"""Weights files: safetensors, with all that is needed to use them as JSON under the metadata key `resgrid`.

A file holds the model's state dict in float32, less the batch norms' counters of batches, which nothing
reads where the momentum is fixed. `load_state_dict` takes the rest as it is, also strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from resgrid.config import OwnArchitecture, Resize
from resgrid.errors import ResgridError
from resgrid.filetype import first_bytes, unreadable
from resgrid.models import build_model
from resgrid.models.classifier import Classifier
from resgrid.project import write_whole
from resgrid.schema import Positive, Strict, Triple

METADATA_KEY = "resgrid"  # the only one: safetensors writes several in no fixed order


class WeightsInfo(Strict):
    """What a weights file says about itself."""

    architecture: OwnArchitecture  # or one of a package: its name is a file's, so never a path
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]  # in the order of the logits
    mean: Triple  # of the input's red, green and blue, on the 0-1 scale
    std: tuple[Positive, Positive, Positive]
    resize: Resize = "stretch"  # how images of another shape became squares; CIFAR-10's needed nothing


def save_weights(path: Path, model: nn.Module, info: WeightsInfo) -> None:
    """Write the weights of `model`, on any device, whole or not at all; the same weights give the same bytes.

    Raises OSError: where `path` cannot be written.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in _stored(model).items()
    }
    write_whole(path, save(tensors, {METADATA_KEY: info.model_dump_json()}))


def load_weights(path: Path, pipeline: Path = Path()) -> tuple[WeightsInfo, dict[str, Tensor]]:
    """What is in `path`: float32 tensors on the CPU by their names in the state dict.

    `pipeline` is the folder that has the architecture, if it is one of a person's own.

    Raises ResgridError: for a file that is missing, cut, not safetensors, without this project's metadata,
    with other tensors than its architecture has, or with a number that is not finite.
    """
    first_bytes(path)  # of a folder or a pipe there are none
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied, for what safetensors returns is a view of the mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise unreadable(path, "a weights file of ResGrid", error, "Copy or train it again.") from None
    if METADATA_KEY not in metadata:
        raise ResgridError(
            f"{path}: its metadata have no {METADATA_KEY!r}, so it names neither architecture nor classes. "
            "`resgrid import` makes a weights file of it."
        )
    try:
        info = WeightsInfo.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or METADATA_KEY
        raise ResgridError(
            f"{path}: {key} in its metadata is wrong: {problem['msg']}. Take a file that this version wrote."
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ResgridError(f"{path}: {name} is {tensor.dtype}, but weights files hold torch.float32.")
    check_shapes(path, {name: tensor.shape for name, tensor in tensors.items()}, info, pipeline)
    check_finite(path, tensors)
    return info, tensors


def load_model(path: Path, pipeline: Path = Path()) -> tuple[Classifier, WeightsInfo]:
    """The model of a weights file, on the CPU, in eval mode; raises ResgridError as `load_weights` does."""
    info, tensors = load_weights(path, pipeline)
    return load_into_model(info, tensors, pipeline), info


def load_into_model(info: WeightsInfo, tensors: Mapping[str, Tensor], pipeline: Path = Path()) -> Classifier:
    """The model of `info`, in eval mode, with these tensors as its own."""
    with torch.device("meta"):  # draws no weights, only to overwrite them
        model = build_model(info.architecture, len(info.class_names), pipeline=pipeline)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def expected_shapes(
    architecture: str, num_classes: int, pipeline: Path = Path()
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a weights file, by name, in the order of the network."""
    with torch.device("meta"):
        model = build_model(architecture, num_classes, pipeline=pipeline)
    return {name: tuple(tensor.shape) for name, tensor in _stored(model).items()}


def check_shapes(
    source: Path, shapes: Mapping[str, tuple[int, ...]], info: WeightsInfo, pipeline: Path = Path()
) -> None:
    """Raises ResgridError, which names the tensor, unless `shapes` are those of the model in `info`."""
    try:
        expected = expected_shapes(info.architecture, len(info.class_names), pipeline)
    except ResgridError as error:  # an architecture that is not here
        raise ResgridError(f"{source}: {error}") from None
    model = f"{info.architecture} with {len(info.class_names)} classes"
    fix = "Check the name of the model and the number of classes."
    if missing := [name for name in expected if name not in shapes]:
        raise ResgridError(f"{source}: {missing[0]} is missing, which {model} has. {fix}")
    if extra := [name for name in shapes if name not in expected]:
        raise ResgridError(f"{source}: it holds {extra[0]}, which {model} has not. {fix}")
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise ResgridError(
                f"{source}: {name} has the shape {tuple(shapes[name])}, where {model} has {shape}. {fix}"
            )


def check_finite(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ResgridError, which names the tensor, for a NaN or an infinity: nothing computes with those."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ResgridError(
                f"{source}: {name} holds a NaN or an infinity. Its training diverged: take earlier weights."
            )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
