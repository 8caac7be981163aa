"""PyTorch's checkpoints, in whatever they are wrapped."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from resgrid.config import NORMALIZATIONS
from resgrid.convert import OF_KERAS, described
from resgrid.errors import ResgridError
from resgrid.filetype import SAFETENSORS, TORCH, identify, refuse
from resgrid.models import ARCHITECTURES, family_of
from resgrid.schema import Triple
from resgrid.weights import WeightsInfo, check_shapes, expected_shapes, filled, save_weights


def import_torch(
    source: Path,
    architecture: str,
    out: Path,
    class_names: Sequence[str] | None = None,
    normalization: tuple[Triple, Triple] = NORMALIZATIONS["kuangliu"],
    key: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> WeightsInfo:
    """Convert the one set of weights in `source` that is the architecture's, wherever it is nested there.

    `source` is what `torch.save` wrote (a state dict, a checkpoint around one, a whole model) or
    safetensors. Taken are this project's own names, and for the wide ResNets also the customary
    ones (`conv1`, `layer1.0.bn1`, `linear`) and any others whose tensors are the same in the same order.
    Elsewhere order proves nothing: the twins that normalise before the ReLU or after it have the same
    shapes. `key` picks among several sets; `say` gets a sentence about which one was taken.

    Raises ResgridError: for a file that is missing, cut, of another kind or of another model, and for several
    sets of weights that differ.
    """
    info = described(architecture, class_names, normalization)
    content, foreign = _read_torch(source)
    sets = _weight_sets(content)
    if key is not None:
        sets = {name: weights for name, weights in sets.items() if f"{name}.".startswith(f"{key}.")}
        if not sets:
            raise ResgridError(f"{source}: there is no tensor below --key {key}.")
    if not sets:
        holds = f", only what {', '.join(sorted(foreign)[:3])} makes" if foreign else ""
        raise ResgridError(
            f"{source}: there is no tensor of weights in it{holds}. "
            "Save the weights with torch.save(model.state_dict(), FILE)."
        )
    fitting = _fitting(sets, info)
    if not fitting:
        _refuse(source, sets, info)
    # less the sets that only hold another one
    names = [
        name
        for name in fitting
        if not any(each != name and each.startswith(f"{name}.".lstrip(".")) for each in fitting)
    ]
    tensors = fitting[names[0]]
    for each, tensor in tensors.items():
        if not _is_plain(tensor):
            raise ResgridError(
                f"{source}: {each!r} is no dense tensor of floats, so this is no state dict of weights. "
                "Save it with torch.save(model.state_dict(), FILE)."
            )
    if any(
        not torch.equal(tensor, fitting[name][each]) for name in names for each, tensor in tensors.items()
    ):
        raise ResgridError(
            f"{source}: it holds {len(names)} sets of weights for {architecture}, which differ: "
            f"{', '.join(names)}. Choose one with --key."
        )
    if names[0]:
        say(f"Taken: the {len(tensors)} tensors below {names[0]}.")
    save_weights(out, filled(info, tensors), info)
    return info


def _fitting(sets: dict[str, dict[str, Tensor]], info: WeightsInfo) -> dict[str, dict[str, Tensor]]:
    """Those that are weights of the model in `info`, by its names."""
    expected = expected_shapes(info.architecture, len(info.class_names))
    as_many = {name: weights for name, weights in sets.items() if len(weights) == len(expected)}
    renamed = {name: _rename(weights, info, expected) for name, weights in as_many.items()}
    return {name: weights for name, weights in renamed.items() if _shapes(weights) == expected}


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


class _Foreign:
    """What stands for an object of any class that a checkpoint names: nothing of that class is run."""

    state: object = None

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _ForeignDict(_Foreign):
    """The same for a class that is filled as a dictionary; a plain one is all that torch will fill."""

    def __new__(cls, *arguments: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _ForeignList(_Foreign):
    """The same for a class that is filled as a list."""

    def __new__(cls, *arguments: object) -> list[Any]:  # type: ignore[misc]
        return []


def _read_torch(source: Path) -> tuple[Any, list[str]]:
    """The content of `source`, and the classes of the objects that are `_Foreign` in it."""
    kind = identify(source)
    if kind is SAFETENSORS:
        try:
            return load_file(source), []
        except (OSError, SafetensorError) as error:
            raise ResgridError(f"{source}: the safetensors file is cut or damaged ({error}).") from None
    if kind is not TORCH:
        raise refuse(source, kind, "a PyTorch file")
    stand_ins: dict[str, Any] = {}
    try:
        if zipfile.is_zipfile(source):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(source))
            stand_ins = {name: type(name, (_Foreign,), {}) for name in names}
        while True:
            try:
                with torch.serialization.safe_globals([(each, name) for name, each in stand_ins.items()]):
                    return torch.load(source, map_location="cpu", weights_only=True), list(stand_ins)
            except pickle.UnpicklingError as error:
                if not _adapted(stand_ins, str(error)):
                    raise
    except Exception as error:  # a hostile or broken pickle can end in any exception
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = re.search(r"WeightsUnpickler error:\s*(.{1,100})|^(.{1,100})", str(error))
        what = f"it asks for {asked[1]}" if asked else reason[0] if reason else type(error).__name__
        raise ResgridError(
            f"{source}: no tensors can be read from this PyTorch file ({what}). If it is whole and you trust "
            "it, load it where it was made, and save the weights with torch.save(model.state_dict(), FILE)."
        ) from None


def _adapted(stand_ins: dict[str, Any], error: str) -> bool:
    """Whether another attempt may go further: with one more class, or with one that is filled as it must be.

    Before torch 1.6 the names in a file could not be listed.
    """
    if asked := re.search(r"Unsupported global: GLOBAL (\S+)", error):
        names = {asked[1], f"builtins.{asked[1]}"}  # that module is left out of the message
        fresh = {name: type(name, (_Foreign,), {}) for name in names - stand_ins.keys()}
        stand_ins.update(fresh)
        return bool(fresh)
    filled = re.search(rf"Can only (\w+) .*<class '{re.escape(__name__)}\.(.+?)'>", error)
    if not filled:
        return False
    stand_ins[filled[2]] = _ForeignDict if filled[1].startswith("SETITEM") else _ForeignList
    return True


MAX_TENSORS = 50_000  # a ResNet-110 with its optimizer has 2,000
MAX_DEPTH = 40
# What wraps a module within a model, and where a module keeps its parts: neither is in a state dict's names.
_TRANSPARENT = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
    "_parameters", "_buffers", "_modules",
}  # fmt: skip


def _tensors(
    value: Any, path: tuple[str, ...], seen: set[int], depth: int = 0
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor below `value`, whatever holds it, with the parts of its name; each holder once."""
    if isinstance(value, Tensor):
        yield path, value
    if id(value) in seen or depth > MAX_DEPTH:
        return
    seen.add(id(value))
    inner = value.state if isinstance(value, _Foreign) else value
    if isinstance(inner, list | tuple):
        inner = dict(enumerate(inner))
    if isinstance(inner, Mapping):
        for key, item in inner.items():
            parts = tuple(part for part in str(key).split(".") if part not in _TRANSPARENT)
            yield from _tensors(item, path + parts, seen, depth + 1)


