"""The architectures: their tables, their arithmetic by hand, and how their weights begin."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resgrid.errors import ResgridError
from resgrid.models import ARCHITECTURES, build_model
from resgrid.models.cifar_resnet import Unit
from resgrid.models.cifar_resnet_v1 import Unit as FirstUnit
from resgrid.models.dropout import Dropout
from resgrid.models.vgg import imagenet_vgg16_base
from resgrid.models.wide_resnet import Block
from resgrid.summary import count_parameters, summarize

# By 3x3 kernels: stage 1 has 2n of 16 -> 16; stage 2 one of 16 -> 32 and 2n - 1 of 32 -> 32; stage 3 the same
# doubled. Two batch norms a unit with 4 figures a channel. Stage 1 at n = 3: 6 * 2,304 + 6 * 64 = 14,208.
CIFAR_RESNETS = [
    # architecture, stages 1 to 3, total, trainable, not trainable
    ("resnet20", (14_208, 51_392, 204_160), 271_098, 269_722, 1_376),
    ("resnet32", (23_680, 88_768, 352_640), 466_426, 464_154, 2_272),
    ("resnet44", (33_152, 126_144, 501_120), 661_754, 658_586, 3_168),
    ("resnet56", (42_624, 163_520, 649_600), 857_082, 853_018, 4_064),
    ("resnet110", (85_248, 331_712, 1_317_760), 1_736_058, 1_727_962, 8_096),
]
# Stage 1, a block: 2 * 36,864 + 2 * 256 = 74,240. Stage 2, the first: 73,728 + 147,456 + 2 * 512, and the
# projection 8,192 + 512, so 230,912; another block: 2 * 147,456 + 2 * 512 = 295,936.
WIDE_RESNETS = [
    ("resnet10", (74_240, 230_912, 920_576, 3_676_160), 4_909_002, 4_903_242, 5_760),
    ("resnet18", (148_480, 526_848, 2_102_272, 8_398_848), 11_183_562, 11_173_962, 9_600),
    ("resnet26", (222_720, 822_784, 3_283_968, 13_121_536), 17_458_122, 17_444_682, 13_440),
]
VGG16_ROWS = [
    ("conv_bn_relu", (32, 32, 64), 2_048),
    ("conv_bn_relu_1", (32, 32, 64), 37_184),
    ("max_pooling2d", (16, 16, 64), 0),
    ("conv_bn_relu_2", (16, 16, 128), 74_368),
    ("conv_bn_relu_3", (16, 16, 128), 148_096),
    ("max_pooling2d_1", (8, 8, 128), 0),
    ("conv_bn_relu_4", (8, 8, 256), 296_192),
    ("conv_bn_relu_5", (8, 8, 256), 591_104),
    ("conv_bn_relu_6", (8, 8, 256), 591_104),
    ("max_pooling2d_2", (4, 4, 256), 0),
    ("conv_bn_relu_7", (4, 4, 512), 1_182_208),
    ("conv_bn_relu_8", (4, 4, 512), 2_361_856),
    ("conv_bn_relu_9", (4, 4, 512), 2_361_856),
    ("max_pooling2d_3", (2, 2, 512), 0),
    ("conv_bn_relu_10", (2, 2, 512), 2_361_856),
    ("conv_bn_relu_11", (2, 2, 512), 2_361_856),
    ("conv_bn_relu_12", (2, 2, 512), 2_361_856),
    ("max_pooling2d_4", (1, 1, 512), 0),
    ("flatten", (512,), 0),
    ("dropout_13", (512,), 0),
    ("dense", (512,), 262_656),
    ("batch_normalization_13", (512,), 2_048),
    ("dense_1", (10,), 5_130),
    ("activation", (10,), 0),
]


@pytest.mark.parametrize(("architecture", "stages", "total", "trainable", "rest"), CIFAR_RESNETS)
def test_table_of_a_cifar_resnet_is_the_originals(
    architecture: str, stages: tuple[int, ...], total: int, trainable: int, rest: int
) -> None:
    summary = summarize(architecture, 10, 0.0)
    assert [(row.layer, row.type, row.output_shape, row.params) for row in summary.rows] == [
        ("conv2d", "Conv2D", (32, 32, 16), 432),
        ("sequential", "Sequential", (32, 32, 16), stages[0]),
        ("sequential_1", "Sequential", (16, 16, 32), stages[1]),
        ("sequential_2", "Sequential", (8, 8, 64), stages[2]),
        ("batch_normalization", "BatchNormalization", (8, 8, 64), 256),
        ("conv2d_1", "Conv2D", (1, 1, 10), 650),
        ("activation", "Activation", (10,), 0),
    ]
    assert (summary.total, summary.trainable, summary.non_trainable) == (total, trainable, rest)


@pytest.mark.parametrize(("architecture", "stages", "total", "trainable", "rest"), WIDE_RESNETS)
def test_table_of_a_wide_resnet_adds_up_to_the_originals_totals(
    architecture: str, stages: tuple[int, ...], total: int, trainable: int, rest: int
) -> None:
    summary = summarize(architecture, 10, 0.1)
    assert [(row.layer, row.type, row.output_shape, row.params) for row in summary.rows] == [
        ("conv2d", "Conv2D", (32, 32, 64), 1_728),
        ("batch_normalization", "BatchNormalization", (32, 32, 64), 256),
        ("sequential", "Sequential", (32, 32, 64), stages[0]),
        ("sequential_1", "Sequential", (16, 16, 128), stages[1]),
        ("sequential_2", "Sequential", (8, 8, 256), stages[2]),
        ("sequential_3", "Sequential", (4, 4, 512), stages[3]),
        ("average_pooling2d", "AveragePooling2D", (1, 1, 512), 0),
        ("flatten", "Flatten", (512,), 0),
        ("dense", "Dense", (10,), 5_130),
    ]
    assert (summary.total, summary.trainable, summary.non_trainable) == (total, trainable, rest)


def test_table_of_the_first_residual_network_adds_up_to_its_papers_count() -> None:
    """He et al. 2015, table 6: 0.27M parameters. By kernels: stage 1 six of 16 -> 16, stage 2 one of 16 -> 32 and
    five of 32 -> 32, stage 3 the same doubled; after each a batch norm of 4 figures a channel."""
    summary = summarize("resnet20v1")
    assert [(row.layer, row.output_shape, row.params) for row in summary.rows] == [
        ("conv2d", (32, 32, 16), 432),
        ("batch_normalization", (32, 32, 16), 64),
        ("sequential", (32, 32, 16), 6 * 2_304 + 6 * 64),
        ("sequential_1", (16, 16, 32), 4_608 + 5 * 9_216 + 6 * 128),
        ("sequential_2", (8, 8, 64), 18_432 + 5 * 36_864 + 6 * 256),
        ("average_pooling2d", (1, 1, 64), 0),
        ("flatten", (64,), 0),
        ("dense", (10,), 650),
    ]
    assert (summary.total, summary.trainable, summary.non_trainable) == (271_098, 269_722, 1_376)


def test_a_unit_of_the_first_residual_network_is_the_formula_of_its_paper() -> None:
    """relu(BN(W2 relu(BN(W1 x))) + shortcut), the shortcut every other pixel between channels of zeros."""
    torch.manual_seed(0)
    unit = FirstUnit(4, 8, 2).eval()
    x = torch.randn(2, 4, 6, 6)
    scale = 1 / math.sqrt(1 + 1e-5)  # a batch norm as it begins, in inference
    y = F.conv2d(
        F.relu(scale * F.conv2d(x, unit.conv1.weight, stride=2, padding=1)), unit.conv2.weight, padding=1
    )
    shortcut = torch.zeros(2, 8, 3, 3)
    shortcut[:, 2:6] = x[:, :, [0, 2, 4]][:, :, :, [0, 2, 4]]
    torch.testing.assert_close(unit(x), F.relu(scale * y + shortcut))


def test_table_of_vgg16_is_the_originals() -> None:
    summary = summarize("vgg16", 10, (0.3, 0.4, 0.5))
    assert [(row.layer, row.output_shape, row.params) for row in summary.rows] == VGG16_ROWS
    assert all(row.type is None for row in summary.rows)
    assert (summary.total, summary.trainable, summary.non_trainable) == (15_001_418, 14_991_946, 9_472)


def test_summaries_equal_those_of_the_reference_file(reference_data: Path) -> None:
    expected = json.loads((reference_data.parent / "reference" / "models.json").read_text())
    assert expected.keys() == ARCHITECTURES.keys() & expected.keys()
    for architecture, numbers in expected.items():
        ours = summarize(architecture).as_dict()
        assert {key: ours[key] for key in numbers} == numbers, architecture


def test_summary_prints_as_a_table() -> None:
    assert summarize("resnet20", 7).table().splitlines() == [
        "resnet20",
        "--------------------------------------------------------------------",
        "Layer (type)                               Output shape   Parameters",
        "--------------------------------------------------------------------",
        "conv2d (Conv2D)                            (32, 32, 16)          432",
        "sequential (Sequential)                    (32, 32, 16)       14,208",
        "sequential_1 (Sequential)                  (16, 16, 32)       51,392",
        "sequential_2 (Sequential)                  (8, 8, 64)        204,160",
        "batch_normalization (BatchNormalization)   (8, 8, 64)            256",
        "conv2d_1 (Conv2D)                          (1, 1, 7)             455",
        "activation (Activation)                    (7)                     0",
        "--------------------------------------------------------------------",
        "Total parameters: 270,903",  # 271,098 less three classes of 64 + 1
        "Trainable parameters: 269,527",
        "Non-trainable parameters: 1,376",
    ]


def test_summary_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    summarize("resnet10", 10, 0.1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [("resnet20", 128 + 650), ("resnet10", 5_130), ("vgg16", 262_656 + 1_024 + 5_130)],
)
def test_freezing_the_base_leaves_the_head_trainable(architecture: str, head: int) -> None:
    model = build_model(architecture, 10)
    total = count_parameters(model)[0]
    model.base.requires_grad_(False)
    assert count_parameters(model) == (total, head, total - head)
    assert [name for name, _ in model.named_children()] == ["base", "head"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient_and_logits_have_a_column_a_class(architecture: str) -> None:
    torch.manual_seed(0)
    model = build_model(architecture, 7, 0.0)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([1, 5])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["resnet20", "resnet10", "vgg16"])
def test_channels_last_stays_channels_last_to_the_end_of_the_base(architecture: str) -> None:
    torch.manual_seed(0)
    model = build_model(architecture, 10).eval().to(memory_format=torch.channels_last)
    layouts = []
    for module in model.base.modules():
        module.register_forward_hook(
            lambda module, _, y: (
                layouts.append(y.is_contiguous(memory_format=torch.channels_last)) if y.ndim == 4 else None
            )
        )
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last))
    assert len(layouts) > 10
    assert all(layouts)


@pytest.mark.parametrize("architecture", ["resnet20", "resnet10", "vgg16"])
def test_compiles_as_one_graph(architecture: str) -> None:
    torch.manual_seed(0)
    model = build_model(architecture, 10).eval()
    images = torch.randn(2, 3, 32, 32)
    graph = torch.compile(model, backend="eager", fullgraph=True)  # raises where a graph would break
    with torch.no_grad():
        assert torch.equal(graph(images), model(images))


# --- how weights begin ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet20", "resnet10", "vgg16"])
def test_weights_begin_as_he_et_al_say(architecture: str) -> None:
    torch.manual_seed(0)
    for module in build_model(architecture, 10).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            deviation = math.sqrt(2 / weight[0].numel())  # an output's inputs: channels times pixels
            error = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a deviation
            assert weight.std().item() == pytest.approx(deviation, rel=error)
            assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(weight.numel())
            assert module.bias is None or module.bias.abs().max() == 0
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))


def test_the_same_seed_draws_the_same_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model("resnet20", 10).state_dict()["base.stem.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# --- the CIFAR ResNets by hand --------------------------------------------------------------------


def test_batch_norms_are_keras_s_or_torch_s() -> None:
    def settings(architecture: str) -> set[tuple[float, float | None]]:
        norms = (nn.BatchNorm2d, nn.BatchNorm1d)
        modules = build_model(architecture, 10).modules()
        return {(module.eps, module.momentum) for module in modules if isinstance(module, norms)}

    assert settings("resnet20") == {(1e-3, 0.01)}
    assert settings("vgg16") == {(1e-3, 0.01)}
    assert settings("resnet10") == {(1e-5, 0.1)}


def _tap(weight: Tensor, row: int, column: int) -> None:
    """A kernel that copies input channel 0 to output channel 0 from one of its nine places."""
    weight.data.zero_()
    weight.data[0, 0, row, column] = 1


def test_stride_2_pads_below_and_to_the_right_alone() -> None:
    unit = Unit(16, 32, stride=2, opens_network=False).eval()
    convolved = []
    unit.conv1.register_forward_hook(lambda module, _, output: convolved.append(output[0, 0]))
    x = torch.rand(1, 16, 8, 8)  # positive, so that ReLU changes nothing
    seen = x[0, 0] / math.sqrt(1 + 1e-3)  # a batch norm of mean 0, variance 1
    with torch.no_grad():
        for row, column in [(0, 0), (1, 1), (2, 2)]:
            _tap(unit.conv1.weight, row, column)
            unit(x)
    assert torch.allclose(convolved[0], seen[0::2, 0::2])  # the first window starts at the first pixel
    assert torch.allclose(convolved[1], seen[1::2, 1::2])
    beyond = F.pad(seen[2::2, 2::2], (0, 1, 0, 1))  # the last window ends in zeros
    assert torch.allclose(convolved[2], beyond)


def _only_the_shortcut(unit: Unit, x: Tensor) -> Tensor:
    unit.conv2.weight.data.zero_()
    with torch.no_grad():
        return unit.eval()(x)


def test_shortcut_is_the_unit_s_input() -> None:
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(_only_the_shortcut(Unit(16, 16, 1, opens_network=False), x), x)


def test_shortcut_of_the_first_unit_is_taken_after_norm_and_relu() -> None:
    x = torch.randn(2, 16, 8, 8)
    y = _only_the_shortcut(Unit(16, 16, 1, opens_network=True), x)
    assert torch.allclose(y, x.clamp(min=0) / math.sqrt(1 + 1e-3))
    stages = build_model("resnet32", 10).base
    opening = [name for name, unit in stages.named_modules() if isinstance(unit, Unit) and unit.opens_network]
    assert opening == ["stage1.0"]


def test_shortcut_into_a_wider_stage_is_pooled_between_zeros() -> None:
    x = torch.randn(2, 16, 4, 4)
    y = _only_the_shortcut(Unit(16, 32, 2, opens_network=False), x)  # (2, 32, 2, 2)
    quarters = (x[:, :, 0::2, 0::2] + x[:, :, 0::2, 1::2] + x[:, :, 1::2, 0::2] + x[:, :, 1::2, 1::2]) / 4
    assert torch.allclose(y[:, 8:24], quarters, atol=1e-6)
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_of_vgg16_stands_where_the_original_has_it() -> None:
    model = build_model("vgg16", 10, (0.3, 0.4, 0.5))
    rates = {name: module.rate for name, module in model.named_modules() if isinstance(module, Dropout)}
    assert rates == {
        "base.conv1_1.dropout": 0.3,
        "base.conv2_1.dropout": 0.4,
        "base.conv3_1.dropout": 0.4,
        "base.conv3_2.dropout": 0.4,
        "base.conv4_1.dropout": 0.4,
        "base.conv4_2.dropout": 0.4,
        "base.conv5_1.dropout": 0.4,
        "base.conv5_2.dropout": 0.4,
        "head.dropout1": 0.5,
        "head.dropout2": 0.5,
    }


def test_dropout_of_a_wide_block_takes_the_sum_with_the_shortcut() -> None:
    torch.manual_seed(0)
    block = Block(8, 8, 1, dropout=0.25).eval()
    x = torch.rand(4, 8, 16, 16) + 1  # the sum is positive nearly everywhere
    with torch.no_grad():
        whole = block(x)
        block.dropout.train()
        dropped = block(x)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], whole[kept] / 0.75)
    assert (~kept & (whole > 0)).sum() / (whole > 0).sum() == pytest.approx(0.25, abs=0.02)


def test_dropout_0_adds_no_layer() -> None:
    assert not [m for m in build_model("resnet10", 10, 0.0).modules() if isinstance(m, Dropout)]


# --- VGG-16 ---------------------------------------------------------------------------------------


def test_vgg16_is_convolution_then_relu_then_norm() -> None:
    torch.manual_seed(0)
    model = build_model("vgg16", 10).eval()
    state = {name: torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()
             if tensor.is_floating_point()}  # fmt: skip
    for name in state:
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
    model.load_state_dict(state)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, offset = (
            state[f"{name}.{key}"].reshape(1, -1, *[1] * (x.ndim - 2))
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-3) * scale + offset

    images = torch.randn(3, 3, 32, 32)
    x = images
    for block, convolutions in enumerate([2, 2, 3, 3, 3], start=1):
        for index in range(1, convolutions + 1):
            name = f"base.conv{block}_{index}"
            x = F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=1)
            x = norm(x.clamp(min=0), f"{name}.norm")
        x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))  # the largest of each 2x2
    x = x.reshape(3, 512) @ state["head.dense.weight"].T + state["head.dense.bias"]
    x = norm(x.clamp(min=0), "head.norm")
    x = x @ state["head.classifier.weight"].T + state["head.classifier.bias"]
    with torch.no_grad():
        assert torch.allclose(model(images), x, rtol=1e-4, atol=1e-5)


# torchvision numbers VGG-16's convolutions among its ReLUs and poolings.
TORCHVISION = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torchvision keeps weights, empty, on a machine without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
        monkeypatch.delenv(proxy.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # the first one made in a process keeps its proxies
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet_weights_put_there_by_hand_go_into_the_convolutions(checkpoints: Path) -> None:
    torch.manual_seed(0)
    model = build_model("vgg16", 10)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    weights = {}
    for number, convolution in zip(TORCHVISION, convolutions, strict=True):
        weights[f"features.{number}.weight"] = torch.randn_like(convolution.weight)
        weights[f"features.{number}.bias"] = torch.randn_like(convolution.bias)
    weights["classifier.0.weight"] = torch.randn(4096, 5)
    torch.save(weights, checkpoints / "vgg16-397923af.pth")
    dense = model.head.get_parameter("dense.weight").clone()

    imagenet_vgg16_base(model)

    for number, convolution in zip(TORCHVISION, convolutions, strict=True):
        assert torch.equal(convolution.weight, weights[f"features.{number}.weight"])
        assert torch.equal(convolution.bias, weights[f"features.{number}.bias"])
    assert torch.equal(model.head.get_parameter("dense.weight"), dense)


def test_imagenet_weights_without_a_network_name_the_file_and_its_folder(checkpoints: Path) -> None:
    with pytest.raises(ResgridError) as error:
        imagenet_vgg16_base(build_model("vgg16", 10))
    assert str(checkpoints / "vgg16-397923af.pth") in str(error.value)
    assert "Connection refused" in str(error.value)
    assert f"put it into {checkpoints} (under $TORCH_HOME)" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."]
)
def test_damaged_imagenet_weights_are_refused(checkpoints: Path, content: bytes) -> None:
    (checkpoints / "vgg16-397923af.pth").write_bytes(content)
    with pytest.raises(ResgridError, match=r"vgg16-397923af\.pth"):
        imagenet_vgg16_base(build_model("vgg16", 10))


def test_other_weights_in_place_of_imagenet_s_are_refused(checkpoints: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, checkpoints / "vgg16-397923af.pth")
    with pytest.raises(ResgridError, match="not the weights of torchvision's VGG-16"):
        imagenet_vgg16_base(build_model("vgg16", 10))
