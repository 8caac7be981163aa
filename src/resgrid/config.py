"""params.yaml as frozen typed models: parsed once, here, and nowhere else.

No field that changes a result has a default: its value stands in `params.yaml`, which DVC watches. The file
has no YAML aliases and no null, which DVC's own commands cannot edit; so every architecture has a whole
recipe, and a study names only what it changes. A mistake is reported in pydantic's words, with its key's
path, its line in the file and the nearest known name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from resgrid.errors import ResgridError, suggest
from resgrid.models import ARCHITECTURES, dropout_rates, installed
from resgrid.optimizers import OPTIMIZERS
from resgrid.project import read_yaml
from resgrid.schema import Checksum, Count, Fraction, NotNegative, Positive, Seed, Strict, Triple


def _known(name: str, info: ValidationInfo) -> str:
    """One of the packages' architectures, or one that the file lists as its own."""
    own = getattr(info.data.get("grid"), "own_architectures", ())
    names = [*ARCHITECTURES, *(() if name in ARCHITECTURES else installed()), *own]
    if name not in names:
        raise ValueError(
            f"must be {', '.join(map(repr, names[:-1]))} or {names[-1]!r}, or listed in "
            f"grid.own_architectures (it is {name!r}){suggest(name, names).removesuffix('.')}"
        )
    return name


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("holds a value twice")
    return values


def _as_named(factor: Any) -> Any:
    """A factor as its stage's name has it: DVC would call 3.0 `x3.0`."""
    if type(factor) in (int, float) and not (0.001 <= factor <= 1000 and str(factor) == f"{factor:g}" != "1"):
        raise ValueError(
            "a factor is a number from 0.001 to 1000, not 1 (that is the grid's own cell), and written as "
            f"0.3 or 3, not as 3.0 (it is {_short_json(factor)})"
        )
    return factor


Architecture = Annotated[str, AfterValidator(_known)]
OwnArchitecture = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]  # its file is architectures/<name>.py
Distinct = AfterValidator(_distinct)
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


class Grid(Strict):
    """The cells are the product of the three lists; those of a pipeline's own architectures come last."""

    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1), Distinct]
    optimizers: Annotated[tuple[OptimizerName, ...], Field(min_length=1), Distinct]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), Distinct]
    own_architectures: Annotated[tuple[OwnArchitecture, ...], Distinct] = ()  # their stages are train-own@…


class Rates(Strict):
    """Every cell of the grid at its learning rate times each of `factors` as well.

    The same factors for every optimizer give each the same number of tries. Studies have none.
    """

    factors: Annotated[tuple[Annotated[float, BeforeValidator(_as_named)], ...], Distinct]


class Engine(Strict):
    """How a cell is computed, apart from its recipe; `auto` goes by the device and the cell's work."""

    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 autocast where the device is good at it
    compile: Literal["auto", "always", "never"]  # steps by torch.compile; auto: where that pays
    scored_epochs: Literal["all", "last"]  # after which of them the test and validation splits are scored


class _Whole(Strict):
    """What stands in the file as it is used."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$")]  # the MLflow experiment
    data: Data
    preprocess: Preprocess
    grid: Grid
    rates: Rates
    engine: Engine
    recipes: dict[Architecture, Recipe]  # how an architecture is trained


class Params(_Whole):
    """The whole of params.yaml, with every number where it is used."""

    optimizers: dict[str, dict[OptimizerName, Optimizer]]  # by architecture: settings and tuning together
    studies: dict[str, Study]


class _Study(Strict):
    """What every study says; the rest of its keys are changes."""

    model_config = ConfigDict(extra="allow")

    architecture: str
    optimizer: OptimizerName
    seed: Seed


class _File(_Whole):
    """The file as it is written, before its parts are put together."""

    tuning: dict[Architecture, dict[OptimizerName, dict[str, Any]]]  # its rate, and settings of its own
    optimizers: dict[OptimizerName, dict[str, Any]]  # settings that are the same for all architectures
    studies: dict[Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")], _Study]


# --- from the file to the models --------------------------------------------------------------------

Problems = list[tuple[str, str]]  # each the path of a key, and what is wrong there
Place = Callable[[str], str]  # the path in the file of a key of a model
Model = TypeVar("Model", bound=BaseModel)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check `path`.

    Raises ResgridError: for a file that is missing or not YAML, and for every unknown key, missing
    key, wrong type and impossible value, each named with its line, path and value.
    """
    return parse_params(read_params_file(path), str(path), path)