def _weight_sets(content: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors below each name in `content` by the rest of their names, less what only counts.

    A counter is a single number: `num_batches_tracked`, `n_averaged`, `total_ops`.
    """
    sets: dict[str, dict[str, Tensor]] = {}
    for path, tensor in islice(_tensors(content, (), set()), MAX_TENSORS):
        if tensor.numel() == 1:
            continue
        for depth in range(len(path)):
            sets.setdefault(".".join(path[:depth]), {})[".".join(path[depth:])] = tensor
    return sets


def _is_plain(value: Tensor) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
        and value.is_floating_point()
    )


# The customary names of the parts of PyTorch's ResNets, and ours.
_CUSTOMARY = (
    (r"^conv1\.", "base.stem."),
    (r"^bn1\.", "base.norm."),
    (r"^layer", "base.stage"),
    (r"\.bn", ".norm"),
    (r"\.(?:shortcut|downsample)\.0\.", ".shortcut.conv."),
    (r"\.(?:shortcut|downsample)\.1\.", ".shortcut.norm."),
    (r"^(?:linear|fc)\.", "head.classifier."),
)


def _our_name(name: str) -> str:
    for pattern, ours in _CUSTOMARY:
        name = re.sub(pattern, ours, name)
    return name


def _rename(
    tensors: dict[str, Tensor], info: WeightsInfo, expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The same tensors by our names, as far as these can be told."""
    if family_of(info.architecture) in OF_KERAS or tensors.keys() == expected.keys():
        return tensors
    renamed = {_our_name(name): tensor for name, tensor in tensors.items()}
    if renamed.keys() == expected.keys():
        return renamed
    theirs = [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in tensors.items()]
    if theirs == [(name.rpartition(".")[2], shape) for name, shape in expected.items()]:
        return dict(zip(expected, tensors.values(), strict=True))
    return renamed
