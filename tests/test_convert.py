"""Weights of Keras and of PyTorch: converted, they compute the same; what is harmful is not read."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import pickle
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from resgrid.cli import main
from resgrid.convert import CIFAR10_CLASSES, import_weights
from resgrid.errors import ResgridError
from resgrid.models import build_model
from resgrid.models.classifier import Classifier
from resgrid.weights import load_model

VGG16_CONVOLUTIONS = [f"conv{block}_{i + 1}" for block, n in enumerate([2, 2, 3, 3, 3], 1) for i in range(n)]


def _random_model(architecture: str, num_classes: int = 10) -> Classifier:
    """Every tensor drawn anew, so that no two layers could be exchanged unnoticed."""
    torch.manual_seed(0)
    model = build_model(architecture, num_classes)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor.normal_(0.5, 0.5)
    return model.eval()


# --- Keras files, named as in the one that the original published ---------------------------------


def _resnet_layers(units: int, first: int = 0) -> list[tuple[str, list[tuple[str, str]]]]:
    """Keras layers in the order of the model, each with (its part in Keras, its module of ours)."""

    def name(layer: str, number: int) -> str:
        return f"{layer}_{number}" if number else layer

    layers = [(name("conv2d", first), [("", "base.stem")])]
    for stage in range(3):
        parts = [
            (f"/res_net_unit_{unit + 1}/{theirs}", f"base.stage{stage + 1}.{unit}.{ours}")
            for unit in range(units)
            for theirs, ours in [
                ("batchnorm_1", "norm1"), ("conv1", "conv1"), ("batchnorm_2", "norm2"), ("conv2", "conv2"),
            ]
        ]  # fmt: skip
        layers.append((name("sequential", first + stage), parts))
    layers.append((name("batch_normalization", first), [("", "head.norm")]))
    layers.append((name("conv2d", first + 1), [("", "head.classifier")]))
    layers.append((name("activation", first), []))
    return layers


def _vgg16_layers(is_flat: bool = False) -> list[tuple[str, list[tuple[str, str]]]]:
    """Flat: the same network without groups, numbered from 1 as older versions of Keras did."""
    layers: list[tuple[str, list[tuple[str, str]]]] = []
    for number, ours in enumerate(VGG16_CONVOLUTIONS):
        if is_flat:
            layers.append((f"conv2d_{number + 1}", [("", f"base.{ours}.conv")]))
            layers.append((f"batch_normalization_{number + 1}", [("", f"base.{ours}.norm")]))
            continue
        end = f"_{number}" if number else ""
        parts = [(f"/conv2d{end}", f"base.{ours}.conv"), (f"/batch_normalization{end}", f"base.{ours}.norm")]
        layers.append((f"conv_bn_relu{end}", parts))
    names = ("dense_1", "batch_normalization_14", "dense_2")
    if not is_flat:
        layers += [("flatten", []), ("dropout_13", []), ("activation", [])]
        names = ("dense", "batch_normalization_13", "dense_1")
    head = ("head.dense", "head.norm", "head.classifier")
    return layers + [(name, [("", ours)]) for name, ours in zip(names, head, strict=True)]


def _write_keras(
    root: h5py.Group, layers: list[tuple[str, list[tuple[str, str]]]], model: nn.Module, listed_by_name: bool
) -> None:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    names = [layer for layer, _ in layers]
    root.attrs["layer_names"] = np.array(sorted(names) if listed_by_name else names, "S")
    root.attrs["backend"] = b"tensorflow"
    root.attrs["keras_version"] = b"2.2.4-tf"
    for layer, parts in layers:
        group = root.create_group(layer)
        trainable, moving = [], []
        for part, ours in parts:
            weight = state[f"{ours}.weight"]
            if weight.ndim > 1:
                kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
                trainable.append((f"{layer}{part}/kernel:0", kernel))
                if f"{ours}.bias" in state:
                    trainable.append((f"{layer}{part}/bias:0", state[f"{ours}.bias"]))
            else:
                trainable.append((f"{layer}{part}/gamma:0", weight))
                trainable.append((f"{layer}{part}/beta:0", state[f"{ours}.bias"]))
                moving.append((f"{layer}{part}/moving_mean:0", state[f"{ours}.running_mean"]))
                moving.append((f"{layer}{part}/moving_variance:0", state[f"{ours}.running_var"]))
        group.attrs["weight_names"] = np.array([name for name, _ in trainable + moving], "S")
        for name, array in trainable + moving:
            group.create_dataset(name, data=array)


def _keras_file(path: Path, model: nn.Module, form: str = "") -> Path:
    """Keras 2's weights of a ResNet or of VGG-16, in a `form` that some version of Keras or a person gives."""
    is_vgg = any("conv5_3" in name for name, _ in model.named_modules())
    units = sum(name.count(".") == 2 for name, _ in model.named_modules() if name.startswith("base.stage1."))
    layers = _vgg16_layers(form == "flat") if is_vgg else _resnet_layers(units, 9 if form == "later" else 0)
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if form == "whole model" else file
        _write_keras(root, layers, model, listed_by_name=form in ("by name", "later", "flat"))
        if form == "whole model":
            file["optimizer_weights/SGD/iter:0"] = np.int64(5)
            root.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0)
    return path


