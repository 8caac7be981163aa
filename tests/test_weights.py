"""Weights files: what goes in comes out, and what is not one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resgrid.cli import main
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", ["predict", "score", "export"])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(
    command: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model("resnet20", 3)
    torch.nn.init.constant_(model.get_parameter("base.stem.weight"), value)
    save_weights(tmp_path / "w", model, INFO)
    file = str(tmp_path / "w")
    arguments = {
        "predict": [str(tmp_path), "--model", file, "--json"],
        "score": [file, "--data", str(tmp_path)],
        "export": [file, "--format", "pt2", "--out", str(tmp_path / "out")],
    }
    assert main([command, *arguments[command]]) == 1
    output = capsys.readouterr()
    assert output.err == (
        f"resgrid: {file}: base.stem.weight holds a NaN or an infinity. Its training diverged: take earlier weights.\n"
    )
    assert output.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


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


# --- refusals -------------------------------------------------------------------------------------


def _refused(path: Path, message: str) -> None:
    with pytest.raises(ResgridError, match=message) as error:
        load_weights(path)
    assert str(path) in str(error.value)


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    with pytest.raises(OSError, match=r"directory: '.*/w'"):
        save_weights(tmp_path / "w", build_model("resnet20", 3), INFO)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "none.safetensors", "there is no such file")
    _refused(tmp_path, "this is a folder")


@pytest.mark.parametrize(
    "content", [b"", b"\x89HDF\r\n\x1a\n", b"no safetensors at all, but text", b"\xff" * 64]
)
def test_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(content)
    _refused(tmp_path / "w", "cannot be read as a weights file of ResGrid")


@pytest.mark.parametrize("kept", [4, 100, 50_000, -1])
def test_a_cut_file_is_refused(kept: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    _refused(saved, r"cannot be read as a weights file of ResGrid \(.+\)\. Copy or train it again")


def test_a_file_without_our_metadata_is_refused(saved: Path) -> None:
    save_file(load_file(saved), saved, {"format": "pt"})
    _refused(saved, "its metadata have no 'resgrid'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "../resnet20"}, "architecture in its metadata is wrong"),
        (
            {"architecture": "resnet21"},
            "this package has no resnet21, and there is no architectures/resnet21.py",
        ),
        ({"std": [0.4, 0.0, 0.6]}, r"std\.1 in its metadata is wrong"),
        ({"class_names": []}, "class_names in its metadata is wrong"),
        ({"colour": "red"}, "colour in its metadata is wrong"),
        ({"architecture": "resnet32"}, r"base\.stage1\.3\.norm1\.weight is missing, which resnet32"),
        ({"architecture": "vgg16"}, r"base\.conv1_1\.conv\.weight is missing, which vgg16"),
        (
            {"class_names": ["a", "b"]},
            r"head\.classifier\.weight has the shape \(3, 64, 1, 1\), where resnet20 with 2 classes",
        ),
    ],
)
def test_metadata_that_are_wrong_are_refused(change: dict[str, object], message: str, saved: Path) -> None:
    info = json.loads(INFO.model_dump_json()) | change
    save_file(load_file(saved), saved, {"resgrid": json.dumps(info)})
    _refused(saved, message)
    save_file(load_file(saved), saved, {"resgrid": "{"})
    _refused(saved, "resgrid in its metadata is wrong")


def test_an_extra_tensor_is_refused(saved: Path) -> None:
    save_file(load_file(saved) | {"extra": torch.zeros(1)}, saved, {"resgrid": INFO.model_dump_json()})
    _refused(saved, "it holds extra, which resnet20 with 3 classes has not")


def test_another_type_of_number_is_refused(saved: Path) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(saved).items()}
    save_file(halves, saved, {"resgrid": INFO.model_dump_json()})
    _refused(saved, r"is torch\.float16, but weights files hold torch\.float32")
