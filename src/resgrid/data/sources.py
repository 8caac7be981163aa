"""The kinds of source, each read a split at a time into uint8 arrays of 32x32x3.

CIFAR-10 and CIFAR-100: https://www.cs.toronto.edu/~kriz/cifar.html. An image folder is torchvision's layout,
with or without splits. All of them may be a folder or an archive; only one image is ever in memory at its own
size.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

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
from resgrid.filetype import START_BYTES, identify_bytes, picture_formats

OnImage = Callable[[str, int, int], None]  # the split, its images that are read, all of them

SPLITS = ("train", "test")
SPLIT_NAMES = {  # of folders, in lower case
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
UNREAD_SUFFIXES = (".heic", ".heif")  # of pictures that Pillow does not read: better named than passed over
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel or less
LAYOUT = "an image folder holds train/<class>/<image> and test/<class>/<image>, or <class>/<image>"
MAX_PIXELS = 208_000_000  # of one picture, which then takes 0.6 GB; the largest of phones have 201 million
MAX_PIXELS_VARIABLE = "RESGRID_MAX_PIXELS"
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


def open_source(path: Path, resize: Resize) -> Source:
    """What stands at `path`, by its content: CIFAR batches or an image folder, in a folder or an archive, the
    folder that `download` made of one, or the processed form.

    Raises ResgridError if it is none of them.
    """
    if (path / "meta.json").is_file():
        return Processed(path)
    path = raw_path(path)
    held = archives.names(path)
    if _cifar_form(held):
        return Cifar(path)
    return ImageFolder(path, resize, needs=())


def raw_path(path: Path) -> Path:
    """The one file in `path`, if that is a folder which holds a file and nothing else; otherwise `path`."""
    if path.is_dir():
        held = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        if len(held) == 1 and held[0].is_file():
            return held[0]
    return path


class Processed(Source):
    """What `preprocess` made."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.class_names = load_meta(path).class_names

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        return load_split(self.path, split)


# --- CIFAR-10 and CIFAR-100 --------------------------------------------------------------------------


@dataclass(frozen=True)
class _CifarForm:
    """One of the forms in which CIFAR's authors publish it, by the names of its files."""

    train: str  # a regular expression; where several match, in the order of their numbers
    test: str
    meta: str  # with the names of the classes
    labels: str = "labels"  # the key in a pickled batch …
    names: str = "label_names"  # … and in the pickled names
    label_bytes: int = 0  # of an image in a binary batch, the last being the label; 0: a pickled batch


_CIFAR_FORMS = (
    _CifarForm(r"data_batch_\d{1,4}", "test_batch", "batches.meta"),
    _CifarForm("train", "test", "meta", "fine_labels", "fine_label_names"),
    _CifarForm(r"data_batch_\d{1,4}\.bin", "test_batch.bin", "batches.meta.txt", label_bytes=1),
    _CifarForm(r"train\.bin", "test.bin", "fine_label_names.txt", label_bytes=2),
)


def _cifar_form(names: Sequence[str]) -> _CifarForm | None:
    """The form whose files are among `names`: two of its three kinds at least."""
    held = {PurePosixPath(name).name for name in names}
    for form in _CIFAR_FORMS:
        trains = any(re.fullmatch(form.train, name) for name in held)
        if trains + (form.test in held) + (form.meta in held) >= 2:
            return form
    return None


