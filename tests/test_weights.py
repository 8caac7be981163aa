"""Weights files: what goes in comes out, and what is not one is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resgrid.errors import ResgridError
from resgrid.models import build_model
from resgrid.weights import WeightsInfo, load_model, load_weights, save_weights

INFO = WeightsInfo(
    architecture="resnet20",
    class_names=("circle", "square", "triangle"),
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_weights(tmp_path / "weights.safetensors", build_model("resnet20", 3), INFO)
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("architecture", ["resnet20", "resnet10", "vgg16"])
def test_a_model_comes_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(architecture, 3)
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))  # moves the running means and variances
    model.eval()
    info = INFO.model_copy(update={"architecture": architecture})
    save_weights(tmp_path / "w", model, info)

    loaded, loaded_info = load_model(tmp_path / "w")

    assert loaded_info == info
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_tensors_load_strictly_into_a_model(saved: Path) -> None:
    model = build_model("resnet20", 3)
    info, tensors = load_weights(saved)
    model.load_state_dict(tensors)
    assert info == INFO
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    # Per unit 2 convolutions and 2 batch norms of 4; the stem; the head's batch norm and convolution.
    assert len(tensors) == 9 * (2 + 2 * 4) + 1 + 4 + 2


def test_the_same_weights_give_the_same_bytes_in_any_memory_format(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", 3).to(memory_format=torch.channels_last)
    for number in range(5):
        save_weights(tmp_path / f"{number}", model, INFO)
        assert (tmp_path / f"{number}").read_bytes() == saved.read_bytes()


def test_nothing_but_the_file_is_left_behind(saved: Path) -> None:
    save_weights(saved, build_model("resnet20", 3), INFO)  # over the old one
    assert [path.name for path in saved.parent.iterdir()] == ["weights.safetensors"]


def test_loaded_tensors_are_no_view_of_the_file(saved: Path) -> None:
    before = saved.read_bytes()
    _, tensors = load_weights(saved)
    tensors["base.stem.weight"].zero_()
    kept = tensors["head.norm.weight"].clone()
    saved.write_bytes(bytes(len(before)))
    assert torch.equal(tensors["head.norm.weight"], kept)


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    with pytest.raises(OSError, match=r"directory: '.*/w'"):
        save_weights(tmp_path / "w", build_model("resnet20", 3), INFO)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize(
    "damaged",
    [
        *(lambda whole, end=end: whole[:end] for end in (0, 4, 100, 50_000, -1)),
        *(
            lambda _, text=text: text
            for text in (b"\x89HDF\r\n\x1a\n", b"no safetensors, but text", b"\xff" * 64)
        ),
    ],
)
def test_a_cut_file_and_another_format_are_refused(damaged: Callable[[bytes], bytes], saved: Path) -> None:
    saved.write_bytes(damaged(saved.read_bytes()))
    with pytest.raises(ResgridError, match=r"cannot be read as a weights file of ResGrid") as error:
        load_weights(saved)
    assert str(saved) in str(error.value)
