"""params.yaml as frozen typed models: parsed once, here, and nowhere else.

No field that changes a result has a default: its value stands in `params.yaml`, which DVC watches.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from resgrid.errors import ResgridError

Architecture = Literal[
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
    "resnet10", "resnet18", "resnet26",
    "vgg16",
]  # fmt: skip
Family = Literal["cifar_resnet", "wide_resnet", "vgg"]
OptimizerName = Literal["sgd", "adam", "rmsprop", "adagrad"]
Resize = Literal["stretch", "crop", "pad"]

FAMILIES: dict[Architecture, Family] = {
    "resnet20": "cifar_resnet",
    "resnet32": "cifar_resnet",
    "resnet44": "cifar_resnet",
    "resnet56": "cifar_resnet",
    "resnet110": "cifar_resnet",
    "resnet10": "wide_resnet",
    "resnet18": "wide_resnet",
    "resnet26": "wide_resnet",
    "vgg16": "vgg",
}


class Strict(BaseModel):
    """Frozen, no unknown keys, no conversion of types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Checksum = Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")]
Triple = tuple[float, float, float]


# --- data: where the images come from -------------------------------------------------------------


class Cifar10(Strict):
    """The official Python archive, from its own host or a mirror, checked by its MD5."""

    source: Literal["cifar10"]


class Archive(Strict):
    """An archive in the layout of CIFAR-10's Python version, at a path or a URL."""

    source: Literal["archive"]
    location: str
    checksum: Checksum


class ImageFolder(Strict):
    """`train/<class>/*` and `test/<class>/*` of PNG or JPEG: a folder, or a tar or zip of one."""

    source: Literal["image-folder"]
    location: str
    checksum: Checksum | None  # of an archive; a URL must have one, a folder has none


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


# --- optimizers: the keywords of torch.optim, without the learning rate ----------------------------


class Sgd(Strict):
    momentum: Fraction
    nesterov: bool

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adam(Strict):
    betas: tuple[Fraction, Fraction]
    eps: Positive


class RMSprop(Strict):
    alpha: Fraction
    momentum: Fraction
    eps: Positive


class Adagrad(Strict):
    lr_decay: Annotated[float, Field(ge=0)]
    initial_accumulator_value: Annotated[float, Field(ge=0)]
    eps: Positive


class Optimizers(Strict):
    sgd: Sgd
    adam: Adam
    rmsprop: RMSprop
    adagrad: Adagrad


class LearningRates(Strict):
    """The learning rate of one architecture with each optimizer."""

    sgd: Positive
    adam: Positive
    rmsprop: Positive
    adagrad: Positive


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
    """The first `steps` optimizer steps at `factor` times the scheduled rate."""

    steps: Count
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
    warmup: Warmup | None
    time_decay: Annotated[float, Field(ge=0)]  # rate / (1 + time_decay * step), as in Keras
    weight_decay: Annotated[float, Field(ge=0)]  # torch's: the gradient of weight_decay / 2 * |w|^2
    decay_norm_and_bias: bool  # False: only the kernels of convolutions and dense layers decay
    dropout: Fraction | tuple[Fraction, Fraction, Fraction]  # three for VGG-16: first, other, dense
    augmentation: Augmentation
    normalization: Normalization
    approach: Literal["end_to_end", "frozen_base"]
    initial_weights: InitialWeights


class Study(Recipe):
    """A cell of its own beside the grid: a whole recipe, in which one thing differs."""

    architecture: Architecture
    optimizer: OptimizerName
    seed: Seed
    lr: Positive