class Cifar(Source):
    """CIFAR-10 or, with its fine labels, CIFAR-100, in the Python or the binary version, packed or not."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        held = archives.names(path)
        self._form = form = _cifar_form(held) or _CIFAR_FORMS[0]
        self.files: dict[str, str] = {}  # data_batch_1 -> cifar-10-batches-py/data_batch_1
        for name in held:
            batch = PurePosixPath(name).name
            if re.fullmatch(form.train, batch) or batch in (form.test, form.meta):
                if batch in self.files:
                    raise ResgridError(f"{path}: {batch} is there twice: {self.files[batch]} and {name}.")
                self.files[batch] = name
        first = form.train.replace(r"\d{1,4}", "1").replace("\\", "")
        wanted = f"{form.meta}, {form.test} and {first}{' and on' * ('1' in first)}"
        for batch in (form.meta, form.test, first):
            if batch not in self.files:
                raise ResgridError(f"{path}: there is no {batch}. This form of CIFAR has {wanted}.")
        ((_, meta),) = archives.contents(path, {self.files[form.meta]})
        names: object
        if form.label_bytes:
            names = meta.decode("utf-8", "replace").split()
        else:
            names = archives.load_pickle(meta, self._origin(form.meta)).get(form.names)
        if not isinstance(names, list) or not all(type(name) is str for name in names) or len(set(names)) < 2:
            raise ResgridError(f"{self._origin(form.meta)}: {form.names} must be two or more names.")
        self.class_names = tuple(names)

    def _load(self, split: str, on_image: OnImage | None) -> Split:
        batches = [self._form.test]
        if split == "train":
            held = (batch for batch in self.files if re.fullmatch(self._form.train, batch))
            batches = sorted(held, key=lambda batch: [int(number) for number in re.findall(r"\d+", batch)])
        wanted = {self.files[batch]: batch for batch in batches}
        read = {wanted[name]: self._batch(wanted[name], content)
                for name, content in archives.contents(self.path, wanted)}  # fmt: skip
        return Split(
            images=torch.from_numpy(np.concatenate([read[batch][0] for batch in batches])),
            labels=torch.from_numpy(np.concatenate([read[batch][1] for batch in batches])),
        )

    def _batch(self, batch: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (N, 32, 32, 3) and labels (N,)."""
        origin = self._origin(batch)
        require_memory(4 * len(content), origin)  # content, text, array, and the array with channels last
        rows, labels = (self._binary if self._form.label_bytes else self._pickled)(origin, content)
        num_classes = len(self.class_names)
        for label in labels:
            if type(label) is not int or not 0 <= label < num_classes:
                raise ResgridError(
                    f"{origin}: a label must be 0 to {num_classes - 1}, not {str(label)[:40]}."
                )
        images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # red, green, blue planes -> NHWC
        return np.ascontiguousarray(images), np.array(labels, np.int64)

    def _pickled(self, origin: str, content: bytes) -> tuple[NDArray[np.uint8], list[object]]:
        pickled, key = archives.load_pickle(content, origin), self._form.labels
        rows, labels = pickled.get("data"), pickled.get(key)
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3 * SIDE * SIDE:
            raise ResgridError(f"{origin}: `data` must be an array of uint8 with rows of 3072.")
        if not isinstance(labels, list) or len(labels) != len(rows) or not len(rows):
            raise ResgridError(
                f"{origin}: `{key}` must be a list with a number for each of {len(rows)} images."
            )
        return rows, labels

    def _binary(self, origin: str, content: bytes) -> tuple[NDArray[np.uint8], list[object]]:
        width = self._form.label_bytes + 3 * SIDE * SIDE
        if not content or len(content) % width:
            raise ResgridError(f"{origin}: must have a multiple of {width} bytes, not {len(content):,}.")
        rows = np.frombuffer(content, np.uint8).reshape(-1, width)
        return rows[:, self._form.label_bytes :], rows[:, self._form.label_bytes - 1].tolist()

    def _origin(self, batch: str) -> str:
        return f"{self.path}: {self.files[batch]}"


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
        alone = {name.lower(): name for name in present if any(name not in held for held in classes.values())}
        alike = difflib.get_close_matches(missing[0].lower(), alone, n=1)
        way_on = f"Is it {alone[alike[0]]!r} there? Then rename one. " if alike else ""
        raise ResgridError(
            f"{path}: class {missing[0]!r} has no image in {split}/, but in the other split{several}. "
            f"{way_on}Every class needs images in both."
        )


def picture_suffixes() -> set[str]:
    """The suffixes of pictures that Pillow reads here, and of those that it is asked for in vain."""
    known = picture_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in known}.union(
        UNREAD_SUFFIXES
    )


