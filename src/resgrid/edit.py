"""Edit params.yaml as DVC's own commands do, keeping comments and layout: what `resgrid set` does."""

from __future__ import annotations

import copy
import difflib
import io
from collections.abc import Iterable, Iterator, MutableMapping
from fnmatch import fnmatchcase
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from resgrid.config import parse_params
from resgrid.errors import ResgridError, suggest


def rewritten(text: str) -> str:
    """`text` in the layout of DVC's writer, which leaves it as it is from then on."""
    return _dump(_yaml().load(text))


def assign(text: str, assignments: Iterable[str], origin: str = "params.yaml") -> str:
    """`text` with each `PATTERN=VALUE` carried out; a pattern such as `recipes.*.epochs` may match many keys.

    Raises ResgridError for an assignment that matches no key, and for a result that is no valid params.yaml.
    """
    params = _yaml().load(text)
    for assignment in assignments:
        pattern, equals, written = assignment.partition("=")
        if not equals or not pattern:
            raise ResgridError(f"{assignment!r}: write KEY=VALUE, as in 'recipes.*.epochs=10'.")
        try:
            value = YAML(typ="safe").load(written)
        except YAMLError as error:
            raise ResgridError(f"{assignment!r}: the value is no YAML: {error}") from None
        places, parts = list(_places(params)), pattern.split(".")
        matches = [
            (path[-1], mapping)
            for path, mapping in places
            if len(path) == len(parts) and all(map(fnmatchcase, path, parts))
        ]
        if not matches:
            known = [".".join(path) for path, _ in places]
            raise ResgridError(f"{origin}: no key matches {pattern!r}{suggest(pattern, known)}")
        for key, mapping in matches:
            mapping[key] = copy.deepcopy(value)  # one object in two places would be written as an alias
    new = _dump(params)
    parse_params(YAML(typ="safe").load(new), origin)
    return new


def changed_lines(old: str, new: str) -> list[str]:
    """`12: -    epochs: 250` and `12: +    epochs: 10`: what differs, by the line in the new text."""
    lines: list[str] = []
    number = 0
    for line in difflib.ndiff(old.splitlines(), new.splitlines()):
        number += line[0] in " +"
        if line[0] in "-+":
            lines.append(f"{number + (line[0] == '-'):4}: {line[0]} {line[2:]}")
    return lines


def _places(
    node: MutableMapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], MutableMapping[str, Any]]]:
    """Each key below `node`: its path, and the mapping that has it."""
    for key, value in node.items():
        yield (*above, str(key)), node
        if isinstance(value, MutableMapping):
            yield from _places(value, (*above, str(key)))


def _yaml() -> YAML:
    """With the settings of DVC's writer."""
    yaml = YAML()
    yaml.default_flow_style = False
    return yaml


def _dump(params: Any) -> str:
    text = io.StringIO()
    _yaml().dump(params, text)
    return text.getvalue()
