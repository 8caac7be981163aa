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
        raise ResgridError(f"{path}: its metadata are not those of this version: {error}") from None
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
    expected = expected_shapes(info.architecture, len(info.class_names), pipeline)
    model = f"{info.architecture} with {len(info.class_names)} classes"
    wrong = [f"{name} is missing, which {model} has" for name in expected if name not in shapes]
    wrong += [f"it holds {name}, which {model} has not" for name in shapes if name not in expected]
    wrong += [
        f"{name} has the shape {tuple(shapes[name])}, where {model} has {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if wrong:
        raise ResgridError(f"{source}: {wrong[0]}. Check the name of the model and the number of classes.")


def check_finite(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ResgridError, which names the tensor, for a NaN or an infinity: nothing computes with those."""
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ResgridError(
            f"{source}: {wrong[0]} holds a NaN or an infinity. Its training diverged: take earlier weights."
        )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
