"""Pictures of one's own, by a model that is trained here on scikit-learn's handwritten digits."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import count
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
from resgrid.grid import find_cell
from resgrid.models import build_model
from resgrid.predict import BATCH, find_pictures, predict
from resgrid.project import read_json
from resgrid.train_cell import train_cell
from resgrid.training.engine import score
from resgrid.weights import WeightsInfo, load_weights, save_weights

CPU = torch.device("cpu")
PROGRAM = (sys.executable, "-c", "import sys; from resgrid.cli import main; sys.exit(main())", "predict")
CELL = "resnet20-adam-0"
PARAMS = SMALL_PARAMS.format(
    data="{source: digits, test_fraction: 0.2, split_seed: 0}",
    training=1.0,
    validation=0.0,
    seeds="[0]",
    recipe=RECIPE.format(epochs=2, batch_size=16),
    studies="{}",
)
Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder with one trained cell, and the test images as PNG files called by their digit."""

    folder: Path
    pictures: Path

    @property
    def weights(self) -> Path:
        return self.folder / "runs" / CELL / "weights.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    data = Digits(source="digits", test_fraction=0.2, split_seed=0)
    download(data, folder / "data" / "raw")
    settings = Preprocess(resize="stretch", validation_fraction=0.0, training_fraction=1.0, seed=0)
    preprocess(data, settings, folder / "data" / "raw", folder / "data" / "processed")
    (folder / "params.yaml").write_text(PARAMS)
    cell = find_cell(load_params(folder / "params.yaml"), CELL)
    for _ in train_cell(cell, folder / "data" / "processed", folder / "runs" / CELL, CPU):
        pass
    digits = load_digits()
    (folder / "pictures").mkdir()
    for i in np.flatnonzero(draw(digits.target, "0123456789", 0.2, 0)):
        grey = ((digits.images[i].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"pictures/{digits.target[i]}-{i}.png")
    return Pipeline(folder, folder / "pictures")


@pytest.fixture
def inside(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.chdir(pipeline.folder)
    return pipeline


@pytest.fixture
def copied(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cell's folder in a copy of the pipeline, which is the current folder."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pipeline.weights.parent, tmp_path / "runs" / CELL))


def test_a_handwritten_digit_given_as_png_is_named_and_probabilities_stand_best_first(inside, capsys):
    picture = min(inside.pictures.glob("4-*.png"))
    assert main(["predict", str(picture), "--model", CELL, "--top", "2"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{picture}: 4 ")
    assert output.out.count(" %") == 2
    assert output.err == f"{CELL}: resnet20, 10 classes\n"
    assert main(["predict", str(picture), "--model", CELL, "--json", "--top", "99"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    values = [each["probability"] for each in row["top"]]
    assert sorted(each["class"] for each in row["top"]) == list("0123456789")
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)


def test_files_are_prepared_as_the_training_images_were_so_that_the_accuracy_is_the_same(inside, capsys):
    """359 pictures: more than a batch, and whether each is right is what `evaluate` counted."""
    assert main(["predict", "pictures", "--model", str(inside.weights), "--json", "--top", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["file"]).name for row in rows] == sorted(p.name for p in inside.pictures.iterdir())
    right = sum(Path(row["file"]).name[0] == row["top"][0]["class"] for row in rows)
    assert len(rows) == 359
    assert right / 359 == read_json(inside.weights.parent / "run.json")["test_accuracy"]
    assert right > 300
    assert load_weights(inside.weights)[0].resize == "stretch"


def _info(num_classes: int = 2, resize: str = "stretch", mean: float = 0.5, std: float = 0.25) -> WeightsInfo:
    return WeightsInfo(
        architecture="resnet20", class_names=tuple(f"class {i}" for i in range(num_classes)),
        mean=(mean,) * 3, std=(std,) * 3, resize=resize,
    )  # fmt: skip


def test_the_resizing_is_the_one_stored_with_the_weights(tmp_path):
    """A picture with a white left third: padded there is black above it, stretched there is none."""
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    means = []

    class Watched(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means.append(images.mean().item())
            return torch.zeros(len(images), 2)

    for resize in ("stretch", "pad", "crop"):
        info = _info(resize=resize, mean=0.0, std=1.0)
        [prediction] = predict(Watched(), info, [tmp_path / "wide.png"], CPU)
        assert prediction.top == (("class 0", 0.5), ("class 1", 0.5))
    assert means == pytest.approx([1 / 3, 1 / 9, 0.0], abs=0.01)


def test_of_a_folder_pictures_are_known_by_content_broken_ones_named_and_others_counted(
    inside, tmp_path, capsys
):
    good = min(inside.pictures.glob("0-*.png"))
    (tmp_path / "a.png").write_bytes(good.read_bytes()[:60])
    for name in ("b.JFIF", "no suffix", "d.dat", ".hidden.png"):
        (tmp_path / name).write_bytes(good.read_bytes())
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "lost.png").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(inside.pictures)
    (tmp_path / "empty").mkdir()
    paths = [str(path) for path in (tmp_path, tmp_path / "gone.png", tmp_path / "empty", good)]
    assert main(["predict", *paths, "--model", CELL, "--json"]) == 1
    output = capsys.readouterr()
    rows = {Path(row["file"]).name: row for row in json.loads(output.out)}
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert list(rows) == [
        "a.png",
        "b.JFIF",
        "c.heic",
        "d.dat",
        "lost.png",
        "no suffix",
        "gone.png",
        "empty",
        good.name,
    ]
    assert list(errors) == ["a.png", "c.heic", "lost.png", "gone.png", "empty"]
    assert "a.png cannot be read as an image" in errors["a.png"]
    assert "cannot be read as an image (it is a HEIC picture, which Pillow does not read" in errors["c.heic"]
    assert "a link that leads nowhere (to nowhere)." in errors["lost.png"]
    assert rows["b.JFIF"]["top"] == rows[good.name]["top"]
    assert output.err == (
        "resgrid: 5 of 9 pictures could not be read.\nresgrid: passed over: 1 × a link to a folder, 1 × a hidden "
        "file, 1 × a file that Pillow cannot identify as a picture.\n"
    )
    assert main(["predict", *paths, "--model", CELL]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 4
    assert "gone.png: there is no such file." in output.err


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.bmp", "x.tif", "x.ppm", "x.jp2", "x.ico"])
def test_other_formats_are_read_as_well(pipeline, tmp_path, name):
    Image.open(min(pipeline.pictures.glob("1-*.png"))).convert("RGB").resize((64, 64)).save(tmp_path / name)
    files = find_pictures([tmp_path], Counter())
    [prediction] = predict(build_model("resnet20", 2), _info(), files, CPU)
    assert prediction.error is None
    assert len(prediction.top) == 2


def test_a_file_whose_name_is_no_utf_8_is_printed_as_it_is(inside, tmp_path):
    picture = tmp_path / "caf\udce9.png"
    picture.write_bytes(min(inside.pictures.glob("0-*.png")).read_bytes())
    command = [*PROGRAM, str(tmp_path), "--model", str(inside.weights)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(bytes(picture))


def test_what_would_start_another_program_or_never_end_is_refused(tmp_path):
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    os.mkfifo(tmp_path / "pipe.png")
    files = [tmp_path / "x.eps", tmp_path / "pipe.png"]
    assert all(each.error for each in predict(build_model("resnet20", 2), _info(), files, CPU))


def test_files_are_opened_a_batch_at_a_time(pipeline):
    picture, taken = min(pipeline.pictures.glob("1-*.png")), []
    endless = (taken.append(number) or picture for number in count())
    predictions = predict(build_model("resnet20", 2), _info(), endless, CPU)
    for _ in range(BATCH + 1):
        next(predictions)
    assert len(taken) == 2 * BATCH


def test_a_reader_that_has_seen_enough_ends_it_without_a_traceback(inside):
    command = shlex.join([*PROGRAM, "pictures", "--model", str(inside.weights)])
    piped = ["bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(piped, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 141)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--model", "resnet20-adam-9"], "no cell is called 'resnet20-adam-9'"),
        (["--model", "absent.safetensors"], "absent.safetensors: there is no such file"),
        (["--model", "params.yaml"], "cannot be read as a weights file of ResGrid"),
        (["--top", "0"], "argument --top: 0: there must be at least one"),
    ],
)
def test_a_mistake_ends_with_one_message(inside, arguments, printed, capsys):
    assert main(["predict", "pictures", *arguments]) == 1
    output = capsys.readouterr()
    assert printed in output.err
    assert output.out == ""


def test_weights_that_changed_since_training_are_refused(pipeline, copied, capsys):
    save_weights(copied / "weights.safetensors", build_model("resnet20", 10), _info(10))
    assert main(["predict", str(pipeline.pictures), "--model", CELL]) == 1
    assert "the file has changed since it was trained" in capsys.readouterr().err


def test_a_diverged_cell_is_refused_unless_its_file_is_named(pipeline, copied, capsys):
    record = json.loads((copied / "run.json").read_text())
    cause = "the training loss was not finite at the end of epoch 1 of 2; the weights are the initial ones."
    (copied / "run.json").write_text(json.dumps(record | {"status": "diverged", "cause": cause}))
    for command in (["predict", str(pipeline.pictures), "--model"], ["export", "--format", "pt2"]):
        assert main([*command, CELL]) == 1
        printed = capsys.readouterr().err
        assert f"{CELL}: it diverged: {cause}" in printed
        assert f"name their file: runs/{CELL}/weights.safetensors" in printed
    named = f"runs/{CELL}/weights.safetensors"
    assert main(["predict", str(pipeline.pictures), "--model", named]) == 0


def test_score_prepares_images_as_those_that_the_weights_were_trained_on(tmp_path):
    numbers = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("class 0", "class 1"):
            (tmp_path / f"images/{split}/{name}").mkdir(parents=True)
            for i in range(4):
                wide = numbers.integers(0, 256, (40, 90, 3), dtype=np.uint8)
                Image.fromarray(wide).save(tmp_path / f"images/{split}/{name}/{i}.png")
    torch.manual_seed(0)
    model, losses = build_model("resnet20", 2, 0.0), set()
    for resize in ("stretch", "pad"):
        save_weights(tmp_path / f"{resize}.safetensors", model, info := _info(resize=resize))
        scores = score_file(tmp_path / f"{resize}.safetensors", tmp_path / "images", "test", CPU)
        images = open_source(tmp_path / "images", resize).load("test")
        assert scores == score(model, images, info.mean, info.std, CPU)
        losses.add(scores.loss)
    assert len(losses) == 2