def max_pixels() -> int:
    """Of one picture, as the environment says; raises ResgridError for a value that is no number."""
    given = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not given.isdecimal() or not int(given):
        raise ResgridError(f"{MAX_PIXELS_VARIABLE}={given}: give a number of pixels, such as {MAX_PIXELS}.")
    return int(given)


@contextmanager
def large_pictures() -> Iterator[list[str]]:
    """Pictures up to `max_pixels` are read, and no warning of Pillow's shows; gives a note on large ones."""
    notes: list[str] = []
    usual, limit = Image.MAX_IMAGE_PIXELS, max_pixels()
    Image.MAX_IMAGE_PIXELS = limit // 2  # Pillow warns above it, and refuses above twice as much
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", Image.DecompressionBombWarning)
            yield notes
    finally:
        Image.MAX_IMAGE_PIXELS = usual
    if caught:
        notes.append(
            f"pictures of more than {limit // 2:,} pixels, each of which takes much memory: {len(caught):,} "
            f"({MAX_PIXELS_VARIABLE}={limit} is the limit)"
        )


class BrokenPicture(ResgridError):
    """One picture that cannot be read, and why."""


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """The picture in `file`, of a format that its content shows or, for the few that have no signature, its
    name. Raises what Pillow's decoders raise.
    """
    Image.init()
    named = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    formats = [each for each in picture_formats() if Image.OPEN[each][1] or each == named]
    return Image.open(file, formats=formats)


def decode(file: IO[bytes], origin: str, resize: Resize) -> NDArray[np.uint8]:
    """A picture as (32, 32, 3): upright by EXIF, transparent parts on black.

    What only says something of the picture, such as a broken text or profile, does not stop it.
    Raises BrokenPicture, which names `origin`, for one that is broken or has more than 8 bits a channel.
    """
    try:
        try:
            image = _upright(file, origin)
        except Exception as cause:
            file.seek(0)
            try:
                image = _upright(io.BytesIO(_without_metadata(file.read())), origin)
            except Exception:
                raise cause from None
        if image.mode not in MODES:
            raise ValueError(f"pixels of type {image.mode}: save it with 8 bits a channel")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.asarray(to_square(image.convert("RGB"), resize))
    except Exception as error:  # a broken file raises whatever its decoder came upon, from a dozen types
        file.seek(0)
        kind = identify_bytes(file.read(START_BYTES))
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):
            reason = f"{reason.partition(',')[0]}: {MAX_PIXELS_VARIABLE} sets another one"
        elif not kind.is_picture:
            reason = f"it is {kind.name}. {kind.advice}"
        raise BrokenPicture(f"{origin} cannot be read as an image ({reason.rstrip('. ')})") from None


def _upright(file: IO[bytes], name: str) -> Image.Image:
    with open_picture(file, name) as opened:
        opened.load()
        try:
            return ImageOps.exif_transpose(opened)
        except Exception:  # EXIF is read anew there, and broken in many ways; the pixels are sound
            return opened.copy()


def _without_metadata(content: bytes) -> bytes:
    """A PNG without its ancillary chunks, a JPEG without its application segments, anything else as it is.

    What the pixels are drawn by stays: transparency, EXIF's orientation, Adobe's colour transform.
    """
    is_png = content.startswith(b"\x89PNG")
    if not is_png and not content.startswith(b"\xff\xd8\xff"):
        return content
    at = 8 if is_png else 2
    kept = [content[:at]]
    while (head := content[at : at + 16]) and (is_png or (head[:1] == b"\xff" and head[1:2] != b"\xda")):
        if is_png:
            end = at + 12 + int.from_bytes(head[:4], "big")
            keep = head[4:5].isupper() or head[4:8] in (b"tRNS", b"eXIf")
        else:  # up to the scan
            end = at + 2 + int.from_bytes(head[2:4], "big")
            is_adobe = head[4:9] == b"Adobe" and end - at > 15
            keep = (
                not re.match(rb".[\xe0-\xef\xfe]", head, re.DOTALL) or head[4:10] == b"Exif\0\0" or is_adobe
            )
        if keep:
            kept.append(content[at:end])
        at = max(end, at + 2)
    return b"".join([*kept, content[at:]])


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
