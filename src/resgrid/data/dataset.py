"""Labelled images: what reads them, and the processed form.

That is a file of arrays a split and `meta.json`, which describes them. `<split>.safetensors` holds `images`,
uint8 (N, 32, 32, 3), and `labels`, int64 (N,). The same images always make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from resgrid.config import Resize
from resgrid.errors import ResgridError
from resgrid.project import write_whole
from resgrid.schema import Strict, Triple

SIDE = 32  # pixels
SPLITS = ("train", "test")
ORDER = ("train", "validation", "test")

OnImage = Callable[[int, int], None]  # images that are read, all of them

FIX = "`dvc repro preprocess` makes it anew."


@dataclass(frozen=True)
class Split:
    images: Tensor  # uint8 (N, 32, 32, 3), RGB
    labels: Tensor  # int64 (N,)


@dataclass(frozen=True)
class Images:
    """Images of one or several splits, each in the source's order."""

    pixels: NDArray[np.uint8]  # (N, 32, 32, 3), RGB
    labels: NDArray[np.int64]  # (N,)
    splits: NDArray[np.str_]  # (N,)
    names: list[str]

    def of(self, rows: NDArray[np.bool_]) -> Split:
        return Split(torch.from_numpy(self.pixels[rows]), torch.from_numpy(self.labels[rows]))


class Source:
    """Labelled images, of which one or several splits are read at once."""

    class_names: tuple[str, ...]  # in the order of the labels
    splits: tuple[str, ...] = SPLITS

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken: dict[str, str] = {}  # pictures that could not be read, and why

    def load(self, split: str) -> Split:
        """The images of one split; raises ResgridError if there is none or one is broken."""
        if split not in self.splits:
            raise ResgridError(f"{self.path}: there is no split {split!r}, only {' and '.join(self.splits)}.")
        images = self.read((split,))
        return images.of(images.splits == split)

    def read(self, splits: Sequence[str], on_image: OnImage | None = None) -> Images:
        """The images of `splits`, with black in place of a broken one that is left out.

        Logs remarks on them. Raises ResgridError, which lists the broken ones, if they are not left out.
        """
        raise NotImplementedError


class EqualImages(Strict):
    """Images of which another has the same 32x32 pixels."""

    num_images: int
    first: tuple[str, ...]  # pairs, as in `test/a/1.png = train/b/2.png`


class Meta(Strict):
    """What `meta.json` holds. Means and deviations are the training split's, on the 0–1 scale."""

    source: str
    class_names: tuple[str, ...]  # in the order of the labels
    resize: Resize  # how images of another shape became squares
    num_images: dict[str, int]  # by split
    scalar_mean: float
    scalar_std: float
    channel_mean: Triple
    channel_std: Triple
    split_digests: dict[str, str]
    digest: str  # sha256:… of the class names and the splits' digests
    # not written where there are none, so that files of earlier versions stay as they are
    left_out: dict[str, list[str]] = Field(default={})  # by split: broken, or in two classes
    duplicates: dict[str, EqualImages] = Field(default={})  # across_splits, across_classes


def split_digest(split: Split) -> str:
    """`sha256:…` over the bytes of the images, then of the labels."""
    sha256 = hashlib.sha256()
    for tensor in (split.images, split.labels):
        sha256.update(tensor.contiguous().numpy().data)
    return f"sha256:{sha256.hexdigest()}"


def content_digest(class_names: tuple[str, ...], split_digests: Mapping[str, str]) -> str:
    """`sha256:…` of the whole content: of its class names and of each split."""
    content = json.dumps([class_names, sorted(split_digests.items())])
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def save(folder: Path, meta: Meta, splits: Mapping[str, Split]) -> None:
    """Write `folder` anew: whole, or not at all."""
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for name, split in splits.items():
        tensors = {"images": split.images.contiguous(), "labels": split.labels.contiguous()}
        write_whole(aside / f"{name}.safetensors", save_tensors(tensors))  # with the umask's mode
    content = meta.model_dump_json(indent=2, exclude_defaults=True)
    write_whole(aside / "meta.json", f"{content}\n".encode())
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)


def load_meta(folder: Path) -> Meta:
    """Raises ResgridError for a `meta.json` that is missing or was changed."""
    path = folder / "meta.json"
    try:
        meta = Meta.model_validate_json(path.read_text(encoding="utf-8"))
        if meta.digest != content_digest(meta.class_names, meta.split_digests):
            raise ValueError("its digest is not that of its content")
    except (OSError, ValueError) as error:
        raise ResgridError(f"{path}: cannot be read ({error}). {FIX}") from None
    return meta


def load_split(folder: Path, split: str) -> Split:
    """Raises ResgridError for a split that is missing, or whose bytes are not those that were written."""
    meta = load_meta(folder)
    if split not in meta.num_images:
        advice = " preprocess.validation_fraction above 0 makes one." if split == "validation" else ""
        known = ", ".join(meta.num_images)
        raise ResgridError(f"{folder}: there is no split {split!r}, only {known}.{advice}")
    path = folder / f"{split}.safetensors"
    try:
        tensors = load_file(path)
        loaded = Split(images=tensors["images"], labels=tensors["labels"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ResgridError(f"{path}: cannot be read ({error}). {FIX}") from None
    if split_digest(loaded) != meta.split_digests[split]:
        raise ResgridError(f"{path}: the file is damaged (its digest is not the one in meta.json). {FIX}")
    return loaded
