"""A person's own pictures, classified: what `resgrid predict` does.

A picture goes the way of a training image: `read_picture` with the resizing that is stored with the
weights, then their mean and deviation. Pictures stream through in batches, so that a folder may hold any
number of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resgrid.config import Resize
from resgrid.data.pictures import is_picture, picture_suffixes, read_picture
from resgrid.errors import ResgridError
from resgrid.filetype import first_bytes
from resgrid.weights import WeightsInfo

BATCH = 64  # pictures in memory at once, at 3 kB each


class Predictor(nn.Module):
    """RGB images (N, 3, 32, 32) on the 0–1 scale to probabilities (N, classes): what other programs want."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: nn.Module, info: WeightsInfo) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(info.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.softmax(self.classifier((images - self.mean) / self.std), dim=1)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one file shows, or why that cannot be said."""

    file: str
    top: tuple[tuple[str, float], ...] = ()  # class and probability, best first
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.error:
            return {"file": self.file, "error": self.error}
        return {"file": self.file, "top": [{"class": name, "probability": value} for name, value in self.top]}


def predict(
    model: nn.Module, info: WeightsInfo, files: Iterable[Path], device: torch.device, top: int = 3
) -> Iterator[Prediction]:
    """The `top` classes of each file, in order; `model` moves to `device`.

    Files are opened as late as their batch is asked for. One that cannot be read has its reason in place of
    classes, and the next ones go on.
    """
    waiting = iter(files)
    while batch := list(islice(waiting, BATCH)):
        read = [_read(file, info.resize) for file in batch]
        images = [each for each in read if not isinstance(each, str)]
        rows = iter(probabilities(model, info, np.stack(images), device) if images else ())
        for file, each in zip(batch, read, strict=True):
            if isinstance(each, str):
                yield Prediction(file=str(file), error=each)
            else:
                values, classes = next(rows).topk(min(top, len(info.class_names)))
                pairs = zip(classes.tolist(), values.tolist(), strict=True)
                yield Prediction(
                    file=str(file), top=tuple((info.class_names[label], value) for label, value in pairs)
                )


def probabilities(
    model: nn.Module, info: WeightsInfo, images: NDArray[np.uint8], device: torch.device
) -> Tensor:
    """Of each class for `images` (N, 32, 32, 3), in fp32 on the CPU: (N, classes)."""
    scaled = torch.from_numpy(images).to(device).permute(0, 3, 1, 2) / 255  # (N, 3, 32, 32)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        result: Tensor = Predictor(model, info).to(device)(scaled)
    return result.cpu()


def find_pictures(paths: Iterable[Path], passed_over: Counter[str]) -> Iterator[Path]:
    """The files that `paths` name, and of a folder all pictures by suffix or content, ordered by name.

    Hidden files and links to folders are passed over, and counted by kind as all others are. A folder without
    pictures stands for itself, as what is not there does: `predict` says so.
    """
    for path in paths:
        pictures = _in_folder(path, passed_over) if path.is_dir() else iter((path,))
        yield next(pictures, path)
        yield from pictures


def _in_folder(folder: Path, passed_over: Counter[str]) -> Iterator[Path]:
    suffixes = picture_suffixes()
    for place, subfolders, files in os.walk(folder):
        passed_over["a link to a folder"] += sum(Path(place, name).is_symlink() for name in subfolders)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            file = Path(place, name)
            if name.startswith("."):
                passed_over["a hidden file"] += 1
            elif file.suffix.lower() in suffixes:
                yield file
            else:
                try:
                    start = first_bytes(file)
                except ResgridError:  # a link that leads nowhere, a pipe, a file of somebody else
                    passed_over["a file that cannot be read"] += 1
                    continue
                if is_picture(start):
                    yield file
                else:
                    passed_over["a file that Pillow cannot identify as a picture"] += 1


def _read(file: Path, resize: Resize) -> NDArray[np.uint8] | str:
    if file.is_dir():
        return f"{file}: there is no picture in this folder, nor below it."
    try:
        first_bytes(file)  # of a pipe there are none
        with file.open("rb") as opened:
            return read_picture(opened, str(file), resize).pixels
    except ResgridError as error:
        return str(error)
