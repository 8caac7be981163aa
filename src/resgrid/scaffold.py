"""A pipeline's folder for a person's own images: what `resgrid init` makes.

Its `dvc.yaml` has the stages of this project's own, with the paths of the code as seen from there; its
`params.yaml` a small grid by the number and the size of the images.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shlex
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jinja2 import Environment, StrictUndefined

import resgrid
from resgrid.config import load_params
from resgrid.data.cifar import Cifar
from resgrid.data.dataset import SIDE, SPLITS
from resgrid.data.fetch import digest
from resgrid.data.pictures import BrokenPicture
from resgrid.data.preprocess import draw
from resgrid.data.sources import ImageFolder, by_reason, count_classes, open_source, read_pictures
from resgrid.dvc.pipeline import dvc
from resgrid.edit import rewritten
from resgrid.errors import ResgridError
from resgrid.grid import expand
from resgrid.project import nearest, write_whole

PACKAGE = Path(resgrid.__file__).parent
NUM_READ = 200  # pictures that are read to choose by, a few of each kind
DRAWN_FOR_TEST = 0.2
SEED = 0  # of the draw, as in init_params.yaml.jinja
MIN_FOR_VALIDATION = 20  # training images in the smallest class

MADE_BY = "Made by `resgrid init`"  # in the head of a dvc.yaml
MADE = ("data", "runs", "reports")  # folders that a pipeline writes into
IGNORED_BY_DVC = "# not part of any hash\n__pycache__\n*.pyc\n.DS_Store\n/mlruns\n/.resgrid\n"
IGNORED_BY_GIT = "# what the pipeline makes\n/data/\n/runs/\n/reports/\n/mlflow.db*\n/mlruns/\n/.resgrid/\n"
ATTRIBUTES = "# as DVC hashes them, also where git would check out CRLF\n" + "".join(
    f"{name} text eol=lf\n" for name in ("*.py", "*.yaml", "dvc.lock", ".dvcignore")
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What stands at a location."""

    source: str  # as in params.yaml
    class_names: tuple[str, ...]
    num_train: int
    num_test: int
    smallest_class: int  # its training images
    sizes: tuple[tuple[int, int], ...]  # width and height of some of them
    test_fraction: float = 0.0  # to be drawn, where there is no test split
    own_validation: bool = False
    normalization: str = "per_channel"

    def __str__(self) -> str:
        smallest, largest = ("x".join(map(str, pick(self.sizes))) for pick in (min, max))
        sizes = smallest if smallest == largest else f"{smallest} to {largest}"
        return (
            f"{self.num_train:,} training and {self.num_test:,} test images of {len(self.class_names)} "
            f"classes, of {sizes} pixels"
        )


def init(folder: Path, data: Path | None) -> str:
    """Make `folder`, with `params.yaml` and `dvc.yaml` for the images at `data`; returns what to do next.

    Without `data` the `dvc.yaml` that an earlier version made is written anew, and all else stays. Where
    `folder` is in no DVC repository, it becomes one. Raises ResgridError for images that the pipeline could
    not read, and for a folder that is a pipeline already. Whatever fails, nothing that was written is left.
    """
    folder = folder.resolve()
    if data is None:
        return _renew(folder)
    for name in ("params.yaml", "dvc.yaml"):
        if (folder / name).exists():
            raise ResgridError(f"{folder / name}: is there already. Name a new folder, or delete it.")
    data = data.expanduser().resolve()
    if data == folder or any(data.is_relative_to(folder / made) for made in MADE):
        raise ResgridError(
            f"--data {data}: the pipeline writes into {', '.join(MADE)} of {folder}. Keep the images "
            f"somewhere else, such as {folder / 'images'}."
        )
    info = inspect_dataset(data)
    root = nearest(folder, ".dvc")
    with _undone_on_failure(folder):
        (folder / "dvc.yaml").write_text(_stages(folder, root), encoding="utf-8")
        (folder / "params.yaml").write_text(_params(folder, root, data, info), encoding="utf-8")
        cells = expand(load_params(folder / "params.yaml"))
        if root is None:
            _make_repository(folder)
        if root is None or root not in PACKAGE.parents:  # ResGrid's own has these lines at its root
            with (folder / ".gitattributes").open("a", encoding="utf-8") as attributes:
                attributes.write(ATTRIBUTES)
    repository = "" if root else f"\n{folder} was in no DVC repository, so it is one now."
    return (
        f"{info}: {len(cells)} cells, {', '.join(cell.id for cell in cells)}.{repository}\n"
        f"Look at {folder / 'params.yaml'}, then:\n"
        f"  cd {shlex.quote(str(folder))} && dvc repro && resgrid compare && resgrid sync"
    )


