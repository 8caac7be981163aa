"""Sources of labelled images, each read a split at a time into uint8 arrays of 32x32x3.

An image folder is torchvision's layout, with or without splits, in a folder or an archive; only one image is
ever in memory at its own size. CIFAR's own layouts are in `cifar`.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from resgrid.config import Resize
from resgrid.data import archives
from resgrid.data.cifar import Cifar, cifar_form
from resgrid.data.dataset import ORDER, SIDE, SPLITS, OnImage, Source, Split, load_meta, load_split
from resgrid.data.pictures import (
    BrokenPicture,
    Picture,
    Remark,
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


def raw_path(path: Path) -> Path:
    """The one file in `path`, if that is a folder which holds a file and nothing else; otherwise `path`."""
    if path.is_dir():
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        if len(entries) == 1 and entries[0].is_file():
            return entries[0]
    return path


def truncate(names: Sequence[str], limit: int = 3) -> str:
    """The first `limit` of `names`."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def by_reason(broken: Mapping[str, str], limit: int = SHOWN) -> list[str]:
    """A line for each reason, with the first `limit` names: `2 × image file is truncated: a.png, b.png`."""
    names: dict[str, list[str]] = {}
    for name, reason in broken.items():
        names.setdefault(reason, []).append(name)
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
        self._remarks: dict[Remark, list[str]] = {}
        splits = _find_images(path)
        if "validation" in splits and "test" not in splits and not test_fraction:
            splits["test"] = splits.pop("validation")
            log.info("There is no test split: the validation images stand for it.")
        if test_fraction and "test" in splits:
            raise ResgridError(
                f"data.test_fraction: {test_fraction}, but {path} has test images of its own. Write 0.0."
            )
        for split in needs:
            if split not in splits and not (split == "test" and test_fraction):
                draws = split == "test" and "train" in splits
                way = " Add it, or have data.test_fraction of each class drawn for it." if draws else ""
                raise ResgridError(f"{path}: there is no image in {split}/: {LAYOUT}.{way}")
        if not splits:
            raise ResgridError(f"{path}: there are no images: {LAYOUT}.")
        _require_same_classes(path, {split: set(images.values()) for split, images in splits.items()})
        self.class_names = tuple(sorted({name for images in splits.values() for name in images.values()}))
        if len(self.class_names) < 2:
            raise ResgridError(
                f"{path}: {self.class_names[0]!r} is the only class: it takes two to tell apart."
            )
        # by split: the image's name in the archive, and its class; ordered by both
        self.images = {
            split: sorted(splits[split].items(), key=lambda item: (item[1], item[0]))
            for split in ORDER
            if split in splits
        }
        self.splits = tuple(self.images)

    def read(self, split: str, on_image: OnImage | None = None) -> Split:
        place = {name: i for i, (name, _) in enumerate(self.images[split])}
        images = np.zeros((len(place), SIDE, SIDE, 3), np.uint8)
        done = 0
        for done, (name, picture) in enumerate(read_pictures(self.path, place, self._resize), start=1):
            if isinstance(picture, BrokenPicture):
                self.broken[name] = picture.reason
            else:
                images[place[name]] = picture.pixels
                for remark in picture.remarks:
                    self._remarks.setdefault(remark, []).append(name)
            if on_image is not None:
                on_image(split, done, len(place))
        if done != len(place):
            raise ResgridError(f"{self.path}: files went while they were read. Run this again.")
        label = {name: i for i, name in enumerate(self.class_names)}
        labels = torch.tensor([label[name] for _, name in self.images[split]])
        return Split(images=torch.from_numpy(images), labels=labels)

    def report_reading(self) -> None:
        """With `on_broken: skip` the broken ones are logged."""
        for remark, names in self._remarks.items():
            log.info(f"{len(names):,} pictures {remark} ({truncate(sorted(names))}).")
        self._remarks.clear()
        if self.broken and self._on_broken == "refuse":
            raise ResgridError(
                "\n  ".join([f"{self.path}: broken pictures: {len(self.broken):,}.", *by_reason(self.broken)])
                + "\nMend or remove them; data.on_broken: skip in params.yaml leaves them out."
            )
        for line in by_reason(self.broken, 3):
            log.info(f"Left out: {line}")

    def image_names(self, split: str, count: int) -> list[str]:
        return [name for name, _ in self.images[split]]


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
    passed: dict[str, list[str]] = {}
    pictures: list[str] = []
    unknown: list[str] = []
    for name in archives.names(path):
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            passed.setdefault("hidden files", []).append(name)
        elif path.is_dir() and (path / name).is_symlink() and not (path / name).exists():
            passed.setdefault("links that lead nowhere", []).append(name)
        else:
            (pictures if PurePosixPath(name).suffix.lower() in suffixes else unknown).append(name)
    for name, start in archives.contents(path, set(unknown), START_BYTES) if unknown else ():
        if is_picture(start):
            pictures.append(name)
        else:
            passed.setdefault("files that Pillow cannot identify as pictures", []).append(name)
    splits, outside, nested = _arrange(path, pictures)
    if outside:
        passed["pictures outside of the splits and classes"] = outside
    if passed:
        kinds = "; ".join(f"{len(each):,} {kind} ({truncate(each)})" for kind, each in passed.items())
        log.info(f"Passed over: {kinds}.")
    if nested:
        log.info(
            f"{len(nested):,} pictures in folders within a class belong to that class ({truncate(nested)})."
        )
    return splits


