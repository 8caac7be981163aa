"""Raw images to the processed form: splits, statistics and a digest. The same input gives the same bytes."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from resgrid import config
from resgrid.data.cifar import Cifar
from resgrid.data.dataset import (
    ORDER,
    EqualImages,
    Meta,
    OnImage,
    Source,
    Split,
    content_digest,
    save,
    split_digest,
)
from resgrid.data.fetch import known_checksum, verify
from resgrid.data.sources import Digits, ImageFolder, count_classes, raw_path, truncate
from resgrid.errors import ResgridError

TRAIN, VALIDATION, TEST, UNUSED = range(4)  # where an image goes, as in ORDER

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
    not what `data` says.
    """
    source = _open(data, settings, raw)
    if settings.validation_fraction > 0 and "validation" in source.splits:
        raise ResgridError(
            f"preprocess.validation_fraction: {settings.validation_fraction}, but the images have a "
            "validation split of their own. Write 0.0."
        )
    loaded = {split: source.read(split, on_image) for split in ORDER if split in source.splits}
    source.report_reading()
    splits, left_out, duplicates = _arrange(data, settings, source, loaded)
    classes = [[source.class_names[label] for label in each.labels.tolist()] for each in splits.values()]
    log.info(f"Classes, as {' + '.join(splits)}: {count_classes(source.class_names, classes)}.")
    counts = histograms(splits["train"].images.numpy())
    scalar_mean, scalar_std = moments(counts.sum(axis=0))
    red, green, blue = (moments(channel) for channel in counts)
    if constant := [name for name, (_, std) in (("red", red), ("green", green), ("blue", blue)) if std == 0]:
        log.warning(
            f"Of the training images the {' and '.join(constant)} never varies, so normalization: "
            f"{{name: per_channel}} would divide by 0. {{name: scalar}} does not."
        )
    digests = {name: split_digest(split) for name, split in splits.items()}
    meta = Meta(
        source=data.source,
        class_names=source.class_names,
        resize=settings.resize,
        num_images={name: len(split.labels) for name, split in splits.items()},
        scalar_mean=scalar_mean,
        scalar_std=scalar_std,
        channel_mean=(red[0], green[0], blue[0]),
        channel_std=(red[1], green[1], blue[1]),
        split_digests=digests,
        digest=content_digest(source.class_names, digests),
        left_out=left_out,
        duplicates=duplicates,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, meta, splits)
    return meta


def _open(data: config.Data, settings: config.Preprocess, raw: Path) -> Source:
    if not raw.is_dir():
        raise ResgridError(f"{raw}: no such folder. `dvc repro download` makes it.")
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


# --- which image goes where -------------------------------------------------------------------------


def _arrange(
    data: config.Data, settings: config.Preprocess, source: Source, loaded: dict[str, Split]
) -> tuple[dict[str, Split], dict[str, list[str]], dict[str, EqualImages]]:
    """The splits, with those that are drawn from training; the names left out of each; the equal images.

    Raises ResgridError for an image folder with equal images in two classes, unless they are to be skipped.
    """
    part = np.concatenate([np.full(len(each.labels), ORDER.index(split)) for split, each in loaded.items()])
    names = [name for split in loaded for name in source.image_names(split, len(loaded[split].labels))]
    images = torch.cat([each.images for each in loaded.values()])
    labels = torch.cat([each.labels for each in loaded.values()]).numpy()
    loaded.clear()  # or the images would be in memory three times
    out = np.array([name in source.broken for name in names])
    first = _first_equal(images.numpy(), out)

    duplicates = {}
    if rows := np.flatnonzero(labels != labels[first]).tolist():
        pairs = [f"{names[i]} = {names[first[i]]}" for i in rows]
        duplicates["across_classes"] = EqualImages(num_images=len(pairs), first=tuple(pairs[:3]))
        message = f"{len(pairs):,} images are equal to one of another class: {truncate(pairs)}."
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

    def draw_apart(fraction: float, seed: int) -> NDArray[np.int64]:
        """Training images, drawn so that equal ones stay on one side."""
        rows = np.flatnonzero(part == TRAIN)
        distinct, which = np.unique(first[rows], return_inverse=True)
        return rows[draw(labels[distinct], source.class_names, fraction, seed)[which]]

    if isinstance(data, config.ImageFolder | config.Digits) and data.test_fraction:
        seed = data.split_seed if isinstance(data, config.Digits) else settings.seed
        part[draw_apart(data.test_fraction, seed)] = TEST
    left_out = {
        split: sorted(names[i] for i in np.flatnonzero(out & (part == code)))
        for code, split in enumerate(ORDER)
        if (out & (part == code)).any()
    }
    part[out] = UNUSED  # after the draw, which so remains what it is when a picture is mended
    if settings.validation_fraction > 0:
        part[draw_apart(settings.validation_fraction, settings.seed)] = VALIDATION
    if settings.training_fraction < 1:
        train = np.flatnonzero(part == TRAIN)
        drawn = draw(labels[train], source.class_names, settings.training_fraction, settings.seed)
        part[train[~drawn]] = UNUSED

    if pairs := _across_splits(part, first, names):
        duplicates["across_splits"] = EqualImages(num_images=len(pairs), first=tuple(pairs[:3]))
        log.warning(
            f"{len(pairs):,} images are in two splits, and their scores say little of new images: "
            f"{truncate(pairs)}."
        )
    splits = {}
    for code in sorted(set(part.tolist()) - {UNUSED}):
        split, mask = ORDER[code], torch.from_numpy(part == code)
        splits[split] = Split(images=images[mask], labels=torch.from_numpy(labels)[mask])
        if left_out and (lost := set(range(len(source.class_names))) - set(splits[split].labels.tolist())):
            name = source.class_names[min(lost)]
            raise ResgridError(f"{source.path}: class {name!r} has no picture in {split} that can be used.")
    return splits, left_out, duplicates


def _first_equal(images: NDArray[np.uint8], broken: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each image the index of the first one with the same pixels, (N,); for a broken one its own."""
    seen: dict[bytes, int] = {}
    digests = (hashlib.blake2b(image.data, digest_size=16).digest() for image in images)  # 0.3 s for 60,000
    return np.array([i if broken[i] else seen.setdefault(each, i) for i, each in enumerate(digests)])


def _across_splits(part: NDArray[np.int64], first: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """Each image that equals one of an earlier split, as `test/a/1.png = train/a/2.png`."""
    pairs = []
    earlier: dict[int, int] = {}  # by the first of equal images: the first of those in a split
    for code in (TRAIN, VALIDATION, TEST):
        rows = np.flatnonzero(part == code).tolist()
        pairs += [f"{names[i]} = {names[earlier[first[i]]]}" for i in rows if first[i] in earlier]
        for i in rows:
            earlier.setdefault(int(first[i]), i)
    return pairs


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