def _renew(folder: Path) -> str:
    stages = folder / "dvc.yaml"
    if not stages.is_file() or MADE_BY not in stages.read_text(encoding="utf-8"):
        raise ResgridError(f"{folder}: no pipeline that `resgrid init` made. --data names images for one.")
    write_whole(stages, _stages(folder, nearest(folder, ".dvc")).encode())
    return f"{stages}: written anew. params.yaml, data and results are as they were. `dvc repro` goes on."


@contextmanager
def _undone_on_failure(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents; if the body fails, remove everything that was not there before."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    before = set() if missing else set(folder.iterdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing[-1:] or set(folder.iterdir()) - before:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def inspect_dataset(data: Path) -> DatasetInfo:
    """Logs the classes and what a person should know of the images.

    Raises ResgridError for what is neither an image folder nor one of CIFAR's forms.
    """
    source = open_source(data, "stretch", needs=("train",))
    sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)
    test_fraction, normalization = 0.0, "per_channel"
    if isinstance(source, ImageFolder):
        labels = {split: [name for _, name in images] for split, images in source.images.items()}
        if "test" not in labels:
            test_fraction = DRAWN_FOR_TEST
            log.info(
                f"There is no test split: data.test_fraction: {test_fraction} of each class is drawn for it."
            )
            names, numbers = np.unique(labels["train"], return_inverse=True)
            drawn = draw(numbers, source.class_names, test_fraction, SEED)
            labels |= {"train": names[numbers[~drawn]].tolist(), "test": names[numbers[drawn]].tolist()}
        sizes, normalization = _read_some(source)
    elif isinstance(source, Cifar):
        names = np.array(source.class_names)
        labels = {split: names[source.load(split).labels.numpy()].tolist() for split in SPLITS}
    else:
        raise ResgridError(f"{data}: give pictures, or CIFAR-10 or CIFAR-100, in a folder or an archive.")
    log.info(f"Classes, as {' + '.join(labels)}: {count_classes(source.class_names, labels.values())}.")
    smallest = min(Counter(labels["train"]).values())
    if smallest < 2:
        log.info("A class has a single training image: such a class is learnt badly, if at all.")
    return DatasetInfo(
        source="image-folder" if isinstance(source, ImageFolder) else "archive",
        class_names=source.class_names,
        num_train=len(labels["train"]),
        num_test=len(labels["test"]),
        smallest_class=smallest,
        sizes=sizes,
        test_fraction=test_fraction,
        own_validation="validation" in labels,
        normalization=normalization,
    )


