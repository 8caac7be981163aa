"""Pipelines for images of one's own, made by `resgrid init` and run by the real DVC."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML
from sklearn.datasets import load_digits
from small import Project

from resgrid.cli import main
from resgrid.config import Params, load_params
from resgrid.data.fetch import download
from resgrid.data.preprocess import preprocess
from resgrid.data.sources import ImageFolder, open_source
from resgrid.errors import ResgridError
from resgrid.grid import expand
from resgrid.scaffold import DatasetInfo, _params, init, inspect_dataset

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _log_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="resgrid")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of digits at 60x40: 25 training and 4 test images each."""
    digits = load_digits()
    for number, name in ((0, "round"), (1, "straight"), (8, "double")):
        pixels = (digits.images[digits.target == number] * 15).astype("uint8")
        for i in range(29):
            folder = tmp_path / "my pictures" / ("train" if i < 25 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).resize((60, 40)).save(folder / f"{i}.png")
    return tmp_path / "my pictures"


def test_outside_of_any_repository_it_makes_one_in_which_dvc_repro_goes_to_the_end(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a pipeline"
    assert main(["init", str(folder), "--data", str(pictures)]) == 0
    said = capsys.readouterr().out
    assert "75 training and 12 test images of 3 classes, of 60x40 pixels: 4 cells, resnet20-sgd-0" in said
    assert f"{folder} was in no DVC repository, so it is one now." in said
    assert f"cd '{folder}' && dvc repro" in said

    smaller = ("grid.architectures=[resnet20]", "grid.optimizers=[adam]", "recipes.*.epochs=1")
    pipeline = Project(folder)
    assert pipeline.run("resgrid", "set", *smaller).returncode == 0
    done = pipeline.run("dvc", "repro")
    assert done.returncode == 0, done.stderr
    assert "resnet20-adam-0" in (folder / "reports" / "leaderboard.csv").read_text()
    again = pipeline.run("dvc", "status")
    assert "up to date" in again.stdout, again.stdout
    synced = pipeline.run("resgrid", "sync")
    assert "champion of models:/a pipeline: resnet20-adam-0" in synced.stdout, synced.stderr
    predicted = pipeline.run("resgrid", "predict", str(pictures / "test" / "round"))
    assert predicted.returncode == 0, predicted.stderr
    assert len(predicted.stdout.splitlines()) == 4


def test_inside_the_project_its_stages_are_those_of_the_example(pictures: Path, tmp_path: Path) -> None:
    """A copy of the code, so that nothing is written into this checkout."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / ".dvc").mkdir()
    code = "import sys; from resgrid.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "init", "examples/mine", "--data", str(pictures)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root / "src")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    yaml = YAML(typ="safe")
    assert yaml.load(root / "examples/mine/dvc.yaml") == yaml.load(ROOT / "examples/digits/dvc.yaml")
    assert sorted(path.name for path in (root / "examples/mine").iterdir()) == ["dvc.yaml", "params.yaml"]


def params_for(folder: Path, **facts: Any) -> Params:
    """What `init` would write for so many images of two classes."""
    known = {"num_train": 100, "num_test": 10, "smallest_class": 100, "sizes": ((64, 64),)}
    info = DatasetInfo(source="image-folder", class_names=("a", "b"), **known | facts)
    (folder / "params.yaml").write_text(_params(folder, None, folder, info))
    return load_params(folder / "params.yaml")


@pytest.mark.parametrize(
    ("num_train", "architectures", "epochs", "batch"),
    [
        (100, ["resnet20", "resnet10"], 100, 16),
        (240, ["resnet20", "resnet10"], 53, 16),
        (1_999, ["resnet20", "resnet10"], 30, 16),
        (2_000, ["resnet20", "resnet32", "resnet10"], 20, 32),
        (19_999, ["resnet20", "resnet32", "resnet10"], 20, 32),
        (20_000, ["resnet20", "resnet56", "resnet18"], 30, 128),
    ],
)
def test_the_grid_grows_with_the_number_of_images(
    tmp_path: Path, num_train: int, architectures: list[str], epochs: int, batch: int
) -> None:
    params = params_for(tmp_path, num_train=num_train)
    assert list(params.grid.architectures) == architectures
    assert {(cell.recipe.epochs, cell.recipe.batch_size) for cell in expand(params)} == {(epochs, batch)}


def test_images_that_are_not_square_keep_their_shape_and_a_validation_split_needs_enough_images(
    tmp_path: Path,
) -> None:
    for size, resize in (((64, 64), "stretch"), ((64, 60), "stretch"), ((64, 48), "pad"), ((20, 200), "pad")):
        assert params_for(tmp_path, sizes=(size,)).preprocess.resize == resize
    for smallest, fraction in ((19, 0.0), (20, 0.1)):
        params = params_for(tmp_path, smallest_class=smallest)
        assert params.preprocess.validation_fraction == fraction


def test_an_archive_is_named_with_its_checksum(image_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pictures.tar.gz", "w:gz") as archive:
        archive.add(image_folder, "images")
    init(tmp_path / "mine", tmp_path / "pictures.tar.gz")
    data = load_params(tmp_path / "mine" / "params.yaml").data
    digest = hashlib.sha256((tmp_path / "pictures.tar.gz").read_bytes()).hexdigest()
    assert (data.source, data.checksum) == ("image-folder", f"sha256:{digest}")  # type: ignore[union-attr]


def test_an_archive_in_cifars_layout_is_one_also_unpacked(cifar_archive: Path, tmp_path: Path) -> None:
    seen = inspect_dataset(cifar_archive)
    assert (seen.source, seen.num_train, seen.num_test, seen.smallest_class) == ("archive", 40, 20, 10)
    with tarfile.open(cifar_archive) as archive:
        archive.extractall(tmp_path, filter="data")
    init(tmp_path / "mine", tmp_path / "cifar-10-batches-py")
    data = load_params(tmp_path / "mine" / "params.yaml").data
    assert (data.source, data.checksum) == ("archive", None)  # type: ignore[union-attr]
    download(data, tmp_path / "raw")
    assert open_source(tmp_path / "raw", "stretch").class_names == ("ant", "bee", "cow", "dog")


def test_a_folder_without_splits_has_a_test_split_drawn_and_says_so(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = init(tmp_path / "mine", image_folder / "train")
    assert "Classes, as train + test: one 3 + 1, three 3 + 1, two 3 + 1." in caplog.messages
    assert "There is no test split: data.test_fraction: 0.2 of each class is drawn for it." in caplog.messages
    assert "9 training and 3 test images" in said
    monkeypatch.chdir(tmp_path / "mine")
    params = load_params()
    download(params.data, Path("data/raw"))
    meta = preprocess(params.data, params.preprocess, Path("data/raw"), Path("data/processed"))
    assert meta.num_images == {"train": 9, "test": 3}


def test_data_of_a_few_images_gets_batches_that_fit(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in sorted(image_folder.glob("train/*/*"))[:-1]:
        if path.name != "0.jpg":
            path.unlink()
    init(tmp_path / "mine", image_folder)
    assert "A class has a single training image" in caplog.text
    params = load_params(tmp_path / "mine" / "params.yaml")
    assert {cell.recipe.batch_size for cell in expand(params)} == {2}  # of 4 images


def test_init_says_what_it_passed_over_and_which_pictures_are_broken(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (image_folder / "train/one/notes.txt").write_text("mine")
    (image_folder / "train/one/9.png").write_bytes(b"<html>")
    (image_folder / "train/one/gone.png").symlink_to("nowhere")
    init(tmp_path / "mine", image_folder)
    assert "1 links that lead nowhere (train/one/gone.png)" in caplog.text
    assert "1 files that Pillow cannot identify as pictures (train/one/notes.txt)" in caplog.text
    assert (
        "1 of 19 pictures looked at are broken; mend or remove them, or write on_broken: skip" in caplog.text
    )
    assert "fetch that again: train/one/9.png" in caplog.text
    params = load_params(tmp_path / "mine" / "params.yaml")
    assert params.data.on_broken == "refuse"  # type: ignore[union-attr]


def test_a_validation_folder_is_used_as_it_is(
    image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(image_folder / "test", image_folder / "val")
    said = init(tmp_path / "mine", image_folder)
    assert "12 training and 6 test images" in said
    assert load_params(tmp_path / "mine" / "params.yaml").preprocess.validation_fraction == 0.0
    shutil.rmtree(image_folder / "test")
    init(tmp_path / "other", image_folder)
    assert "There is no test split: the validation images stand for it." in caplog.messages


def test_images_may_lie_in_the_pipelines_folder_but_not_where_it_writes(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_folder, "data")
    before = sorted(tmp_path.rglob("*"))
    for folder, data in ((".", "data"), ("images", "images")):
        with pytest.raises(ResgridError, match="the pipeline writes into data, runs, reports of"):
            init(Path(folder), Path(data))
    assert sorted(tmp_path.rglob("*")) == before
    init(Path(), Path("images"))
    assert load_params().data.location == "images"  # type: ignore[union-attr]


def test_a_pipeline_gets_a_name_that_no_other_of_the_repository_has(
    image_folder: Path, tmp_path: Path
) -> None:
    """The name is that of an experiment and of a registered model."""
    (tmp_path / "project" / ".dvc").mkdir(parents=True)
    for place, name in (("a/pets", "pets"), ("b/pets", "pets-2"), ("c/猫", "own"), ("c/犬", "own-2")):
        init(tmp_path / "project" / place, image_folder)
        assert load_params(tmp_path / "project" / place / "params.yaml").name == name


def test_the_images_that_it_names_are_those_that_the_pipeline_reads(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(image_folder, "stretch")
    assert isinstance(source, ImageFolder)
    seen = inspect_dataset(image_folder)
    assert (seen.num_train, seen.num_test, seen.class_names) == (12, 6, source.class_names)
    assert seen.sizes == ((8, 8),) * 18
    assert "Classes, as train + test: one 4 + 2, three 4 + 2, two 4 + 2." in caplog.messages


def test_where_no_picture_can_be_read_init_says_why_and_once(tmp_path: Path) -> None:
    for i in range(40):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("I;16", (8, 8), i).save(folder / f"{i:02}.png")
    with pytest.raises(ResgridError) as caught:
        init(tmp_path / "mine", tmp_path / "images")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'images'}: none of 40 pictures looked at can be read:",
        "  40 × pixels of type I;16: save it as RGB with 8 bits a channel: a/00.png, a/02.png, a/04.png, …",
    ]
    assert not (tmp_path / "mine").exists()


def test_some_pictures_of_each_kind_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 1,002 pictures the two TIFFs are among those that are looked at, and one of them is broken."""
    for i in range(500):
        for name in "ab":
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i % 256).save(tmp_path / "images" / name / f"{i:03}.png")
    Image.new("L", (8, 8)).save(tmp_path / "images/a/fine.tif")
    Image.new("LAB", (8, 8)).save(tmp_path / "images/b/lab.tif")
    info = inspect_dataset(tmp_path / "images")
    assert len(info.sizes) == 101  # every tenth PNG, and a TIFF
    assert "1 of 102 pictures looked at are broken" in caplog.text
    assert "1 × pixels of type LAB: save it as RGB with 8 bits a channel: b/lab.tif" in caplog.text