def _computes_the_same(path: Path, model: nn.Module) -> None:
    converted, _ = load_model(path)
    ours, theirs = converted.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "num_batches" not in name)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(converted(images), model(images))


def test_names_of_the_written_files_are_those_of_the_published_one(reference_data):
    def listing(file: h5py.File) -> dict[str, list[bytes]]:
        return {name.decode(): list(file[name].attrs["weight_names"]) for name in file.attrs["layer_names"]}

    with (
        h5py.File(reference_data / "keras-resnet20.h5") as published,
        h5py.File(io.BytesIO(), "w") as written,
    ):
        _write_keras(written, _resnet_layers(3), build_model("resnet20", 10), listed_by_name=False)
        ours, theirs = listing(written), listing(published)
    assert list(ours) == list(theirs)
    assert ours == theirs


@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        ("resnet20", ""),
        ("resnet20", "whole model"),
        ("resnet20", "later"),  # in a session with other models: sequential_9 to _11, conv2d_9 and _10
        ("resnet110", ""),
        ("resnet110", "by name"),
        ("vgg16", ""),
        ("vgg16", "by name"),
        ("vgg16", "flat"),
    ],
)
def test_keras_weights_compute_the_same_here(architecture, form, tmp_path):
    model = _random_model(architecture)
    info = import_weights(_keras_file(tmp_path / "keras.h5", model, form), architecture, tmp_path / "out")
    assert info.class_names == CIFAR10_CLASSES
    assert info.mean == pytest.approx((0.47336, 0.47336, 0.47336), abs=1e-5)
    assert info.std == pytest.approx((0.25157, 0.25157, 0.25157), abs=1e-5)
    _computes_the_same(tmp_path / "out", model)


