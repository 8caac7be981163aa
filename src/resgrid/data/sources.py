"""What stands at a path, as a source of labelled images of 32x32x3 uint8.

An image folder is torchvision's layout, with or without splits, in a folder or an archive; only one image is
ever in memory at its own size. CIFAR's own layouts are in `cifar`.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from resgrid.config import Resize
from resgrid.data import archives
from resgrid.data.cifar import Cifar, cifar_form
from resgrid.data.dataset import ORDER, SIDE, SPLITS, Images, OnImage, Source, Split, load_meta, load_split
from resgrid.data.pictures import (
    BrokenPicture,
    Picture,
    is_picture,
    picture_suffixes,
    read_picture,
    to_square,
)
from resgrid.errors import ResgridError, suggest
from resgrid.filetype import START_BYTES

SPLIT_NAMES = {  # of folders, in lower case
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_LIKE_SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})[\W_]*\d*", re.IGNORECASE)  # also train2017
LAYOUT = "an image folder holds train/<class>/<image> and test/<class>/<image>, or <class>/<image>"
SHOWN = 20  # pictures that an error names for each reason

log = logging.getLogger(__name__)


def open_source(path: Path, resize: Resize, needs: Sequence[str] = ()) -> Source:
    """What stands at `path`, by its content: CIFAR batches or an image folder, in a folder or an archive, the
    folder that `download` made of one, or the processed form.

    Raises ResgridError if it is none of them, or an image folder without a split of `needs`.
    """
    if (path / "meta.json").is_file():
        return Processed(path)
    path = raw_path(path)
    if cifar_form([name for name, _ in archives.files(path)]):
        return Cifar(path)
    return ImageFolder(path, resize, needs=needs)


def raw_path(path: Path) -> Path:
    """The one file in `path`, if that is a folder which holds a file and nothing else; otherwise `path`."""
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        if len(entries) == 1 and entries[0].is_file():
            return entries[0]
    return path


class Processed(Source):
    """What `preprocess` made."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.class_names = load_meta(path).class_names

    def load(self, split: str) -> Split:
        return load_split(self.path, split)


class Digits(Source):
    """scikit-learn's handwritten digits, as `download` stored them: uint8 (1797, 8, 8) of 0 to 16."""

    class_names = tuple("0123456789")
    splits = ("train",)

    def read(self, splits: Sequence[str] = ("train",), on_image: OnImage | None = None) -> Images:
        """Enlarged to 32x32 in grey."""
        try:
            arrays = load_file(self.path)
            images, labels = arrays["images"], arrays["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ResgridError(
                f"{self.path}: cannot be read ({error}). `dvc repro download` makes it."
            ) from None
        grey = (images.astype(np.uint16) * 255 + 8) // 16  # 0..16 -> 0..255, rounded
        large = [np.asarray(to_square(Image.fromarray(image), "stretch")) for image in grey.astype(np.uint8)]
        return Images(
            pixels=np.stack(large)[..., None].repeat(3, axis=3),  # (N, 32, 32) -> (N, 32, 32, 3)
            labels=labels,
            splits=np.repeat("train", len(labels)),
            names=[f"train image {i}" for i in range(len(labels))],
        )


# --- words ------------------------------------------------------------------------------------------


