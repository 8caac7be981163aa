"""params.yaml as frozen typed models: parsed once, here, and nowhere else.

No field that changes a result has a default: its value stands in `params.yaml`, which DVC watches. The file
has no YAML aliases and no null, which DVC's own commands cannot edit; so every architecture has a whole
recipe, and a study names only what it changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from resgrid.errors import ResgridError, suggest
from resgrid.mistakes import Check, report, short_json
from resgrid.models import ARCHITECTURES, dropout_rates, installed
from resgrid.optimizers import OPTIMIZERS
from resgrid.project import read_yaml
from resgrid.schema import Checksum, Count, Fraction, NotNegative, Positive, Seed, Strict, Triple


def _known(name: str, info: ValidationInfo) -> str:
    """One of the packages' architectures, or one that the file lists as its own."""
    names = [*ARCHITECTURES, *(() if name in ARCHITECTURES else installed()), *(info.context or ())]
    if name not in names:
        raise ValueError(
            f"must be {', '.join(map(repr, names[:-1]))} or {names[-1]!r}, or listed in "
            f"grid.own_architectures (it is {name!r}){suggest(name, names).removesuffix('.')}"
        )
    return name


def _file_name(name: str) -> str:
    """A name that a file of Python's and a stage of DVC's can both have."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"must be a lower-case letter, then such letters, digits and _ (it is {name!r})")
    return name


Architecture = Annotated[str, AfterValidator(_known)]
OwnArchitecture = Annotated[str, AfterValidator(_file_name)]  # its file is architectures/<name>.py
if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
Resize = Literal["stretch", "crop", "pad"]


# --- data: where the images come from -------------------------------------------------------------


class Cifar10(Strict):
    """The official Python archive, from its own host or a mirror, checked by its MD5."""

    source: Literal["cifar10"]


class Archive(Strict):
    """CIFAR-10 or CIFAR-100 in the Python or the binary version, or other images in one of these forms."""

    source: Literal["archive"]
    location: str  # of an archive, or of the folder that is in one
    checksum: Checksum | None = None  # of an archive; a URL must have one, a folder has none


class ImageFolder(Strict):
    """`train/<class>/*` and `test/<class>/*`, or `<class>/*`, of pictures: a folder, a tar or a zip."""

    source: Literal["image-folder"]
    location: str
    checksum: Checksum | None = None  # of an archive; a URL must have one, a folder has none
    test_fraction: Fraction  # of each class, drawn with preprocess.seed; 0: the images have a test split
    on_broken: Literal["refuse", "skip"]  # what cannot be read or is in two classes: list it, or leave it out


class Digits(Strict):
    """The handwritten digits that ship with scikit-learn: 1,797 images of 8x8 in 10 classes."""

    source: Literal["digits"]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Seed


Data = Annotated[Cifar10 | Archive | ImageFolder | Digits, Field(discriminator="source")]


class Preprocess(Strict):
    """From raw images to arrays of 32x32x3."""

    resize: Resize  # how another shape becomes a square
    validation_fraction: Fraction  # of the training images, drawn within each class; 0: no split
    training_fraction: Annotated[float, Field(gt=0, le=1)]  # of the others, drawn likewise; 1: all of them
    seed: Seed  # of both draws


class Optimizer(Strict):
    """One optimizer as a cell uses it; `settings` are the other keywords of torch's class."""

    name: OptimizerName
    lr: Positive
    settings: SerializeAsAny[Strict]


# --- recipes: everything else that a training run is made of ---------------------------------------


class Constant(Strict):
    name: Literal["constant"]


class Drop(Strict):
    """Times `factor` after every `every_epochs` epochs."""

    name: Literal["drop"]
    every_epochs: Count
    factor: Annotated[float, Field(gt=0, le=1)]


class Piecewise(Strict):
    """`factors[i]` from step `boundaries[i - 1]` on: He et al. 2015, section 4.2."""

    name: Literal["piecewise"]
    boundaries: tuple[Count, ...]  # in optimizer steps
    factors: tuple[Positive, ...]

    @model_validator(mode="after")
    def _one_factor_an_interval(self) -> Self:
        if len(self.factors) != len(self.boundaries) + 1:
            raise ValueError("factors needs one value more than boundaries")
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError("boundaries must rise")
        return self


