"""The mistakes that are worded: what a person does, and what ResGrid says to it.

Each message names the key or the file, what is wrong, and the way out. Whatever else goes wrong ends with the
library's own error. What is wrong inside an archive, a picture, a download, another program's weights or a
server stands in the tests of those.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from resgrid.cli import main
from resgrid.config import load_params, parse_params
from resgrid.errors import ResgridError
from resgrid.grid import choose, find_cell
from resgrid.models import build_model
from resgrid.project import read_json, read_yaml
from resgrid.scaffold import inspect_dataset
from resgrid.training.device import choose_device
from resgrid.weights import WeightsInfo, load_weights, save_weights

ROOT = Path(__file__).parents[1]
OTHER = {"architecture": "resnet10", "optimizer": "adam", "seed": 1}

# In params.yaml: a key of the root's file, its new value (None: the key is deleted), and the message.
PARAMS: list[tuple[str, object, str]] = [
    # spelling
    ("lerning", 1, "lerning: unknown key. Check its spelling, or delete it"),
    ("recipes/resnet20/epoch", 1, "recipes.resnet20.epoch: unknown key. Check its spelling, or delete it"),
    ("preprocess", {"rezise": "crop"}, "preprocess.rezise: unknown key; did you mean resize? Check its spelling"),
    ("preprocess/resize", None, "preprocess.resize: this key is missing"),
    ("rates", None, "rates: this key is missing; add the line `rates: {factors: []}`, for no other learning rates"),
    ("recipes/resnet20/schedule/name", "dorp", "recipes.resnet20.schedule.name: Input tag 'dorp' found using 'name' does not match any of the expected tags: 'constant', 'drop', 'piecewise', 'cosine' (it is \"dorp\"); did you mean drop?"),
    ("recipes/resnet20/schedule", {"factor": 1.0}, "recipes.resnet20.schedule.name: this key is missing"),
    ("data", {"source": "cifar100"}, "data.source: Input tag 'cifar100' found using 'source' does not match"),
    ("engine/precision", "bf61", "engine.precision: Input should be 'auto', 'fp32' or 'bf16' (it is \"bf61\"); did you mean bf16?"),
    ("grid/architectures", ["resnet23"], "grid.architectures.0: must be 'resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110', 'resnet10', 'resnet18', 'resnet26', 'vgg16' or 'resnet20v1', or listed in grid.own_architectures (it is 'resnet23'); did you mean resnet32 or resnet26 or resnet20?"),
    ("optimizers/adams", {}, "optimizers.adams: Input should be 'sgd', 'adam', 'rmsprop', 'adagrad' or 'adamw'"),
    ("name", "a/b", "name: String should match pattern"),
    # values
    ("recipes/resnet20/epochs", 0, "recipes.resnet20.epochs: Input should be greater than or equal to 1 (it is 0)"),
    ("recipes/resnet20/epochs", 1.5, "recipes.resnet20.epochs: Input should be a valid integer (it is 1.5)"),
    ("recipes/resnet20/epochs", True, "recipes.resnet20.epochs: Input should be a valid integer (it is true)"),
    ("recipes/resnet10/dropout", 1.5, "recipes.resnet10.dropout: Input should be less than 1 (it is 1.5)"),
    ("recipes/resnet20/schedule/factor", 2.0, "recipes.resnet20.schedule.factor: Input should be less than or equal to 1"),
    ("recipes/resnet10/normalization/mean", [[]], "recipes.resnet10.normalization.mean.0: Input should be a valid number"),
    ("tuning/resnet20/sgd/lr", "1e-3", "tuning.resnet20.sgd.lr: Input should be a valid number (it is \"1e-3\")"),
    ("tuning/resnet20/sgd/lr", -0.1, "tuning.resnet20.sgd.lr: Input should be greater than 0 (it is -0.1)"),
    ("tuning/resnet20/sgd/lr", float("nan"), "tuning.resnet20.sgd.lr: Input should be a finite number"),
    ("optimizers/adam/eps", 0, "optimizers.adam.eps: Input should be greater than 0 (it is 0)"),
    ("grid/optimizers", [], "grid.optimizers: Tuple should have at least 1 item"),
    ("grid/seeds", [0, 0], "grid.seeds: holds a value twice"),
    ("data", {"source": "archive", "location": "x", "checksum": "md5:12"}, "data.checksum: String should match"),
    # values that do not fit together
    ("recipes/vgg16/dropout", 0.1, "recipes.vgg16.dropout: vgg16 takes three rates, as in [0.3, 0.4, 0.5]"),
    ("recipes/resnet10/dropout", [0.1, 0.2, 0.3], "recipes.resnet10.dropout: resnet10 takes one rate, not three"),
    ("recipes/resnet20/dropout", 0.1, "recipes.resnet20.dropout: resnet20 has no dropout layer, so it must be 0.0"),
    ("recipes/resnet10/initial_weights/name", "imagenet", "recipes.resnet10.initial_weights: imagenet weights exist for vgg16 only"),
    ("recipes/vgg16/initial_weights", {"name": "mlflow", "uri": "models:/vgg@best"}, "uri: an alias moves, unseen by DVC; name the version, as in models:/NAME/3"),
    ("recipes/resnet20/schedule", {"name": "piecewise", "boundaries": [5], "factors": [1.0]}, "recipes.resnet20.schedule: factors needs one value more than boundaries"),
    ("recipes/resnet20/schedule", {"name": "piecewise", "boundaries": [5, 3], "factors": [1.0, 0.1, 0.01]}, "recipes.resnet20.schedule: boundaries must rise"),
    ("optimizers/sgd/momentum", 0.0, "optimizers.sgd: nesterov needs a momentum above 0"),
    ("recipes/resnet18", None, "recipes.resnet18: is missing, but the grid has resnet18"),
    ("optimizers/adagrad", None, "optimizers.adagrad: is missing, but the grid has adagrad"),
    ("tuning/resnet18", None, "tuning.resnet18.sgd: is missing: every optimizer has a learning rate for every architecture"),
    ("tuning/resnet20/sgd", {"nesterov": True}, "tuning.resnet20.sgd.lr: this key is missing"),
    ("tuning/resnet20/sgd", {"lr": 0.1}, "optimizers.sgd.nesterov: this key is missing"),
    ("tuning/resnet20/sgd/momentum", 0.5, "tuning.resnet20.sgd.momentum: stands in optimizers.sgd too; keep one of them"),
    ("grid/own_architectures", ["resnet20"], "grid.own_architectures: resnet20 is the name of a package's network"),
    ("grid/own_architectures", ["not-one-word"], "grid.own_architectures.0: String should match pattern"),
    ("grid/own_architectures", ["tiny"], "recipes.tiny: is missing, but the grid has tiny"),
    # studies
    ("studies/lr-0p5/lr", 0, "studies.lr-0p5.lr: Input should be greater than 0 (it is 0)"),
    ("studies/lr-0p5/epoch", 3, "studies.lr-0p5.epoch: unknown key; did you mean epochs or approach?"),
    ("studies/lr-0p5/momentum", 0.9, "studies.lr-0p5.momentum: unknown key"),  # of another optimizer
    ("studies/lr-0p5/dropout", [0.1, 0.2, 0.3], "studies.lr-0p5.dropout: resnet10 takes one rate, not three"),
    ("studies/lr-0p5/architecture", "resnet23", "studies.lr-0p5.architecture: there is no recipes.resnet23; did you mean resnet32"),
    ("studies/lr-0p5", {"optimizer": "adam", "seed": 0}, "studies.lr-0p5.architecture: this key is missing"),
    ("studies/resnet20-sgd-7", OTHER, "studies.resnet20-sgd-7: that is the name of a cell; take another one"),
    ("studies/resnet20-sgd-7-x30", OTHER, "studies.resnet20-sgd-7-x30: that is the name of a cell"),
    # other learning rates
    ("rates/factors", [0.3, 3.0], "rates.factors.1: a factor is a number from 0.001 to 1000, not 1 (that is the grid's own cell), and written as 0.3 or 3, not as 3.0 (it is 3.0)"),
    ("rates/factors", [1], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that is"),
    ("rates/factors", [0.0001], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that is"),
    ("rates/factors", [10**400], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that is"),
    ("rates/factors", [0.1234567], "rates.factors.0: a factor is a number from 0.001 to 1000, not 1 (that is"),
    ("rates/factors", ["0.3"], "rates.factors.0: Input should be a valid number (it is \"0.3\")"),
    ("rates/factors", [0.3, 0.3], "rates.factors: holds a value twice"),
]  # fmt: skip

# A whole params.yaml.
FILES = [
    ("a: [1, 2", "params.yaml: cannot be read (while parsing a flow sequence"),
    ("a: 1\na: 2", "params.yaml: cannot be read (while constructing a mapping"),
    ("\x00", "params.yaml: cannot be read (unacceptable character"),
    ("- 1\n- 2", "params.yaml: Input should be an object (it is [1, 2])"),
    ("", "params.yaml: Input should be an object (it is null)"),
    (None, "Run this in a pipeline's folder, such as the project's root or examples/digits."),
]

# On the command line, in a pipeline's folder where nothing was trained.
COMMANDS = [
    ("cells --jsn", "unrecognized arguments: --jsn. `resgrid --help` shows what it takes."),
    ("set recipes.*.epoch=1", "params.yaml: no key matches 'recipes.*.epoch'; did you mean recipes."),
    ("set recipes.*.epochs=ten", "params.yaml: recipes.resnet20.epochs: Input should be a valid integer"),
    ("set recipes.*.epochs", "'recipes.*.epochs': write KEY=VALUE, as in 'recipes.*.epochs=10'."),
    ("set grid.seeds=[0", "'grid.seeds=[0': the value is no YAML: while parsing a flow sequence"),
    ("init . --data images", "params.yaml: is there already. Name a new folder, or delete it."),
    ("init new --data absent", "absent: there is no such file"),
    ("init new --data new/data/mine", "new/data/mine: the pipeline writes into data, runs, reports of"),
    ("init new --data digits.safetensors", "digits.safetensors: cannot be read as a folder, a tar or a zip"),
    ("init new", "new: no pipeline that `resgrid init` made. --data names images for one."),
    ("predict one.png --model resnet20-sdg-0", "no cell is called 'resnet20-sdg-0'; did you mean resnet20-sgd-0"),
    ("predict one.png --model resnet20-sgd-0", "resnet20-sgd-0: this cell has no result (not trained yet). `dvc repro train@resnet20-sgd-0` trains it."),
    ("score absent.safetensors --data images", "absent.safetensors: there is no such file."),
    ("score digits.safetensors --data images", "images: its classes are one, two; digits.safetensors knows circle, square. Give data with the same classes."),
    ("preprocess", "cannot be read (No such file or directory: data/raw/digits.safetensors). `dvc repro download` makes it."),
    ("compare", "reports/leaderboard.csv: there is no comparison yet. `dvc repro` trains and compares;"),
    ("plan", "there is no dvc.yaml here. Name a pipeline's folder, such as the project's root or examples/digits"),
]  # fmt: skip

# A folder of images: what is in it.
IMAGES = [
    ("", "an image folder holds train/<class>/<image> and test/<class>/<image>, or <class>/<image>."),
    ("cat/0.png", "'cat' is the only class: it takes two to tell apart."),
    ("test/cat/0.png test/dog/0.png", "there is no image in train/: "),
    ("train/cat/0.png train/dog/0.png test/cat/0.png", "class 'dog' has no image in test/"),
    ("a/train/cat/0.png a/train/dog/0.png b/train/cat/0.png", "there are splits in several places: a/train, b/train. Keep one: "),
]  # fmt: skip

# A weights file: what its metadata say.
METADATA = [
    (None, "its metadata have no 'resgrid', so it names neither architecture nor classes. `resgrid import` makes"),
    ("{", "its metadata are not those of this version: 1 validation error for WeightsInfo"),
    ({"architecture": "../resnet20"}, "architecture\n  String should match pattern"),
    ({"std": [0.4, 0.0, 0.6]}, "std.1\n  Input should be greater than 0"),
    ({"colour": "red"}, "colour\n  Extra inputs are not permitted"),
    ({"architecture": "resnet21"}, "this package has no resnet21, and there is no architectures/resnet21.py."),
    ({"architecture": "resnet32"}, "base.stage1.3.norm1.weight is missing, which resnet32 with 2 classes has."),
    ({"architecture": "resnet10"}, "base.norm.weight is missing, which resnet10 with 2 classes has."),
    ({"class_names": ["a"]}, "head.classifier.weight has the shape (2, 64, 1, 1), where resnet20 with 1 classes has (1, 64, 1, 1). Check the name of the model and the number of classes."),
]  # fmt: skip

# In Python.
CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: find_cell(load_params(), "resnet20-*"), "no cell is called 'resnet20-[*]'"),
    (lambda: choose(load_params(), ["vgg19-*"]), "no cell is called 'vgg19-*'. `resgrid cells` lists all of them; resnet20-* and *-adam-? are patterns."),
    (lambda: choose_device("gpu"), "device=gpu: no device has that name. This machine has"),
    (lambda: choose_device("cuda:99"), "device=cuda:99: this machine has no such device. This machine has"),
    (lambda: build_model("tiny", 2), "this package has no tiny, and there is no architectures/tiny.py. Known are resnet20,"),
    (lambda: load_weights(Path("images")), "images: this is a folder."),
    (lambda: load_weights(Path("images/one/0.png")), "images/one/0.png: cannot be read as a weights file of ResGrid"),
    (lambda: read_json(Path("absent.json")), "absent.json: cannot be read (No such file or directory). `dvc checkout --force` restores it."),
    (lambda: read_json(Path("params.yaml")), "params.yaml: cannot be read (Expecting value: line 1 column 1"),
    (lambda: read_json(Path("list.json")), "list.json: cannot be read (it holds no object)."),
    (lambda: read_yaml(Path("images/one/0.png")), "images/one/0.png: cannot be read ('utf-8' codec can't decode"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline's folder with a weights file and some pictures, in which this process is."""
    shutil.copy(ROOT / "examples/digits/params.yaml", tmp_path)
    info = WeightsInfo(
        architecture="resnet20", class_names=("circle", "square"), mean=(0.1,) * 3, std=(0.4,) * 3
    )
    save_weights(tmp_path / "digits.safetensors", build_model("resnet20", 2), info)
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 255).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "list.json").write_text("[1]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ResgridError) as refused:
        call()
    return str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "expected"), PARAMS, ids=[f"{path}={value}"[:60] for path, value, _ in PARAMS]
)
def test_in_params_each_mistake_is_named_with_its_key(path: str, value: object, expected: str) -> None:
    raw = node = YAML(typ="safe").load(ROOT / "params.yaml")
    *parents, last = path.split("/")
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    refusal = message(lambda: parse_params(raw))
    assert refusal.startswith("params.yaml: ")
    assert expected in refusal


