"""Pictures of one's own, by a model that is trained here on scikit-learn's handwritten digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from small import PARAMS as SMALL_PARAMS
from small import RECIPE

from resgrid.cli import main
from resgrid.config import Digits, Preprocess, load_params
from resgrid.data.fetch import download
from resgrid.data.preprocess import draw, preprocess
from resgrid.data.sources import open_source
from resgrid.evaluation import score_file
from resgrid.grid import expand
from resgrid.models import build_model
from resgrid.predict import BATCH, find_pictures, predict
from resgrid.project import read_json
from resgrid.train_cell import train_cell
from resgrid.training.engine import score
from resgrid.weights import WeightsInfo, load_weights, save_weights

CPU = torch.device("cpu")
PARAMS = SMALL_PARAMS.format(
    data="{source: digits, test_fraction: 0.2, split_seed: 0}",
    training=1.0,
    validation=0.0,
    seeds="[0]",
    recipe=RECIPE.format(epochs=2, batch_size=16),
    studies="{}",
)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder with one trained cell, and the test images as PNG files called by their digit."""

    folder: Path
    pictures: Path

    @property
    def weights(self) -> Path:
        return self.folder / "runs" / "resnet20-adam-0" / "weights.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    data = Digits(source="digits", test_fraction=0.2, split_seed=0)
    download(data, folder / "data" / "raw")
    settings = Preprocess(resize="stretch", validation_fraction=0.0, training_fraction=1.0, seed=0)
    preprocess(data, settings, folder / "data" / "raw", folder / "data" / "processed")
    (folder / "params.yaml").write_text(PARAMS)
    cell = next(each for each in expand(load_params(folder / "params.yaml")) if each.id == "resnet20-adam-0")
    for _ in train_cell(cell, folder / "data" / "processed", folder / "runs" / cell.id, CPU):
        pass
    digits = load_digits()
    is_test = draw(digits.target, "0123456789", 0.2, 0)
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in np.flatnonzero(is_test):
        grey = ((digits.images[i].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
        Image.fromarray(grey).save(pictures / f"{digits.target[i]}-{i}.png")
    return Pipeline(folder, pictures)


@pytest.fixture
def inside(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.chdir(pipeline.folder)
    return pipeline


def test_a_handwritten_digit_given_as_png_is_named(
    inside: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = min(inside.pictures.glob("4-*.png"))
    assert main(["predict", str(picture), "--model", "resnet20-adam-0", "--top", "2"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{picture}: 4 ")
    assert output.out.count(" %") == 2
    assert output.err == "resnet20-adam-0: resnet20, 10 classes\n"


def test_files_are_prepared_as_the_training_images_were_so_that_the_accuracy_is_the_same(
    inside: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """359 pictures: more than a batch, and whether each is right is what `evaluate` counted."""
    assert main(["predict", "pictures", "--model", str(inside.weights), "--json", "--top", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["file"]).name for row in rows] == sorted(p.name for p in inside.pictures.iterdir())
    right = sum(Path(row["file"]).name[0] == row["top"][0]["class"] for row in rows)
    assert len(rows) == 359
    assert right / 359 == read_json(inside.weights.parent / "run.json")["test_accuracy"]
    assert right > 300
    assert load_weights(inside.weights)[0].resize == "stretch"


def test_the_resizing_is_the_one_stored_with_the_weights(tmp_path: Path) -> None:
    """A picture with a white left third: padded there is black above it, stretched there is none."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    seen = {}

    class Watched(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen["mean"] = images.mean().item()
            return torch.zeros(len(images), 2)

    for resize, mean in (("stretch", 1 / 3), ("pad", 1 / 9), ("crop", 0.0)):
        info = WeightsInfo(
            architecture="resnet20", class_names=("a", "b"), mean=(0.0,) * 3, std=(1.0,) * 3, resize=resize
        )
        [prediction] = predict(Watched(), info, [tmp_path / "wide.png"], CPU)
        assert prediction.top == (("a", 0.5), ("b", 0.5))
        assert seen["mean"] == pytest.approx(mean, abs=0.01)


def test_probabilities_add_up_and_stand_best_first(
    inside: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(min(inside.pictures.glob("7-*.png")))
    assert main(["predict", picture, "--model", "resnet20-adam-0", "--json", "--top", "99"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    values = [each["probability"] for each in row["top"]]
    assert sorted(each["class"] for each in row["top"]) == list("0123456789")
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)


def test_a_broken_file_is_named_and_the_next_ones_go_on(
    inside: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = min(inside.pictures.glob("0-*.png"))
    (tmp_path / "a.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "b.png").write_bytes(good.read_bytes())
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path), str(tmp_path / "gone.png"), str(tmp_path / "empty"), str(good)]
    assert main(["predict", *paths, "--model", "resnet20-adam-0", "--json"]) == 1
    output = capsys.readouterr()
    rows = json.loads(output.out)
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png", "gone.png", "empty", good.name]
    assert ["error" in row for row in rows] == [True, False, True, True, False]
    assert "a.png cannot be read as an image" in rows[0]["error"]
    assert rows[1]["top"] == rows[4]["top"]
    assert output.err == (
        "resgrid: 3 of 5 pictures could not be read.\nresgrid: passed over: 1 × a file that Pillow cannot identify as a picture.\n"
    )

    assert main(["predict", *paths, "--model", "resnet20-adam-0"]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    assert "gone.png: there is no such file." in output.err


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.bmp", "x.tif", "x.ppm", "x.jp2", "x.ico"])
def test_other_formats_are_read_as_well(pipeline: Pipeline, tmp_path: Path, name: str) -> None:
    Image.open(min(pipeline.pictures.glob("1-*.png"))).convert("RGB").resize((64, 64)).save(tmp_path / name)
    model, info = build_model("resnet20", 2), _info(2)
    [prediction] = predict(model, info, find_pictures([tmp_path]), CPU)
    assert prediction.error is None
    assert len(prediction.top) == 2


def test_a_file_whose_name_is_no_utf_8_is_printed_as_it_is(inside: Pipeline, tmp_path: Path) -> None:
    picture = tmp_path / "caf\udce9.png"
    picture.write_bytes(min(inside.pictures.glob("0-*.png")).read_bytes())
    program = "import sys; from resgrid.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "predict", str(tmp_path), "--model", str(inside.weights)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(bytes(picture))


def test_pictures_of_a_folder_are_known_by_content_and_others_are_counted(
    inside: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = min(inside.pictures.glob("0-*.png")).read_bytes()
    for name in ("a.JFIF", "no suffix", "b.dat"):
        (tmp_path / name).write_bytes(good)
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / ".hidden.png").write_bytes(good)
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(inside.pictures)
    assert main(["predict", str(tmp_path), "--model", str(inside.weights)]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 3
    assert "c.heic cannot be read as an image (it is a HEIC picture, which Pillow does not read" in output.err
    assert "gone.png: a link that leads nowhere (to nowhere)." in output.err
    assert (
        "resgrid: passed over: 1 × a link to a folder, 1 × a hidden file, "
        "1 × a file that Pillow cannot identify as a picture.\n"
    ) in output.err


def _info(num_classes: int) -> WeightsInfo:
    names = tuple(f"class {i}" for i in range(num_classes))
    return WeightsInfo(architecture="resnet20", class_names=names, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_what_would_start_another_program_or_never_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    os.mkfifo(tmp_path / "pipe.png")
    found = list(
        predict(build_model("resnet20", 2), _info(2), [tmp_path / "x.eps", tmp_path / "pipe.png"], CPU)
    )
    assert all(each.error for each in found)


def test_files_are_opened_a_batch_at_a_time(pipeline: Pipeline) -> None:
    picture = min(pipeline.pictures.glob("1-*.png"))
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield picture

    predictions = predict(build_model("resnet20", 2), _info(2), endless(), CPU)
    for _ in range(BATCH + 1):
        next(predictions)
    assert taken == 2 * BATCH


def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback(inside: Pipeline) -> None:
    program = "import sys; from resgrid.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "predict", "pictures", "--model", str(inside.weights)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    timer = threading.Timer(120, process.kill)
    timer.start()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 141)
    timer.cancel()


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--model", "resnet20-adam-9"], "no cell is called 'resnet20-adam-9'"),
        (["--model", "absent.safetensors"], "absent.safetensors: there is no such file"),
        (["--model", "params.yaml"], "cannot be read as a weights file of ResGrid"),
        (["--top", "0"], "argument --top: 0: there must be at least one"),
    ],
)
def test_a_mistake_ends_with_one_message(
    inside: Pipeline, arguments: list[str], printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "pictures", *arguments]) == 1
    output = capsys.readouterr()
    assert printed in output.err
    assert output.out == ""


def test_weights_that_changed_since_training_are_refused(
    inside: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = tmp_path / "runs" / "resnet20-adam-0"
    shutil.copytree(inside.weights.parent, cell)
    (tmp_path / "params.yaml").write_text(PARAMS)
    save_weights(cell / "weights.safetensors", build_model("resnet20", 10), _info(10))
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(inside.pictures), "--model", "resnet20-adam-0"]) == 1
    assert "the file has changed since it was trained" in capsys.readouterr().err


def test_a_diverged_cell_is_refused_unless_its_file_is_named(
    inside: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = tmp_path / "runs" / "resnet20-adam-0"
    shutil.copytree(inside.weights.parent, cell)
    (tmp_path / "params.yaml").write_text(PARAMS)
    record = json.loads((cell / "run.json").read_text())
    cause = "the training loss was not finite at the end of epoch 1 of 2; the weights are the initial ones."
    (cell / "run.json").write_text(json.dumps(record | {"status": "diverged", "cause": cause}))
    monkeypatch.chdir(tmp_path)
    for command in (["predict", str(inside.pictures), "--model"], ["export", "--format", "pt2"]):
        assert main([*command, "resnet20-adam-0"]) == 1
        printed = capsys.readouterr().err
        assert f"resnet20-adam-0: it diverged: {cause}" in printed
        assert "name their file: runs/resnet20-adam-0/weights.safetensors" in printed
    asked_for = "runs/resnet20-adam-0/weights.safetensors"
    assert main(["predict", str(inside.pictures), "--model", asked_for]) == 0


def test_score_prepares_images_as_those_that_the_weights_were_trained_on(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / f"images/{split}/{name}").mkdir(parents=True)
            for i in range(4):
                wide = numbers.integers(0, 256, (40, 90, 3), dtype=np.uint8)
                Image.fromarray(wide).save(tmp_path / f"images/{split}/{name}/{i}.png")
    torch.manual_seed(0)
    model = build_model("resnet20", 2, 0.0)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    losses = {}
    for resize in ("stretch", "pad"):
        info = WeightsInfo(architecture="resnet20", class_names=("a", "b"), mean=mean, std=std, resize=resize)
        save_weights(tmp_path / f"{resize}.safetensors", model, info)
        found = score_file(tmp_path / f"{resize}.safetensors", tmp_path / "images", "test", CPU)
        images = open_source(tmp_path / "images", resize).load("test")
        assert found == score(model, images, mean, std, CPU)
        losses[resize] = found.loss
    assert losses["stretch"] != losses["pad"]
