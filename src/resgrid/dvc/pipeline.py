"""A pipeline's folder in a DVC repository, and the command that calls DVC."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from resgrid import stage_record
from resgrid.errors import ResgridError
from resgrid.project import nearest
from resgrid.stage_record import Record

CODE = re.compile(r"^ +- ['\"]?(.*\bresgrid/.+\.py)['\"]?$", re.MULTILINE)  # in a dvc.yaml
# -P: or Python would look for modules in the pipeline's folder first
DVC_COMMAND = (sys.executable, "-P", "-m", "dvc", "--wait-for-lock")


@dataclass(frozen=True)
class Pipeline:
    """A folder with a dvc.yaml, and where this project keeps its own state about it."""

    folder: Path
    root: Path  # of the DVC repository

    @classmethod
    def find(cls, folder: str | Path) -> Pipeline:
        """The pipeline in `folder`.

        Raises ResgridError if it has no dvc.yaml, or one that lists code of another version, or is in no DVC
        repository.
        """
        path = Path(folder).resolve()
        if not (path / "dvc.yaml").is_file():
            raise ResgridError(
                f"{path}: there is no dvc.yaml here. Name a pipeline's folder, such as the project's root or "
                "examples/digits; `git checkout dvc.yaml` brings back one that is gone."
            )
        code = CODE.findall((path / "dvc.yaml").read_text(encoding="utf-8"))
        if missing := [file for file in code if not (path / file).is_file()]:
            raise ResgridError(
                f"{path / 'dvc.yaml'}: lists {missing[0]}, which this version of ResGrid has not. "
                f"`resgrid init {path}` writes it anew, and keeps params.yaml, data and results."
            )
        if root := nearest(path, ".dvc"):
            return cls(path, root)
        raise ResgridError(f"{path}: is in no DVC repository. Clone the project with git, or run `dvc init`.")

    @property
    def name(self) -> str:
        """Its folder as seen from the repository's root; `.` for the root itself."""
        return self.folder.relative_to(self.root).as_posix()

    def log(self, stage: str) -> Path:
        return self.root / ".resgrid/logs" / self.name / f"{stage}.log"

    def state(self, name: str) -> Path:
        return stage_record.state_file(self.root, self.folder, name)

    def lock(self, name: str) -> FileLock:
        """A lock of this pipeline's, which ends with the process that has it."""
        path = self.root / ".resgrid/locks" / self.name / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def record(self, stage: str) -> Record | None:
        return stage_record.read_record(self.root, self.folder, stage)

    def records(self) -> list[Record]:
        return stage_record.read_records(self.root, self.folder)


def dvc(folder: Path, *arguments: str) -> str:
    """What `dvc` prints with these arguments in `folder`; raises ResgridError, with its reason."""
    command = [*DVC_COMMAND, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr + done.stdout).strip()[-1000:] or "no reason given"
        raise ResgridError(f"{folder}: `dvc {' '.join(arguments)}` failed: {reason}")
    return done.stdout
