"""What is wrong with params.yaml: pydantic's words, each with its key's path and its line in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from resgrid.errors import suggest

NEW = {"rates": "; add the line `rates: {factors: []}`, for no other learning rates"}  # older files lack it

Model = TypeVar("Model", bound=BaseModel)


class Check:
    """Validates values against models, and keeps the path of each mistake's key and what is wrong there."""

    def __init__(self, own_architectures: Sequence[str] = ()) -> None:
        self.own_architectures = own_architectures
        self.problems: list[tuple[str, str]] = []

    def problem(self, key: str, what: str) -> None:
        self.problems.append((key.rstrip("."), what))  # a whole mapping has the empty path in itself

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
            problems = [(each, _locate(each, value)) for each in error.errors()]
            missing = [key for problem, key in problems if problem["type"] == "missing"]
            for problem, key in problems:
                self.problem(where(key), _what(problem, key, missing))
            return None


def report(problems: Sequence[tuple[str, str]], origin: str, path: Path | None) -> str:
    """`params.yaml:43: KEY: WHAT`, a line a mistake; without the file's `path` no lines are known."""
    root = None if path is None else YAML().load(path)  # once more, with its lines: 0.1 s
    lines = (f"{origin}{_line(root, key)}: {f'{key}: ' if key else ''}{what}" for key, what in problems)
    return "\n".join(dict.fromkeys(lines))


def _line(node: Any, path: str) -> str:
    """`:43`, where `path`, or what is nearest above it, stands in the file; empty without a file."""
    line = ""
    for part in path.split("."):
        key = int(part) if isinstance(node, list) and part.isdecimal() else part
        lines: Any = getattr(node, "lc", None)
        try:
            place, node = (lines.item if isinstance(node, list) else lines.key)(key), node[key]
        except (AttributeError, KeyError, IndexError, TypeError):  # no such key, or nothing below it
            break
        line = f":{place[0] + 1}"
    return line


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
    return f"{problem['msg']} (it is {short_json(value)}){suggest(str(value), known).removesuffix('.')}"


def _locate(problem: Any, raw: dict[str, Any]) -> str:
    """The key's path as it stands in the file, without pydantic's names of union members."""
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
    if problem["type"].startswith("union_tag"):  # it is the key that names the kind
        keys.append(problem["ctx"]["discriminator"].strip("'"))
    return ".".join(keys)


def short_json(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