def read_params_file(path: Path) -> Any:
    """What a params.yaml holds, unchecked; raises ResgridError for one that is missing or no YAML."""
    if not path.exists():
        raise ResgridError(
            f"{path}: no such file here ({path.absolute().parent}). Run this in a pipeline's folder, "
            "such as the project's root or examples/digits."
        )
    return read_yaml(path)


def parse_params(raw: Any, origin: str = "params.yaml", path: Path | None = None) -> Params:
    """Check what was read from `origin`; raises ResgridError as `load_params` does, with `path`'s lines."""
    problems: Problems = []
    file = _checked(_File, raw, str, problems)
    params = _put_together(file, problems) if file else None
    if params is None or problems:
        root = YAML().compose(path) if path else None  # once more, with its lines: 0.1 s
        lines = (f"{origin}{_line(root, key)}: {key}{': ' * bool(key)}{what}" for key, what in problems)
        raise ResgridError("\n".join(dict.fromkeys(lines)))
    return params


def _put_together(file: _File, problems: Problems) -> Params:
    """Optimizers from `optimizers` and `tuning`, studies from what they change."""
    grid = file.grid
    for name in set(grid.own_architectures) & {*ARCHITECTURES, *installed()}:
        problems.append(("grid.own_architectures", f"{name} is the name of a package's network"))
    for key, used, present in (
        ("recipes", {*grid.architectures, *grid.own_architectures}, file.recipes),
        ("optimizers", set(grid.optimizers), file.optimizers),
    ):
        missing = used - present.keys()
        problems += [(f"{key}.{name}", f"is missing, but the grid has {name}") for name in missing]
    optimizers: dict[str, dict[OptimizerName, Optimizer]] = {}
    for architecture, recipe in file.recipes.items():
        _check_recipe(architecture, recipe, f"recipes.{architecture}.".__add__, problems)
        tuned = {name: _tuned(architecture, name, file, problems) for name in file.optimizers}
        optimizers[architecture] = {name: each for name, each in tuned.items() if each}
    studies = {name: _study(name, file, optimizers, problems) for name in file.studies}
    return Params.model_construct(
        **{key: value for key, value in file if key in _Whole.model_fields},
        optimizers=optimizers,
        studies={name: study for name, study in studies.items() if study},
    )


def _tuned(architecture: str, name: str, file: _File, problems: Problems) -> Optimizer | None:
    """An optimizer with the settings that it has for all architectures and those that it has for this one."""
    place, shared = f"tuning.{architecture}.{name}", file.optimizers[name]
    own = file.tuning.get(architecture, {}).get(name)
    if own is None:
        problems.append((place, "is missing: every optimizer has a learning rate for every architecture"))
        return None
    for key in own.keys() & shared.keys():
        problems.append((f"{place}.{key}", f"stands in optimizers.{name} too; keep one of them"))

    def where(key: str) -> str:
        is_own = key.partition(".")[0] in {*own, "lr"}  # of the first beta as well
        return f"{place}.{key}" if is_own else f"optimizers.{name}.{key}"

    return _optimizer(name, shared | own, where, problems)


def _study(
    name: str, file: _File, optimizers: Mapping[str, Mapping[str, Optimizer]], problems: Problems
) -> Study | None:
    head, where = file.studies[name], f"studies.{name}.".__add__
    architecture, changes = head.architecture, head.model_extra or {}
    architectures, names = "|".join([*ARCHITECTURES, *file.recipes]), "|".join(OPTIMIZERS)
    if re.fullmatch(rf"({architectures})-({names})-\d+(-x\d+)?", name):
        problems.append((f"studies.{name}", "that is the name of a cell; take another one"))
    if architecture in file.grid.own_architectures:
        what = f"{architecture} is an architecture of your own, whose file DVC does not watch for a study"
        problems.append((where("architecture"), what))
    if architecture not in file.recipes:
        what = f"there is no recipes.{architecture}{suggest(architecture, file.recipes).removesuffix('.')}"
        problems.append((where("architecture"), what))
    if head.optimizer not in file.optimizers:
        problems.append((where("optimizer"), f"there is no optimizers.{head.optimizer}"))
    base = optimizers.get(architecture, {}).get(head.optimizer)
    if base is None:
        return None
    recipe = file.recipes[architecture].model_dump(mode="json")
    settings = {"lr": base.lr, **base.settings.model_dump(mode="json")}
    for key in changes.keys() - recipe.keys() - settings.keys():
        problems.append((where(key), f"unknown key{suggest(key, [*recipe, *settings])}"))
    recipe, settings = (
        {key: changes.get(key, value) for key, value in each.items()} for each in (recipe, settings)
    )
    changed = _checked(Recipe, recipe, where, problems)
    optimizer = _optimizer(head.optimizer, settings, where, problems)
    if changed is None or optimizer is None:
        return None
    _check_recipe(architecture, changed, where, problems)
    return Study(
        architecture=architecture, optimizer=optimizer, seed=head.seed, recipe=changed, changes=changes
    )


