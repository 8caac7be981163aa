"""Every gradient of the fast convolution against torch's own, in the arithmetic of fp64 rounded to bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resgrid.models.convolution import Conv3x3, _Convolution


@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("channels", [(256, 512), (512, 256), (64, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_all_gradients_are_torchs_within_the_rounding_of_bf16(side, channels, bias):
    torch.manual_seed(0)
    fast = Conv3x3(*channels, bias=bias).to(memory_format=torch.channels_last)
    exact = nn.Conv2d(*channels, 3, padding=1, bias=bias)
    exact.load_state_dict(fast.state_dict())
    exact.double()
    x = torch.randn(8, channels[0], side, side).to(memory_format=torch.channels_last).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(x)
    exact_y = exact(exact_x)
    gradient = torch.randn_like(exact_y)
    y.backward(gradient.to(y.dtype))
    exact_y.backward(gradient)

    pairs = [(y, exact_y), (x.grad, exact_x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(fast.parameters(), exact.parameters(), strict=True)]
    for found, expected in pairs:
        assert found.shape == expected.shape
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 0.01  # bf16 has eight bits: about 0.4 %


@pytest.mark.parametrize(("side", "channels", "fast"), [(4, 256, True), (2, 512, True), (8, 256, False), (4, 128, False)])  # fmt: skip
def test_the_matrix_product_is_taken_for_small_images_of_many_channels(side, channels, fast):
    convolution = Conv3x3(channels, channels)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolution(torch.randn(2, channels, side, side))
    names = {type(node).__name__ for node, _ in y.grad_fn.next_functions if node} | {type(y.grad_fn).__name__}
    assert (f"{_Convolution.__name__}Backward" in names) == fast


def test_fp32_and_frozen_weights_take_torchs_own():
    convolution, x = Conv3x3(256, 256), torch.randn(2, 256, 2, 2)
    assert type(convolution(x).grad_fn).__name__ == "ConvolutionBackward0"
    convolution.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution(x).grad_fn is None
