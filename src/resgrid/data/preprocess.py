"""Raw images to the processed form: splits, statistics and a digest. The same input gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from resgrid import config
from resgrid.data.cifar import Cifar
from resgrid.data.dataset import SIDE, Meta, Split, content_digest, save, split_digest
from resgrid.data.fetch import known_checksum, verify
from resgrid.data.room import require_disk
from resgrid.data.sources import BrokenPictures, Digits, ImageFolder, OnImage, Source, draw, raw_path
from resgrid.errors import ResgridError


def preprocess(
    data: config.Data,
    settings: config.Preprocess,
    raw: Path,
    out: Path,
    on_image: OnImage | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Meta:
    """Make `out` (see `dataset`) of what `download` put into `raw`; returns its description.

    `say` is told what is passed over and left out. Raises ResgridError for raw data that is missing, damaged
    or not what `data` says.
    """
    source = _open(data, settings, raw)
    loaded = _load_all(source, on_image)
    for note in source.notes:
        say(note)
    train, test = loaded.pop("train"), loaded.pop("test")
    held_out = loaded  # an image folder may have a validation split of its own
    if settings.validation_fraction > 0:
        if held_out:
            raise ResgridError(
                f"preprocess.validation_fraction: {settings.validation_fraction}, but the images have a "
                "validation split of their own. Write 0.0."
            )
        drawn = draw(train.labels.numpy(), source.class_names, settings.validation_fraction, settings.seed)
        held_out, train = {"validation": _part(train, drawn)}, _part(train, ~drawn)
    if settings.training_fraction < 1:
        drawn = draw(train.labels.numpy(), source.class_names, settings.training_fraction, settings.seed)
        train = _part(train, drawn)
    splits = {"train": train, **held_out, "test": test}
    counts = histograms(splits["train"].images.numpy())
    scalar_mean, scalar_std = moments(counts.sum(axis=0))
    red, green, blue = (moments(channel) for channel in counts)
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
        left_out={split: sorted(names) for split, names in source.broken.items() if names},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(meta.num_images.values()) * (3 * SIDE * SIDE + 8)
    require_disk(out.parent, num_bytes, f"{out.name} of {sum(meta.num_images.values()):,} images")
    save(out, meta, splits)
    return meta


def _load_all(source: Source, on_image: OnImage | None) -> dict[str, Split]:
    """Every split; raises BrokenPictures, with those of all splits."""
    loaded: dict[str, Split] = {}
    broken: BrokenPictures | None = None
    for split in source.splits:
        try:
            loaded[split] = source.load(split, on_image)
        except BrokenPictures as error:  # the next one tells of these as well
            broken = error
    if broken:
        raise broken
    return loaded


def _part(split: Split, chosen: NDArray[np.bool_]) -> Split:
    mask = torch.from_numpy(chosen)
    return Split(images=split.images[mask], labels=split.labels[mask])


def _open(data: config.Data, settings: config.Preprocess, raw: Path) -> Source:
    if not raw.is_dir():
        raise ResgridError(f"{raw}: no such folder. `dvc repro download` makes it.")
    if isinstance(data, config.Digits):
        return Digits(raw / "digits.safetensors", data.test_fraction, data.split_seed)
    path = raw_path(raw)
    if checksum := known_checksum(data):
        if not path.is_file():
            raise ResgridError(f"{raw}: does not hold one archive. `dvc repro download` makes it anew.")
        verify(path, checksum, "`dvc repro -f download` fetches it again.")
    if not isinstance(data, config.ImageFolder):
        return Cifar(path)
    return ImageFolder(
        path,
        settings.resize,
        test_fraction=data.test_fraction,
        seed=settings.seed,
        on_broken=data.on_broken,
    )


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
