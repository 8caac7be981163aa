"""The kinds of source, each read a split at a time into uint8 arrays of 32x32x3.

CIFAR-10's Python layout: https://www.cs.toronto.edu/~kriz/cifar.html. An image folder is torchvision's
layout under `train` and `test`. All of them may be a folder or an archive; only one image is ever in memory
at its own size.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.numpy import load_file

from resgrid.config import Resize
from resgrid.data import archives
from resgrid.data.dataset import SIDE, Split, load_meta, load_split
from resgrid.data.room import require_memory
from resgrid.errors import ResgridError

OnImage = Callable[[str, int, int], None]  # the split, its images that are read, all of them

SPLITS = ("train", "test")
FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")
OTHER_SUFFIXES = (".bmp", ".gif", ".webp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm", ".pgm")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel or less
LAYOUT = "an image folder holds train/<class>/<image> and test/<class>/<image> as PNG or JPEG"


class Source(Protocol):
    class_names: tuple[str, ...]  # in the order of the labels

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        """The images of one split; raises ResgridError if it has none or one is broken."""


def open_source(path: Path, resize: Resize) -> Source:
    """What stands at `path`, by its content: CIFAR batches or an image folder, in a folder or an archive, the
    folder that `download` made of one, or the processed form.

    Raises ResgridError if it is none of them.
    """
    if (path / "meta.json").is_file():
        return Processed(path)
    path = raw_path(path)
    held = archives.names(path)
    if any(_batch_name(name) for name in held):
        return Cifar(path)
    return ImageFolder(path, resize, needs=())


def raw_path(path: Path) -> Path:
    """The one file in `path`, if that is a folder which holds a file and nothing else; otherwise `path`."""
    if path.is_dir():
        held = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        if len(held) == 1 and held[0].is_file():
            return held[0]
    return path


class Processed:
    """What `preprocess` made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.class_names = load_meta(folder).class_names

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        return load_split(self._folder, split)


# --- CIFAR-10's Python layout -----------------------------------------------------------------------


class Cifar:
    """`data_batch_1` and on (at least one), `test_batch` and `batches.meta`, in an archive or a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, str] = {}  # data_batch_1 -> cifar-10-batches-py/data_batch_1
        for name in archives.names(path):
            if batch := _batch_name(name):
                if batch in self._files:
                    raise ResgridError(f"{path}: {batch} is there twice: {self._files[batch]} and {name}.")
                self._files[batch] = name
        for batch in ("batches.meta", "test_batch", "data_batch_1"):
            if batch not in self._files:
                raise ResgridError(
                    f"{path}: there is no {batch}. CIFAR-10's Python layout has batches.meta, test_batch and "
                    "data_batch_1 to data_batch_5."
                )
        ((_, meta),) = archives.contents(path, {self._files["batches.meta"]})
        names = archives.load_pickle(meta, self._origin("batches.meta")).get("label_names")
        if not isinstance(names, list) or not all(type(name) is str for name in names) or len(set(names)) < 2:
            raise ResgridError(f"{self._origin('batches.meta')}: label_names must be two or more names.")
        self.class_names: tuple[str, ...] = tuple(names)

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        batches = {
            "train": sorted(
                (batch for batch in self._files if batch.startswith("data_batch_")),
                key=lambda batch: int(batch.rpartition("_")[2]),
            ),
            "test": ["test_batch"],
        }
        if split not in batches:
            raise ResgridError(f"{self._path}: there is no split {split!r}, only train and test.")
        wanted = {self._files[batch]: batch for batch in batches[split]}
        read = {wanted[name]: self._batch(wanted[name], content)
                for name, content in archives.contents(self._path, wanted)}  # fmt: skip
        return Split(
            images=torch.from_numpy(np.concatenate([read[batch][0] for batch in batches[split]])),
            labels=torch.from_numpy(np.concatenate([read[batch][1] for batch in batches[split]])),
        )

    def _batch(self, batch: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (N, 32, 32, 3) and labels (N,)."""
        origin = self._origin(batch)
        require_memory(4 * len(content), origin)  # content, text, array, and the array with channels last
        pickled = archives.load_pickle(content, origin)
        rows, labels = pickled.get("data"), pickled.get("labels")
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3 * SIDE * SIDE:
            raise ResgridError(f"{origin}: `data` must be an array of uint8 with rows of 3072.")
        if not isinstance(labels, list) or len(labels) != len(rows) or not len(rows):
            raise ResgridError(
                f"{origin}: `labels` must be a list with a number for each of {len(rows)} images."
            )
        num_classes = len(self.class_names)
        for label in labels:
            if type(label) is not int or not 0 <= label < num_classes:
                raise ResgridError(
                    f"{origin}: a label must be 0 to {num_classes - 1}, not {str(label)[:40]}."
                )
        images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # red, green, blue planes -> NHWC
        return np.ascontiguousarray(images), np.array(labels, np.int64)

    def _origin(self, batch: str) -> str:
        return f"{self._path}: {self._files[batch]}"


