"""Every key of a params.yaml broken in every way: each file is refused with the key of its mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from resgrid.config import parse_params
from resgrid.errors import ResgridError

EXAMPLES = Path(__file__).parents[1] / "examples"
OPEN = [("studies",), ("recipes",), ("tuning",), ("optimizers",)]  # whose keys are names
WRONG = ["1e-3", [[]], {"a": 1}, -1.5, "no such", float("nan"), -float("inf")]


def mappings(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every mapping in it whose keys are fixed, with its path; a study may leave out most of its own."""
    if isinstance(node, dict):
        if node and path not in OPEN and not (len(path) == 2 and path[0] == "studies"):
            yield path, node
        for key, value in node.items():
            yield from mappings(value, (*path, key))


def broken(raw: dict[str, Any]) -> Iterator[str]:
    """Break `raw` in one place after another; yields the key to be named, and mends what it has broken."""
    for path, node in list(mappings(raw)):
        for key in [name for name in node if name not in ("checksum", "own_architectures")]:  # optional
            value = node.pop(key)
            # A setting may stand in `optimizers` as well, which is where a missing one is asked for.
            is_setting = path[:1] == ("tuning",) and len(path) == 3 and key != "lr"
            yield ".".join((*(("optimizers", path[2]) if is_setting else path), key))
            for wrong in WRONG:
                node[key] = 7 if key in ("name", "location") and isinstance(wrong, str) else wrong
                yield ".".join((*path, key))
            node[key] = value
        for unknown in ("epoch", "Epochs", "x", "lr ", "__class__"):
            node[unknown] = 1
            yield ".".join((*path, unknown))
            del node[unknown]


@pytest.mark.parametrize("example", ["digits", "optimizers"])
def test_every_broken_configuration_is_refused_with_its_key(example: str) -> None:
    raw = YAML(typ="safe").load(EXAMPLES / example / "params.yaml")
    raw = json.loads(json.dumps(raw))  # no value shared by two keys
    count = 0
    for count, key in enumerate(broken(raw), start=1):  # noqa: B007
        with pytest.raises(ResgridError) as refused:
            parse_params(raw)
        assert key in str(refused.value)
    assert count > 500
    parse_params(raw)  # all is mended
