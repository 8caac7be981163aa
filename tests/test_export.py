"""Exports: each is read back by the program that it is for, and gives what the model gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits

from resgrid.cli import main
from resgrid.errors import ResgridError
from resgrid.export import export
from resgrid.models import build_model
from resgrid.weights import METADATA_KEY, WeightsInfo, load_model, save_weights

DIGITS = tuple("0123456789")
Images = np.ndarray[Any, Any]


def make_weights(path: Path, architecture: str = "resnet20") -> Path:
    """Weights whose batch norms have seen images, so that no statistic is the one it began with."""
    torch.manual_seed(0)
    model = build_model(architecture, 10)
    with torch.no_grad():
        model(torch.randn(64, 3, 32, 32))
    mean, std = (0.3, 0.31, 0.32), (0.4, 0.41, 0.42)
    info = WeightsInfo(architecture=architecture, class_names=DIGITS, mean=mean, std=std, resize="pad")
    save_weights(path, model, info)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture(scope="module")
def images() -> Images:
    """The first 20 handwritten digits: uint8 (20, 32, 32, 3)."""
    grey = (load_digits().images[:20] * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    return grey[..., None].repeat(3, 3)


def expected(weights: Path, images: Images) -> Images:
    """Probabilities by the definition: softmax of the logits of ((x / 255) - mean) / std."""
    model, info = load_model(weights)
    normalised = (torch.from_numpy(images) / 255 - torch.tensor(info.mean)) / torch.tensor(info.std)
    with torch.no_grad():
        return torch.softmax(model(normalised.permute(0, 3, 1, 2)), dim=1).numpy()


@pytest.mark.parametrize(
    "architecture", ["resnet20", pytest.param("resnet10", marks=pytest.mark.long), "vgg16"]
)
def test_onnx_gives_the_models_probabilities_for_any_number_of_images_and_says_its_classes_and_input(
    architecture, images, tmp_path
):
    weights = make_weights(tmp_path / "w.safetensors", architecture)
    difference = export(*load_model(weights), "onnx", tmp_path / "m.onnx", images)
    assert difference < 1e-4
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for number in (1, 7, 20):
        [probabilities] = session.run(None, {"images": scaled[:number]})
        np.testing.assert_allclose(probabilities, expected(weights, images)[:number], atol=1e-4)
    info = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert (info["class_names"], info["resize"]) == (list(DIGITS), "pad")
    ends = [(each.name, each.shape[1:]) for each in (*session.get_inputs(), *session.get_outputs())]
    assert ends == [("images", [3, 32, 32]), ("probabilities", [10])]


def test_pt2_is_a_program_that_needs_no_code_of_ours(weights, images, tmp_path):
    export(*load_model(weights), "pt2", tmp_path / "m.pt2", images)
    extra = {f"{METADATA_KEY}.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    np.testing.assert_allclose(program.module()(scaled).numpy(), expected(weights, images), atol=1e-5)
    assert json.loads(extra[f"{METADATA_KEY}.json"])["architecture"] == "resnet20"


def test_what_differs_from_the_model_is_not_written(weights, images, tmp_path, monkeypatch):
    """Without any tolerance even another order of summation is too much."""
    monkeypatch.setattr("resgrid.export.TOLERANCE", -1.0)
    with pytest.raises(ResgridError, match=r"m\.pt2: not written, .* differs from the model by "):
        export(*load_model(weights), "pt2", tmp_path / "m.pt2", images)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(weights, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "m.pt2"
    assert main(["export", str(weights), "--format", "pt2", "--out", str(out)]) == 1
    printed = capsys.readouterr().err
    assert re.search(rf"resgrid: .*: {out}\. Check its owner and mode, and its disk\.\n$", printed)


def test_the_command_writes_beside_the_person_and_says_on_what_it_was_compared(
    weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(weights), "--format", "pt2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("weights.pt2: 1.")
    assert "On 64 images of noise, since there is no data/processed here, it differs" in printed
    assert (tmp_path / "weights.pt2").is_file()