def _read_some(source: ImageFolder) -> tuple[tuple[tuple[int, int], ...], str]:
    """Width and height of some pictures of each kind, and the normalization for them: `scalar` where a
    channel never varies. Raises ResgridError if none of them can be read.
    """
    kinds: dict[str, list[str]] = {}  # by suffix
    for name in (name for images in source.images.values() for name, _ in images):
        kinds.setdefault(PurePosixPath(name).suffix.lower(), []).append(name)
    share = max(3, NUM_READ // len(kinds))
    chosen = {name for each in kinds.values() for name in each[:: -(-len(each) // share)]}
    read = dict(read_pictures(source.path, chosen, "stretch"))
    broken = {name: each.reason for name, each in read.items() if isinstance(each, BrokenPicture)}
    pictures = [each for each in read.values() if not isinstance(each, BrokenPicture)]
    reasons = "\n  ".join(["", *by_reason(broken, 3)])
    if not pictures:
        raise ResgridError(f"{source.path}: none of {len(chosen)} pictures looked at can be read:{reasons}")
    if broken:
        log.warning(
            f"{len(broken)} of {len(chosen)} pictures looked at are broken; mend or remove them, or write "
            f"on_broken: skip to leave them out:{reasons}"
        )
    pixels = np.stack([picture.pixels for picture in pictures])  # (N, 32, 32, 3)
    varies = (pixels != pixels[0, 0, 0]).any(axis=(0, 1, 2)).all()
    if not varies:
        log.info("A channel never varies in the pictures looked at, so the normalization is scalar.")
    return tuple(picture.size for picture in pictures), "per_channel" if varies else "scalar"


# --- the files --------------------------------------------------------------------------------------


def _stages(folder: Path, root: Path | None) -> str:
    """The project's dvc.yaml, its paths of code as seen from `folder`.

    Inside the repository of the code, .dvcignore keeps byte code out of the hashes. It does not reach
    outside: there a folder of code is named file by file.
    """
    template = PACKAGE / "pipeline.yaml"  # in a wheel
    if not template.is_file():
        template = PACKAGE.parents[1] / "dvc.yaml"
    outside = root is None or root not in PACKAGE.parents

    def as_seen(match: re.Match[str]) -> str:
        place = PACKAGE / match[2]
        files = sorted(place.rglob("*.py")) if outside and place.is_dir() else [place]
        return "\n".join(f"{match[1]}{_quoted(os.path.relpath(file, folder))}" for file in files)

    _, start, stages = template.read_text(encoding="utf-8").partition("stages:")
    return (
        "# download -> preprocess -> a stage a cell, of train, train-rate, train-own, … -> evaluate\n"
        f"# {MADE_BY}: the stages of ResGrid's own dvc.yaml, on other images.\n\n"
    ) + re.sub("^( +- )src/resgrid/(.+)$", as_seen, start + stages, flags=re.MULTILINE)


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


def _params(folder: Path, root: Path | None, data: Path, info: DatasetInfo) -> str:
    """init_params.yaml.jinja for these images.

    Its location is relative where images and pipeline move together, in one repository or one folder. Images
    keep their shape, by bars of black, unless they are nearly square.
    """
    architectures, epochs, batch_size = _scale(info.num_train)
    template = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined).from_string(
        (PACKAGE / "init_params.yaml.jinja").read_text(encoding="utf-8")
    )
    has_enough = info.smallest_class >= MIN_FOR_VALIDATION and not info.own_validation
    ratio = statistics.median(max(size) / min(size) for size in info.sizes)
    text = template.render(
        name=_quoted(_free_name(folder, root)),
        info=info,
        location=_quoted(os.path.relpath(data, folder) if (root or folder) in data.parents else str(data)),
        checksum=None if data.is_dir() else digest(data, "sha256:"),
        resize="stretch" if ratio < 1.15 else "pad",
        validation_fraction=0.1 if has_enough else 0.0,
        architectures=architectures,
        wide=("resnet10", "resnet18"),
        epochs=epochs,
        batch_size=batch_size,
    )
    return rewritten(text)


def _free_name(folder: Path, root: Path | None) -> str:
    """The folder's name, with a number where another pipeline of the repository has it: a name is that of an
    experiment and of a registered model."""
    taken = set()
    for place, folders, files in os.walk(root or folder):
        folders[:] = [each for each in folders if each[0] != "." and each not in MADE]
        if "params.yaml" in files:
            text = Path(place, "params.yaml").read_text(encoding="utf-8", errors="replace")
            taken |= set(re.findall(r"^name: *['\"]?(.*?)['\"]?(?: #.*)?$", text, re.MULTILINE))
    name = re.sub(r"[^A-Za-z0-9 _.-]", "-", folder.name).lstrip(" _.-") or "own"
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def _make_repository(folder: Path) -> None:
    """`dvc init`, as part of a git repository if there is one.

    DVC asks for no newer version of itself, because versions are locked.
    """
    in_git = nearest(folder, ".git")
    kind = ["--no-scm"] if in_git is None else [] if in_git == folder else ["--subdir"]
    quiet = ["config", "core.analytics", "false"], ["config", "core.check_update", "false"]
    for command in (["init", "--quiet", *kind], *quiet):
        dvc(folder, *command)
    (folder / ".dvcignore").write_text(IGNORED_BY_DVC, encoding="utf-8")
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text(IGNORED_BY_GIT, encoding="utf-8")
