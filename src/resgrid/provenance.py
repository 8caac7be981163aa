"""What a result was made by: git's commit, the code that can change weights, and DVC's experiment."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from resgrid.errors import ResgridError
from resgrid.project import git_state, nearest, read_yaml

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
CODE = ("data/batches.py", "models", "optimizers.py", "training")  # as a cell's dependencies in dvc.yaml


def made_by() -> dict[str, str | bool | None]:
    """What timing.json says of a result's origin: the commit, and the Prefect flow run, if one trains it."""
    state = git_state()
    if state.problem:
        log.warning("the result names no commit, for git refuses to read this repository: %s", state.problem)
    flow_run = os.environ.get("RESGRID_FLOW_RUN_ID")
    return {"commit": state.commit, "dirty": state.dirty, "flow_run_id": flow_run}


def code_digest(package: Path = PACKAGE, own: Path | None = None) -> str:
    """`sha256:…` of the source files of `package` that can change a cell's weights.

    `own` is the file of the cell's architecture, where that is a person's own.
    """
    sha256 = hashlib.sha256()
    paths = [path for name in CODE for path in _sources(package / name)]
    files = {path: path.relative_to(package).as_posix() for path in paths}
    if own and own.is_file():
        files[own] = own.name
    for path, name in files.items():
        content = path.read_bytes()
        sha256.update(f"{name} {len(content)}\n".encode() + content)
    return f"sha256:{sha256.hexdigest()}"


def _sources(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


def package_of(pipeline: Path) -> Path:
    """The folder of code that a pipeline's dvc.yaml names, or this package where it names none."""
    try:
        stages = read_yaml(pipeline / "dvc.yaml")["stages"]
        [batches] = [dep for dep in stages["train"]["deps"] if str(dep).endswith(f"/{CODE[0]}")]
    except (ResgridError, KeyError, TypeError, ValueError):
        return PACKAGE
    return (pipeline / str(batches)).resolve().parents[1]


def check_code(pipeline: Path) -> None:
    """Raises ResgridError where this process runs other code than DVC records for the pipeline.

    An experiment's copy of the project holds the code as it was queued, and `resgrid` is the one that is
    installed.
    """
    package = package_of(pipeline)
    if package != PACKAGE and package.is_dir() and code_digest(package) != code_digest():
        raise ResgridError(
            f"the code in {package} is not what would train: that is the installed one, {PACKAGE}. DVC would "
            "record a result under code that did not make it. Queue the experiment again, or install the "
            "package from that folder."
        )


@dataclass(frozen=True)
class Experiment:
    """A run of `dvc exp run --temp` or `--queue`, in a copy of the project below its .dvc/tmp/exps."""

    name: str
    project: Path


def experiment() -> Experiment | None:
    """That of the current folder, as DVC's environment says; None in the project itself."""
    root = os.environ.get("DVC_ROOT")
    if not root or not Path.cwd().resolve().is_relative_to(Path(root, ".dvc/tmp/exps").resolve()):
        return None
    return Experiment(os.environ.get("DVC_EXP_NAME", "experiment"), Path(root).resolve())


def check_links(pipeline: Path) -> None:
    """Raises ResgridError for a folder of outputs that is a link: in git, DVC records nothing behind it."""
    folder = pipeline.resolve()
    links = [folder / name for name in ("data", "runs", "reports") if (folder / name).is_symlink()]
    if links and nearest(folder, ".git"):
        raise ResgridError(
            f"{links[0]}: is a link to {links[0].readlink()}, and in a git repository DVC records nothing "
            "behind a link. Make it a folder, and put DVC's cache on the other disk: `dvc config --local "
            "cache.dir FOLDER` and `dvc config --local cache.type symlink`."
        )


def check_lock(pipeline: Path) -> None:
    """Raises ResgridError in an experiment of which DVC would lose results.

    In a shallow clone it records no experiment, and ends well all the same. It makes the copy from what git
    knows, and the copy's dvc.lock takes the place of the project's: one whose commit has none would lose the
    other cells'.
    """
    made = experiment()
    if made is None:
        return
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"],
        cwd=made.project, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if shallow.stdout.strip() == "true":
        raise ResgridError(
            f"{made.project}: a shallow clone, in which DVC records no experiment. `git fetch --unshallow` "
            "brings the rest of the history; then run the experiment again."
        )
    committed = subprocess.run(
        ["git", "cat-file", "-e", "HEAD:./dvc.lock"], cwd=pipeline, capture_output=True, check=False
    )
    if committed.returncode:
        raise ResgridError(
            "dvc.lock is in no commit, so applying this experiment would lose what it records of the other "
            "cells. Commit it first: `git add dvc.lock && git commit -m 'Record results'`; then run the "
            "experiment again. (Where there is none yet, `dvc repro` makes it.)"
        )