class Cosine(Strict):
    """Half a cosine from 1 to `final_factor`, by step: Loshchilov & Hutter 2017, equation 5."""

    name: Literal["cosine"]
    final_factor: Fraction


Schedule = Annotated[Constant | Drop | Piecewise | Cosine, Field(discriminator="name")]


class Warmup(Strict):
    """The first `steps` optimizer steps at `factor` times the scheduled rate; none at 0 steps."""

    steps: Annotated[int, Field(ge=0)]
    factor: Annotated[float, Field(gt=0, le=1)]


class Augmentation(Strict):
    """What is drawn afresh for each image in each epoch."""

    flip: bool  # left to right, with probability 1/2
    crop_padding: Annotated[int, Field(ge=0, le=16)]  # pixels of black on each side, then 32x32 cut out
    rotation_degrees: Annotated[float, Field(ge=0, le=180)]  # uniform within plus or minus this
    shift_fraction: Fraction  # of the side, uniform within plus or minus this, in both directions


class ScalarStatistics(Strict):
    """One mean and one deviation over all pixels and channels of the training images."""

    name: Literal["scalar"]


class ChannelStatistics(Strict):
    """A mean and a deviation for each channel of the training images."""

    name: Literal["per_channel"]


class FixedStatistics(Strict):
    """Given figures, on the 0-1 scale."""

    name: Literal["fixed"]
    mean: Triple
    std: tuple[Positive, Positive, Positive]


Normalization = Annotated[ScalarStatistics | ChannelStatistics | FixedStatistics, Field(discriminator="name")]


class RandomWeights(Strict):
    """He's initialisation, drawn with the cell's seed."""

    name: Literal["random"]


class ImageNetWeights(Strict):
    """torchvision's VGG-16, trained on ImageNet: for the convolutions of `vgg16` alone."""

    name: Literal["imagenet"]


class WeightsFile(Strict):
    """A weights file of this project; the checksum makes a changed file a changed param."""

    name: Literal["file"]
    path: str
    checksum: Checksum


class MlflowWeights(Strict):
    """The weights of a model in MLflow, as `models:/NAME/VERSION` or `runs:/RUN_ID`."""

    name: Literal["mlflow"]
    uri: Annotated[str, Field(pattern=r"^(models|runs):/.+")]

    @model_validator(mode="after")
    def _stays_the_same(self) -> Self:
        if "@" in self.uri:
            raise ValueError("uri: an alias moves, unseen by DVC; name the version, as in models:/NAME/3")
        return self


InitialWeights = Annotated[
    RandomWeights | ImageNetWeights | WeightsFile | MlflowWeights, Field(discriminator="name")
]


class Recipe(Strict):
    """How one architecture is trained, whatever the optimizer."""

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)]
    schedule: Schedule
    warmup: Warmup
    time_decay: NotNegative  # rate / (1 + time_decay * step), as in Keras
    weight_decay: NotNegative  # torch's: the gradient of weight_decay / 2 * |w|^2; AdamW has its own
    decay_norm_and_bias: bool  # False: only the kernels of convolutions and dense layers decay
    dropout: Fraction | tuple[Fraction, Fraction, Fraction]  # three for VGG-16: first, other, dense
    augmentation: Augmentation
    normalization: Normalization
    approach: Literal["end_to_end", "frozen_base"]
    initial_weights: InitialWeights


class Study(Strict):
    """A cell of its own beside the grid: that of an architecture and an optimizer, but for `changes`."""

    architecture: str
    optimizer: Optimizer
    seed: Seed
    recipe: Recipe
    changes: dict[str, Any]  # what the study says differs, by its keys: `lr`, a setting, or one of a recipe


