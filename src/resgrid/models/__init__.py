"""The architectures: one entry each, one file a family, one builder for all of them.

An entry says all that the rest of the program knows of an architecture: what params.yaml may name, in which
order tables and legends have it, and whose depths are compared. To add one is to add an entry, and a module
of its family's name if there is none yet (docs/extending.md). Importing this package takes no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resgrid.errors import ResgridError

if TYPE_CHECKING:  # torch takes 2 s to import, which `resgrid cells` need not wait for
    from torch import nn

    from resgrid.models.classifier import Classifier

GROUP = "resgrid.architectures"  # of entry points, by which an installed package offers an architecture
FOLDER = Path("architectures")  # beside a params.yaml: those of its own


@dataclass(frozen=True)
class Architecture:
    """One architecture of this package.

    `family` is the module in this folder whose `build(blocks, num_classes, dropout)` makes it: base and head.
    """

    name: str
    family: str
    blocks: tuple[int, ...]  # units a stage, or convolutions a block
    gflop: float  # to train with one image, forward and backward; a multiplication and an addition are two
    dropout_rates: Literal[0, 1, 3] = 0  # how many its recipe gives


ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture("resnet20", "cifar_resnet", (3, 3, 3), 0.24),
        Architecture("resnet32", "cifar_resnet", (5, 5, 5), 0.41),
        Architecture("resnet44", "cifar_resnet", (7, 7, 7), 0.58),
        Architecture("resnet56", "cifar_resnet", (9, 9, 9), 0.75),
        Architecture("resnet110", "cifar_resnet", (18, 18, 18), 1.52),
        Architecture("resnet10", "wide_resnet", (1, 1, 1, 1), 1.52, dropout_rates=1),
        Architecture("resnet18", "wide_resnet", (2, 2, 2, 2), 3.33, dropout_rates=1),
        Architecture("resnet26", "wide_resnet", (3, 3, 3, 3), 5.14, dropout_rates=1),
        Architecture("vgg16", "vgg", (2, 2, 3, 3, 3), 1.88, dropout_rates=3),
        Architecture("resnet20v1", "cifar_resnet_v1", (3, 3, 3), 0.24),
    )
}


@cache
def installed() -> dict[str, metadata.EntryPoint]:
    """The architectures that other packages offer, by name; nothing of them is imported."""
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def family_of(architecture: str) -> str:
    """The family whose depths are compared; an architecture from elsewhere is one by itself."""
    entry = ARCHITECTURES.get(architecture)
    return entry.family if entry else architecture


def gflop_of(architecture: str) -> float | None:
    """GFLOP to train with one image; None for an architecture from elsewhere."""
    entry = ARCHITECTURES.get(architecture)
    return entry.gflop if entry else None


def dropout_rates(architecture: str) -> int:
    """How many rates of dropout its recipe gives: 0, 1 or 3; one from elsewhere takes one, which may be 0."""
    entry = ARCHITECTURES.get(architecture)
    return entry.dropout_rates if entry else 1


def place_of(architecture: str) -> int:
    """Its place in tables and legends: entries in their order, then all others."""
    return [*ARCHITECTURES, architecture].index(architecture)


def origin_of(architecture: str) -> str | None:
    """The package and its version, or the file, that an architecture from elsewhere comes from."""
    if file := own_file(architecture):
        return str(file)
    if architecture in ARCHITECTURES:
        return None
    package = installed()[architecture].dist
    return f"{package.name} {package.version}" if package else installed()[architecture].value


def own_file(architecture: str, pipeline: Path = Path()) -> Path | None:
    """The file of an architecture that belongs to a pipeline; None for one of a package."""
    if architecture in ARCHITECTURES or architecture in installed():
        return None
    return pipeline / FOLDER / f"{architecture}.py"


def build_model(
    architecture: str,
    num_classes: int,
    dropout: float | tuple[float, float, float] = 0.0,
    pipeline: Path = Path(),
) -> Classifier:
    """A new model, its weights drawn from torch's global generator.

    `dropout` is as in `Recipe.dropout`; one rate given to VGG-16 stands for all three of its own.
    An architecture that is not this package's is an installed one, or the file in the folder `pipeline`; its
    `build(num_classes, dropout)` returns base and head, whose initial weights stay as it draws them.
    Under `torch.device("meta")` the model has shapes and nothing else, and draws nothing.

    Raises ResgridError for an architecture that does not exist, or whose code fails.
    """
    from resgrid.models.classifier import Classifier, check, initialize

    if entry := ARCHITECTURES.get(architecture):
        family = import_module(f"resgrid.models.{entry.family}")
        model = Classifier(*family.build(entry.blocks, num_classes, dropout))
        initialize(model)
        return model
    origin, build = _from_elsewhere(architecture, pipeline)
    try:
        match build(num_classes, dropout):
            case (base, head):
                model = Classifier(base, head)
            case other:
                raise TypeError(f"it returns one {type(other).__name__}, where base and head are expected")
        check(model, num_classes)
    except Exception as error:  # whatever the code of somebody else raises
        raise ResgridError(f"{origin}: build({num_classes}, {dropout}): {_describe(error)}") from error
    return model


def _from_elsewhere(
    architecture: str, pipeline: Path
) -> tuple[str, Callable[[int, Any], tuple[nn.Module, nn.Module]]]:
    """Where an architecture comes from, and its function `build`."""
    file = own_file(architecture, pipeline)
    origin = str(file) if file else f"the entry point {installed()[architecture].value}"
    if file and not file.is_file():
        raise ResgridError(
            f"this package has no {architecture}, and there is no {file}. Known are "
            f"{', '.join([*ARCHITECTURES, *installed()])}."
        )
    try:
        if file is None:
            return origin, installed()[architecture].load()
        spec = importlib.util.spec_from_file_location(f"{FOLDER}.{architecture}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return origin, module.build
    except Exception as error:
        raise ResgridError(f"{origin}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
