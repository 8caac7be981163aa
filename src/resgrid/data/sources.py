"""Sources of labelled images, each read a split at a time into uint8 arrays of 32x32x3.

An image folder is torchvision's layout, with or without splits, in a folder or an archive; only one image is
ever in memory at its own size. CIFAR's own layouts are in `cifar`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from resgrid.config import Resize
from resgrid.data import archives
from resgrid.data.dataset import SIDE, Split
from resgrid.data.pictures import BrokenPicture, decode, large_pictures, picture_suffixes, to_square
from resgrid.data.room import require_memory
from resgrid.errors import ResgridError, suggest
from resgrid.filetype import START_BYTES, identify_bytes

OnImage = Callable[[str, int, int], None]  # the split, its images that are read, all of them

SPLITS = ("train", "test")
SPLIT_NAMES = {  # of folders, in lower case
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
LAYOUT = "an image folder holds train/<class>/<image> and test/<class>/<image>, or <class>/<image>"
SHOWN = 20  # broken pictures that an error names


class Source:
    """Labelled images, read a split at a time."""

    class_names: tuple[str, ...]  # in the order of the labels

    def __init__(self, path: Path) -> None:
        self.path = path
        self.splits: tuple[str, ...] = SPLITS
        self.notes: list[str] = []  # what a person should know: passed over, or standing for something else
        self.broken: dict[str, dict[str, str]] = {}  # by split that is loaded: picture -> why

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        """The images of one split; raises ResgridError if there is none or one is broken."""
        if split not in self.splits:
            raise ResgridError(f"{self.path}: there is no split {split!r}, only {' and '.join(self.splits)}.")
        return self._load(split, on_image)

    def _load(self, split: str, on_image: OnImage | None) -> Split:
        raise NotImplementedError


def raw_path(path: Path) -> Path:
    """The one file in `path`, if that is a folder which holds a file and nothing else; otherwise `path`."""
    if path.is_dir():
        held = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        if len(held) == 1 and held[0].is_file():
            return held[0]
    return path


# --- image folders ----------------------------------------------------------------------------------


class BrokenPictures(ResgridError):
    """Pictures that cannot be read, each with its reason: all of them in one message."""


class ImageFolder(Source):
    """Pictures in `<split>/<class>/` or `<class>/`, in a folder or an archive, perhaps below one more folder.

    A split's folder may be called `train` or `training`, `test` or `testing`, `val`, `valid` or `validation`.
    Classes are numbered by name, and images of a split are in the order of class and name. A picture is what
    has the suffix of one or begins like one; hidden files and all others are passed over, and counted in
    `notes`.
    """

    def __init__(
        self,
        path: Path,
        resize: Resize,
        needs: Sequence[str] = SPLITS,
        test_fraction: float = 0.0,
        seed: int = 0,
        on_broken: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        """`test_fraction` of each class's training images are drawn for a test split where there is none.

        Raises ResgridError if a split of `needs` has no image, or the splits have not the same classes.
        """
        super().__init__(path)
        self._resize, self._on_broken = resize, on_broken
        found, self.notes = _find_images(path)
        if "validation" in found and "test" not in found and not test_fraction:
            found["test"] = found.pop("validation")
            self.notes.append("there is no test split: the validation images stand for it")
        if test_fraction and "test" in found:
            raise ResgridError(
                f"data.test_fraction: {test_fraction}, but {path} has test images of its own. Write 0.0."
            )
        for split in needs:
            if split not in found and not (split == "test" and test_fraction):
                draws = split == "test" and "train" in found
                way = " Add it, or have data.test_fraction of each class drawn for it." if draws else ""
                raise ResgridError(f"{path}: there is no image in {split}/: {LAYOUT}.{way}")
        if not found:
            raise ResgridError(f"{path}: there are no images: {'; '.join([LAYOUT, *self.notes])}.")
        _require_same_classes(path, {split: set(images.values()) for split, images in found.items()})
        self.class_names = tuple(sorted({name for images in found.values() for name in images.values()}))
        if len(self.class_names) < 2:
            raise ResgridError(
                f"{path}: {self.class_names[0]!r} is the only class: it takes two to tell apart."
            )
        # by split: the image's name in the archive, and its class; ordered by both
        self.images = {
            split: sorted(images.items(), key=lambda item: (item[1], item[0]))
            for split, images in found.items()
        }
        if test_fraction:
            labels = self._labels(name for _, name in self.images["train"])
            is_test = draw(labels, self.class_names, test_fraction, seed)
            pairs = list(zip(self.images["train"], is_test, strict=True))
            self.images = {
                "train": [image for image, drawn in pairs if not drawn],
                "test": [image for image, drawn in pairs if drawn],
            } | {split: images for split, images in self.images.items() if split != "train"}

        self.splits = tuple(self.images)

    def _load(self, split: str, on_image: OnImage | None) -> Split:
        """Raises BrokenPictures, with those of all splits so far, unless they are to be skipped."""
        wanted = self.images[split]
        place = {name: i for i, (name, _) in enumerate(wanted)}
        require_memory(len(wanted) * 3 * SIDE * SIDE, f"{self.path}: {split} of {len(wanted):,} images")
        images = np.empty((len(wanted), SIDE, SIDE, 3), np.uint8)
        broken = self.broken[split] = {}
        done = 0
        with large_pictures() as large:
            for done, (name, content) in enumerate(archives.contents(self.path, place), start=1):
                try:
                    images[place[name]] = decode(io.BytesIO(content), name, self._resize)
                except BrokenPicture as error:
                    broken[name] = str(error)
                if on_image is not None:
                    on_image(split, done, len(wanted))
        if done != len(wanted):
            raise ResgridError(f"{self.path}: files went while they were read. Run this again.")
        self.notes += large
        if broken and self._on_broken == "refuse":
            lines = [line for each in self.broken.values() for line in each.values()]
            more = [f"… and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
            raise BrokenPictures(
                "\n  ".join([f"{self.path}: broken pictures: {len(lines):,}.", *lines[:SHOWN], *more])
                + "\nMend or remove them; data.on_broken: skip in params.yaml leaves them out."
            )
        if broken:
            self.notes.append(
                f"{len(broken):,} broken pictures of {split} are left out: {some(sorted(broken))}"
            )
        kept = [i for i, (name, _) in enumerate(wanted) if name not in broken]
        classes = [wanted[i][1] for i in kept]
        if lost := set(self.class_names) - set(classes):
            raise ResgridError(
                f"{self.path}: class {min(lost)!r} has no picture in {split} that can be read."
            )
        labels = torch.from_numpy(self._labels(classes))
        return Split(images=torch.from_numpy(images[kept] if broken else images), labels=labels)

    def _labels(self, classes: Iterable[str]) -> NDArray[np.int64]:
        label = {name: i for i, name in enumerate(self.class_names)}
        return np.array([label[name] for name in classes])


def some(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _find_images(path: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """By split: name -> class, of every picture; and what was passed over, by kind."""
    names = archives.names(path)
    suffixes = picture_suffixes()
    passed: dict[str, list[str]] = {}
    pictures: list[str] = []
    unknown: list[str] = []
    for name in names:
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            passed.setdefault("a hidden file", []).append(name)
        elif path.is_dir() and (path / name).is_symlink() and not (path / name).exists():
            passed.setdefault("a link that leads nowhere", []).append(name)
        else:
            (pictures if PurePosixPath(name).suffix.lower() in suffixes else unknown).append(name)
    starts = dict(archives.contents(path, set(unknown), START_BYTES)) if unknown else {}
    for name, start in starts.items():
        kind = identify_bytes(start)
        if kind.is_picture:
            pictures.append(name)
        else:
            passed.setdefault(kind.name, []).append(name)
    found, outside = _arrange(path, pictures)
    if outside:
        passed["a picture outside of the splits and classes"] = outside
    notes = []
    if passed:
        kinds = "; ".join(f"{len(held):,} × {kind} ({some(held)})" for kind, held in passed.items())
        notes.append(f"passed over: {kinds}")
    if escaped := [name for name in names if isinstance(name, archives.Escaped)]:
        notes.append(f"{len(escaped):,} names are not UTF-8 and are written with % signs: {some(escaped)}")
    return found, notes


def _arrange(path: Path, pictures: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """By split: name -> class; and the pictures that lie beside it. Without splits all are `train`."""
    parts = {name: tuple(name.split("/")) for name in pictures}
    in_split = {name for name, each in parts.items() if len(each) > 2 and each[-3].lower() in SPLIT_NAMES}
    depth = 3 if in_split else 2
    inside = in_split or {name for name, each in parts.items() if len(each) > 1}
    roots = {parts[name][:-depth] for name in inside}
    if len(roots) > 1:
        several = ", ".join(sorted("/".join(root) or "." for root in roots)[:3])
        raise ResgridError(f"{path}: holds more than one image folder: {several}. Give one: {LAYOUT}.")
    root = next(iter(roots), ())
    folders: dict[str, str] = {}  # by split
    found: dict[str, dict[str, str]] = {}
    outside = []
    for name, each in parts.items():
        if name in inside:
            folder = each[-3] if in_split else "train"
            split = SPLIT_NAMES[folder.lower()]
            if folders.setdefault(split, folder) != folder:
                raise ResgridError(
                    f"{path}: holds both {folders[split]}/ and {folder}/. Put all {split} images into one."
                )
            found.setdefault(split, {})[name] = each[-2]
        elif in_split and each[: len(root)] == root and each[len(root)].lower() in SPLIT_NAMES:
            raise ResgridError(
                f"{path}: {name} lies in the wrong place: {LAYOUT}. Take it out, if it has none."
            )
        else:
            outside.append(name)
    return found, outside


def _require_same_classes(path: Path, classes: dict[str, set[str]]) -> None:
    everything = set[str]().union(*classes.values())
    for split, present in classes.items():
        if not (missing := sorted(everything - present)):
            continue
        several = f" (and {len(missing) - 1} more classes)" if len(missing) > 1 else ""
        alone = [name for name in present if any(name not in held for held in classes.values())]
        raise ResgridError(
            f"{path}: class {missing[0]!r} has no image in {split}/, but in the other split{several}"
            f"{suggest(missing[0], alone)} Every class needs images in both."
        )


# --- scikit-learn's digits --------------------------------------------------------------------------


class Digits(Source):
    """scikit-learn's handwritten digits, as `download` stored them: uint8 (1797, 8, 8) of 0 to 16."""

    class_names = tuple("0123456789")

    def __init__(self, path: Path, test_fraction: float, split_seed: int) -> None:
        super().__init__(path)
        self._test_fraction, self._split_seed = test_fraction, split_seed

    def _load(self, split: str, on_image: OnImage | None) -> Split:
        """Enlarged to 32x32 in grey; the test split is drawn within each class."""
        try:
            arrays = load_file(self.path)
            images, labels = arrays["images"], arrays["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ResgridError(
                f"{self.path}: cannot be read ({error}). `dvc repro download` makes it."
            ) from None
        is_test = draw(labels, self.class_names, self._test_fraction, self._split_seed)
        chosen = is_test if split == "test" else ~is_test
        grey = (images[chosen].astype(np.uint16) * 255 + 8) // 16  # 0..16 -> 0..255, rounded
        large = [np.asarray(to_square(Image.fromarray(image), "stretch")) for image in grey.astype(np.uint8)]
        images = np.stack(large)[..., None].repeat(3, axis=3)  # (N, 32, 32) -> (N, 32, 32, 3)
        return Split(images=torch.from_numpy(images), labels=torch.from_numpy(labels[chosen]))


def draw(
    labels: NDArray[np.int64], class_names: Sequence[str], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """A stratified draw, (N,): True for round(fraction * n) of each class's n images, at least 1, never all.

    The order comes from PCG64's raw stream, which NumPy promises never to change, as it does no distribution.
    Raises ResgridError for a class with a single image.
    """
    bits = np.random.PCG64(seed)
    drawn = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ResgridError(
                f"class {class_names[label]!r} has a single image, which cannot be on both sides of a split. "
                "Give it another, or draw no split: data.test_fraction: 0.0, "
                "preprocess.validation_fraction: 0.0, training_fraction: 1.0."
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = np.argsort(bits.random_raw(len(members)), kind="stable")
        drawn[members[order[:count]]] = True
    return drawn