def test_where_a_channel_never_varies_the_normalization_is_one_that_works(
    image_folder: Path, tmp_path: Path
) -> None:
    init(tmp_path / "grey", image_folder)
    for path in image_folder.glob("*/*/*"):
        with Image.open(path) as image:
            grey = image.convert("L")
        path.unlink()
        Image.merge("RGB", [grey, grey, Image.new("L", grey.size)]).save(path.with_suffix(".png"))
    init(tmp_path / "yellow", image_folder)
    names = [
        {cell.recipe.normalization.name for cell in expand(load_params(tmp_path / name / "params.yaml"))}
        for name in ("grey", "yellow")
    ]
    assert names == [{"per_channel"}, {"scalar"}]


@pytest.mark.parametrize("there", [False, True])
def test_in_a_repository_that_dvc_refuses_nothing_is_left(
    image_folder: Path, tmp_path: Path, there: bool
) -> None:
    """Objects of SHA-256, which DVC's git library does not read."""
    subprocess.run(["git", "init", "-q", "--object-format=sha256", str(tmp_path / "repo")], check=True)
    folder = tmp_path / "repo" / "deep" / "mine"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    before = sorted((tmp_path / "repo").rglob("*"))
    for _ in range(2):  # and again: it does not say that there is something already
        with pytest.raises(ResgridError, match=r"dvc init"):
            init(folder, image_folder)
        left = sorted(path for path in (tmp_path / "repo").rglob("*") if ".git" not in path.parts)
        assert left == [path for path in before if ".git" not in path.parts]


def test_in_a_repository_of_ones_own_what_dvc_hashes_keeps_its_line_ends(
    image_folder: Path, tmp_path: Path
) -> None:
    """A clone of a person who has git write CRLF: no file that DVC hashes has one."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q", "theirs")
    (tmp_path / "theirs/.gitattributes").write_text("*.bin -text\n")
    (tmp_path / "theirs/notes.txt").write_text("a line\n")
    init(tmp_path / "theirs", image_folder)
    assert (tmp_path / "theirs/.gitattributes").read_text().startswith("*.bin -text\n")
    (tmp_path / "theirs/dvc.lock").write_text("schema: '2.0'\n")
    (tmp_path / "theirs/architectures").mkdir()
    (tmp_path / "theirs/architectures/mine.py").write_text("NAME = 1\n")
    git("-C", "theirs", "add", ".")
    git("-C", "theirs", "commit", "-q", "-m", "all")
    git("clone", "-q", "theirs", "clone")
    hashed = ["params.yaml", "dvc.yaml", "dvc.lock", ".dvcignore", "architectures/mine.py"]
    crlf = [name for name in ("notes.txt", *hashed) if b"\r" in (tmp_path / "clone" / name).read_bytes()]
    assert crlf == ["notes.txt"]
