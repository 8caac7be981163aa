"""The weights that a cell starts from."""

from __future__ import annotations

from pathlib import Path

import torch

from resgrid.config import ImageNetWeights, MlflowWeights, RandomWeights, WeightsFile
from resgrid.data.fetch import verify
from resgrid.errors import ResgridError
from resgrid.grid import Cell
from resgrid.models import build_model
from resgrid.models.classifier import Classifier
from resgrid.models.vgg import imagenet_vgg16_base
from resgrid.training.engine import stream_seed
from resgrid.weights import load_weights


def initial_model(cell: Cell, num_classes: int, fetched: Path | None = None) -> Classifier:
    """The cell's model, its weights drawn with the cell's seed or read from where the recipe says.

    `fetched` is the file of weights from MLflow, which the caller downloads.
    Raises ResgridError as `load_initial_weights` does.
    """
    torch.manual_seed(stream_seed(cell.seed, "weights"))
    model = build_model(cell.architecture, num_classes, cell.recipe.dropout)
    load_initial_weights(cell, model, num_classes, fetched)
    return model


def load_initial_weights(
    cell: Cell, model: Classifier, num_classes: int, fetched: Path | None = None
) -> None:
    """Load the recipe's initial weights into `model`, whose weights were drawn at random.

    From a file with another number of classes the base alone is loaded; the head stays as it was drawn.
    Raises ResgridError for a file that does not exist, has another checksum, or is of another architecture.
    """
    key = cell.key("initial_weights")
    match cell.recipe.initial_weights:
        case RandomWeights():
            return
        case ImageNetWeights():
            imagenet_vgg16_base(model)
            return
        case WeightsFile(path=path, checksum=checksum):
            file = Path(path)
            if not file.is_file():
                raise ResgridError(f"{key}.path: there is no file {path} in {Path.cwd()}.")
            verify(
                file, checksum, f"Restore that file, or write the checksum of this one into {key}.checksum."
            )
        case MlflowWeights():
            assert fetched is not None, "the caller downloads weights from MLflow"
            file = fetched
    info, tensors = load_weights(file)
    if info.architecture != cell.architecture:
        raise ResgridError(
            f"{key}: {file} holds weights of {info.architecture}, but this cell trains {cell.architecture}; "
            f"take a file of {cell.architecture}."
        )
    if len(info.class_names) == num_classes:
        model.load_state_dict(tensors)
    else:
        base = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
        model.base.load_state_dict(base)
