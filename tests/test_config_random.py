"""Hundreds of valid and of broken params.yaml files: the valid load, the others are refused with their key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resgrid.config import parse_params
from resgrid.errors import ResgridError
from resgrid.grid import expand, find_cell
from resgrid.models import ARCHITECTURES

OPTIMIZERS = ("sgd", "adam", "rmsprop", "adagrad", "adamw")
FEW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


def fractions(low: float = 0.0) -> st.SearchStrategy[float]:
    return st.floats(low, 0.99)


positive = st.floats(1e-9, 1e3)
seed = st.integers(0, 2**32 - 1)
triple = st.lists(st.floats(-5, 5), min_size=3, max_size=3)
data = st.one_of(
    st.just({"source": "cifar10"}),
    st.fixed_dictionaries(
        {"source": st.just("digits"), "test_fraction": st.floats(0.01, 0.99), "split_seed": seed}
    ),
    st.fixed_dictionaries(
        {
            "source": st.just("archive"),
            "location": st.text(min_size=1),
            "checksum": st.sampled_from(["md5:" + 32 * "a", "sha256:" + 64 * "0"]),
        }
    ),
)


@st.composite
def piecewise(draw: st.DrawFn) -> dict[str, Any]:
    boundaries = sorted(draw(st.sets(st.integers(1, 10**6), max_size=4)))
    num = len(boundaries) + 1
    factors = draw(st.lists(positive, min_size=num, max_size=num))
    return {"name": "piecewise", "boundaries": boundaries, "factors": factors}


schedule = st.one_of(
    st.just({"name": "constant"}),
    st.fixed_dictionaries(
        {"name": st.just("drop"), "every_epochs": st.integers(1, 500), "factor": st.floats(0.01, 1)}
    ),
    st.fixed_dictionaries({"name": st.just("cosine"), "final_factor": fractions()}),
    piecewise(),
)
warmup = st.fixed_dictionaries({"steps": st.integers(0, 1000), "factor": st.floats(0.01, 1)})


@st.composite
def recipes(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    rates = ARCHITECTURES[architecture].dropout_rates
    dropout: st.SearchStrategy[Any] = st.just(0.0)
    if rates == 1:
        dropout = fractions()
    elif rates == 3:
        dropout = st.lists(fractions(), min_size=3, max_size=3)
    return {
        "epochs": draw(st.integers(1, 500)),
        "batch_size": draw(st.integers(2, 4096)),
        "schedule": draw(schedule),
        "warmup": draw(warmup),
        "time_decay": draw(st.floats(0, 1)),
        "weight_decay": draw(st.floats(0, 1)),
        "decay_norm_and_bias": draw(st.booleans()),
        "dropout": draw(dropout),
        "augmentation": {
            "flip": draw(st.booleans()),
            "crop_padding": draw(st.integers(0, 16)),
            "rotation_degrees": draw(st.floats(0, 180)),
            "shift_fraction": draw(fractions()),
        },
        "normalization": draw(
            st.sampled_from([{"name": "scalar"}, {"name": "per_channel"}])
            | st.fixed_dictionaries(
                {"name": st.just("fixed"), "mean": triple, "std": st.lists(positive, min_size=3, max_size=3)}
            )
        ),
        "approach": draw(st.sampled_from(["end_to_end", "frozen_base"])),
        "initial_weights": {"name": "random"},
    }


SETTINGS = {
    "sgd": {"momentum": fractions(0.1), "nesterov": st.booleans()},
    "adam": {"betas": st.lists(fractions(), min_size=2, max_size=2), "eps": positive},
    "rmsprop": {"alpha": fractions(), "momentum": fractions(), "eps": positive},
    "adamw": {
        "betas": st.lists(fractions(), min_size=2, max_size=2),
        "eps": positive,
        "weight_decay": st.just(0.05),
    },
    "adagrad": {"lr_decay": st.just(0.0), "initial_accumulator_value": st.just(0.0), "eps": positive},
}


@st.composite
def whole(draw: st.DrawFn) -> dict[str, Any]:
    """A valid params.yaml, as it is read."""
    known = sorted(ARCHITECTURES)
    architectures = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    optimizers = draw(st.lists(st.sampled_from(OPTIMIZERS), min_size=1, unique=True))
    recipe = {name: draw(recipes(name)) for name in architectures}
    # Each setting stands in one of two places, the same for all architectures.
    shared = {name: draw(st.sets(st.sampled_from(sorted(SETTINGS[name])))) for name in optimizers}
    tuning = {
        architecture: {
            name: {"lr": draw(positive)}
            | {key: draw(values) for key, values in SETTINGS[name].items() if key not in shared[name]}
            for name in optimizers
        }
        for architecture in architectures
    }
    names = draw(st.sets(st.from_regex(r"[a-z0-9]+(-[a-z0-9]+)*", fullmatch=True), max_size=2))
    studies = {}
    for number, name in enumerate(sorted(names)):
        architecture, optimizer = draw(st.sampled_from(architectures)), draw(st.sampled_from(optimizers))
        own = draw(recipes(architecture)) | {"lr": draw(positive)}
        own |= {key: draw(values) for key, values in SETTINGS[optimizer].items()}
        changed = draw(st.sets(st.sampled_from(sorted(own))))
        studies[name] = {key: own[key] for key in sorted(changed)} | {
            "architecture": architecture,
            "optimizer": optimizer,
            "seed": 2**32 - 1 - number,
        }
    return {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,20}", fullmatch=True)),
        "data": draw(data),
        "preprocess": {
            "resize": draw(st.sampled_from(["stretch", "crop", "pad"])),
            "validation_fraction": draw(fractions()),
            "training_fraction": 1 - draw(fractions()),
            "seed": draw(seed),
        },
        "grid": {
            "architectures": architectures,
            "optimizers": draw(st.lists(st.sampled_from(optimizers), min_size=1, unique=True)),
            "seeds": draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True)),
        },
        "rates": {"factors": draw(st.lists(st.sampled_from([0.001, 0.3, 3, 10, 1000]), unique=True))},
        "recipes": recipe,
        "tuning": tuning,
        "optimizers": {
            name: {key: draw(SETTINGS[name][key]) for key in sorted(shared[name])} for name in optimizers
        },
        "studies": studies,
        "engine": {
            "precision": draw(st.sampled_from(["auto", "fp32", "bf16"])),
            "compile": draw(st.sampled_from(["auto", "always", "never"])),
            "scored_epochs": draw(st.sampled_from(["all", "last"])),
        },
    }


@settings(max_examples=150, **FEW)
@given(raw=whole())
def test_every_valid_configuration_loads_and_its_grid_expands(raw: dict[str, Any]) -> None:
    params = parse_params(raw)
    cells = expand(params)
    grid = raw["grid"]
    num = len(grid["architectures"]) * len(grid["optimizers"]) * len(grid["seeds"])
    num = num * (1 + len(raw["rates"]["factors"])) + len(raw["studies"])
    assert len(cells) == num == len({cell.digest for cell in cells})
    assert find_cell(params, cells[-1].id) == cells[-1]


def _mappings(node: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every mapping in it whose keys are fixed, with its path."""
    found = []
    if isinstance(node, dict):
        is_study = len(path) == 2 and path[0] == "studies"  # most of its keys may be missing
        if node and not is_study and path not in (("studies",), ("recipes",), ("tuning",), ("optimizers",)):
            found.append((path, node))
        for key, value in node.items():
            found += _mappings(value, (*path, key))
    return found


