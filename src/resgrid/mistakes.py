"""What is wrong with a file of settings: pydantic's problems, each with its key's path in the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from resgrid.errors import suggest

MISSING = {"rates": "; add the line `rates: {factors: []}`, for no other learning rates"}  # new

Model = TypeVar("Model", bound=BaseModel)


class Check:
    """Validates values against models, and keeps a line `key.path: what is wrong (value)` a mistake."""

    def __init__(self, own_architectures: Sequence[str] = ()) -> None:
        self.own_architectures = own_architectures
        self.problems: list[str] = []

    def problem(self, key: str, what: str) -> None:
        key = key.rstrip(".")  # a whole mapping has the empty path in itself
        self.problems.append(f"{key}: {what}" if key else what)

    def __call__(
        self, model: type[Model], value: dict[str, Any], where: Callable[[str], str] = str
    ) -> Model | None:
        """`value` as a `model`, or None where it has mistakes; `where` gives the place of a path in it."""
        try:
            # Through JSON, because strict types then take a YAML list for a tuple and nothing else.
            return model.model_validate_json(
                json.dumps(value, default=str), strict=True, context=self.own_architectures
            )
        except ValidationError as error:
            for key, what in _explain(error.errors(), value):
                self.problem(where(key), what)
            return None


def _explain(problems: list[Any], raw: dict[str, Any]) -> list[tuple[str, str]]:
    """The key's path in `raw`, and what is wrong there, of each of pydantic's problems."""
    lines: list[tuple[str, str]] = []
    missing = [_locate(problem, raw)[0] for problem in problems if problem["type"] == "missing"]
    for problem in problems:
        key, value = _locate(problem, raw)
        parent, _, last = key.rpartition(".")
        match problem["type"]:
            case "missing":
                what = f"this key is missing{MISSING.get(key, '')}"
            case "extra_forbidden":
                beside = [name.rpartition(".")[2] for name in missing if name.rpartition(".")[0] == parent]
                what = f"unknown key{suggest(last, beside)} Check its spelling, or delete it"
            case "value_error":
                what = problem["msg"].removeprefix("Value error, ")
            case "union_tag_not_found":
                key, what = f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}", "this key is missing"
            case "union_tag_invalid":
                what = f"must be one of {problem['ctx']['expected_tags']} (it is {problem['ctx']['tag']!r})"
                key = f"{key}.{problem['ctx']['discriminator'].strip(chr(39))}"
            case _:
                what = f"{problem['msg'].replace('Input should be', 'must be')} (it is {shown(value)})"
        lines.append((key, what))
    return lines


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


def shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
