"""Augmentation against a slow version, an image and a pixel at a time, that is given the same draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from resgrid.config import Augmentation
from resgrid.data.batches import Batches, Draws, augment, draw, in_order, pad
from resgrid.data.dataset import Split

NOTHING = Augmentation(flip=False, crop_padding=0, rotation_degrees=0.0, shift_fraction=0.0)
EVERYTHING = Augmentation(flip=True, crop_padding=4, rotation_degrees=15.0, shift_fraction=0.1)
MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """40 real digits, (40, 32, 32, 3), shaded differently in each channel, so that none can be mixed up."""
    digits = load_digits().images[:40].repeat(4, axis=1).repeat(4, axis=2)  # (40, 32, 32), 0–16
    shaded = np.stack([15 * digits, 255 - 12 * digits, 40 + 9 * digits], axis=-1)
    return torch.from_numpy(shaded.astype(np.uint8))


def numbered(count: int) -> Split:
    """Images that are one colour each: their own number, which is their label too."""
    numbers = torch.arange(count)
    pixels = numbers.to(torch.uint8)[:, None, None, None].expand(count, 32, 32, 3)
    return Split(images=pixels.contiguous(), labels=numbers)


def zero_draws(count: int, **fields: torch.Tensor) -> Draws:
    zeros = torch.zeros(count)
    draws = Draws(zeros.bool(), zeros.long(), zeros.long(), zeros, zeros, zeros)
    return draws._replace(**fields)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slowly(
    image: NDArray[np.uint8],
    padding: int,
    flip: bool,
    top: int,
    left: int,
    angle: float,
    down: float,
    right: float,
) -> NDArray[np.float64]:
    """(32, 32, 3) on the 0–255 scale; `down` and `right` in pixels."""
    cropped = np.zeros((32, 32, 3))
    for y in range(32):
        for x in range(32):
            from_y, from_x = y + top - padding, (31 - x if flip else x) + left - padding
            if 0 <= from_y < 32 and 0 <= from_x < 32:
                cropped[y, x] = image[from_y, from_x]
    moved = np.zeros((32, 32, 3))
    for y in range(32):
        for x in range(32):
            across, along = x - 15.5 + right, y - 15.5 + down
            from_x = 15.5 + math.cos(angle) * across - math.sin(angle) * along
            from_y = 15.5 + math.sin(angle) * across + math.cos(angle) * along
            from_x, from_y = (
                min(max(from_x, 0.0), 31.0),
                min(max(from_y, 0.0), 31.0),
            )  # the nearest edge pixel
            x0, y0 = int(from_x), int(from_y)
            x1, y1 = min(x0 + 1, 31), min(y0 + 1, 31)
            a, b = from_x - x0, from_y - y0
            moved[y, x] = (1 - b) * ((1 - a) * cropped[y0, x0] + a * cropped[y0, x1]) + b * (
                (1 - a) * cropped[y1, x0] + a * cropped[y1, x1]
            )
    return moved


@pytest.mark.parametrize(
    ("rotation", "shift"), [(0.0, 0.0), (15.0, 0.0), (0.0, 0.1), (15.0, 0.1), (180.0, 0.5)]
)
def test_augmentation_does_to_each_image_what_the_slow_version_does(images, rotation, shift):
    recipe = Augmentation(flip=True, crop_padding=4, rotation_degrees=rotation, shift_fraction=shift)
    index = torch.randperm(40, generator=generator(1))[:8]
    draws = draw(recipe, 8, generator(2))
    fast = augment(pad(images, 4), index, draws, recipe)
    assert fast.shape == (8, 3, 32, 32)
    assert draws.flip.any()
    assert not draws.flip.all()
    for row, number in enumerate(index.tolist()):
        flip, top, left, angle, down, right = (field[row].item() for field in draws)
        slow = slowly(images[number].numpy(), 4, flip, top, left, angle, 32 * down, 32 * right)
        exact = rotation == shift == 0
        np.testing.assert_allclose(
            fast[row].permute(1, 2, 0).numpy(), slow, rtol=0, atol=0 if exact else 2e-3
        )


def test_a_rotation_by_nothing_is_the_exact_identity(images):
    recipe = EVERYTHING.model_copy(update={"crop_padding": 0})
    result = augment(images, torch.arange(40), zero_draws(40), recipe)
    assert torch.equal(result, images.permute(0, 3, 1, 2).float())


def test_a_quarter_turn_is_numpys_rot90(images):
    quarter = zero_draws(40, angle=torch.full((40,), math.pi / 2))
    turned = augment(images, torch.arange(40), quarter, EVERYTHING.model_copy(update={"crop_padding": 0}))
    expected = np.rot90(images.numpy(), axes=(1, 2)).astype(np.float32)
    np.testing.assert_allclose(turned.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=2e-3)


def test_a_shift_by_three_pixels_repeats_the_edge(images):
    shift = zero_draws(40, down=torch.full((40,), 3 / 32))
    moved = augment(images, torch.arange(40), shift, EVERYTHING.model_copy(update={"crop_padding": 0}))
    rows = np.minimum(np.arange(32) + 3, 31)  # output row p shows input row p + 3
    np.testing.assert_allclose(
        moved.permute(0, 2, 3, 1).numpy(), images.numpy()[:, rows].astype(np.float32), rtol=0, atol=2e-3
    )


def test_draws_stay_within_their_limits_and_reach_them():
    draws = draw(EVERYTHING, 20_000, generator())
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    for window in (draws.top, draws.left):
        counts = torch.bincount(window, minlength=9)
        assert counts.shape == (9,)  # 0 to 8: nothing beyond the padding of 4 on both sides
        assert counts.min() > 0.9 * 20_000 / 9
    for drawn, limit in ((draws.angle, math.radians(15)), (draws.down, 0.1), (draws.right, 0.1)):
        assert 0.99 * limit < drawn.max() <= limit
        assert -limit <= drawn.min() < -0.99 * limit
        assert drawn.mean().item() == pytest.approx(0, abs=0.03 * limit)


def test_every_kind_is_drawn_independently_for_each_image():
    draws = torch.stack([field.double() for field in draw(EVERYTHING, 20_000, generator())])
    correlation = np.corrcoef(draws.numpy())
    np.testing.assert_allclose(correlation, np.eye(6), atol=0.03)
    neighbours = [np.corrcoef(kind[:-1], kind[1:])[0, 1] for kind in draws.numpy()]
    np.testing.assert_allclose(neighbours, np.zeros(6), atol=0.03)


def test_switching_one_kind_off_leaves_the_draws_of_the_others():
    everything = draw(EVERYTHING, 100, generator())
    for change, field in (("flip", "flip"), ("crop_padding", "top"), ("rotation_degrees", "angle")):
        fewer = draw(
            EVERYTHING.model_copy(update={change: type(getattr(EVERYTHING, change))(0)}), 100, generator()
        )
        assert not getattr(fewer, field).any()
        kept = set(Draws._fields) - {field, "left" if field == "top" else field}
        assert all(torch.equal(getattr(fewer, name), getattr(everything, name)) for name in kept)


def test_training_batches_are_normalised_and_channels_last():
    split = numbered(8)
    batches = Batches(split, NOTHING, 4, MEAN, STD, generator())
    images, labels = next(iter(batches))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, label in zip(images, labels.tolist(), strict=True):
        expected = [(label / 255 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
        assert image.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-6)
        assert image.var(dim=(1, 2)).max() < 1e-10


def test_resampled_batches_are_channels_last_too(images):
    split = Split(images=images, labels=torch.arange(40))
    resampled, _ = next(iter(Batches(split, EVERYTHING, 8, MEAN, STD, generator())))
    assert resampled.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_drops_the_incomplete_batch_and_repeats_no_image():
    batches = Batches(numbered(23), NOTHING, 5, MEAN, STD, generator())
    assert len(batches) == 4
    epoch = [labels.tolist() for _, labels in batches]
    assert [len(labels) for labels in epoch] == [5, 5, 5, 5]
    assert len(set(sum(epoch, []))) == 20  # noqa: RUF017


def test_a_batch_may_hold_all_images():
    ((images, labels),) = Batches(numbered(8), NOTHING, 8, MEAN, STD, generator())
    assert images.shape == (8, 3, 32, 32)
    assert sorted(labels.tolist()) == list(range(8))


def test_cropped_and_flipped_images_keep_their_bytes(images):
    recipe = EVERYTHING.model_copy(update={"rotation_degrees": 0.0, "shift_fraction": 0.0})
    whole = augment(
        pad(images, 4),
        torch.arange(40),
        zero_draws(40, top=torch.full((40,), 4), left=torch.full((40,), 4)),
        recipe,
    )
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, images.permute(0, 3, 1, 2))


def test_every_image_takes_its_turn_over_the_epochs():
    batches = Batches(numbered(23), NOTHING, 5, MEAN, STD, generator())
    epochs = [torch.cat([labels for _, labels in batches]).tolist() for _ in range(10)]
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert {label for epoch in epochs for label in epoch} == set(range(23))


def test_images_keep_their_labels_through_augmentation():
    recipe = EVERYTHING.model_copy(update={"crop_padding": 0})
    for images, labels in Batches(numbered(40), recipe, 10, (0.0,) * 3, (1.0,) * 3, generator()):
        assert torch.allclose(255 * images.mean(dim=(1, 2, 3)), labels.float(), atol=1e-3)


def test_the_state_of_the_generator_repeats_an_epoch_exactly(images):
    split = Split(images=images, labels=torch.arange(40))
    draws = generator(3)
    batches = Batches(split, EVERYTHING, 8, MEAN, STD, draws)
    list(batches)
    state = draws.get_state()
    second = list(batches)
    third = list(batches)
    resumed = generator(99)
    resumed.set_state(state)
    again = list(Batches(split, EVERYTHING, 8, MEAN, STD, resumed))
    for (a, a_labels), (b, b_labels) in zip(second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a_labels, b_labels)
    assert not torch.equal(second[0][0], third[0][0])


def test_torchs_global_generator_has_no_part_in_it(images):
    split = Split(images=images, labels=torch.arange(40))
    torch.manual_seed(1)
    first = next(iter(Batches(split, EVERYTHING, 8, MEAN, STD, generator())))
    torch.manual_seed(2)
    second = next(iter(Batches(split, EVERYTHING, 8, MEAN, STD, generator())))
    assert torch.equal(first[0], second[0])


def test_scoring_takes_every_image_once_and_in_order(images):
    split = Split(images=images, labels=torch.arange(40))
    batches = list(in_order(split, MEAN, STD, 16))
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(40))
    expected = (images.numpy() / 255 - np.array(MEAN)) / np.array(STD)
    found = torch.cat([batch for batch, _ in batches])
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch, _ in batches)