def test_other_classes_and_statistics_are_kept(tmp_path):
    model = _random_model("resnet20", 3)
    source = _keras_file(tmp_path / "keras.h5", model)
    import_weights(source, "resnet20", tmp_path / "out", ["a", "b", "c"], ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    _computes_the_same(tmp_path / "out", model)
    info = load_model(tmp_path / "out")[1]
    assert (info.class_names, info.mean, info.std) == (("a", "b", "c"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# --- an independent ResNet-20: NumPy in float64, written from the description, on Keras's own arrays -


def _same_convolution(x: NDArray[Any], kernel: NDArray[Any], stride: int) -> NDArray[Any]:
    """TensorFlow's SAME, as its documentation defines it: (N, H, W, C) to (N, H / stride, W / stride, C')."""
    size, side = kernel.shape[0], x.shape[1]
    outputs = -(-side // stride)
    padding = max((outputs - 1) * stride + size - side, 0)
    before = padding // 2
    x = np.pad(x, [(0, 0), (before, padding - before), (before, padding - before), (0, 0)])
    y = np.zeros((len(x), outputs, outputs, kernel.shape[3]))
    for i in range(outputs):
        for j in range(outputs):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.tensordot(window, kernel, axes=3)
    return y


def _naive_resnet(file: h5py.File, images: NDArray[Any], units: int) -> NDArray[Any]:
    def array(path: str) -> NDArray[Any]:
        return np.asarray(file[f"{path.split('/')[0]}/{path}:0"], dtype=np.float64)

    def norm_relu(x: NDArray[Any], path: str) -> NDArray[Any]:
        gamma, beta, mean, variance = (
            array(f"{path}/{kind}") for kind in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return np.maximum((x - mean) / np.sqrt(variance + 1e-3) * gamma + beta, 0)

    x = _same_convolution(images, array("conv2d/kernel"), 1)
    for stage, layer in enumerate(["sequential", "sequential_1", "sequential_2"]):
        for unit in range(1, units + 1):
            path = f"{layer}/res_net_unit_{unit}"
            stride = 2 if stage > 0 and unit == 1 else 1
            y = norm_relu(x, f"{path}/batchnorm_1")
            shortcut = y if stage == 0 and unit == 1 else x
            if stride == 2:
                n, h, w, c = shortcut.shape
                shortcut = shortcut.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
                shortcut = np.pad(shortcut, [(0, 0), (0, 0), (0, 0), (c // 2, c // 2)])
            y = _same_convolution(y, array(f"{path}/conv1/kernel"), stride)
            y = norm_relu(y, f"{path}/batchnorm_2")
            x = shortcut + _same_convolution(y, array(f"{path}/conv2/kernel"), 1)
    pooled = norm_relu(x, "batch_normalization").mean(axis=(1, 2))
    return pooled @ array("conv2d_1/kernel")[0, 0] + array("conv2d_1/bias")  # type: ignore[no-any-return]


def test_resnet20_equals_a_naive_one_on_keras_arrays(tmp_path):
    source = _keras_file(tmp_path / "keras.h5", _random_model("resnet20"))
    import_weights(source, "resnet20", tmp_path / "out")
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    with h5py.File(source) as file:
        expected = _naive_resnet(file, images, units=3)
    with torch.no_grad():
        ours = load_model(tmp_path / "out")[0](torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_published_resnet20_scores_as_its_authors_say(reference_data, tmp_path):
    """On the 1,000 first test images, which are bit-exact."""
    info = import_weights(reference_data / "keras-resnet20.h5", "resnet20", tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    with tarfile.open(reference_data / "cifar-10-python-6k.tar.gz") as archive:
        member = archive.extractfile("cifar-10-batches-py/test_batch")
        assert member is not None
        batch = pickle.load(member, encoding="bytes")
    images, labels = torch.tensor(batch[b"data"]).view(-1, 3, 32, 32) / 255, torch.tensor(batch[b"labels"])
    images = (images - torch.tensor(info.mean).view(3, 1, 1)) / torch.tensor(info.std).view(3, 1, 1)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(250)])
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(0.926, abs=0.001)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(0.241, abs=0.001)
    with h5py.File(reference_data / "keras-resnet20.h5") as file:
        expected = _naive_resnet(file, images[:2].permute(0, 2, 3, 1).double().numpy(), units=3)
    np.testing.assert_allclose(logits[:2], expected, atol=1e-4)


# --- Keras 3, whose files number the arrays of a layer ----------------------------------------------


def _write_keras3(file: h5py.File, layers: list[tuple[str, list[tuple[str, str]]]], model: nn.Module) -> None:
    """As Keras 3.15 writes them: `layers/sequential/layers/res_net_unit/conv1/vars/0`."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for layer, parts in layers:
        file.create_group(f"layers/{layer}/vars")
        for part, ours in parts:
            weight = state[f"{ours}.weight"]
            arrays = [weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T]
            arrays += [
                state[f"{ours}.{kind}"]
                for kind in ("bias", "running_mean", "running_var")
                if f"{ours}.{kind}" in state
            ]
            for number, array in enumerate(arrays):
                within = part.replace("/", "/layers/", 1) if "res_net_unit" in part else part
                file[f"layers/{layer}{within}/vars/{number}"] = array
    file["layers/dropout/seed_generator/vars/0"] = np.array([1, 2], np.uint32)
    file["optimizer/vars/0"] = np.int64(5)


@pytest.mark.parametrize("architecture", ["resnet20", "vgg16"])
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_keras_3_weights_compute_the_same_here(architecture, suffix, tmp_path):
    model = _random_model(architecture)
    layers = _vgg16_layers(is_flat=True) if architecture == "vgg16" else _resnet_layers(3)
    source = tmp_path / f"model{suffix}"
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        _write_keras3(file, layers, model)
    if suffix == ".keras":
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.write(tmp_path / "model.weights.h5", "model.weights.h5")
    import_weights(source, architecture, tmp_path / "out")
    _computes_the_same(tmp_path / "out", model)


# --- Keras files that are refused -----------------------------------------------------------------


@pytest.fixture
def keras20(tmp_path: Path) -> Path:
    return _keras_file(tmp_path / "keras.h5", _random_model("resnet20"))


def _refused(source: Path, message: str, architecture: str = "resnet20", **kwargs: Any) -> None:
    out = source.parent / "out"
    with pytest.raises(ResgridError, match=message) as error:
        import_weights(source, architecture, out, **kwargs)
    assert str(source) in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("size", [100, 5_000, 500_000])
def test_a_cut_keras_file_is_refused(keras20, size):
    keras20.write_bytes(keras20.read_bytes()[:size])
    _refused(keras20, r"cannot be read as a Keras \(HDF5\) file \(.+\)\. Copy or save it again")


@pytest.mark.parametrize(
    ("architecture", "class_names", "message"),
    [
        ("resnet32", None, r"where resnet32 has 32 and 31\."),
        ("vgg16", None, r"where vgg16 has 15 and 14\."),
        ("resnet10", None, r"where resnet10 has 13 and 12\."),
        ("resnet20", ["a", "b", "c"], r"shape \(10, 64, 1, 1\), where resnet20 with 3 classes has \(3, 64"),
    ],
)
def test_keras_weights_of_another_model_or_other_classes_are_refused(
    architecture, class_names, message, keras20
):
    _refused(keras20, message, architecture, class_names=class_names)


def test_impossible_statistics_are_refused(keras20):
    with pytest.raises(ResgridError, match=r"std\.1: Input should be greater than 0"):
        import_weights(keras20, "resnet20", keras20.parent / "out", None, ((0.5,) * 3, (0.5, 0.0, 0.5)))


STEM = "conv2d/conv2d/kernel:0"
SHAPE = (3, 3, 3, 16)


def _stem(*arguments: Any, **keywords: Any) -> Callable[[h5py.File], Any]:
    """The stem's kernel is another array: of these arguments of `create_dataset`."""

    def change(file: h5py.File) -> None:
        del file[STEM]
        file.create_dataset(STEM, *arguments, **keywords)

    return change


def _virtual(file: h5py.File) -> None:
    del file[STEM]
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[...] = h5py.VirtualSource("elsewhere.h5", "x", SHAPE)
    file.create_virtual_dataset(STEM, layout)


LARGE_CHUNKS = {"chunks": (3, 3, 3, 2**20), "maxshape": (3, 3, 3, None)}
NO_FLOATS = "is no plain array of floats"
BAD_ARRAYS = {
    "missing": (
        lambda file: file.__delitem__("sequential_1/sequential_1/res_net_unit_2/batchnorm_2/beta:0"),
        r"base\.stage2\.1\.norm2\.bias is missing",
    ),
    "of something else": (
        lambda file: [file.__delitem__(name) for name in list(file)] + [file.create_group("measurements")],
        "holds 0 convolutions or dense layers and 0 batch norms, where resnet20 has 20 and 19",
    ),
    "of an unknown kind": (
        lambda file: file.create_dataset("conv2d/conv2d/depthwise_kernel:0", (3, 3, 3, 1), "f4"),
        "holds /conv2d/conv2d/depthwise_kernel:0, which no layer",
    ),
    "another shape": (_stem((5, 5, 3, 16), "f4"), r"base\.stem\.weight has the shape \(16, 3, 5, 5\)"),
    "118 TB, none of it written": (
        _stem((3, 3, 3, 2**40), "f4", chunks=(3, 3, 3, 1)),
        r"has the shape \(1099511627776, 3, 3, 3\)",
    ),
    "chunks larger than their array": (_stem(SHAPE, "f4", **LARGE_CHUNKS), f"conv2d/kernel:0 {NO_FLOATS}"),
    "text": (_stem(SHAPE, h5py.string_dtype()), NO_FLOATS),
    "lists": (_stem(SHAPE, h5py.vlen_dtype("f4")), NO_FLOATS),
    "integers": (_stem(SHAPE, "i8"), "holds 19 convolutions"),
    "complex": (_stem(SHAPE, "c8"), NO_FLOATS),
    "no shape": (_stem(data=h5py.Empty("f4")), "holds 19 convolutions"),
    "values in another file": (
        _stem(SHAPE, "f4", external=[("/etc/hosts", 0, h5py.h5f.UNLIMITED)]),
        NO_FLOATS,
    ),
    "values in another array": (_virtual, NO_FLOATS),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_a_bad_array_is_refused_by_name_and_unread(what, keras20):
    change, message = BAD_ARRAYS[what]
    with h5py.File(keras20, "a") as file:
        change(file)
    _refused(keras20, message)


@pytest.mark.parametrize("link", [h5py.ExternalLink("/etc/hosts", "/x"), h5py.SoftLink("/conv2d_1")])
@pytest.mark.parametrize("place", ["conv2d", STEM, "model_weights"])
def test_links_are_not_followed(keras20, link, place):
    with h5py.File(keras20, "a") as file:
        if place in file:
            del file[place]
        file[place] = link
    if place == "model_weights":  # beside all that is needed
        import_weights(keras20, "resnet20", keras20.parent / "out")
        _computes_the_same(keras20.parent / "out", _random_model("resnet20"))
    else:
        _refused(keras20, "holds 19 convolutions")


def test_groups_in_a_circle_are_read_once(keras20):
    with h5py.File(keras20, "a") as file:
        file["sequential/again"] = file["sequential"]
    model = _random_model("resnet20")
    import_weights(keras20, "resnet20", keras20.parent / "out")
    _computes_the_same(keras20.parent / "out", model)


# --- PyTorch: an independent wide ResNet with the customary names ---------------------------------


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + self.shortcut(x))


class CustomaryResNet(nn.Module):
    def __init__(self, blocks: list[int], widths: tuple[int, ...] = (64, 128, 256, 512)) -> None:
        super().__init__()
        inputs = widths[0]
        self.conv1 = nn.Conv2d(3, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        for number, (count, outputs) in enumerate(zip(blocks, widths, strict=True), start=1):
            stage = []
            for index in range(count):
                stage.append(BasicBlock(inputs, outputs, 2 if index == 0 and number > 1 else 1))
                inputs = outputs
            setattr(self, f"layer{number}", nn.Sequential(*stage))
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return self.linear(F.avg_pool2d(x, 4).flatten(1))  # type: ignore[no-any-return]


def _customary(blocks: list[int], **more: Any) -> CustomaryResNet:
    torch.manual_seed(0)
    model = CustomaryResNet(blocks, **more)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def customary() -> CustomaryResNet:
    return _customary([1, 1, 1, 1])


def _scores_alike(path: Path, model: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(load_model(path)[0](images), model(images))


@pytest.mark.parametrize(
    ("architecture", "blocks"),
    [("resnet10", [1, 1, 1, 1]), ("resnet18", [2, 2, 2, 2]), ("resnet26", [3, 3, 3, 3])],
)
def test_customary_torch_weights_compute_the_same_here(architecture, blocks, tmp_path):
    model = _customary(blocks)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    info = import_weights(tmp_path / "w.pt", architecture, tmp_path / "out")
    assert info.mean == (0.4914, 0.4822, 0.4465)
    assert info.std == (0.2023, 0.1994, 0.2010)
    assert info.class_names[3] == "cat"
    _scores_alike(tmp_path / "out", model)


@pytest.mark.parametrize("form", ["in any order and wrapped", "by order and shape", "safetensors"])
def test_customary_weights_are_read_in_any_form(form, customary, tmp_path):
    state = customary.state_dict()
    match form:
        case "in any order and wrapped":
            wrapped = {f"module.{name}": tensor for name, tensor in sorted(state.items())}
            torch.save({"net": wrapped, "acc": 91.0, "epoch": 200}, tmp_path / "w")
        case "by order and shape":
            kinds = [(name.rpartition(".")[2], tensor) for name, tensor in state.items()]
            torch.save({f"part{i}.{kind}": tensor for i, (kind, tensor) in enumerate(kinds)}, tmp_path / "w")
        case "safetensors":
            save_file(state, tmp_path / "w")
    import_weights(tmp_path / "w", "resnet10", tmp_path / "out")
    _scores_alike(tmp_path / "out", customary)


@pytest.mark.parametrize("architecture", ["resnet20", "resnet10", "vgg16"])
def test_our_own_names_are_read_for_every_family(architecture, tmp_path):
    model = _random_model(architecture, 4)
    torch.save(model.half().state_dict(), tmp_path / "w.pt")
    import_weights(tmp_path / "w.pt", architecture, tmp_path / "out", class_names=("a", "b", "c", "d"))
    _scores_alike(tmp_path / "out", model.float())


# --- PyTorch checkpoints as people have them -------------------------------------------------------


def _prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


class Settings(dict[str, Any]):
    """A dictionary of a class of its own, as configurations are."""


def _checkpoint(form: str, model: nn.Module) -> Any:
    """What tutorials, Lightning, compilers and profilers put around a state dict."""
    state = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimized = optimizer.state_dict()
    forms: dict[str, Any] = {
        "tutorial": {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": optimized, "loss": 0.3},
        "lightning": {
            "pytorch-lightning_version": "2.5.0",
            "state_dict": _prefixed(state, "model.") | {"criterion.weight": torch.ones(10)},
            "optimizer_states": [optimized],
            "hyper_parameters": argparse.Namespace(lr=0.1),
            "callbacks": {},
        },
        "several prefixes": {"weights": {"net": _prefixed(state, "module._orig_mod.model.")}},
        "unusual name": {"best": {"generator": state}, "acc": 91.0},
        "list": [state, optimized],
        "within": {name.replace("stage2.", "stage2.module."): tensor for name, tensor in state.items()},
        "averaged": torch.optim.swa_utils.AveragedModel(model).state_dict(),
        "profiled": state | {"total_ops": torch.zeros(1), "base.stage1.0.total_params": torch.zeros(1)},
        "foreign objects": {
            "net": state,
            "acc": np.float64(0.9),
            "random": np.random.RandomState(0).get_state(),
            "args": argparse.Namespace(lr=0.1, out=Path("runs")),
            "date": datetime.datetime(2026, 1, 1),
            "settings": Settings(a=1),
            "history": defaultdict(list, loss=[1.0]),
            "done": {1, 2},
        },
        "whole model": model,
    }
    return forms[form]


FORMS = (
    "tutorial", "lightning", "several prefixes", "unusual name", "list", "within", "averaged", "profiled",
    "foreign objects", "whole model",
)  # fmt: skip


@pytest.mark.parametrize(
    ("form", "zipped"), [*((form, True) for form in FORMS), ("tutorial", False), ("foreign objects", False)]
)
def test_weights_are_found_in_whatever_a_checkpoint_puts_around_them(form, zipped, tmp_path):
    model = _random_model("resnet20")
    torch.save(_checkpoint(form, model), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    import_weights(tmp_path / "w.pt", "resnet20", tmp_path / "out")
    _scores_alike(tmp_path / "out", model)


def test_of_several_sets_of_weights_one_is_chosen_by_its_key(customary, tmp_path):
    state = customary.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, "ema": {"model": other}}, tmp_path / "w.pt")
    _refused(tmp_path / "w.pt", r"2 sets of weights .* differ: state_dict, ema\.model\. .*--key", "resnet10")
    import_weights(tmp_path / "w.pt", "resnet10", tmp_path / "out", key="state_dict")
    _scores_alike(tmp_path / "out", customary)
    (tmp_path / "out").unlink()
    _refused(tmp_path / "w.pt", "no tensor of weights below --key best", "resnet10", key="best")
    torch.save({"a": state, "b": state}, tmp_path / "w.pt")  # the same twice is no question
    import_weights(tmp_path / "w.pt", "resnet10", tmp_path / "out")


def test_a_resnet_that_normalises_after_its_convolutions_is_told_from_ours(tmp_path):
    """The much copied ResNet-20 of He et al. 2015, with nothing to learn in its shortcuts: the shapes are ours."""
    state = _customary([3, 3, 3], widths=(16, 32, 64)).state_dict()
    plain = {name: tensor for name, tensor in state.items() if "shortcut" not in name}
    torch.save({"state_dict": _prefixed(plain, "module.")}, tmp_path / "w.th")
    _refused(tmp_path / "w.th", "not those of resnet20 but of resnet20v1: --model resnet20v1")
    import_weights(tmp_path / "w.th", "resnet20v1", tmp_path / "out")


def test_an_import_says_what_it_checked_and_assumed_and_scores_at_once(cifar_archive, tmp_path, capsys):
    torch.save(build_model("resnet20", 4).state_dict(), tmp_path / "w.pt")
    out = tmp_path / "out.safetensors"
    command = ["import", str(tmp_path / "w.pt"), "--model", "resnet20", "--out", str(out)]
    command += ["--class-names", "ant", "bee", "cow", "dog"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Checked: the names, shapes and types of its tensors. No file of weights says how" in printed
    assert "deviation (0.2023, 0.1994, 0.201), which is assumed: --normalization" in printed
    assert "resgrid score" in printed
    assert main([*command, "--normalization", "imagenet", "--data", str(cifar_archive)]) == 0
    printed = capsys.readouterr().out
    assert "assumed" not in printed
    assert re.search(r"accuracy \d+\.\d+ %", printed)
    assert "about as good as guessing" in printed  # these weights are random
    assert load_model(out)[1].std == (0.229, 0.224, 0.225)
    figures = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"]
    assert main([*command, *figures]) == 0
    assert load_model(out)[1].mean == (0.1, 0.2, 0.3)
    for wrong, message in (
        (["--normalization", "imagnet"], "invalid choice: 'imagnet' (choose from "),
        (figures[:4], "both --mean and --std"),
        ([*figures, "--normalization", "none"], "either its name, or"),
    ):
        assert main([*command, *wrong]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "predict"])
def test_a_reader_of_weights_files_says_what_it_was_given_and_who_reads_that(command, tmp_path, capsys):
    torch.save(build_model("resnet20", 10).state_dict(), tmp_path / "w.pt")
    _keras_file(tmp_path / "keras.h5", build_model("resnet20", 10))
    save_file({"a": torch.zeros(3)}, tmp_path / "bare.safetensors")
    for name, printed in (
        ("w.pt", "cannot be read as a weights file of ResGrid: it is a PyTorch file: `resgrid import` makes"),
        (
            "keras.h5",
            "cannot be read as a weights file of ResGrid: it is a Keras .HDF5. file: `resgrid import`",
        ),
        ("bare.safetensors", "metadata have no 'resgrid', .*`resgrid import` makes a weights file"),
    ):
        file = str(tmp_path / name)
        arguments = [file, "--data", str(tmp_path)] if command == "score" else ["x.png", "--model", file]
        assert main([command, *arguments]) == 1
        assert re.search(printed, capsys.readouterr().err)


# --- weights that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", ["keras", "torch", "twice in torch", "safetensors"])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(form, value, tmp_path):
    model = _random_model("resnet20")
    model.get_parameter("base.stage2.1.norm2.bias")[3:4].data.fill_(value)
    source = tmp_path / "w"
    if form == "keras":
        _keras_file(source, model)
    elif form == "safetensors":
        save_file(model.state_dict(), source)
    else:
        state = model.state_dict()
        torch.save(state if form == "torch" else {"a": state, "b": dict(state)}, source)
    with pytest.raises(ResgridError, match=r"w: base\.stage2\.1\.norm2\.bias holds a NaN or an infinity"):
        import_weights(source, "resnet20", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- PyTorch files that are refused ---------------------------------------------------------------


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_a_program_is_refused_unrun(zipped, tmp_path):
    target = tmp_path / "ran"
    torch.save({"a": Malice(target)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    _refused(
        tmp_path / "w.pt",
        r"GLOBAL posix\.system whose .* is blocked.*torch\.save\(model\.state_dict\(\), FILE\)",
        "resnet10",
    )
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "printed"),
    [
        (b"", ": it is an empty file: copy or fetch it again"),
        (b"text", r" \(.*opcode"),
        (b"<!DOCTYPE html><html>Not found</html>", ": it is a web page, .*in place of the file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            ": it is a Git LFS pointer .*`git lfs pull`",
        ),
        (b"PK\x03\x04 not a zip", r" \(PytorchStreamReader failed .*not a ZIP archive"),
        (b"\x80\x02.", r" \(pickle exhausted"),
        (b"\x93NUMPY\x01\x00", r" \(expected 77 bytes"),
        (b"\x00\x00\x00\x1cTFL3", r" \(.*opcode"),
    ],
)
def test_what_is_no_torch_file_is_named_or_refused_in_torchs_words(content, printed, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    _refused(tmp_path / "w.pt", f"cannot be read as a PyTorch file{printed}", "resnet10")


def test_torchscript_packed_arrays_and_a_cut_file_are_no_checkpoints(customary, tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("model/data.pkl", "model/constants.pkl", "model/code/__torch__.py"):
            archive.writestr(name, b"")
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    torch.save(customary.state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:1_000_000])
    for name in ("script.pt", "w.npz", "cut.pt"):
        _refused(tmp_path / name, r"cannot be read as a PyTorch file \(.+\)\. If it is whole", "resnet10")
    _refused(tmp_path / "none.pt", "there is no such file", "resnet10")


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": torch.tensor(3.0)}, {"a": np.zeros(3)}])
def test_what_holds_no_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    _refused(tmp_path / "w.pt", "there is no tensor of weights", "resnet10")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("changes", "message", "keywords"),
    [
        ({"conv1.weight": lambda w: w.to(torch.int32)}, r"base\.stem\.weight is no dense tensor of floats", {}),
        ({"conv1.weight": lambda w: w.to_sparse()}, r"base\.stem\.weight is no dense tensor of floats", {}),
        ({"conv1.weight": lambda w: w.to("meta")}, r"base\.stem\.weight is no dense tensor of floats", {}),
        ({"linear.weight": None, "linear.bias": None, "neck.weight": torch.zeros_like},
         r"head\.classifier\.weight is missing, which resnet10 with 10 classes", {}),
        ({}, "not those of resnet18 but of resnet10: --model resnet10", {"architecture": "resnet18"}),
        ({}, r"has the shape \(10, 512\), where .* 2 classes", {"class_names": ["a", "b"]}),
        ({"conv1.weight": lambda w: torch.zeros(64, 3, 7, 7)}, r"shape \(64, 3, 7, 7\), where .*\(64, 3, 3, 3\)", {}),
    ],
)  # fmt: skip
def test_weights_of_another_kind_model_or_number_of_classes_are_refused_by_a_tensor(
    changes, message, keywords, customary, tmp_path
):
    state = dict(customary.state_dict())
    for name, change in changes.items():
        tensor = state.pop(name, torch.zeros(3, 3))
        if change:
            state[name] = change(tensor)
    torch.save(state, tmp_path / "w.pt")
    _refused(tmp_path / "w.pt", message, **{"architecture": "resnet10"} | keywords)


def test_a_cifar_resnet_of_foreign_names_is_refused_though_its_shapes_fit(tmp_path):
    """It might as well normalise after its convolutions: the shapes would be the same."""
    kinds = [(name.rpartition(".")[2], t) for name, t in build_model("resnet20", 10).state_dict().items()]
    torch.save({f"x{i}.{kind}": tensor for i, (kind, tensor) in enumerate(kinds)}, tmp_path / "w.pt")
    _refused(tmp_path / "w.pt", r"base\.stem\.weight is missing")
