"""PyTorch's weights, in whatever they are wrapped: a state dict, a checkpoint around one, a whole model."""

from __future__ import annotations

import pickletools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from resgrid.errors import ResgridError
from resgrid.filetype import first_bytes, unreadable
from resgrid.models import ARCHITECTURES, family_of
from resgrid.weights import WeightsInfo, check_finite, check_shapes, expected_shapes

SAVE = "torch.save(model.state_dict(), FILE)"


def read_torch(source: Path, info: WeightsInfo, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of `info`'s model, by our names, at any depth of `source`; raises as the import does."""
    sets = _weight_sets(_load(source))
    if key is not None:
        sets = {name: weights for name, weights in sets.items() if f"{name}.".startswith(f"{key}.")}
    if not sets:
        where = f" below --key {key}" if key else ""
        raise ResgridError(f"{source}: there is no tensor of weights{where}. Save them with {SAVE}.")
    fitting = _fitting(sets, info)
    if not fitting:
        _refuse(source, sets, info)
    # of several names of the same tensors the longest
    names = list({tuple(map(id, weights.values())): name for name, weights in fitting.items()}.values())
    tensors = fitting[names[0]]
    for name, tensor in tensors.items():
        is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not is_dense or not tensor.is_floating_point():
            raise ResgridError(f"{source}: {name} is no dense tensor of floats. Save weights with {SAVE}.")
    check_finite(source, tensors)
    if any(not torch.equal(fitting[each][name], tensors[name]) for each in names for name in tensors):
        raise ResgridError(
            f"{source}: it holds {len(names)} sets of weights for {info.architecture}, which differ: "
            f"{', '.join(names)}. Choose one with --key."
        )
    return tensors


class _StandIn:
    """What stands for every class and function that a checkpoint names: nothing of them is run.

    What it makes is a Counter, since torch fills those as dictionaries and lets them keep their state.
    """

    def __new__(cls, *arguments: object) -> Counter[Any]:  # type: ignore[misc]
        instance = Counter[Any]()
        instance.__setstate__ = partial(instance.__setitem__, "")  # type: ignore[attr-defined]
        return instance


def _load(source: Path) -> Any:
    try:
        if first_bytes(source)[8:9] == b"{":  # the header of safetensors
            return load_file(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols, and of pickletools on damaged names
            with torch.serialization.safe_globals([(_StandIn, name) for name in _globals(source)]):
                return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or broken pickle can end in any
        way_on = f"If it is whole and you trust it, load it where it was made, and save weights with {SAVE}."
        # torch's reason is behind its advice to run whatever the file asks for
        raise unreadable(source, "a PyTorch file", error.__context__ or error, way_on) from None


def _globals(source: Path) -> set[str]:
    """The names that the pickle in `source` asks for and torch does not know."""
    if first_bytes(source).startswith(b"PK"):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(str(source)))
    with source.open("rb") as file:  # before torch 1.6: magic number, version, system, content
        operations = [operation for _ in range(4) for operation in pickletools.genops(file)]
    names = (str(argument).replace(" ", ".") for code, argument, _ in operations if code.name == "GLOBAL")
    return {name.replace("__builtin__", "builtins") for name in names}


MAX_TENSORS = 50_000  # a ResNet-110 with its optimizer has 2,000
MAX_DEPTH = 40
# What wraps a module within a model, and where a module keeps its parts: neither is in a state dict's names.
_TRANSPARENT = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "",
                "_parameters", "_buffers", "_modules"}  # fmt: skip


def _tensors(
    value: Any, path: tuple[str, ...], seen: set[int], depth: int = 0
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor below `value`, whatever holds it, with the parts of its name; each holder once."""
    if isinstance(value, Tensor):
        yield path, value
    if id(value) in seen or depth > MAX_DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            parts = tuple(part for part in str(key).split(".") if part not in _TRANSPARENT)
            yield from _tensors(item, path + parts, seen, depth + 1)


def _weight_sets(content: Any) -> dict[str, dict[str, Tensor]]:
    """By each name, the tensors below it by the rest of their names; single numbers only count."""
    sets: dict[str, dict[str, Tensor]] = {}
    for path, tensor in islice(_tensors(content, (), set()), MAX_TENSORS):
        if tensor.numel() != 1:
            for depth in range(len(path)):
                sets.setdefault(".".join(path[:depth]), {})[".".join(path[depth:])] = tensor
    return sets


_CUSTOMARY = (  # names of the parts of PyTorch's ResNets, and ours
    (r"^conv1\.", "base.stem."), (r"^bn1\.", "base.norm."), (r"^layer", "base.stage"), (r"\.bn", ".norm"),
    (r"\.(?:shortcut|downsample)\.0\.", ".shortcut.conv."), (r"^(?:linear|fc)\.", "head.classifier."),
    (r"\.(?:shortcut|downsample)\.1\.", ".shortcut.norm."),
)  # fmt: skip


def _fitting(sets: dict[str, dict[str, Tensor]], info: WeightsInfo) -> dict[str, dict[str, Tensor]]:
    """Those that are weights of the model in `info`, by its names."""
    expected = expected_shapes(info.architecture, len(info.class_names))
    as_many = [(name, weights) for name, weights in sets.items() if len(weights) == len(expected)]
    renamed = {name: _rename(weights, info, expected) for name, weights in as_many}
    return {name: weights for name, weights in renamed.items() if _shapes(weights) == expected}


def _rename(
    tensors: dict[str, Tensor], info: WeightsInfo, expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The same tensors by our names, as far as they are known.

    Other names than ours are read for the wide ResNets alone: the customary ones, or any whose tensors are
    the same in the same order. Elsewhere order proves nothing: the twins that normalise before the ReLU or
    after it have the same shapes.
    """
    if family_of(info.architecture) in ("cifar_resnet", "vgg") or tensors.keys() == expected.keys():
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, ours in _CUSTOMARY:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    kinds, ours_kinds = ([name.rpartition(".")[2] for name in names] for names in (tensors, expected))
    in_order = kinds == ours_kinds and [*_shapes(tensors).values()] == [*expected.values()]
    if renamed.keys() != expected.keys() and in_order:
        return dict(zip(expected, tensors.values(), strict=True))
    return renamed


def _refuse(source: Path, sets: dict[str, dict[str, Tensor]], info: WeightsInfo) -> NoReturn:
    """Raises ResgridError, with the architecture that the weights are of, or what they lack of this one."""
    for other in ARCHITECTURES:
        if _fitting(sets, info.model_copy(update={"architecture": other})):
            raise ResgridError(
                f"{source}: its tensors are not those of {info.architecture} but of {other}: --model {other}."
            )
    expected = expected_shapes(info.architecture, len(info.class_names))
    renamed = [_shapes(_rename(weights, info, expected)) for weights in sets.values()]
    # the set with the most names in common, and the fewest beside them
    nearest = max(renamed, key=lambda shapes: (len(shapes.keys() & expected.keys()), -len(shapes)))
    check_shapes(source, nearest, info)
    raise AssertionError(source)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
