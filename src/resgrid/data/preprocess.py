"""Raw images to the processed form: splits, statistics and a digest. The same input gives the same bytes."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resgrid import config
from resgrid.data.cifar import Cifar
from resgrid.data.dataset import (
    ORDER,
    EqualImages,
    Images,
    Meta,
    OnImage,
    Source,
    content_digest,
    save,
    split_digest,
)
from resgrid.data.fetch import known_checksum, verify
from resgrid.data.sources import Digits, ImageFolder, count_classes, raw_path, truncate
from resgrid.errors import OutOfMemory, ResgridError

log = logging.getLogger(__name__)


def preprocess(
    data: config.Data,
    settings: config.Preprocess,
    raw: Path,
    out: Path,
    on_image: OnImage | None = None,
) -> Meta:
    """Make `out` (see `dataset`) of what `download` put into `raw`; returns its description.

    Logs what a person should know of the images. Raises ResgridError for raw data that is missing, damaged or
    not what `data` says, and OutOfMemory.
    """
    source = _open(data, settings, raw)
    if settings.validation_fraction > 0 and "validation" in source.splits:
        raise ResgridError(
            f"preprocess.validation_fraction: {settings.validation_fraction}, but the images have a "
            "validation split of their own. Write 0.0."
        )
    try:
        return _process(data, settings, source, out, on_image)
    except MemoryError as error:
        raise OutOfMemory(f"preprocess: memory is too small, at some 9 kB an image. {error}") from None


def _open(data: config.Data, settings: config.Preprocess, raw: Path) -> Source:
    if isinstance(data, config.Digits):
        return Digits(raw / "digits.safetensors")
    path = raw_path(raw)
    if checksum := known_checksum(data):
        if not path.is_file():
            raise ResgridError(f"{raw}: does not hold one archive. `dvc repro download` makes it anew.")
        verify(path, checksum, "`dvc repro -f download` fetches it again.")
    if not isinstance(data, config.ImageFolder):
        return Cifar(path)
    return ImageFolder(path, settings.resize, test_fraction=data.test_fraction, on_broken=data.on_broken)


def _process(
    data: config.Data, settings: config.Preprocess, source: Source, out: Path, on_image: OnImage | None
) -> Meta:
    images = source.read(source.splits, on_image)
    part, left_out, duplicates = _arrange(data, settings, source, images)
    splits = {split: images.of(part == split) for split in ORDER if split in part}
    names = {split: [source.class_names[i] for i in each.labels.tolist()] for split, each in splits.items()}
    for split in splits if left_out else ():
        if lost := sorted(set(source.class_names) - set(names[split])):
            raise ResgridError(f"{source.path}: class {lost[0]!r} has no usable picture in {split}.")
    log.info(f"Classes, as {' + '.join(splits)}: {count_classes(source.class_names, names.values())}.")
    counts = histograms(splits["train"].images.numpy())
    scalar_mean, scalar_std = moments(counts.sum(axis=0))
    red, green, blue = (moments(channel) for channel in counts)
    if constant := [name for name, (_, std) in (("red", red), ("green", green), ("blue", blue)) if std == 0]:
        log.warning(
            f"Of the training images the {' and '.join(constant)} never varies, so normalization: "
            f"{{name: per_channel}} would divide by 0. {{name: scalar}} does not."
        )
    digests = {split: split_digest(each) for split, each in splits.items()}
    meta = Meta(
        source=data.source,
        class_names=source.class_names,
        resize=settings.resize,
        num_images={split: len(each.labels) for split, each in splits.items()},
        scalar_mean=scalar_mean,
        scalar_std=scalar_std,
        channel_mean=(red[0], green[0], blue[0]),
        channel_std=(red[1], green[1], blue[1]),
        split_digests=digests,
        digest=content_digest(source.class_names, digests),
        left_out=left_out,
        duplicates=duplicates,
    )
    save(out, meta, splits)
    return meta


# --- which image goes where -------------------------------------------------------------------------


def _arrange(
    data: config.Data, settings: config.Preprocess, source: Source, images: Images
) -> tuple[NDArray[np.str_], dict[str, list[str]], dict[str, EqualImages]]:
    """The split of each image, (N,), with those that are drawn from training, or "unused"; the names left out
    of each split; the equal images.

    Raises ResgridError for an image folder with equal images in two classes, unless they are to be skipped.
    """
    names, labels = images.names, images.labels
    part = images.splits.astype("U10")  # wide enough for "validation"
    out = np.array([name in source.broken for name in names])
    # of each image the first one with the same pixels; of a broken one itself
    seen: dict[bytes, int] = {}
    digests = (hashlib.blake2b(each, digest_size=16).digest() for each in images.pixels)  # 0.3 s for 60,000
    first = np.array([i if out[i] else seen.setdefault(each, i) for i, each in enumerate(digests)])

    duplicates = {}

    def note_pairs(kind: str, rows: Sequence[int], others: Sequence[int]) -> str:
        pairs = [f"{names[i]} = {names[j]}" for i, j in zip(rows, others, strict=True)]
        duplicates[kind] = EqualImages(num_images=len(pairs), first=tuple(pairs[:3]))
        return truncate(pairs)

    if (rows := np.flatnonzero(labels != labels[first])).size:
        pairs = note_pairs("across_classes", rows.tolist(), first[rows].tolist())
        message = f"{rows.size:,} images are equal to one of another class: {pairs}."
        if not isinstance(data, config.ImageFolder):
            log.warning(message)
        elif data.on_broken == "skip":
            log.warning(f"Left out, both: {message}")
            out |= np.isin(first, first[rows])
        else:
            raise ResgridError(
                f"{source.path}: {message} Correct or remove them; data.on_broken: skip in params.yaml "
                "leaves them out."
            )

    def draw_apart(split: str, fraction: float, seed: int) -> None:
        """Move training images to `split`, drawn so that equal ones stay on one side."""
        rows = np.flatnonzero(part == "train")
        distinct, which = np.unique(first[rows], return_inverse=True)
        part[rows[draw(labels[distinct], source.class_names, fraction, seed)[which]]] = split

    if isinstance(data, config.ImageFolder | config.Digits) and data.test_fraction:
        seed = data.split_seed if isinstance(data, config.Digits) else settings.seed
        draw_apart("test", data.test_fraction, seed)
    left_out = {
        split: sorted(names[i] for i in np.flatnonzero(out & (part == split)))
        for split in ORDER
        if split in part[out]
    }
    part[out] = "unused"  # after the draw, which so remains what it is when a picture is mended
    if settings.validation_fraction > 0:
        draw_apart("validation", settings.validation_fraction, settings.seed)
    if settings.training_fraction < 1:
        train = np.flatnonzero(part == "train")
        drawn = draw(labels[train], source.class_names, settings.training_fraction, settings.seed)
        part[train[~drawn]] = "unused"

    earliest: dict[int, int] = {}  # by the first of equal images: the first of them in the earliest split
    rows_in_order = [i for split in ORDER for i in np.flatnonzero(part == split).tolist()]
    repeated = [i for i in rows_in_order if part[earliest.setdefault(first[i], i)] != part[i]]
    if repeated:
        pairs = note_pairs("across_splits", repeated, [earliest[first[i]] for i in repeated])
        log.warning(
            f"{len(repeated):,} images are in two splits, and their scores say little of new images: {pairs}."
        )
    return part, left_out, duplicates


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
                "Give it another one that differs, or draw no split: data.test_fraction: 0.0, "
                "preprocess.validation_fraction: 0.0, training_fraction: 1.0."
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = np.argsort(bits.random_raw(len(members)), kind="stable")
        drawn[members[order[:count]]] = True
    return drawn


# --- statistics -------------------------------------------------------------------------------------


def histograms(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each value stands in each channel of (N, H, W, 3): (3, 256)."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1024):  # bincount makes an int64 of every pixel: 8 MB at a time
        for channel in range(3):
            pixels = images[start : start + 1024, :, :, channel].ravel()
            counts[channel] += np.bincount(pixels, minlength=256)
    return counts


def moments(counts: NDArray[np.int64]) -> tuple[float, float]:
    """Mean and standard deviation (of the population), on the 0–1 scale, of a histogram's values.

    In exact integers up to the last division and root, so that no order of summation shows in the result.
    """
    of_value = [int(count) for count in counts]
    number = sum(of_value)
    total = sum(value * count for value, count in enumerate(of_value))
    squares = sum(value * value * count for value, count in enumerate(of_value))
    return total / (255 * number), math.sqrt(number * squares - total * total) / (255 * number)