class Grid(Strict):
    """The cells are the product of the three lists."""

    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)]
    optimizers: Annotated[tuple[OptimizerName, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for key in ("architectures", "optimizers", "seeds"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise ValueError(f"{key} holds a value twice")
        return self


class Engine(Strict):
    """How a cell is computed, apart from its recipe; `auto` goes by the device and the cell's work."""

    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 autocast where the device is good at it
    compile: Literal["auto", "always", "never"]  # steps by torch.compile; auto: where that pays
    scored_epochs: Literal["all", "last"]  # after which of them the test and validation splits are scored


class Params(Strict):
    """The whole of params.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$")]  # the MLflow experiment
    data: Data
    preprocess: Preprocess
    grid: Grid
    recipes: dict[Architecture, Recipe]
    learning_rates: dict[Architecture, LearningRates]
    optimizers: Optimizers
    studies: dict[Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")], Study]
    engine: Engine

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        for architecture in self.grid.architectures:
            for section in ("recipes", "learning_rates"):
                if architecture not in getattr(self, section):
                    raise ValueError(f"{section}.{architecture} is missing, but the grid has {architecture}")
        for name, recipe in self.recipes.items():
            _check_recipe(f"recipes.{name}", name, recipe)
        for study_name, study in self.studies.items():
            _check_recipe(f"studies.{study_name}", study.architecture, study)
            if re.fullmatch(rf"({'|'.join(FAMILIES)})-({'|'.join(get_args(OptimizerName))})-\d+", study_name):
                raise ValueError(f"studies.{study_name}: that is the name of a cell; take another one")
        return self


def _check_recipe(key: str, architecture: Architecture, recipe: Recipe) -> None:
    family = FAMILIES[architecture]
    if family == "vgg" and not isinstance(recipe.dropout, tuple):
        raise ValueError(f"{key}.dropout: VGG-16 takes three rates, as in [0.3, 0.4, 0.5]")
    if family != "vgg" and isinstance(recipe.dropout, tuple):
        raise ValueError(f"{key}.dropout: {architecture} takes one rate, not three")
    if family == "cifar_resnet" and recipe.dropout != 0:
        raise ValueError(f"{key}.dropout: {architecture} has no dropout layer, so it must be 0.0")
    if recipe.initial_weights.name == "imagenet" and family != "vgg":
        raise ValueError(f"{key}.initial_weights: imagenet weights exist for vgg16 only")


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check `path`.

    Raises ResgridError: for a file that is missing or not YAML, and for every unknown key, missing
    key, wrong type and impossible value, each named with its path and value.
    """
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResgridError(
            f"{path}: no such file here ({path.absolute().parent}). Run this in a pipeline's folder, "
            "such as the project's root or examples/digits."
        ) from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ResgridError(f"{path}: cannot be read as YAML: {error}") from None
    return parse_params(raw, str(path))


def parse_params(raw: Any, origin: str = "params.yaml") -> Params:
    """Check what was read from `origin`; raises ResgridError as `load_params` does."""
    if not isinstance(raw, dict):
        raise ResgridError(f"{origin}: must be a mapping of keys to values, not {_shown(raw)}")
    try:
        # Through JSON, because strict types then take a YAML list for a tuple and nothing else.
        return Params.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        problems = error.errors()
    raise ResgridError("\n".join(f"{origin}: {line}" for line in _explain(problems, raw)))


def _explain(problems: list[Any], raw: dict[str, Any]) -> list[str]:
    """One line for each mistake: `key.path: what is wrong (value)`.

    A value that several keys share by a YAML alias is one mistake, named at the first of them.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        key, value = _locate(problem, raw)
        match problem["type"]:
            case "missing":
                what = "this key is missing"
            case "extra_forbidden":
                what = "unknown key; check its spelling, or delete it"
            case "value_error":
                what = problem["msg"].removeprefix("Value error, ")
            case "union_tag_not_found":
                key, what = f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}", "this key is missing"
            case "union_tag_invalid":
                what = f"must be one of {problem['ctx']['expected_tags']} (it is {problem['ctx']['tag']!r})"
                key = f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}"
            case "tuple_type" if any(_locate(other, raw)[0] == key for other in problems if other != problem):
                continue  # the other half of "a number or three", already said of the number
            case "too_short" if value:
                continue  # its items were refused, each with a line of its own
            case _:
                what = problem["msg"].replace("Input should be", "must be")
                if isinstance(value, str) and _is_number(value):
                    what += "; it is text: a number in YAML 1.2 has a dot, as in 1.0e-3, and no quotes"
                what += f" (it is {_shown(value)})"
        found.setdefault((key.rpartition(".")[2], what), []).append(key)
    return [
        f"{keys[0]}: {what}".removeprefix(": ")
        + (f" [the same at {len(keys) - 1} more, such as {keys[1]}]" if len(keys) > 1 else "")
        for (_, what), keys in found.items()
    ]


def _locate(problem: Any, raw: dict[str, Any]) -> tuple[str, Any]:
    """The key's path as it stands in the file, and its value, without pydantic's names of union members."""
    keys: list[str] = []
    node: Any = raw
    for depth, part in enumerate(problem["loc"]):
        missing = problem["type"] == "missing" and depth == len(problem["loc"]) - 1
        in_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if in_list or (isinstance(node, dict) and part in node):
            node = node[part]
        elif not missing:
            continue  # a tag such as `drop` in schedule.drop.factor, or the name of a type
        keys.append(str(part))
    return ".".join(keys), node


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
