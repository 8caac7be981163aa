"""One cell from data folder to run folder, on the digits as the `preprocess` stage makes them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from resgrid.config import Digits, Engine, Preprocess, Recipe, load_params
from resgrid.data.dataset import content_digest, load_meta, load_split, save, split_digest
from resgrid.data.fetch import download
from resgrid.data.preprocess import preprocess
from resgrid.errors import ResgridError
from resgrid.grid import Cell, find_cell
from resgrid.models import build_model
from resgrid.run_status import epoch_ends, epoch_speeds, started_at
from resgrid.summary import summarize
from resgrid.train_cell import train_cell
from resgrid.training.engine import Epoch, Outcome, score, stream_seed
from resgrid.training.initial import load_initial_weights
from resgrid.weights import WeightsInfo, load_model, load_weights, save_weights

PARAMS = load_params(Path(__file__).parents[1] / "params.yaml")
CPU = torch.device("cpu")
FILES = ["history.csv", "run.json", "summary.txt", "timing.json", "weights.safetensors"]
AUGMENTATION = {"flip": False, "crop_padding": 2, "rotation_degrees": 5.0, "shift_fraction": 0.0}
PLAIN = {
    "epochs": 2, "batch_size": 16, "schedule": {"name": "constant"}, "time_decay": 0.0, "augmentation": AUGMENTATION,
}  # fmt: skip


def cell(cell_id: str = "resnet20-sgd-0", lr: float | None = None, **recipe: Any) -> Cell:
    """A cell of the grid, at another rate or with another recipe, in exact arithmetic."""
    first = find_cell(PARAMS, cell_id)
    changes = {
        "recipe": Recipe.model_validate(first.recipe.model_dump() | PLAIN | recipe),
        "optimizer": first.optimizer.model_copy(update={"lr": lr or first.optimizer.lr}),
        "engine": Engine(precision="fp32", compile="never", scored_epochs="all"),
    }
    return first.model_copy(update=changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """48 training, 32 test and 16 validation images of the digits, as the first two stages leave them."""
    root = tmp_path_factory.mktemp("data")
    source = Digits(source="digits", test_fraction=0.2, split_seed=0)
    settings = Preprocess(resize="stretch", validation_fraction=0.1, training_fraction=1.0, seed=0)
    download(source, root / "raw")
    preprocess(source, settings, root / "raw", root / "all")
    return smaller(root / "all", root / "processed", train=48, test=32, validation=16)


def smaller(whole: Path, out: Path, **num_images: int) -> Path:
    """The first images of each split alone, with digests that are right again."""
    meta = load_meta(whole)
    splits = {}
    for name, count in num_images.items():
        split = load_split(whole, name)
        splits[name] = dataclasses.replace(split, images=split.images[:count], labels=split.labels[:count])
    digests = {name: split_digest(split) for name, split in splits.items()}
    digest = content_digest(meta.class_names, digests)
    changed = {"num_images": num_images, "split_digests": digests, "digest": digest}
    save(out, meta.model_copy(update=changed), splits)
    return out


def train(trained: Cell, folder: Path, out: Path) -> tuple[list[Epoch], Outcome]:
    training = train_cell(trained, folder, out, CPU)
    epochs = []
    while True:
        try:
            epochs.append(next(training))
        except StopIteration as end:
            return epochs, end.value


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "resnet20-sgd-0"
    train(cell(), folder, out)
    return out


def test_a_run_leaves_five_files_and_its_metrics_have_these_keys_in_this_order(finished, folder):
    assert sorted(path.name for path in finished.iterdir()) == FILES
    metrics = json.loads((finished / "run.json").read_text())
    assert list(metrics) == [
        "cell", "cell_digest", "study", "architecture", "family", "depth", "optimizer", "learning_rate",
        "batch_size", "seed", "approach", "initial_weights", "status", "cause", "epochs", "epochs_planned", "steps",
        "train_loss", "train_accuracy", "test_loss", "test_accuracy", "validation_loss",
        "validation_accuracy", "best_test_accuracy", "best_epoch", "num_parameters", "num_trainable",
        "num_non_trainable", "data_digest", "code_digest", "architecture_origin", "weights_sha256", "numbers",
    ]  # fmt: skip
    known = {
        "cell": "resnet20-sgd-0", "study": None, "architecture": "resnet20", "family": "cifar_resnet",
        "depth": 20, "optimizer": "sgd", "learning_rate": 0.1, "batch_size": 16, "seed": 0,
        "approach": "end_to_end", "initial_weights": "random", "status": "completed", "cause": None,
        "epochs": 2, "epochs_planned": 2, "steps": 6, "num_parameters": 271_098, "num_trainable": 269_722,
        "num_non_trainable": 1_376,
    }  # fmt: skip
    assert {key: metrics[key] for key in known} == known
    assert metrics["data_digest"] == load_meta(folder).digest
    weights = (finished / "weights.safetensors").read_bytes()
    assert metrics["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_a_fresh_scoring_of_the_weights_file_repeats_the_metrics_to_the_last_digit(finished, folder):
    metrics = json.loads((finished / "run.json").read_text())
    model, info = load_model(finished / "weights.safetensors")
    for split in ("test", "validation"):
        fresh = score(model, load_split(folder, split), info.mean, info.std, CPU)
        assert (fresh.loss, fresh.accuracy) == (metrics[f"{split}_loss"], metrics[f"{split}_accuracy"])


def test_the_weights_file_says_how_to_use_it_and_the_summary_is_the_architectures_table(finished, folder):
    info, _ = load_weights(finished / "weights.safetensors")
    meta = load_meta(folder)
    mean, std = (meta.scalar_mean,) * 3, (meta.scalar_std,) * 3
    assert info == WeightsInfo(architecture="resnet20", class_names=tuple("0123456789"), mean=mean, std=std)
    assert (finished / "summary.txt").read_text() == summarize("resnet20", 10, 0.0).table() + "\n"


def test_the_history_has_a_row_an_epoch_and_ends_as_the_metrics_do(finished):
    metrics = json.loads((finished / "run.json").read_text())
    with (finished / "history.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        "epoch", "step", "learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
        "validation_loss", "validation_accuracy",
    ]  # fmt: skip
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6")]
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "validation_loss"):
        assert float(rows[-1][key]) == metrics[key]
    best = max(float(row["test_accuracy"]) for row in rows)
    assert metrics["best_test_accuracy"] == best == float(rows[metrics["best_epoch"] - 1]["test_accuracy"])


def test_the_timing_has_all_that_depends_on_the_clock_or_the_machine(finished):
    timing = json.loads((finished / "timing.json").read_text())
    assert list(timing) == [
        "started", "train_seconds", "epoch_seconds", "epoch_images_per_second", "images_per_second", "peak_memory_bytes",
        "device", "device_name", "precision", "compiled", "graphed", "sharing", "threads", "torch", "python", "platform",
        "resgrid", "commit", "dirty", "flow_run_id",
    ]  # fmt: skip
    assert timing["train_seconds"] == sum(timing["epoch_seconds"])
    assert len(timing["epoch_seconds"]) == 2
    assert timing["images_per_second"] == pytest.approx(2 * 48 / timing["train_seconds"])
    assert 50e6 < timing["peak_memory_bytes"] < 100e9
    assert (timing["device"], timing["precision"]) == ("cpu", "fp32")
    assert timing["epoch_images_per_second"] == [pytest.approx(48 / each) for each in timing["epoch_seconds"]]
    assert 0 < time.time() - timing["started"] / 1e6 < 600  # microseconds


def test_the_timing_names_the_commit_that_trained_and_the_flow_run(folder, tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t.invalid", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def origin(name: str) -> tuple[str, bool, str | None]:
        train(cell(epochs=1), folder, tmp_path / name)
        timing = json.loads((tmp_path / name / "timing.json").read_text())
        return timing["commit"], timing["dirty"], timing["flow_run_id"]

    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    for name in ("params.yaml", "dvc.lock"):
        Path(name).write_text("a: 1\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    Path("dvc.lock").write_text("stages:\n")  # DVC rewrites it at each stage
    monkeypatch.setenv("RESGRID_FLOW_RUN_ID", "0198")
    assert origin("run") == (git("rev-parse", "HEAD"), False, "0198")
    Path("params.yaml").write_text("a: 2\n")
    monkeypatch.delenv("RESGRID_FLOW_RUN_ID")
    assert origin("again") == (git("rev-parse", "HEAD"), True, None)


def test_the_time_of_an_epoch_is_the_beginning_and_the_seconds_so_far_also_in_folders_of_former_versions():
    started = 1_764_374_400_123_456  # 2025-11-29T00:00:00.123456 in UTC
    assert started_at({"started": started}) == started
    assert epoch_ends(started, [1.5, 0.25]) == [1_764_374_401_623, 1_764_374_401_873]
    assert epoch_ends(started, []) == []
    former = {"started": "2025-11-29T00:00:00+00:00", "epoch_seconds": [1.0, 3.0], "images_per_second": 30.0}
    assert started_at(former) == 1_764_374_400_000_000
    assert epoch_speeds(former) == [60.0, 20.0]  # 120 images in two epochs of 60 each


def test_two_runs_write_the_same_bytes_but_for_the_timing_which_has_when_they_began(
    finished, folder, tmp_path
):
    train(cell(), folder, tmp_path)
    for name in set(FILES) - {"timing.json"}:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    timings = [json.loads((each / "timing.json").read_text()) for each in (finished, tmp_path)]
    assert timings[0]["started"] < timings[1]["started"]


def test_a_diverged_cell_writes_all_its_files_with_the_last_finite_weights(folder, tmp_path):
    trained = cell(lr=1e30)
    epochs, _ = train(trained, folder, tmp_path)
    assert epochs == []
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    metrics = json.loads((tmp_path / "run.json").read_text())
    assert metrics["status"] == "diverged"
    assert "was not finite at the end of epoch 1 of 2, at a learning rate of 1e+30" in metrics["cause"]
    assert (metrics["epochs"], metrics["steps"], metrics["train_loss"]) == (0, 0, None)
    assert (tmp_path / "history.csv").read_text().count("\n") == 1  # the names of its columns
    model, info = load_model(tmp_path / "weights.safetensors")
    torch.manual_seed(stream_seed(0, "weights"))
    initial = build_model("resnet20", 10, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), initial.parameters(), strict=True))
    fresh = score(model, load_split(folder, "test"), info.mean, info.std, CPU)
    assert (fresh.loss, fresh.accuracy) == (metrics["test_loss"], metrics["test_accuracy"])


def test_a_run_that_is_stopped_leaves_an_earlier_one_as_it_was(folder, tmp_path):
    train(cell(epochs=1), folder, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    training = train_cell(cell(), folder, tmp_path, CPU)
    next(training)
    training.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_frozen_base_is_counted_as_not_trainable_and_ends_as_it_began(folder, tmp_path):
    trained = cell(approach="frozen_base")
    train(trained, folder, tmp_path)
    metrics = json.loads((tmp_path / "run.json").read_text())
    assert (metrics["approach"], metrics["num_trainable"]) == ("frozen_base", 778)  # BN 2 x 64, 64 x 10 + 10
    assert metrics["num_parameters"] == metrics["num_trainable"] + metrics["num_non_trainable"] == 271_098
    model, _ = load_model(tmp_path / "weights.safetensors")
    torch.manual_seed(stream_seed(0, "weights"))
    initial = build_model("resnet20", 10, 0.0)
    for name, tensor in initial.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, model.state_dict()[name]) == name.startswith("base."), name


def test_without_a_validation_split_its_figures_are_null_and_empty(folder, tmp_path):
    few = smaller(folder, tmp_path / "few", train=32, test=8)
    train(cell(epochs=1), few, tmp_path / "run")
    metrics = json.loads((tmp_path / "run/run.json").read_text())
    assert (metrics["validation_loss"], metrics["validation_accuracy"]) == (None, None)
    assert (tmp_path / "run/history.csv").read_text().splitlines()[1].endswith(",,")


# --- initial weights ---------------------------------------------------------------------------------


def weights_file(path: Path, architecture: str = "resnet20", classes: int = 10) -> str:
    """A file of random weights; returns its checksum."""
    torch.manual_seed(7)
    names = tuple(f"class {number}" for number in range(classes))
    info = WeightsInfo(architecture=architecture, class_names=names, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_weights(path, build_model(architecture, classes, 0.0), info)
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def from_file(path: Path | str, checksum: str, **recipe: Any) -> Cell:
    return cell(initial_weights={"name": "file", "path": str(path), "checksum": checksum}, **recipe)


def test_a_weights_file_of_as_many_classes_is_taken_whole_and_one_from_mlflow_as_it_is_passed(
    tmp_path, monkeypatch
):
    checksum = weights_file(tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    _, tensors = load_weights(tmp_path / "w.safetensors")
    fetched = cell(initial_weights={"name": "mlflow", "uri": "models:/resnet20/1"})
    for trained, passed in ((from_file("w.safetensors", checksum), None), (fetched, Path("w.safetensors"))):
        model = build_model("resnet20", 10, 0.0)
        load_initial_weights(trained, model, 10, passed)  # relative to the current folder
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_of_a_weights_file_of_other_classes_the_base_is_taken_and_the_head_is_drawn(tmp_path):
    checksum = weights_file(tmp_path / "w.safetensors", classes=100)
    torch.manual_seed(1)
    drawn = build_model("resnet20", 10, 0.0).head.state_dict()
    torch.manual_seed(1)
    model = build_model("resnet20", 10, 0.0)
    load_initial_weights(from_file(tmp_path / "w.safetensors", checksum), model, 10)
    _, tensors = load_weights(tmp_path / "w.safetensors")
    base = {name: tensor for name, tensor in tensors.items() if name.startswith("base.")}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    assert all(torch.equal(model.head.state_dict()[name], tensor) for name, tensor in drawn.items())


def test_a_run_from_a_weights_file_names_it_in_its_metrics(folder, tmp_path):
    source = tmp_path / "w.safetensors"
    train(from_file(source, weights_file(source), approach="frozen_base", epochs=1), folder, tmp_path / "run")
    metrics = json.loads((tmp_path / "run/run.json").read_text())
    assert metrics["initial_weights"] == str(source)
    before, after = (load_weights(path)[1] for path in (source, tmp_path / "run/weights.safetensors"))
    assert torch.equal(before["base.stem.weight"], after["base.stem.weight"])


@pytest.mark.parametrize(
    ("name", "architecture", "checksum", "message"),
    [
        ("w.safetensors", "resnet20", "md5:" + 32 * "0",
         r"its checksum is md5:[0-9a-f]{32}, .*recipes\.resnet20\.initial_weights\.checksum"),
        ("w.safetensors", "resnet32", None, "holds weights of resnet32, but this cell trains resnet20"),
        ("absent.safetensors", "resnet20", None, r"^recipes\.resnet20\.initial_weights\.path: there is no file absent\.saf"),
    ],
)  # fmt: skip
def test_initial_weights_of_another_file_or_architecture_are_refused(
    name, architecture, checksum, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    right = weights_file(Path("w.safetensors"), architecture)
    with pytest.raises(ResgridError, match=message):
        load_initial_weights(from_file(name, checksum or right), build_model("resnet20", 10, 0.0), 10)


# --- data that cannot be trained on ------------------------------------------------------------------


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(
        ResgridError, match=r"meta\.json: cannot be read .*No such file.*dvc repro preprocess"
    ):
        train(cell(), tmp_path / "nowhere", tmp_path / "run")