def _optimizer(name: str, values: Any, where: Place, problems: Problems) -> Optimizer | None:
    settings = OPTIMIZERS[name].settings
    checked = _checked(create_model(name, __base__=settings, lr=(Positive, ...)), values, where, problems)
    own = checked.model_dump() if checked else {}
    return Optimizer(name=name, lr=own.pop("lr"), settings=settings(**own)) if own else None


def _check_recipe(architecture: str, recipe: Recipe, where: Place, problems: Problems) -> None:
    rates = dropout_rates(architecture)
    if isinstance(recipe.dropout, tuple) != (rates == 3):
        what = "three rates, as in [0.3, 0.4, 0.5]" if rates == 3 else "one rate, not three"
        problems.append((where("dropout"), f"{architecture} takes {what}"))
    elif rates == 0 and recipe.dropout != 0:
        problems.append((where("dropout"), f"{architecture} has no dropout layer, so it must be 0.0"))
    if recipe.initial_weights.name == "imagenet" and architecture != "vgg16":
        problems.append((where("initial_weights"), "imagenet weights exist for vgg16 only"))


# --- what is wrong, and where -----------------------------------------------------------------------

NEW = {"rates": "; add the line `rates: {factors: []}`, for no other learning rates"}  # older files lack it


def _checked(model: type[Model], value: Any, where: Place, problems: Problems) -> Model | None:
    """`value` as a `model`, or None where it has mistakes, which are added to `problems`."""
    try:
        # Through JSON, because strict types then take a YAML list for a tuple and nothing else.
        return model.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        each = [(_locate(problem, value), problem) for problem in error.errors()]
        missing = [key for key, problem in each if problem["type"] == "missing"]
        problems += [(where(key).rstrip("."), _what(problem, key, missing)) for key, problem in each]
        return None


def _line(node: Node | None, path: str) -> str:
    """`:43`, where `path`, or what is nearest above it, stands in the file; empty without a file."""
    line = ""
    for part in path.split("."):
        if isinstance(node, MappingNode):
            children = {str(key.value): (key, value) for key, value in node.value}
        else:
            values = node.value if isinstance(node, SequenceNode) else ()
            children = {str(place): (value, value) for place, value in enumerate(values)}
        if part not in children:
            break
        key, node = children[part]
        line = f":{key.start_mark.line + 1}"
    return line


def _locate(problem: Any, value: Any) -> str:
    """The key's path as it stands in the file, without pydantic's names of union members."""
    keys = []
    for part in problem["loc"]:
        try:
            value = value[part]
        except (LookupError, TypeError):  # a tag such as `drop` in schedule.drop.factor, or a type's name
            continue
        keys.append(str(part))
    if problem["type"] == "missing":
        keys.append(str(problem["loc"][-1]))
    if problem["type"].startswith("union_tag"):  # it is the key that names the kind
        keys.append(problem["ctx"]["discriminator"].strip("'"))
    return ".".join(keys)


def _what(problem: Any, key: str, missing: Sequence[str]) -> str:
    """What is wrong at `key`: pydantic's words but for the two commonest mistakes, with the nearest names."""
    parent, _, last = key.rpartition(".")
    context = problem.get("ctx", {})
    match problem["type"]:
        case "missing" | "union_tag_not_found":
            return f"this key is missing{NEW.get(key, '')}"
        case "extra_forbidden":
            beside = [name.rpartition(".")[2] for name in missing if name.rpartition(".")[0] == parent]
            return f"unknown key{suggest(last, beside)} Check its spelling, or delete it"
        case "value_error":
            return str(context["error"])
    value = context.get("tag", problem["input"])
    known = re.findall("'([^']+)'", context.get("expected_tags", "") + context.get("expected", ""))
    return f"{problem['msg']} (it is {_short_json(value)}){suggest(str(value), known).removesuffix('.')}"


def _short_json(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