def _batch_name(name: str) -> str | None:
    base = PurePosixPath(name).name
    return base if re.fullmatch(r"data_batch_\d{1,4}|test_batch|batches\.meta", base) else None


# --- image folders ----------------------------------------------------------------------------------


class ImageFolder:
    """`train/<class>/<image>` and `test/<class>/<image>`, in a folder or an archive, perhaps below one more.

    Classes are numbered by name, and images of a split are in the order of class and name. Hidden files,
    `__MACOSX`, and what has no suffix of an image are passed over.
    """

    def __init__(self, path: Path, resize: Resize, needs: Sequence[str] = SPLITS) -> None:
        """Raises ResgridError if a split of `needs` has no image, or the splits have not the same classes."""
        self._path, self._resize = path, resize
        found = _find_images(path)
        for split in needs:
            if split not in found:
                raise ResgridError(f"{path}: there is no image in {split}/: {LAYOUT}.")
        if not found:
            raise ResgridError(f"{path}: there are no images: {LAYOUT}.")
        classes = {split: set(images.values()) for split, images in found.items()}
        everything = set[str]().union(*classes.values())
        for split, present in classes.items():
            if missing := sorted(everything - present):
                several = f" (and {len(missing) - 1} more classes)" if len(missing) > 1 else ""
                raise ResgridError(
                    f"{path}: class {missing[0]!r} has no image in {split}/, but in the other "
                    f"split{several}. Every class needs images in both."
                )
        if len(everything) < 2:
            raise ResgridError(f"{path}: {everything.pop()!r} is the only class: it takes two to tell apart.")
        self.class_names = tuple(sorted(everything))
        # by split: the image's name in the archive, and its class; ordered by both
        self.images = {
            split: sorted(images.items(), key=lambda item: (item[1], item[0]))
            for split, images in found.items()
        }

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        if split not in self.images:
            raise ResgridError(
                f"{self._path}: there is no split {split!r}, only {' and '.join(self.images)}."
            )
        wanted = self.images[split]
        place = {name: i for i, (name, _) in enumerate(wanted)}
        require_memory(len(wanted) * 3 * SIDE * SIDE, f"{self._path}: {split} of {len(wanted):,} images")
        images = np.empty((len(wanted), SIDE, SIDE, 3), np.uint8)
        done = 0
        with no_bombs():
            for done, (name, content) in enumerate(archives.contents(self._path, place), start=1):
                images[place[name]] = decode(io.BytesIO(content), f"{self._path}: {name}", self._resize)
                if on_image is not None:
                    on_image(split, done, len(wanted))
        if done != len(wanted):
            raise ResgridError(f"{self._path}: files went while they were read. Run this again.")
        labels = torch.tensor([self.class_names.index(name) for _, name in wanted])
        return Split(images=torch.from_numpy(images), labels=labels)


