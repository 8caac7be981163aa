"""Draw ARCHITECTURE.md's picture anew from what imports what: `make picture`.

A box is a layer of the import contract in pyproject.toml, which `make check` enforces: its modules, and the
tools that they import. An arrow points to the nearest layers that it imports.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
TOOLS = ("prefect", "mlflow", "torch")  # DVC is used by its command line alone
PICTURE = re.compile(r"(?<=<!-- picture -->\n).*(?=<!-- /picture -->)", re.DOTALL)


def picture() -> str:
    """The boxes and arrows in Mermaid's language, which GitHub draws."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    outer, inner = (contract["layers"] for contract in linter["contracts"][:2])
    layers = [[name] for name in outer if name != "resgrid"] + [layer.split(" | ") for layer in inner]
    layer_of = {name: number for number, layer in enumerate(layers) for name in layer}

    graph = grimp.build_graph(*linter["root_packages"], include_external_packages=True)
    tools: list[set[str]] = [set() for _ in layers]
    below: list[set[int]] = [set() for _ in layers]
    for module in graph.modules:
        upper = _layer(module, layer_of)
        for imported in graph.find_modules_directly_imported_by(module) if upper is not None else ():
            lower = _layer(imported, layer_of)
            if imported in TOOLS:
                tools[upper].add(imported)
            elif lower is not None and lower > upper:
                below[upper].add(lower)

    lines = ["```mermaid", "flowchart TB"]
    for number, layer in enumerate(layers):
        names = " · ".join(name.removeprefix("resgrid.") for name in layer)
        uses = f"<br/><i>imports {', '.join(sorted(tools[number]))}</i>" if tools[number] else ""
        lines.append(f'    {number}["{names}{uses}"]')
    for upper, lowers in enumerate(below):
        further = {far for lower in lowers for far in _reached(lower, below)}
        lines += [f"    {upper} --> {lower}" for lower in sorted(lowers - further)]
    return "\n".join([*lines, "```", ""])


def _layer(module: str, layer_of: dict[str, int]) -> int | None:
    parts = module.split(".")
    return next((layer_of[name] for n in (2, 1) if (name := ".".join(parts[:n])) in layer_of), None)


def _reached(start: int, below: list[set[int]]) -> set[int]:
    return below[start] | {far for lower in below[start] for far in _reached(lower, below)}


if __name__ == "__main__":
    page = ROOT / "ARCHITECTURE.md"
    page.write_text(PICTURE.sub(lambda _: picture(), page.read_text(encoding="utf-8")), encoding="utf-8")
