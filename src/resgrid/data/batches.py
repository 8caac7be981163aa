"""Batches made on the device: crop, flip, rotation and shift as batched tensor code, a draw for each image.

The whole split stays on the device as uint8. Crop and flip (He et al. 2015, section 4.2) are one gather
through a strided view of the padded images; rotation and shift are those of Keras's ImageDataGenerator: one
bilinear resampling about the centre, in which the nearest edge pixel fills what comes from outside. On the
CPU that is a few per cent of a training step, at which PIL images in worker processes take a third of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resgrid.config import (
    Augmentation,
    ChannelStatistics,
    FixedStatistics,
    Normalization,
    ScalarStatistics,
)
from resgrid.data.dataset import SIDE, Meta, Split
from resgrid.errors import ResgridError
from resgrid.schema import Triple


class Draws(NamedTuple):
    """What is done to each image of an epoch; every field is (N,), on the device of the images."""

    flip: Tensor  # bool
    top: Tensor  # int64, the window's first row in the padded image: 0 … 2 * crop_padding
    left: Tensor  # int64, its first column
    angle: Tensor  # radians
    down: Tensor  # as a part of the side
    right: Tensor


class Batches:
    """Epochs of training batches: iterating once is one epoch.

    Yields `len(self)` pairs of images, float32 (batch_size, 3, 32, 32) in channels-last layout, and labels,
    int64 (batch_size,). The order is drawn anew for each epoch, and the images at its end that fill no batch
    are left out: so the shapes are fixed, batch norm never sees a batch of one, and every image takes its
    turn over the epochs. All draws of an epoch are made at its start, from `generator` alone: its state then
    is all that repeating the epoch needs. Nothing in an epoch makes the CPU wait for the device.
    """

    def __init__(
        self,
        split: Split,
        augmentation: Augmentation,
        batch_size: int,
        mean: Triple,
        std: Triple,
        generator: torch.Generator,
    ) -> None:
        """`split` lies on the device of `generator`; `mean` and `std` are on the 0–1 scale."""
        assert len(split.labels) >= batch_size
        self.padded = pad(split.images, augmentation.crop_padding)
        self.labels = split.labels
        self.augmentation, self.batch_size, self.generator = augmentation, batch_size, generator
        self.mean, self.std = _per_channel(mean, split.images.device), _per_channel(std, split.images.device)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        num_images = len(self.labels)
        order = torch.randperm(num_images, generator=self.generator, device=self.generator.device)
        draws = draw(self.augmentation, num_images, self.generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = slice(start, start + self.batch_size)
            index = order[batch]
            images = augment(self.padded, index, Draws(*(field[batch] for field in draws)), self.augmentation)
            yield (images - self.mean) / self.std, self.labels[index]


def in_order(split: Split, mean: Triple, std: Triple, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of `split` once, in order and as it is, in the form that `Batches` yields.

    The last batch may be smaller.
    """
    mean_255, std_255 = _per_channel(mean, split.images.device), _per_channel(std, split.images.device)
    for start in range(0, len(split.labels), batch_size):
        images = split.images[start : start + batch_size].permute(0, 3, 1, 2)  # (B, 3, 32, 32)
        yield (images - mean_255) / std_255, split.labels[start : start + batch_size]


def pad(images: Tensor, padding: int) -> Tensor:
    """uint8 (N, 32, 32, 3) with `padding` pixels of black on each side: (N, 32 + 2p, 32 + 2p, 3)."""
    return F.pad(images, (0, 0, padding, padding, padding, padding)).contiguous()


def draw(augmentation: Augmentation, num_images: int, generator: torch.Generator) -> Draws:
    """One draw for each image, every kind independent of the others.

    A kind that is switched off still uses up its random numbers, so that the other kinds draw the same
    without it: two recipes that differ in one kind differ in nothing else.
    """

    def uniform(limit: float) -> Tensor:  # within ±limit
        drawn = torch.rand(num_images, generator=generator, device=generator.device)
        return (2 * drawn - 1) * limit

    def window() -> Tensor:
        high = 2 * augmentation.crop_padding + 1
        return torch.randint(high, (num_images,), generator=generator, device=generator.device)

    return Draws(
        flip=(uniform(1.0) < 0) & augmentation.flip,
        top=window(),
        left=window(),
        angle=uniform(math.radians(augmentation.rotation_degrees)),
        down=uniform(augmentation.shift_fraction),
        right=uniform(augmentation.shift_fraction),
    )


def augment(padded: Tensor, index: Tensor, draws: Draws, augmentation: Augmentation) -> Tensor:
    """Cut 32x32 out of the images `padded[index]`, then flip, then rotate and shift.

    Returns (B, 3, 32, 32) in channels-last layout on the 0–255 scale: uint8, or float32 where pixels were
    interpolated. Output pixel p takes the value at R(angle) · (p + (right, down)), p from the centre.
    """
    num_images, height, width, channels = padded.shape
    by_image, by_row, by_column, by_channel = padded.stride()
    windows = padded.as_strided(  # every window of every image, with no copy
        (num_images, height - SIDE + 1, width - SIDE + 1, SIDE, SIDE, channels),
        (by_image, by_row, by_column, by_row, by_column, by_channel),
    )
    images = windows[index, draws.top, draws.left]  # (B, 32, 32, 3)
    if augmentation.flip:
        images = torch.where(draws.flip[:, None, None, None], images.flip(2), images)
    images = images.permute(0, 3, 1, 2)  # (B, 3, 32, 32): NHWC in memory is channels-last
    if augmentation.rotation_degrees == 0 and augmentation.shift_fraction == 0:
        return images
    cos, sin = draws.angle.cos(), draws.angle.sin()
    right, down = 2 * draws.right, 2 * draws.down  # a side is 2 long in affine_grid's coordinates
    row_x = torch.stack((cos, -sin, cos * right - sin * down), dim=1)
    row_y = torch.stack((sin, cos, sin * right + cos * down), dim=1)
    # Pixel centres at (2i + 1) / 32 - 1 (align_corners=False) are exact in binary, and ±1 at the first and
    # last pixel (True) leaves steps of 2/31, which are not: only the former keeps an unrotated image exact.
    grid = F.affine_grid(torch.stack((row_x, row_y), dim=1), list(images.shape), align_corners=False)
    resampled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return resampled.contiguous(memory_format=torch.channels_last)


def _per_channel(values: Triple, device: torch.device) -> Tensor:
    """(1, 3, 1, 1), on the 0–255 scale."""
    return 255 * torch.tensor(values, device=device).view(1, 3, 1, 1)


def statistics(meta: Meta, normalization: Normalization) -> tuple[Triple, Triple]:
    """Mean and standard deviation a channel, on the 0–1 scale.

    Raises ResgridError if the images do not vary, so that nothing can be divided by their deviation.
    """
    mean: Triple
    std: Triple
    match normalization:
        case ScalarStatistics():
            mean, std = (meta.scalar_mean,) * 3, (meta.scalar_std,) * 3
        case ChannelStatistics():
            mean, std = meta.channel_mean, meta.channel_std
        case FixedStatistics():
            mean, std = normalization.mean, normalization.std
    if min(std) == 0:
        raise ResgridError(
            f"normalization {normalization.name}: the training images have the same value everywhere in a "
            "channel, and a deviation of 0 cannot be divided by. Take scalar or fixed figures."
        )
    return mean, std
