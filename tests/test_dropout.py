"""Dropout against torch's own, and its share of zeros against the binomial distribution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resgrid.models.dropout import Dropout


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_dropped_at_the_rate_and_the_others_scaled(rate, dtype):
    torch.manual_seed(0)
    num = 1_000_003  # no multiple of four
    y = Dropout(rate)(torch.ones(num, dtype=dtype))
    dropped = int((y == 0).sum())
    assert abs(dropped - rate * num) < 4 * (num * rate * (1 - rate)) ** 0.5  # four standard deviations
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - rate)], rel=1e-4 if dtype.is_floating_point
                                                        and dtype == torch.float32 else 4e-3)  # fmt: skip


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_is_scaled_by_one_over_its_share(rate, dtype):
    """On the mean; what is left in bf16 is the rounding of the 128 numbers that there are in 1 … 2."""
    torch.manual_seed(0)
    x = torch.rand(1_000_000).add(1).to(dtype)
    y = Dropout(rate)(x)
    scale = y.double().sum() / x[y != 0].double().sum()
    assert scale == pytest.approx(1 / (1 - rate), rel=5e-4)


def test_the_gradient_passes_where_the_element_did():
    torch.manual_seed(0)
    x = torch.rand(64, 8, 4, 4).add(1).to(memory_format=torch.channels_last).requires_grad_()
    y = Dropout(0.25)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * torch.tensor(1 / 0.75))
    assert torch.allclose(y, x * x.grad)


def test_neighbours_are_dropped_independently():
    """Four elements come from one 64-bit number: no pair of them goes together more often than others."""
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(400_000)) == 0).view(-1, 4).float()
    together = torch.corrcoef(dropped.T) - torch.eye(4)
    assert together.abs().max() < 4 / 100_000**0.5


@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (4, 6), (1,)])
def test_any_shape_and_layout_goes(shape):
    torch.manual_seed(0)
    x = torch.rand(shape).add(1).transpose(0, -1)  # not contiguous in any layout
    y = Dropout(0.5)(x)
    assert torch.allclose(y[y != 0], 2 * x[y != 0])


def test_scoring_leaves_everything_as_it_is():
    x = torch.rand(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_the_same_seed_draws_the_same_mask_and_another_does_not():
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Dropout(0.5)(torch.ones(1000))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_it_has_no_parameters_and_torchs_stands_for_it_elsewhere():
    torch.manual_seed(0)
    on_meta = Dropout(0.5)(torch.ones(10, device="meta"))
    assert (on_meta.shape, list(nn.Sequential(Dropout(0.5)).state_dict())) == ((10,), [])