def _find_images(path: Path) -> dict[str, dict[str, str]]:
    """By split: name -> class, of every image in the layout."""
    found: dict[str, dict[str, str]] = {}
    roots = set()
    for name in archives.names(path):
        parts = name.split("/")
        suffix = PurePosixPath(name).suffix.lower()
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        depth = 0 if parts[0] in SPLITS else 1  # of the folder that holds train and test
        in_layout = len(parts) > depth and parts[depth] in SPLITS
        if hidden or not in_layout or suffix not in SUFFIXES + OTHER_SUFFIXES:
            continue
        if len(parts) != depth + 3:
            raise ResgridError(f"{path}: {name} lies in the wrong place: {LAYOUT}.")
        if suffix in OTHER_SUFFIXES:
            raise ResgridError(f"{path}: {name} is neither PNG nor JPEG. Convert it, or take it out.")
        roots.add("/".join(parts[:depth]))
        split, class_name, _ = parts[depth:]
        found.setdefault(split, {})[name] = class_name
    if len(roots) > 1:
        raise ResgridError(
            f"{path}: holds more than one image folder: {', '.join(sorted(roots)[:3])}. Give one."
        )
    return found


@contextmanager
def no_bombs() -> Iterator[None]:
    """Pillow's warning of 90 megapixels and more is an error, and those of metadata do not show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(
    file: Path | IO[bytes], origin: str, resize: Resize, formats: tuple[str, ...] = FORMATS
) -> NDArray[np.uint8]:
    """A picture in one of Pillow's `formats` as (32, 32, 3): upright by EXIF, transparent parts on black.

    Raises ResgridError, which names `origin`, for one that is broken or has more than 8 bits a channel.
    """
    try:
        with Image.open(file, formats=formats) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        if image.mode not in MODES:
            raise ValueError(f"pixels of type {image.mode}: save it with 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.asarray(to_square(image.convert("RGB"), resize))
    except Exception as error:  # a broken file raises whatever its decoder came upon, from a dozen types
        reason = str(error) or type(error).__name__
        raise ResgridError(
            f"{origin} cannot be read as an image ({reason}). Mend it, or take it out."
        ) from None


def to_square(image: Image.Image, resize: Resize) -> Image.Image:
    """`image` at 32x32, bilinear with antialiasing: `stretch` gives up its shape, `crop` what is outside of
    the square in the middle, `pad` puts black on two sides.
    """
    if image.size == (SIDE, SIDE):
        return image
    bilinear = Image.Resampling.BILINEAR
    match resize:
        case "stretch":
            return image.resize((SIDE, SIDE), bilinear)
        case "crop":
            return ImageOps.fit(image, (SIDE, SIDE), bilinear)
        case "pad":
            scale = SIDE / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            square = Image.new(image.mode, (SIDE, SIDE))
            square.paste(image.resize((width, height), bilinear), ((SIDE - width) // 2, (SIDE - height) // 2))
            return square


# --- scikit-learn's digits --------------------------------------------------------------------------


class Digits:
    """scikit-learn's handwritten digits, as `download` stored them: uint8 (1797, 8, 8) of 0 to 16."""

    class_names = tuple("0123456789")

    def __init__(self, path: Path, test_fraction: float, split_seed: int) -> None:
        self._path, self._test_fraction, self._split_seed = path, test_fraction, split_seed

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        """Enlarged to 32x32 in grey; the test split is drawn within each class."""
        try:
            arrays = load_file(self._path)
            images, labels = arrays["images"], arrays["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ResgridError(
                f"{self._path}: cannot be read ({error}). `dvc repro download` makes it."
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
                "Give it another, or set preprocess.validation_fraction: 0.0 and training_fraction: 1.0."
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = np.argsort(bits.random_raw(len(members)), kind="stable")
        drawn[members[order[:count]]] = True
    return drawn