class _Lists(Strict):
    """Lists of which none holds a value twice."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for key, values in self:
            if len(set(values)) != len(values):
                raise ValueError(f"{key} holds a value twice")
        return self


class Grid(_Lists):
    """The cells are the product of the three lists; those of a pipeline's own architectures come last."""

    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)]
    optimizers: Annotated[tuple[OptimizerName, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    own_architectures: tuple[OwnArchitecture, ...] = ()  # their stages are train-own@…


def _as_named(factor: Any) -> Any:
    """A factor as its stage's name has it: DVC would call 3.0 `x3.0`."""
    if type(factor) in (int, float) and not (0.001 <= factor <= 1000 and str(factor) == f"{factor:g}" != "1"):
        raise ValueError(
            "a factor is a number from 0.001 to 1000, not 1 (that is the grid's own cell), and written as "
            f"0.3 or 3, not as 3.0 (it is {short_json(factor)})"
        )
    return factor


class Rates(_Lists):
    """Every cell of the grid at its learning rate times each of `factors` as well.

    The same factors for every optimizer give each the same number of tries. Studies have none.
    """

    factors: tuple[Annotated[float, BeforeValidator(_as_named)], ...]


class Engine(Strict):
    """How a cell is computed, apart from its recipe; `auto` goes by the device and the cell's work."""

    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 autocast where the device is good at it
    compile: Literal["auto", "always", "never"]  # steps by torch.compile; auto: where that pays
    scored_epochs: Literal["all", "last"]  # after which of them the test and validation splits are scored


class _Whole(Strict):
    """What stands in the file as it is used."""

    name: str  # the MLflow experiment
    data: Data
    preprocess: Preprocess
    grid: Grid
    rates: Rates
    engine: Engine


class Params(_Whole):
    """The whole of params.yaml, with every number where it is used."""

    recipes: dict[str, Recipe]
    optimizers: dict[str, dict[OptimizerName, Optimizer]]  # settings and tuning together
    studies: dict[str, Study]


class _StudyHead(Strict):
    """What every study says; the rest of its keys are changes."""

    model_config = ConfigDict(extra="allow")

    architecture: Architecture
    optimizer: OptimizerName
    seed: Seed


class _File(_Whole):
    """The file as it is written, before its parts are put together."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$")]
    recipes: dict[Architecture, Recipe]  # how an architecture is trained
    tuning: dict[Architecture, dict[OptimizerName, dict[str, Any]]]  # its rate, and settings of its own
    optimizers: dict[OptimizerName, dict[str, Any]]  # settings that are the same for all architectures
    studies: dict[Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")], _StudyHead]


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check `path`.

    Raises ResgridError: for a file that is missing or not YAML, and for every unknown key, missing
    key, wrong type and impossible value, each named with its line, path and value.
    """
    return parse_params(read_params_file(path), str(path), path)


def read_params_file(path: Path) -> dict[str, Any]:
    """What a params.yaml holds, unchecked; raises ResgridError for one that is missing or no mapping."""
    if not path.exists():
        raise ResgridError(
            f"{path}: no such file here ({path.absolute().parent}). Run this in a pipeline's folder, "
            "such as the project's root or examples/digits."
        )
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ResgridError(f"{path}: must be a mapping of keys to values, not {short_json(raw)}")
    return raw


def parse_params(raw: Any, origin: str = "params.yaml", path: Path | None = None) -> Params:
    """Check what was read from `origin`; raises ResgridError as `load_params` does, with `path`'s lines."""
    match raw:
        case {"grid": {"own_architectures": list(own)}}:
            check = Check([name for name in own if isinstance(name, str)])
        case _:
            check = Check()
    file = check(_File, raw)
    params = _put_together(file, check) if file else None
    if check.problems or params is None:
        raise ResgridError(report(check.problems, origin, path))
    return params


def _put_together(file: _File, check: Check) -> Params:
    """Optimizers from `optimizers` and `tuning`, studies from what they change; problems go to `check`."""
    grid = file.grid
    for name in set(grid.own_architectures) & {*grid.architectures, *ARCHITECTURES, *installed()}:
        check.problem("grid.own_architectures", f"{name} is in grid.architectures too, or a package's")
    for name in {*grid.architectures, *grid.own_architectures} - file.recipes.keys():
        check.problem(f"recipes.{name}", f"is missing, but the grid has {name}")
    for name in set(grid.optimizers) - file.optimizers.keys():
        check.problem(f"optimizers.{name}", f"is missing, but the grid has {name}")
    optimizers: dict[str, dict[OptimizerName, Optimizer]] = {name: {} for name in file.recipes}
    for architecture, recipe in file.recipes.items():
        _check_recipe(architecture, recipe, f"recipes.{architecture}.".__add__, check)
        for name, shared in file.optimizers.items():
            place = f"tuning.{architecture}.{name}"
            tuned = file.tuning.get(architecture, {}).get(name)
            if tuned is None:
                check.problem(place, "is missing: every optimizer has a learning rate for every architecture")
                continue
            for key in tuned.keys() & shared.keys():
                check.problem(f"{place}.{key}", f"stands in optimizers.{name} too; keep one of them")

            def where(key: str, place: str = place, name: str = name, own: Any = tuned) -> str:
                is_tuned = key.partition(".")[0] in {*own, "lr"}  # of the first beta as well
                return f"{place}.{key}" if is_tuned else f"optimizers.{name}.{key}"

            if optimizer := _optimizer(name, shared | tuned, where, check):
                optimizers[architecture][name] = optimizer
    studies = {
        name: study
        for name, head in file.studies.items()
        if (study := _study(name, head, file, optimizers, check))
    }
    same = {key: value for key, value in file if key in Params.model_fields}
    return Params(**same | {"optimizers": optimizers, "studies": studies})


def _study(
    name: str,
    head: _StudyHead,
    file: _File,
    optimizers: Mapping[str, Mapping[OptimizerName, Optimizer]],
    check: Check,
) -> Study | None:
    architecture, changes, where = head.architecture, head.model_extra or {}, f"studies.{name}.".__add__
    architectures, names = "|".join([*ARCHITECTURES, *file.recipes]), "|".join(OPTIMIZERS)
    if re.fullmatch(rf"({architectures})-({names})-\d+(-x\d+)?", name):
        check.problem(where(""), "that is the name of a cell; take another one")
    if architecture in file.grid.own_architectures:
        what = f"{architecture} is an architecture of your own, whose file DVC does not watch for a study"
        check.problem(where("architecture"), what)
    if architecture not in file.recipes:
        check.problem(where("architecture"), f"there is no recipes.{architecture}")
    if head.optimizer not in file.optimizers:
        check.problem(where("optimizer"), f"there is no optimizers.{head.optimizer}")
    tuned = optimizers.get(architecture, {}).get(head.optimizer)
    if tuned is None:
        return None
    recipe = file.recipes[architecture].model_dump(mode="json")
    settings = {"lr": tuned.lr, **tuned.settings.model_dump(mode="json")}
    for key in changes.keys() - recipe.keys() - settings.keys():
        check.problem(where(key), f"unknown key{suggest(key, [*recipe, *settings])}")
    whole = check(Recipe, recipe | {key: changes[key] for key in recipe if key in changes}, where)
    own = {key: changes[key] for key in settings if key in changes}
    optimizer = _optimizer(head.optimizer, settings | own, where, check)
    if whole is None or optimizer is None:
        return None
    _check_recipe(architecture, whole, where, check)
    return Study(
        architecture=architecture, optimizer=optimizer, seed=head.seed, recipe=whole, changes=changes
    )


class _Rate(Strict):
    lr: Positive


def _optimizer(
    name: OptimizerName, values: dict[str, Any], where: Callable[[str], str], check: Check
) -> Optimizer | None:
    rate = check(_Rate, {key: values[key] for key in values if key == "lr"}, where)
    own = {key: values[key] for key in values if key != "lr"}
    settings = check(OPTIMIZERS[name].settings, own, where)
    return Optimizer(name=name, lr=rate.lr, settings=settings) if rate and settings else None


def _check_recipe(architecture: str, recipe: Recipe, where: Callable[[str], str], check: Check) -> None:
    rates = dropout_rates(architecture)
    if rates == 3 and not isinstance(recipe.dropout, tuple):
        check.problem(where("dropout"), "VGG-16 takes three rates, as in [0.3, 0.4, 0.5]")
    if rates != 3 and isinstance(recipe.dropout, tuple):
        check.problem(where("dropout"), f"{architecture} takes one rate, not three")
    elif rates == 0 and recipe.dropout != 0:
        check.problem(where("dropout"), f"{architecture} has no dropout layer, so it must be 0.0")
    if recipe.initial_weights.name == "imagenet" and architecture != "vgg16":
        check.problem(where("initial_weights"), "imagenet weights exist for vgg16 only")
