"""An environment of torch and the five packages that training needs beside it, and nothing else."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

SIX = ("torch", "numpy", "pydantic", "ruamel.yaml", "safetensors", "pillow")


def link(folder: Path) -> Path:
    """Links in `folder` to the files of the six and of what they cannot do without; for PYTHONPATH.

    `python -S` sees these and the standard library alone.
    """
    folder.mkdir()
    for name in _closure():
        distribution = importlib.metadata.distribution(name)
        for top in {
            file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            target = Path(str(distribution.locate_file(top)))
            if (folder / top).is_symlink() and target.is_dir():  # a namespace of several: ruamel, nvidia
                continue
            (folder / top).symlink_to(target)
    return folder


def _closure() -> list[str]:
    """The six with all that they require, by their own metadata."""
    names, waiting = [], list(SIX)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in names:
            continue
        try:
            required = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:  # of another system or Python
            continue
        names.append(name)
        waiting += [
            match[0] for text in required if "extra ==" not in text and (match := re.match(r"[\w.-]+", text))
        ]
    return names