def test_all_mistakes_of_a_file_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("  resize: stretch", "  rezise: stretch"), ("  precision: auto", "  precision: bf61"), ("  - resnet32\n", "  - resnet23\n"),
    ):  # fmt: skip
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "params.yaml").write_text(text)
    lines = message(lambda: load_params(tmp_path / "params.yaml")).replace(f"{tmp_path}/", "").splitlines()
    assert [line.split(" ")[:2] for line in lines] == [
        ["params.yaml:11:", "preprocess.resize:"],
        ["params.yaml:12:", "preprocess.rezise:"],
        ["params.yaml:27:", "grid.architectures.1:"],
        ["params.yaml:18:", "engine.precision:"],
    ]


@pytest.mark.parametrize(("content", "expected"), FILES)
def test_a_file_that_is_no_params_is_named(content: str | None, expected: str, here: Path) -> None:
    if content is None:
        Path("params.yaml").unlink()
    else:
        Path("params.yaml").write_text(content)
    assert expected in message(load_params).replace("params.yaml:1:", "params.yaml:")


@pytest.mark.parametrize(("command", "expected"), COMMANDS)
def test_a_command_ends_with_one_message_and_writes_nothing(
    command: str, expected: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main(command.split()) == 1
    output = capsys.readouterr()
    assert expected in output.err.replace(f"{here}/", "")
    assert output.out == ""
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("names", "expected"), IMAGES)
def test_images_that_are_no_classes_are_refused(names: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in names.split():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255).save(tmp_path / "mine" / name)
    assert expected in message(lambda: inspect_dataset(tmp_path / "mine"))