@st.composite
def broken(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """A configuration with one mistake, and the key that it was made at."""
    raw = json.loads(json.dumps(draw(whole())))  # no value shared by two keys
    path, node = draw(st.sampled_from(_mappings(raw)))
    key = draw(
        st.sampled_from([name for name in sorted(node) if name != "checksum"])
    )  # which may be left out
    match draw(st.sampled_from(["missing", "unknown", "type", "infinite"])):
        case "missing":
            del node[key]
            if path[:1] == ("tuning",) and len(path) == 3 and key != "lr":
                path = ("optimizers", path[2])  # where a setting is asked for that stands in neither place
        case "unknown":
            key = draw(st.sampled_from(["epoch", "Epochs", "x", "lr ", "__class__"]))
            node[key] = 1
        case "type":
            node[key] = draw(st.sampled_from(["1e-3", [[]], {"a": 1}, -1.5, "no such"]))
            if key in ("name", "location") and isinstance(node[key], str):
                node[key] = 7
        case "infinite":
            node[key] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    return raw, ".".join((*path, key))


@settings(max_examples=150, **FEW)
@given(case=broken())
def test_every_broken_configuration_is_refused_with_its_key(case: tuple[dict[str, Any], str]) -> None:
    raw, key = case
    with pytest.raises(ResgridError) as refused:
        parse_params(raw)
    assert key in str(refused.value)
