"""A pipeline's folder for a person's own images: what `resgrid init` makes.

Its `dvc.yaml` has the stages of this project's own, with the paths of the code as seen from there; its
`params.yaml` a small grid by the number and the size of the images.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

import resgrid
from resgrid.config import Resize, load_params
from resgrid.data import archives
from resgrid.data.cifar import Cifar
from resgrid.data.dataset import SIDE
from resgrid.data.detect import open_source
from resgrid.data.fetch import digest
from resgrid.data.pictures import large_pictures, open_picture
from resgrid.data.sources import SPLITS, ImageFolder, some
from resgrid.dvc.pipeline import dvc
from resgrid.edit import rewritten
from resgrid.errors import ResgridError
from resgrid.grid import expand

PACKAGE = Path(resgrid.__file__).parent
NUM_SIZED = 200  # images whose size is looked at
DRAWN_FOR_TEST = 0.2
MIN_FOR_VALIDATION = 20  # training images in the smallest class

IGNORED_BY_DVC = "# not part of any hash\n__pycache__\n*.pyc\n.DS_Store\n/mlruns\n/.resgrid\n"
IGNORED_BY_GIT = "# what the pipeline makes\n/data/\n/runs/\n/reports/\n/mlflow.db*\n/mlruns/\n/.resgrid/\n"


@dataclass(frozen=True)
class Found:
    """What stands at a location."""

    source: str  # as in params.yaml
    class_names: tuple[str, ...]
    num_train: int
    num_test: int
    smallest_class: int  # its training images
    sizes: tuple[tuple[int, int], ...]  # width and height of some of them
    test_fraction: float = 0.0  # to be drawn, where there is no test split
    own_validation: bool = False
    notes: tuple[str, ...] = ()  # what a person should know


def init(folder: Path, data: Path) -> str:
    """Make `folder`, with `params.yaml` and `dvc.yaml` for the images at `data`; returns what to do next.

    Where that is in no DVC repository, it becomes one.
    Raises ResgridError, and writes nothing, for images that the pipeline could not read, and for a folder
    that is a pipeline already.
    """
    folder = folder.resolve()
    for name in ("params.yaml", "dvc.yaml"):
        if (folder / name).exists():
            raise ResgridError(f"{folder / name}: is there already. Name a new folder, or delete it.")
    data = data.expanduser().resolve()
    for made in ("data", "runs", "reports"):
        if data == folder or data == folder / made or (folder / made) in data.parents:
            raise ResgridError(
                f"--data {data}: the pipeline writes into {folder / made}. Keep the images somewhere else, "
                f"such as {folder / 'images'}."
            )
    for path in (folder, data):
        if str(path).encode(errors="replace") != os.fsencode(path):
            raise ResgridError(f"{path}: this name is no UTF-8, and params.yaml cannot hold it. Rename it.")
    if _ignored_by_git(folder):
        raise ResgridError(
            f"{folder}: git ignores it, and DVC keeps no pipeline in an ignored folder. Name another one, "
            "or take the rule out of .gitignore."
        )
    found = look_at(data)
    root = _repository(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dvc.yaml").write_text(_stages(folder, root), encoding="utf-8")
        params = _params(_name(folder), _location(data, folder, root), data, found)
        (folder / "params.yaml").write_text(params, encoding="utf-8")
        if root is None:
            _make_repository(folder)
    except OSError as error:
        raise ResgridError(f"{folder}: cannot be written: {error.strerror}.") from None
    cells = expand(load_params(folder / "params.yaml"))
    repository = "" if root else f"\n{folder} was in no DVC repository, so it is one now."
    notes = "".join(f"\n{note[0].upper()}{note[1:]}." for note in found.notes)
    return (
        f"{_counts(found)}: {len(cells)} cells, {', '.join(cell.id for cell in cells)}.{notes}{repository}\n"
        f"Look at {folder / 'params.yaml'}, then:\n"
        f"  cd {shlex.quote(str(folder))} && dvc repro && resgrid compare && resgrid sync"
    )


def look_at(data: Path) -> Found:
    """Raises ResgridError for what is neither an image folder nor one of CIFAR's forms."""
    source = open_source(data, "stretch")
    test_fraction, notes = 0.0, list(source.notes)
    if isinstance(source, ImageFolder):
        if "test" not in source.images:
            test_fraction = DRAWN_FOR_TEST
            notes.append(
                f"there is no test split: data.test_fraction: {test_fraction} of each class is drawn for it"
            )
        source = ImageFolder(data, "stretch", test_fraction=test_fraction)  # both splits must be there now
        labels = {split: [name for _, name in images] for split, images in source.images.items()}
        train = source.images["train"]
        step = max(1, len(train) // NUM_SIZED)
        sizes, broken = _measure(data, [name for name, _ in train[::step][:NUM_SIZED]])
        if broken:
            total = len(broken) + len(sizes)
            notes.append(
                f"{len(broken)} of {total} pictures looked at are broken ({some(broken)}): mend or remove "
                "them, or write on_broken: skip to leave them out"
            )
        kind = "image-folder"
    elif isinstance(source, Cifar):
        labels = {
            split: [source.class_names[label] for label in source.load(split).labels.tolist()]
            for split in SPLITS
        }
        sizes, kind = ((SIDE, SIDE),), "archive"
    else:
        raise ResgridError(f"{data}: give pictures, or CIFAR-10 or CIFAR-100, in a folder or an archive.")
    counts = Counter(labels["train"])
    smallest = min(counts[name] for name in source.class_names)
    if smallest < 2:
        notes.append("a class has a single training image: such a class is learnt badly, if at all")
    return Found(
        source=kind,
        class_names=source.class_names,
        num_train=len(labels["train"]),
        num_test=len(labels["test"]),
        smallest_class=smallest,
        sizes=sizes,
        test_fraction=test_fraction,
        own_validation="validation" in labels,
        notes=tuple(notes),
    )


def _measure(data: Path, names: Sequence[str]) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """Width and height of those that can be read, and the names of the others.

    Raises ResgridError if none can.
    """
    sizes, broken = [], []
    with large_pictures():
        for name, content in archives.contents(data, set(names)):
            try:
                with open_picture(io.BytesIO(content), name) as image:
                    sizes.append(image.size)
            except Exception:  # a broken file raises whatever its decoder came upon
                broken.append(name)
    if not sizes:
        raise ResgridError(
            f"{data}: none of {len(names)} pictures looked at can be read, such as {names[0]}."
        )
    return tuple(sizes), broken


# --- the files --------------------------------------------------------------------------------------


def _stages(folder: Path, root: Path | None) -> str:
    """The project's dvc.yaml, its paths of code as seen from `folder`.

    Inside the repository of the code, .dvcignore keeps byte code out of the hashes. It does not reach
    outside: there a folder of code is named file by file.
    """
    template = PACKAGE / "pipeline.yaml"  # in a wheel
    if not template.is_file():
        template = PACKAGE.parents[1] / "dvc.yaml"
    text = template.read_text(encoding="utf-8").partition("stages:")
    lines = []
    for line in (text[1] + text[2]).splitlines():
        match = re.fullmatch(r"( +- )src/resgrid/(.+)", line)
        if not match:
            lines.append(line)
            continue
        indent, path = match.groups()
        place = PACKAGE / path
        outside = root is None or root not in PACKAGE.parents
        files = sorted(place.rglob("*.py")) if outside and place.is_dir() else [place]
        lines += [f"{indent}{_quoted(os.path.relpath(file, folder))}" for file in files]
    head = (
        "# download -> preprocess -> train@<cell>, train-own@<cell>, train-study@<name> -> evaluate\n"
        "# Made by `resgrid init`: the stages of ResGrid's own dvc.yaml, on other images.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As a YAML scalar."""
    return text if re.fullmatch(r"[\w./@+-]+", text) else "'" + text.replace("'", "''") + "'"


def _scale(num_train: int) -> tuple[tuple[str, ...], int, int]:
    """Architectures, epochs, batch size: 800 to some thousands of steps a cell, or 100 epochs of very few
    images; enough to rank by, and a minute to an hour on a CPU.

    With fewer steps, the running means of batch norm (momentum 0.99, Keras's) are still those of the
    beginning, and test accuracy is that of a guess where training's is high.
    """
    if num_train < 2_000:
        half = max(2, num_train // 2)  # two steps an epoch at least
        batch = min(16, 2 ** (half.bit_length() - 1))
        return ("resnet20", "resnet10"), min(100, max(30, 800 * batch // num_train)), batch
    if num_train < 20_000:
        return ("resnet20", "resnet32", "resnet10"), 20, 32
    return ("resnet20", "resnet56", "resnet18"), 30, 128


def _params(name: str, location: str, data: Path, found: Found) -> str:
    """init_params.yaml.jinja for these images."""
    architectures, epochs, batch_size = _scale(found.num_train)
    template = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).from_string(
        (PACKAGE / "init_params.yaml.jinja").read_text(encoding="utf-8")
    )
    has_enough = found.smallest_class >= MIN_FOR_VALIDATION and not found.own_validation
    text = template.render(
        counts=_counts(found),
        name=_quoted(name),
        found=found,
        location=_quoted(location),
        checksum=None if data.is_dir() else digest(data, "sha256:"),
        resize=_resize(found),
        validation_fraction=0.1 if has_enough else 0.0,
        architectures=architectures,
        wide=("resnet10", "resnet18"),
        epochs=epochs,
        batch_size=batch_size,
    )
    return rewritten(text)


def _resize(found: Found) -> Resize:
    """`stretch` keeps the shape where all images are nearly square; otherwise bars of black do."""
    ratio = statistics.median(max(size) / min(size) for size in found.sizes)
    return "stretch" if ratio < 1.15 else "pad"


def _counts(found: Found) -> str:
    smallest, largest = ("x".join(map(str, pick(found.sizes))) for pick in (min, max))
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    return (
        f"{found.num_train:,} training and {found.num_test:,} test images of {len(found.class_names)} "
        f"classes, of {sizes} pixels"
    )


def _name(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9 _.-]", "-", folder.name).lstrip(" _.-") or "own"


def _location(data: Path, folder: Path, root: Path | None) -> str:
    """Relative where images and pipeline move together, in one repository or one folder."""
    home = root or folder
    return os.path.relpath(data, folder) if home in data.parents else str(data)


# --- the repository ---------------------------------------------------------------------------------


def _repository(folder: Path) -> Path | None:
    return next((each for each in (folder, *folder.parents) if (each / ".dvc").is_dir()), None)


def _ignored_by_git(folder: Path) -> bool:
    """False also where there is no git or no repository."""
    above = next(each for each in folder.parents if each.is_dir())
    try:
        command = ["git", "check-ignore", "--quiet", str(folder)]
        return subprocess.run(command, cwd=above, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _make_repository(folder: Path) -> None:
    """`dvc init`, as part of a git repository if there is one.

    DVC asks for no newer version of itself, because versions are locked.
    """
    in_git = next((each for each in (folder, *folder.parents) if (each / ".git").exists()), None)
    kind = ["--no-scm"] if in_git is None else [] if in_git == folder else ["--subdir"]
    quiet = ["config", "core.analytics", "false"], ["config", "core.check_update", "false"]
    for command in (["init", "--quiet", *kind], *quiet):
        dvc(folder, *command)
    (folder / ".dvcignore").write_text(IGNORED_BY_DVC, encoding="utf-8")
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text(IGNORED_BY_GIT, encoding="utf-8")
