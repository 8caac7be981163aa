"""What two checkouts must have in common for one to train a cell for the other, and how it is checked."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
from importlib import metadata
from typing import Self

from pydantic import BaseModel
from ruamel.yaml import YAML

from resgrid.dvc.pipeline import Pipeline
from resgrid.errors import ResgridError

DATA_STAGES = ("download", "preprocess")  # the cells are trained on what the last of them makes


class Order(BaseModel, frozen=True):
    """Under what a cell is to be trained: by the same code, with the same packages, on the same data."""

    pipeline: str  # its folder in the repository
    commit: str
    versions: dict[str, str]  # by package, of those that pyproject.toml names
    data: str  # DVC's hash of data/processed
    device: str | None = None  # cpu, cuda or mps; None leaves it to the worker

    @classmethod
    def of(cls, pipeline: Pipeline, device: str | None) -> Self:
        """That of this checkout, whose data are up to date.

        Raises ResgridError if it differs from its commit.
        """
        commit, changed = _git_state(pipeline)
        if changed:
            raise ResgridError(
                f"{pipeline.root}: {_list(changed)} differ from the commit, so no worker can have them. "
                "Commit them, and bring the workers to that commit."
            )
        data = recorded_data(pipeline)
        assert data is not None, "the data stages have just been brought up to date"
        return cls(pipeline=pipeline.name, commit=commit, versions=installed(), data=data, device=device)

    @property
    def tag(self) -> str:
        """Of the flow runs under this order; with a cell's id it names one training."""
        content = json.dumps(self.model_dump(), sort_keys=True)  # PostgreSQL gives keys back in its own order
        return f"order-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def refusal(self, pipeline: Pipeline) -> str | None:
        """Why this checkout must not train under the order; None if it may."""
        commit, changed = _git_state(pipeline)
        if commit != self.commit:
            return f"it stands at commit {commit[:10]}, the grid at {self.commit[:10]}: `git checkout` that"
        if changed:
            return f"{_list(changed)} differ from the commit: `git checkout` or commit them everywhere"
        mine = installed()
        other = [
            f"{name} {mine.get(name, 'is missing')}, not {version}"
            for name, version in self.versions.items()
            if mine.get(name) != version
        ]
        if other:
            return f"it has {_list(other)}: `make install` brings the locked versions"
        return None


def recorded_data(pipeline: Pipeline) -> str | None:
    """DVC's hash of the processed data, by this checkout's dvc.lock."""
    try:
        lock = YAML(typ="safe").load(pipeline.folder / "dvc.lock")
        (out,) = lock["stages"][DATA_STAGES[-1]]["outs"]
        return str(out["md5"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def installed() -> dict[str, str]:
    """The versions of this package and of those that it needs, as far as they are installed."""
    asked = [line for line in metadata.requires("resgrid") or () if "extra ==" not in line]
    wanted = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in asked]
    found = {}
    for name in ("resgrid", *wanted):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
    return found


def host() -> str:
    """This machine, for people to read."""
    return socket.gethostname()


def _git_state(pipeline: Pipeline) -> tuple[str, list[str]]:
    """The commit, and the files that differ from it, as far as they can matter to a cell.

    DVC rewrites dvc.lock and .gitignore as it works; of files that git does not know, those of the source do.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=pipeline.root, capture_output=True, text=True, check=True
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        status = git("status", "--porcelain", "-z", "--no-renames")
    except (OSError, subprocess.CalledProcessError):
        raise ResgridError(f"{pipeline.root}: is in no git repository with a commit.") from None
    changed = []
    for line in filter(None, status.split("\0")):
        path = line[3:]
        is_own = path.rpartition("/")[2] in ("dvc.lock", ".gitignore")
        if not is_own and (not line.startswith("??") or path.startswith("src/")):
            changed.append(path)
    return commit, changed


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
