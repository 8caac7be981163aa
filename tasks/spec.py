"""What two checkouts must have in common for one to train a cell for the other: commit, versions and data.

The digest of commit and versions names the queues by which a coordinator and its workers meet.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from typing import Self

from pydantic import BaseModel

from resgrid.dvc.pipeline import Pipeline
from resgrid.errors import ResgridError
from resgrid.project import read_yaml

DATA_STAGES = ("download", "preprocess")  # the cells are trained on what the last of them makes
DEVICES = ("cpu", "cuda", "mps")
QUEUE = re.compile(rf"[0-9a-f]{{16}}(-({'|'.join(DEVICES)}))?")  # the name of any checkout's queue


class RunSpec(BaseModel, frozen=True):
    """Under what a cell is to be trained: by this code, with these packages, on these data."""

    pipeline: str  # its folder in the repository
    commit: str
    digest: str  # of commit and versions: see `checkout`
    data: str  # DVC's hash of data/processed
    device: str | None = None  # one of DEVICES; None leaves it to the worker

    @classmethod
    def of(cls, pipeline: Pipeline, device: str | None) -> Self:
        """The spec of this checkout, whose data are up to date; raises ResgridError for changed files."""
        commit, digest = checkout(pipeline)
        data = recorded_data(pipeline)
        assert data is not None, "the data stages have just been brought up to date"
        return cls(pipeline=pipeline.name, commit=commit, digest=digest, data=data, device=device)

    @property
    def tag(self) -> str:
        """Of the flow runs under this spec; with a cell's id it names one training."""
        return f"spec-{_digest(self.model_dump())}"

    @property
    def queue(self) -> str:
        """Of a pool's queues, the one whose workers have this checkout and device."""
        return f"{self.digest}-{self.device}" if self.device else self.digest


def checkout(pipeline: Pipeline) -> tuple[str, str]:
    """The commit of a checkout, and the digest of it and the versions of the packages.

    Raises ResgridError if files differ from the commit that can matter to a cell: DVC rewrites dvc.lock and
    .gitignore as it works, and of files that git does not know those of the source do.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(pipeline.root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        lines = git("status", "--porcelain", "-z", "--no-renames").split("\0")
    except (OSError, subprocess.CalledProcessError):
        raise ResgridError(f"{pipeline.root}: is in no git repository with a commit.") from None
    counting = [line[3:] for line in lines if not line.startswith("??") or line.startswith("?? src/")]
    changed = [path for path in counting if path.rpartition("/")[2] not in ("", "dvc.lock", ".gitignore")]
    if changed:
        raise ResgridError(
            f"{pipeline.root}: {', '.join(changed[:3])}{' and others' if changed[3:] else ''} differ from "
            "the commit, so no other checkout has them. Commit them and bring the workers to that commit, "
            "or `git checkout` them."
        )
    return commit, _digest({"commit": commit, "versions": installed()})


def difference(pipeline: Pipeline, commit: str, digest: str) -> str | None:
    """Why the checkout is not the one of `digest`, which is at `commit`; None if it is."""
    try:
        here = checkout(pipeline)
    except ResgridError as error:
        return str(error)
    if here == (commit, digest):
        return None
    what = "its packages have other versions: `make install`"
    if here[0] != commit:
        what = f"it is at commit {here[0][:10]}, they are for {commit[:10]}"
    return f"{pipeline.root}: this clone is not the one that the cells were placed for: {what}."


def recorded_data(pipeline: Pipeline) -> str | None:
    """DVC's hash of the processed data, by this checkout's dvc.lock."""
    with suppress(ResgridError, KeyError, TypeError, ValueError):
        (out,) = read_yaml(pipeline.folder / "dvc.lock")["stages"][DATA_STAGES[-1]]["outs"]
        return str(out["md5"])
    return None


def installed() -> dict[str, str]:
    """The versions of this package and of those that it needs, as far as they are installed."""
    needed = [line for line in metadata.requires("resgrid") or () if "extra ==" not in line]
    versions = {}
    for name in ("resgrid", *(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed)):
        with suppress(metadata.PackageNotFoundError):  # of another platform
            versions[name] = metadata.version(name)
    return versions


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True)  # PostgreSQL returns keys in an order of its own
    return hashlib.sha256(text.encode()).hexdigest()[:16]
