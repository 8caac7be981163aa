"""The test accuracies that the two original experiments published for CIFAR-10, and how they were reached.

A figure stands beside a measured one where data and recipe agree; else `differing` says what does not. Only
settings that an experiment states are compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from resgrid.convert import CIFAR10_CLASSES
from resgrid.data.dataset import Meta
from resgrid.grid import Cell

NUM_IMAGES = {"train": 50_000, "test": 10_000}  # of CIFAR-10, all of which both experiments used


class Publication(NamedTuple):
    accuracy: float  # 0-1, of a single run
    settings: dict[str, Any]  # those stated, by the keys of `resgrid.config`'s optimizers and recipes


KERAS: dict[str, Any] = {
    "batch_size": 128,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "approach": "end_to_end",
}

# A later revision of the Keras system, which left these rows blank at first: the schedule of He et al. 2015.
KERAS_RESNET = KERAS | {
    "epochs": 165,
    "schedule": {"name": "piecewise", "boundaries": (32_000, 48_000), "factors": (1.0, 0.1, 0.01)},
    "warmup": {"steps": 500, "factor": 0.1},
    "weight_decay": 2e-4,  # L2 of 1e-4 in Keras's terms
    "normalization": {"name": "scalar"},
}

# The companion of its first version.
KERAS_VGG = KERAS | {
    "epochs": 250,
    "schedule": {"name": "drop", "every_epochs": 20, "factor": 0.5},
    "time_decay": 1e-6,
    "weight_decay": 1e-3,  # L2 of 5e-4 in Keras's terms
    "dropout": (0.3, 0.4, 0.5),
    "augmentation": {"flip": True, "rotation_degrees": 15.0, "shift_fraction": 0.1},
}

# The PyTorch system; "about 91 %".
TORCH_RESNET: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 64,
    "learning_rate": 0.01,
    "schedule": {"name": "constant"},
    "weight_decay": 0.0,
    "dropout": 0.1,
    "augmentation": {"flip": True, "rotation_degrees": 0.0, "shift_fraction": 0.0},
    "normalization": {"name": "fixed", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)},
    "approach": "end_to_end",
}

PUBLISHED = {
    "resnet20-sgd": Publication(0.9152, KERAS_RESNET),
    "resnet32-sgd": Publication(0.9253, KERAS_RESNET),
    "resnet44-sgd": Publication(0.9316, KERAS_RESNET),
    "resnet56-sgd": Publication(0.9321, KERAS_RESNET),
    "resnet110-sgd": Publication(0.9390, KERAS_RESNET),
    "resnet10-adam": Publication(0.91, TORCH_RESNET),
    "vgg16-sgd": Publication(0.9315, KERAS_VGG),
}


def publication(cell: Cell, meta: Meta) -> Publication | None:
    """What was published for a grid cell; None for a study, and for other images than CIFAR-10's."""
    if cell.study or set(meta.class_names) != set(CIFAR10_CLASSES):
        return None
    return PUBLISHED.get(f"{cell.architecture}-{cell.optimizer.name}")


def differing(cell: Cell, meta: Meta, published: Publication) -> list[str]:
    """How the data and recipe of `cell` differ from those of the published figure, as `epochs 20 of 250`."""
    texts = []
    if meta.source != "cifar10":
        texts.append(f"images of the source {meta.source}, such as JPEG copies")
    for split, count in NUM_IMAGES.items():
        if (own_count := meta.num_images.get(split, 0)) != count:
            texts.append(f"{own_count:,} of {count:,} {split} images")
    own = {"learning_rate": cell.optimizer.lr} | cell.optimizer.settings.model_dump()
    own |= cell.recipe.model_dump()
    for key, stated in published.settings.items():
        value, name = own[key], key.replace("_", " ")
        if isinstance(stated, dict):
            if value is None or any(value.get(part) != each for part, each in stated.items()):
                texts.append(f"other {name}")
        elif value != stated:
            texts.append(f"{name} {as_text(value)} {'of' if key == 'epochs' else 'for'} {as_text(stated)}")
    return texts


def as_text(value: Any) -> str:
    """A setting's value as a person reads it: `end to end`, `0.3, 0.4, 0.5`, `none`."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    return "none" if value is None else str(value).replace("_", " ")