def truncate(names: Sequence[str], limit: int = 3) -> str:
    """The first `limit` of `names`."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def by_reason(broken: Mapping[str, str], limit: int = SHOWN) -> list[str]:
    """A line for each reason, with the first `limit` names: `2 × image file is truncated: a.png, b.png`."""
    names = defaultdict(list)
    for name, reason in broken.items():
        names[reason].append(name)
    return [f"{len(each):,} × {reason}: {truncate(sorted(each), limit)}" for reason, each in names.items()]


def count_classes(class_names: Sequence[str], labels: Iterable[Iterable[str]]) -> str:
    """`cat 40 + 10, dog 38 + 9`: of each class the images of every split in `labels`, a class an image."""
    counts = [Counter(each) for each in labels]
    return truncate(
        [f"{name} {' + '.join(f'{each[name]:,}' for each in counts)}" for name in class_names], 100
    )


# --- image folders ----------------------------------------------------------------------------------


class ImageFolder(Source):
    """Pictures below `<split>/<class>/` or `<class>/`, in a folder or an archive, perhaps below more folders.

    A split's folder may be called `train` or `training`, `test` or `testing`, `val`, `valid` or `validation`.
    Classes are numbered by name, and images of a split are in the order of class and name. A picture is what
    has the suffix of one or begins like one; hidden files and all others are passed over, and this is logged.
    """

    def __init__(
        self,
        path: Path,
        resize: Resize,
        needs: Sequence[str] = SPLITS,
        test_fraction: float = 0.0,
        on_broken: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        """With a `test_fraction` the test split is drawn from training images later, so none may be there.

        Raises ResgridError if a split of `needs` has no image, or the splits have not the same classes.
        """
        super().__init__(path)
        self._resize, self._on_broken = resize, on_broken
        splits = _find_images(path)
        if "validation" in splits and "test" not in splits and not test_fraction:
            splits["test"] = splits.pop("validation")
            log.info("There is no test split: the validation images stand for it.")
        if test_fraction and "test" in splits:
            raise ResgridError(
                f"data.test_fraction: {test_fraction}, but {path} has test images of its own. Write 0.0."
            )
        if not splits:
            raise ResgridError(f"{path}: there are no images: {LAYOUT}.")
        present = {*splits, "test"} if test_fraction else set(splits)
        if missing := [split for split in needs if split not in present]:
            draws = missing == ["test"]
            way = " Add it, or have data.test_fraction of each class drawn for it." if draws else ""
            raise ResgridError(f"{path}: there is no image in {missing[0]}/: {LAYOUT}.{way}")
        # by split: the image's name in the archive, and its class; ordered by both
        self.images = {
            split: sorted(splits[split].items(), key=lambda item: (item[1], item[0]))
            for split in ORDER
            if split in splits
        }
        self.splits = tuple(self.images)
        self.class_names = _same_classes(path, {split: set(each.values()) for split, each in splits.items()})

    def read(self, splits: Sequence[str], on_image: OnImage | None = None) -> Images:
        images = [(split, name, label) for split in splits for name, label in self.images[split]]
        names = [name for _, name, _ in images]
        place = {name: i for i, name in enumerate(names)}
        pixels = np.zeros((len(names), SIDE, SIDE, 3), np.uint8)
        remarks: dict[str, list[str]] = defaultdict(list)
        done = 0
        for done, (name, picture) in enumerate(read_pictures(self.path, place, self._resize), start=1):
            if isinstance(picture, BrokenPicture):
                self.broken[name] = picture.reason
            else:
                pixels[place[name]] = picture.pixels
                for remark in picture.remarks:
                    remarks[remark].append(name)
            if on_image is not None:
                on_image(done, len(names))
        if done != len(names):
            raise ResgridError(f"{self.path}: files went while they were read. Run this again.")
        for remark, remarked in remarks.items():
            log.info(f"{len(remarked):,} pictures {remark} ({truncate(sorted(remarked))}).")
        if self.broken and self._on_broken == "refuse":
            raise ResgridError(
                "\n  ".join([f"{self.path}: broken pictures: {len(self.broken):,}.", *by_reason(self.broken)])
                + "\nMend or remove them; data.on_broken: skip in params.yaml leaves them out."
            )
        for line in by_reason(self.broken, 3):
            log.info(f"Left out: {line}")
        numbers = {label: i for i, label in enumerate(self.class_names)}
        return Images(
            pixels=pixels,
            labels=np.array([numbers[label] for _, _, label in images]),
            splits=np.array([split for split, _, _ in images]),
            names=names,
        )


def read_pictures(
    path: Path, names: Container[str], resize: Resize
) -> Iterator[tuple[str, Picture | BrokenPicture]]:
    """Each of the files `names` of a folder or an archive, as a picture or what is wrong with it."""
    for name, content in archives.contents(path, names):
        try:
            yield name, read_picture(io.BytesIO(content), name, resize)
        except BrokenPicture as error:
            yield name, error


def _find_images(path: Path) -> dict[str, dict[str, str]]:
    """By split: name -> class, of every picture. Logs what is passed over or may surprise."""
    suffixes = picture_suffixes()
    passed: dict[str, list[str]] = defaultdict(list)
    pictures = []

    def has_suffix(name: str) -> bool:
        return PurePosixPath(name).suffix.lower() in suffixes

    for name, start in archives.files(path, lambda name: 0 if has_suffix(name) else START_BYTES):
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            passed["hidden files"].append(name)
        elif start is None:
            passed["links that lead nowhere"].append(name)
        elif has_suffix(name) or is_picture(start):
            pictures.append(name)
        else:
            passed["files that Pillow cannot identify as pictures"].append(name)
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    class_at = _class_places(path, pictures)
    for name in pictures:
        if name in class_at:
            split, at = class_at[name]
            splits[split][name] = name.split("/")[at]
        else:
            passed["pictures outside of the splits and classes"].append(name)
    if passed:
        kinds = "; ".join(f"{len(each):,} {kind} ({truncate(each)})" for kind, each in passed.items())
        log.info(f"Passed over: {kinds}.")
    if nested := [name for name, (_, at) in class_at.items() if name.count("/") > at + 1]:
        log.info(
            f"{len(nested):,} pictures in folders within a class belong to that class ({truncate(nested)})."
        )
    return splits


def _class_places(path: Path, pictures: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Of each picture that belongs to a class: its split, and which part of its name is its class.

    A split is a folder that is called so and holds folders. Without splits all pictures are `train`, and the
    classes are the topmost folders that lie side by side. All that lies below a class belongs to it.
    """
    parts = {name: name.split("/") for name in pictures}
    places: dict[str, tuple[str, int]] = {}
    for name, each in parts.items():
        lowest = (i for i in range(len(each) - 3, -1, -1) if each[i].lower() in SPLIT_NAMES)
        if (i := next(lowest, None)) is not None:
            places[name] = SPLIT_NAMES[each[i].lower()], i + 1
    splits = {"/".join(parts[name][:at]) for name, (_, at) in places.items()}
    if len({split.rpartition("/")[0] for split in splits}) > 1:
        several = truncate(sorted(splits))
        raise ResgridError(f"{path}: there are splits in several places: {several}. Keep one: {LAYOUT}.")
    if not places:
        at = _first_fork(parts.values())
        places = {name: ("train", at) for name, each in parts.items() if len(each) > at + 1}
    folders = [parts[name][at:-1] for name, (_, at) in places.items()]
    classes, inner = {each[0] for each in folders}, {each[1] for each in folders if len(each) > 1}
    for level, what in ((classes, "the classes"), (inner, "the folders within classes")):
        if level and all(_LIKE_SPLIT.fullmatch(name) for name in level):
            raise ResgridError(
                f"{path}: {what} are called {truncate(sorted(level))}, as splits are: {LAYOUT}."
            )
    return places


def _first_fork(pictures: Iterable[list[str]]) -> int:
    """How many folders all pictures in folders have in common, before the one that they lie in."""
    folders = [each[:-1] for each in pictures if len(each) > 1]
    at = 0
    while len({each[at] for each in folders}) == 1 and any(len(each) > at + 1 for each in folders):
        at += 1
        folders = [each for each in folders if len(each) > at]
    return at


def _same_classes(path: Path, classes: Mapping[str, set[str]]) -> tuple[str, ...]:
    """The classes, by name; raises ResgridError if one is not in every split, or there is only one."""
    everything = set[str]().union(*classes.values())
    for split, present in classes.items():
        if missing := sorted(everything - present):
            others = {name for name in present if any(name not in each for each in classes.values())}
            raise ResgridError(
                f"{path}: class {missing[0]!r} has no image in {split}/{suggest(missing[0], others)} "
                "Every class needs images in every split."
            )
    if len(everything) < 2:
        raise ResgridError(f"{path}: {everything.pop()!r} is the only class: it takes two to tell apart.")
    return tuple(sorted(everything))