@pytest.mark.parametrize(("metadata", "expected"), METADATA)
def test_a_weights_file_whose_metadata_are_wrong_is_refused(metadata: Any, expected: str, here: Path) -> None:
    path, info = Path("digits.safetensors"), load_weights(Path("digits.safetensors"))[0]
    if isinstance(metadata, dict):
        metadata = json.dumps(json.loads(info.model_dump_json()) | metadata)
    save_file(load_file(path), path, {"format": "pt"} if metadata is None else {"resgrid": metadata})
    assert expected in message(lambda: load_weights(path))


def test_weights_that_fit_no_network_are_refused(here: Path) -> None:
    path = Path("digits.safetensors")
    metadata = {"resgrid": load_weights(path)[0].model_dump_json()}
    good = load_file(path)
    for tensors, expected in (
        ({"extra": torch.zeros(1)}, "it holds extra, which resnet20 with 2 classes has not. Check the name"),
        ({"base.stem.weight": torch.full((16, 3, 3, 3), float("inf"))}, "base.stem.weight holds a NaN or an infinity. Its training diverged: take earlier weights."),
    ):  # fmt: skip
        save_file(good | tensors, path, metadata)
        assert f"{path}: {expected}" in message(lambda: load_weights(path))


@pytest.mark.parametrize(("call", "expected"), CALLS)
def test_a_call_is_refused_with_its_name(call: Callable[[], object], expected: str, here: Path) -> None:
    assert expected in message(call)