def _arrange(path: Path, pictures: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """By split: name -> class; the pictures beside all classes; and those in folders within a class's folder.

    A split is a folder that is called so and holds folders. Without splits all pictures are `train`, and the
    classes are the topmost folders that lie side by side. All that lies below a class belongs to it.
    """
    parts = {name: tuple(name.split("/")) for name in pictures}
    # where the class's folder stands in a picture's path
    class_at = {name: at for name, each in parts.items() if (at := _below_split(each))}
    roots = {parts[name][: at - 1] for name, at in class_at.items()}
    if len(roots) > 1:
        several = truncate(sorted({"/".join(parts[name][:at]) for name, at in class_at.items()}))
        raise ResgridError(f"{path}: there are splits in several places: {several}. Keep one: {LAYOUT}.")
    has_splits = bool(roots)
    root = roots.pop() if has_splits else _common_folder(parts.values())
    if not has_splits:
        class_at = {name: len(root) for name, each in parts.items() if len(each) > len(root) + 1}
    folders: dict[str, str] = {}  # by split
    splits: dict[str, dict[str, str]] = {}
    outside, nested = [], []
    for name, each in parts.items():
        at = class_at.get(name)
        if at is None:
            if has_splits and each[: len(root)] == root and each[len(root)].lower() in SPLIT_NAMES:
                raise ResgridError(f"{path}: {name} lies in no class: {LAYOUT}. Take it out, if it has none.")
            outside.append(name)
            continue
        folder = each[at - 1] if has_splits else "train"
        split = SPLIT_NAMES[folder.lower()]
        if folders.setdefault(split, folder) != folder:
            raise ResgridError(
                f"{path}: holds both {folders[split]}/ and {folder}/. Put all {split} images into one."
            )
        splits.setdefault(split, {})[name] = each[at]
        if len(each) > at + 2:
            nested.append(name)
    classes = {parts[name][at] for name, at in class_at.items()}
    inner = {parts[name][class_at[name] + 1] for name in nested}
    for level, what in ((classes, "the classes"), (inner, "the folders within classes")):
        if level and all(_LIKE_SPLIT.fullmatch(name) for name in level):
            raise ResgridError(
                f"{path}: {what} are called {truncate(sorted(level))}, as splits are: {LAYOUT}."
            )
    return splits, outside, nested


def _below_split(parts: Sequence[str]) -> int | None:
    """Where the folder right below the lowest split stands in a picture's path."""
    return next((i for i in range(len(parts) - 2, 0, -1) if parts[i - 1].lower() in SPLIT_NAMES), None)


def _common_folder(pictures: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The lowest folder below which all pictures in folders lie, with folders of its own."""
    root: tuple[str, ...] = ()
    while True:
        below = [each for each in pictures if len(each) > len(root) + 1]
        tops = {each[len(root)] for each in below}
        if len(tops) != 1 or all(len(each) == len(root) + 2 for each in below):
            return root
        root = (*root, *tops)


def _require_same_classes(path: Path, classes: dict[str, set[str]]) -> None:
    everything = set[str]().union(*classes.values())
    for split, present in classes.items():
        if not (missing := sorted(everything - present)):
            continue
        several = f" (and {len(missing) - 1} more classes)" if len(missing) > 1 else ""
        alone = [name for name in present if any(name not in other for other in classes.values())]
        raise ResgridError(
            f"{path}: class {missing[0]!r} has no image in {split}/, but in the other split{several}"
            f"{suggest(missing[0], alone)} Every class needs images in both."
        )


# --- scikit-learn's digits --------------------------------------------------------------------------


class Digits(Source):
    """scikit-learn's handwritten digits, as `download` stored them: uint8 (1797, 8, 8) of 0 to 16."""

    class_names = tuple("0123456789")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.splits = ("train",)

    def read(self, split: str, on_image: OnImage | None = None) -> Split:
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
        images = np.stack(large)[..., None].repeat(3, axis=3)  # (N, 32, 32) -> (N, 32, 32, 3)
        return Split(images=torch.from_numpy(images), labels=torch.from_numpy(labels))


# --- what stands at a path ---------------------------------------------------------------------------


def open_source(path: Path, resize: Resize, needs: Sequence[str] = ()) -> Source:
    """What stands at `path`, by its content: CIFAR batches or an image folder, in a folder or an archive, the
    folder that `download` made of one, or the processed form.

    Raises ResgridError if it is none of them, or an image folder without a split of `needs`.
    """
    if (path / "meta.json").is_file():
        return Processed(path)
    path = raw_path(path)
    if cifar_form(archives.names(path)):
        return Cifar(path)
    return ImageFolder(path, resize, needs=needs)


class Processed(Source):
    """What `preprocess` made."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.class_names = load_meta(path).class_names

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        return load_split(self.path, split)
