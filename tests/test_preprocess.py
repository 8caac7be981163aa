"""Sources to the processed form on real images: splits, sizes, statistics, digests, and bad image folders."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits
from test_archives import write_tar

from resgrid import config
from resgrid.data.batches import statistics
from resgrid.data.dataset import Meta, load_meta, load_split
from resgrid.data.fetch import download
from resgrid.data.pictures import read_picture, to_square
from resgrid.data.preprocess import draw, moments, preprocess
from resgrid.data.sources import Digits, open_source
from resgrid.errors import ResgridError


@pytest.fixture(autouse=True)
def _log_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="resgrid")


PLAIN = config.Preprocess(resize="stretch", validation_fraction=0.0, training_fraction=1.0, seed=0)
DIGITS = config.Digits(source="digits", test_fraction=0.2, split_seed=0)


def with_validation(fraction: float, seed: int = 0) -> config.Preprocess:
    return PLAIN.model_copy(update={"validation_fraction": fraction, "seed": seed})


def sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def images(path: Path, test_fraction: float = 0.0, on_broken: str = "refuse") -> config.ImageFolder:
    checksum = sha256(path) if path.is_file() else None
    return config.ImageFolder(
        source="image-folder",
        location=str(path),
        checksum=checksum,
        test_fraction=test_fraction,
        on_broken=on_broken,
    )


def archive(path: Path) -> config.Archive:
    return config.Archive(source="archive", location=str(path), checksum=sha256(path))


def pixels(content: bytes) -> np.ndarray:
    return read_picture(io.BytesIO(content), "x", "stretch").pixels


def process(data: config.Data, folder: Path, settings: config.Preprocess = PLAIN) -> Meta:
    """Both stages; the result is in folder/processed."""
    download(data, folder / "raw")
    return preprocess(data, settings, folder / "raw", folder / "processed")


# --- CIFAR ------------------------------------------------------------------------------------------


def test_the_real_images_of_cifar_10_come_out_bit_for_bit(reference_data, tmp_path):
    """Read by pickle itself, and in float64 by NumPy, beside the reader and the exact integers."""
    path = reference_data / "cifar-10-python-6k.tar.gz"
    meta = process(archive(path), tmp_path)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    with tarfile.open(path) as tar:
        files = [tar.extractfile(f"cifar-10-batches-py/{name}") for name in names]
        batches = [pickle.load(file, encoding="bytes") for file in files]
    rows = np.concatenate([batch[b"data"] for batch in batches[:5]])
    train, test = load_split(tmp_path / "processed", "train"), load_split(tmp_path / "processed", "test")
    planes = train.images.numpy().transpose(0, 3, 1, 2).reshape(5000, -1)  # red, green, blue
    np.testing.assert_array_equal(planes, rows)
    assert train.labels.tolist() == [label for batch in batches[:5] for label in batch[b"labels"]]
    assert test.labels.tolist() == batches[5][b"labels"]
    assert meta.num_images == {"train": 5000, "test": 1000}
    assert meta.class_names == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    values = rows.astype(np.float64) / 255
    assert meta.scalar_mean == pytest.approx(values.mean(), rel=1e-12)
    assert meta.scalar_std == pytest.approx(values.std(), rel=1e-12)
    channels = values.reshape(5000, 3, 1024)
    assert meta.channel_mean == pytest.approx(channels.mean(axis=(0, 2)), rel=1e-12)
    assert meta.channel_std == pytest.approx(channels.std(axis=(0, 2)), rel=1e-12)
    # 121.18 and 64.38 here; 120.7076 and 64.1501 over all 50,000 images
    assert (255 * meta.scalar_mean, 255 * meta.scalar_std) == pytest.approx((120.7076, 64.1501), rel=0.01)


def test_a_smaller_archive_in_cifars_layout_keeps_its_order_and_names(cifar_archive, tmp_path):
    meta = process(archive(cifar_archive), tmp_path)
    assert (meta.source, meta.class_names) == ("archive", ("ant", "bee", "cow", "dog"))
    assert meta.num_images == {"train": 40, "test": 20}
    train = load_split(tmp_path / "processed", "train")
    assert train.labels.tolist() == [i % 4 for i in range(20)] * 2
    first = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)  # as the fixture draws it
    red_green_blue = [first[3, 34], first[3, 1024 + 34], first[3, 2048 + 34]]
    assert train.images[3][1, 2].tolist() == red_green_blue  # row 1, column 2


def repacked(source: Path, path: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """`source` with its members changed."""
    with tarfile.open(source) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    change(members)
    return write_tar(path, members)


B = "cifar-10-batches-py/"
D, T = f"{B}data_batch_2", f"{B}test_batch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop(T), "there is no test_batch"),
        (lambda m: m.pop(B + "batches.meta"), r"there is no batches\.meta"),
        (lambda m: m.pop(B + "data_batch_1"), "there is no data_batch_1"),
        (lambda m: m.clear(), "cut or damaged|there is no batches"),
        (lambda m: m.update({"other/test_batch": b""}), "test_batch is there twice"),
        (lambda m: m.update({D: b"\x80\x02cos\nsystem\n."}), r"data_batch_2: this pickle is refused .*os\.system"),
        (lambda m: m.update({D: m[D][:9999]}), "data_batch_2: this pickle is refused .*bytes"),
        (lambda m: m.update({T: m[B + "batches.meta"]}), "test_batch: `data` must be"),
        (lambda m: m.update({B + "batches.meta": m[T]}), r"batches\.meta: label_names must be"),
        (lambda m: m.update({T: m[T].replace(b"K\x03", b"K\x04")}), "must be a list of numbers from 0 to 3"),
        (lambda m: m.update({T: m[T].replace(b"K\x03e", b"e")}), "`labels` must be .* each of 20 images"),
    ],
)  # fmt: skip
def test_an_archive_that_is_not_in_cifars_layout_is_named_with_what_is_wrong(
    change, message, cifar_archive, tmp_path
):
    path = repacked(cifar_archive, tmp_path / "bad.tar.gz", change)
    with pytest.raises(ResgridError, match=rf"(?s)bad\.tar\.gz: .*({message})"):
        process(archive(path), tmp_path)
    assert not (tmp_path / "processed").exists()


def test_raw_data_that_was_altered_after_its_download_is_noticed(cifar_archive, tmp_path):
    data = archive(cifar_archive)
    download(data, tmp_path / "raw")
    raw = tmp_path / "raw/tiny.tar.gz"
    raw.write_bytes(raw.read_bytes()[:-1])
    with pytest.raises(ResgridError, match=r"tiny\.tar\.gz: its checksum is .* `dvc repro -f download`"):
        preprocess(data, PLAIN, tmp_path / "raw", tmp_path / "processed")
    with pytest.raises(ResgridError, match=r"absent: does not hold one archive. `dvc repro download`"):
        preprocess(data, PLAIN, tmp_path / "absent", tmp_path / "processed")


def test_too_little_memory_is_worded(tmp_path):
    """60,000 images in a process that may have 300 MB more than it has."""
    forms = cifar_forms(tmp_path)
    os.truncate(forms["bin10"] / "cifar/data_batch_1.bin", 60_000 * 3073)
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom test_preprocess import *\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300_000_000, -1))\n"
        "data = config.Archive(source='archive', location='', checksum=None)\n"
        "preprocess(data, PLAIN, Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(forms["bin10"] / "cifar"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert "OutOfMemory: preprocess: memory is too small, at some 9 kB an image." in done.stderr
    assert not (tmp_path / "out").exists()


def cifar_forms(folder: Path) -> dict[str, Path]:
    """The same 6 training and 4 test images of 3 classes in every form that the authors publish."""
    values = np.random.default_rng(0)
    names = [b"ant", b"bee", b"cow"]
    fine = {b"fine_label_names": names, b"coarse_label_names": [b"a", b"b"]}
    written: dict[str, dict[str, Any]] = {
        "py10": {"batches.meta": {b"label_names": names}},
        "py100": {"meta": fine},
        "bin10": {"batches.meta.txt": b"\n".join([*names, b""])},
        "bin100": {"fine_label_names.txt": b"\n".join(names), "coarse_label_names.txt": b"a\nb"},
    }
    for part, batch, count in (("train", "data_batch_1", 6), ("test", "test_batch", 4)):
        rows = values.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [i % 3 for i in range(count)]
        coarse = [1 - label % 2 for label in labels]
        column, wide = np.array(labels, np.uint8)[:, None], np.array(coarse, np.uint8)[:, None]
        written["py10"][batch] = {b"data": rows, b"labels": labels}
        written["py100"][part] = {b"data": rows, b"fine_labels": labels, b"coarse_labels": coarse}
        written["bin10"][f"{batch}.bin"] = np.hstack([column, rows]).tobytes()
        written["bin100"][f"{part}.bin"] = np.hstack([wide, column, rows]).tobytes()
    made = {}
    for form, files in written.items():
        (folder / form / "cifar").mkdir(parents=True)
        for name, content in files.items():
            packed = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
            (folder / form / "cifar" / name).write_bytes(packed)
        made[form] = folder / form
        made[f"{form}.tar.gz"] = pack(folder / form, folder / f"{form}.tar.gz", "cifar")
    return made


def test_every_form_of_cifar_gives_the_same_images(tmp_path):
    forms = cifar_forms(tmp_path)
    first = open_source(forms["py10"], "stretch")
    for path in forms.values():
        source = open_source(path, "stretch")
        assert source.class_names == ("ant", "bee", "cow")
        for split in ("train", "test"):
            assert torch.equal(source.load(split).images, first.load(split).images)
            assert torch.equal(source.load(split).labels, first.load(split).labels)
    data = config.Archive(source="archive", location=str(forms["bin100"]), checksum=None)  # a folder
    assert process(data, tmp_path / "out").num_images == {"train": 6, "test": 4}
    batch = forms["bin10"] / "cifar/test_batch.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(
        ResgridError, match=r"test_batch\.bin: must have a multiple of 3073 bytes, not 12,291"
    ):
        open_source(forms["bin10"], "stretch").load("test")


# --- image folders ----------------------------------------------------------------------------------


def pack(folder: Path, path: Path, inside: str = "") -> Path:
    """An archive of `folder`; its kind is that of the suffix."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as target:
            for file in sorted(folder.rglob("*"), reverse=True):
                target.write(file, inside + file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, f"w:{path.suffix[1:]}") as target:
            target.add(folder, inside or ".")
    return path


def test_a_folder_and_every_kind_of_archive_of_it_give_the_same_content(image_folder, tmp_path):
    metas = [process(images(image_folder), tmp_path / "folder")]
    for name, inside in (("a.tar.gz", ""), ("b.tar.xz", "pictures/"), ("c.zip", ""), ("d.zip", "pictures/")):
        metas.append(process(images(pack(image_folder, tmp_path / name, inside)), tmp_path / name[:1]))
    assert len({meta.model_dump_json() for meta in metas}) == 1
    written = [tmp_path / where / "processed/train.safetensors" for where in ("folder", "a", "d")]
    assert len({path.read_bytes() for path in written}) == 1
    meta = metas[0]
    assert meta.class_names == ("one", "three", "two")  # by name
    assert meta.num_images == {"train": 12, "test": 6}
    train = load_split(tmp_path / "folder/processed", "train")
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with Image.open(image_folder / "train/three/3.png") as image:  # three's are 4 to 7
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(train.images[7, :, :, 1], expected)


def add(content: bytes, name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def huge_png() -> bytes:
    """20,000 x 20,000 pixels in its header, and next to nothing behind it."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    content = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in content)


RED = Image.new("RGB", (9, 9), (255, 0, 0))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))

BAD_FOLDERS = {
    "no images": (lambda f: [path.unlink() for path in f.rglob("*.*")], "there are no images: an image folder holds"),
    "no test": (lambda f: shutil.rmtree(f / "test"), "there is no image in test/"),
    "class missing from test": (lambda f: shutil.rmtree(f / "test/two"), "class 'two' has no image in test/"),
    "class missing from train": (add(encoded(RED), "test/four/1.png"), "class 'four' has no image in train/"),
    "one class": (lambda f: [shutil.rmtree(path) for path in f.glob("*/t*")], "'one' is the only class"),
    "not an image": (add(b"GIF89a", "train/one/x.png"), r"cannot identify image file: train/one/x\.png"),
    "empty image": (add(b"", "train/one/x.jpg"), r"an empty file.*: train/one/x\.jpg"),
    "cut image": (add(encoded(NOISE)[:6000], "test/one/x.png"), r"1 × .*truncated.*: test/one/x\.png"),
    "cut JPEG": (add(encoded(NOISE, "JPEG")[:2000], "test/one/x.jpg"), r"1 × .*truncated.*: test/one/x\.jpg"),
    "a bomb": (add(huge_png(), "train/one/x.png"), r"exceeds limit of 208000000 pixels.*: train/one/x\.png"),
    "16 bits": (
        add(encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "train/one/x.png"),
        r"pixels of type I;16: save it as RGB with 8 bits a channel: train/one/x\.png",
    ),
    "HEIC": (add(b"\0\0\0\x18ftypheic\0\0", "train/one/x.heic"), r"HEIC.*convert it.*: train/one/x\.heic"),
    "a page": (add(b"<html>Not found", "train/one/x.jpg"), r"it is a web page.*fetch that again: train/one/x\.jpg"),
    "another spelling": (
        lambda f: (f / "test/three").rename(f / "test/Three"),
        r"class '[tT]hree' has no image in (test|train)/.*did you mean [tT]hree\?",
    ),
    "two of them": (add(encoded(RED), "other/train/one/x.png"), r"splits in several places: other/train, test, train\. Keep one"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_image_folder_is_refused_with_the_name_of_what_is_wrong(case, form, image_folder, tmp_path):
    change, message = BAD_FOLDERS[case]
    change(image_folder)
    path = image_folder if form == "folder" else pack(image_folder, tmp_path / "images.zip")
    with pytest.raises(ResgridError, match=message) as caught:
        process(images(path), tmp_path)
    assert len(str(caught.value).splitlines()) <= 3  # what is broken has a line of its own
    assert (tmp_path / "raw").exists() == (form == "zip" or "broken" in str(caught.value))


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_all_broken_pictures_are_reported_at_once_or_left_out(form, image_folder, tmp_path, caplog):
    add(b"", "train/one/x.jpg")(image_folder)
    add(encoded(NOISE)[:6000], "test/two/y.png")(image_folder)
    path = image_folder if form == "folder" else pack(image_folder, tmp_path / "images.zip")
    with pytest.raises(ResgridError, match="broken pictures: 2") as caught:
        process(images(path), tmp_path)
    for part in ("an empty file", ": train/one/x.jpg\n", ": test/two/y.png\n", "on_broken: skip"):
        assert part in str(caught.value)
    data = images(path, on_broken="skip")
    download(data, tmp_path / "raw")
    meta = preprocess(data, PLAIN, tmp_path / "raw", tmp_path / "processed")
    assert meta.num_images == {"train": 12, "test": 6}
    assert meta.left_out == {"train": ["train/one/x.jpg"], "test": ["test/two/y.png"]}
    assert load_meta(tmp_path / "processed") == meta
    assert re.search(r"Left out: 1 × .*empty file.*: train/one/x\.jpg", caplog.text)
    assert load_split(tmp_path / "processed", "train").labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_class_of_broken_pictures_alone_is_named(image_folder, tmp_path):
    for path in (image_folder / "test/two").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ResgridError, match="class 'two' has no usable picture in test"):
        process(images(image_folder, on_broken="skip"), tmp_path)


def test_pictures_are_known_by_content_and_what_is_none_is_counted(image_folder, caplog):
    for i, (name, form) in enumerate(
        [("a.JFIF", "JPEG"), ("b.JPG", "JPEG"), ("c.jpeg", "PNG"), ("d", "PNG"), ("e.dat", "WEBP"), ("f.avif", "AVIF"),
         ("g.tif", "TIFF"), ("h.gif", "GIF"), ("i.bmp", "BMP"), ("j.tga", "TGA")]
    ):  # fmt: skip
        add(encoded(Image.new("RGB", (32, 32), (20 * i, 0, 0)), form), f"train/one/{name}")(image_folder)
    add(b"notes", "train/one/n.txt")(image_folder)
    add(b"%PDF-1.7", "train/one/scan.pdf")(image_folder)
    for name in ("train/.DS_Store", "__MACOSX/train/one/x.png", "test/.ipynb_checkpoints/x.png"):
        add(b"x", name)(image_folder)
    (image_folder / "train/one/gone.png").symlink_to("nowhere")
    (image_folder / "train/circle").symlink_to(image_folder)
    for name in ("cover.png", "other/one/x.png", "train/x.png"):
        add(encoded(RED), name)(image_folder)
    source = open_source(image_folder, "stretch")
    assert len(source.load("train").labels) == 12 + 10
    assert caplog.messages == [
        "Passed over: 3 hidden files (__MACOSX/train/one/x.png, test/.ipynb_checkpoints/x.png, "
        "train/.DS_Store); 1 links that lead nowhere (train/one/gone.png); "
        "2 files that Pillow cannot identify as pictures (train/one/n.txt, train/one/scan.pdf); "
        "3 pictures outside of the splits and classes (cover.png, other/one/x.png, train/x.png)."
    ]


METADATA = {
    "a long text": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))),
    "a long international text": chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
    "a text with a wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"x",
    "a large profile": chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(3_000_000))),
    "a text packed in an unknown way": chunk(b"zTXt", b"a\0\7x"),
    "no EXIF": chunk(b"eXIf", b"garbage"),
    "a short gamma": chunk(b"gAMA", b"1"),
    "a short animation": chunk(b"acTL", b"1"),
    "EXIF that is none": segment(0xE1, b"Exif\0\0garbage!"),
    "a cut profile": segment(0xE2, b"ICC_PROFILE\0\1\5x"),
    "an orientation in words": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0\0\0\0\0"),
}


@pytest.mark.parametrize("what", METADATA)
def test_broken_metadata_does_not_stop_sound_pixels(what):
    added = METADATA[what]
    jpeg = added[:1] == b"\xff"
    sound = encoded(NOISE, "JPEG" if jpeg else "PNG")
    at = 2 if jpeg else 33  # behind SOI, behind IHDR
    np.testing.assert_array_equal(pixels(sound[:at] + added + sound[at:]), pixels(sound))


def test_a_photograph_of_201_megapixels_is_read_without_a_warning():
    """The largest that phones take: 17,920 x 11,200 = 200,704,000 pixels."""
    content = encoded(Image.new("1", (17_920, 11_200), 1))
    assert pixels(content).shape == (32, 32, 3)


TRANSPARENT_PALETTE = Image.new("P", (32, 32), 1)
TRANSPARENT_PALETTE.putpalette([0, 0, 0, 255, 0, 0])


@pytest.mark.parametrize(
    ("image", "form", "pixel"),
    [
        (Image.new("RGB", (32, 32), (10, 20, 30)), "PNG", [10, 20, 30]),
        (Image.new("L", (32, 32), 77), "PNG", [77, 77, 77]),
        (Image.new("1", (32, 32), 1), "PNG", [255, 255, 255]),
        (TRANSPARENT_PALETTE, "PNG", [255, 0, 0]),
        # 128/255 of each, 127/255 of white
        (Image.new("RGBA", (32, 32), (200, 100, 50, 128)), "PNG", [227, 177, 152]),
        (Image.new("LA", (32, 32), (100, 128)), "PNG", [177, 177, 177]),
        (Image.new("CMYK", (32, 32), (0, 0, 0, 0)), "JPEG", [255, 255, 255]),
        (Image.new("L", (32, 32), 128), "JPEG", [128, 128, 128]),
    ],
)
def test_every_mode_becomes_rgb_and_what_is_transparent_shows_white(image, form, pixel):
    assert (pixels(encoded(image, form)) == pixel).all()
    assert (pixels(encoded(TRANSPARENT_PALETTE, transparency=1)) == 255).all()  # all of it is transparent


def test_a_photograph_stands_as_its_exif_tag_says():
    upper_red = np.zeros((32, 32, 3), np.uint8)
    upper_red[:16, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image = pixels(encoded(Image.fromarray(upper_red), exif=exif))
    assert image[5, :, 0].tolist() == [0] * 16 + [255] * 16


# --- splits as people call them ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "renamed", [{"train": "Training", "test": "testing"}, {"test": "val"}, {"test": "Validation"}]
)
def test_a_split_may_have_another_usual_name(renamed, image_folder, tmp_path):
    before = process(images(image_folder), tmp_path / "a")
    for old, new in renamed.items():
        (image_folder / old).rename(image_folder / new)
    assert process(images(image_folder), tmp_path / "b") == before
    assert before.num_images == {"train": 12, "test": 6}


def test_a_validation_folder_beside_a_test_folder_is_the_validation_split(image_folder, tmp_path):
    shutil.copytree(image_folder / "test", image_folder / "val")
    assert process(images(image_folder), tmp_path).num_images == {"train": 12, "validation": 6, "test": 6}
    with pytest.raises(ResgridError, match=r"validation_fraction: 0\.25, but .* of their own\. Write 0\.0"):
        process(images(image_folder), tmp_path, with_validation(0.25))
    (image_folder / "val/one").rename(image_folder / "valid")  # two folders of one split are one split
    (image_folder / "valid").rename(image_folder / "one")
    (image_folder / "valid").mkdir()
    (image_folder / "one").rename(image_folder / "valid/one")
    assert process(images(image_folder), tmp_path).num_images["validation"] == 6


@pytest.mark.parametrize("form", ["train alone", "a folder a class", "packed"])
def test_without_a_test_split_one_is_drawn_or_offered(form, image_folder, tmp_path):
    shutil.rmtree(image_folder / "test")
    path = image_folder if form == "train alone" else image_folder / "train"
    if form == "packed":
        path = pack(path, tmp_path / "a.zip", "my data/")
    with pytest.raises(
        ResgridError, match=r"no image in test/.* have data\.test_fraction of each class drawn"
    ):
        process(images(path), tmp_path / "refused")
    meta = process(images(path, test_fraction=0.25), tmp_path)
    assert meta.num_images == {"train": 9, "test": 3}
    shutil.copytree(image_folder / "train", tmp_path / "both/train")
    shutil.copytree(image_folder / "train", tmp_path / "both/test")
    with pytest.raises(ResgridError, match=r"data\.test_fraction: 0\.2, but .* test images of its own"):
        process(images(tmp_path / "both", test_fraction=0.2), tmp_path / "refused")
    train, test = (load_split(tmp_path / "processed", split) for split in ("train", "test"))
    assert torch.bincount(test.labels).tolist() == [1, 1, 1]
    assert not any((train.images == image).all(dim=(1, 2, 3)).any() for image in test.images)


def test_names_that_are_no_utf_8_are_stored_escaped(image_folder, tmp_path, caplog):
    for split in ("train", "test"):
        (image_folder / split / "two").rename(image_folder / split / "caf\udce9")
    assert process(images(image_folder), tmp_path).class_names == ("caf%E9", "one", "three")
    assert "Classes, as train + test: caf%E9 4 + 2, one 4 + 2, three 4 + 2." in caplog.messages


# --- layouts that are read otherwise than meant ----------------------------------------------------------


def drawn(folder: Path, *names: str) -> Path:
    """A picture of noise, each another, at each of `names` in `folder`."""
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        add(encoded(Image.fromarray(pixels)), name)(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "called"),
    [
        (("train/1.png", "train/2.png", "test/1.png", "test/2.png"), "the classes are called test, train"),
        (("train2017/1.png", "val2017/2.png"), "the classes are called train2017, val2017"),
        (("train/train/1.png", "test/test/2.png"), "the classes are called test, train"),
        (("train/1.png", "train/2.png"), "the classes are called train"),
        (("cat/train/1.png", "cat/test/2.png", "dog/train/3.png"), "the folders within classes are called"),
        (("train/train/a/1.png", "test/test/a/2.png"), "splits in several places: test/test, train/train"),
    ],
)
def test_split_folders_are_not_taken_for_classes(names, called, tmp_path):
    drawn(tmp_path / "images", *names)
    with pytest.raises(ResgridError, match=rf"{called}.*holds train/<class>/<image> and test/<class>"):
        open_source(tmp_path / "images", "stretch")


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    drawn(tmp_path / "images", "bus/1.png", "train/1.png")
    assert open_source(tmp_path / "images", "stretch").class_names == ("bus", "train")
    below = ("train/bus/1.png", "test/bus/2.png", "train/car/3.png", "test/car/4.png")
    drawn(tmp_path / "split", *(f"test/{name}" for name in below))  # below a folder "test"
    assert open_source(tmp_path / "split", "stretch").splits == ("train", "test")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_pictures_at_any_depth_below_a_class_belong_to_it(form, tmp_path, caplog):
    deep = "train/cat/a/b/c/d/e/f/2.png"
    others = ("train/cat/1.png", "test/cat/3.png", "train/dog/4.png", "test/dog/5.png")
    folder = drawn(tmp_path / "images", deep, *others)
    path = folder if form == "folder" else pack(folder, tmp_path / "images.zip")
    meta = process(images(path), tmp_path)
    assert meta.num_images == {"train": 3, "test": 2}
    assert f"1 pictures in folders within a class belong to that class ({deep})." in caplog.messages
    assert "Classes, as train + test: cat 2 + 1, dog 1 + 1." in caplog.messages


def test_of_folders_within_folders_the_topmost_that_lie_side_by_side_are_the_classes(tmp_path, caplog):
    names = ("plants/oak/1.png", "plants/elm/2.png", "animals/cat/3.png", "x.png")
    drawn(tmp_path / "images", *(f"all/{name}" for name in names))
    assert open_source(tmp_path / "images", "stretch").class_names == ("animals", "plants")
    assert caplog.messages == [
        "Passed over: 1 pictures outside of the splits and classes (all/x.png).",
        "3 pictures in folders within a class belong to that class "
        "(all/animals/cat/3.png, all/plants/elm/2.png, all/plants/oak/1.png).",
    ]


def test_where_no_picture_is_found_it_is_said_what_was_passed_over(tmp_path, caplog):
    for i in range(4):
        add(bytes(128) + b"DICM", f"cat/{i}.dcm")(tmp_path / "images")
    add(encoded(RED), "1.png")(tmp_path / "images")
    with pytest.raises(ResgridError, match="images: there are no images: an image folder holds"):
        open_source(tmp_path / "images", "stretch")
    assert caplog.messages == [
        "Passed over: 4 files that Pillow cannot identify as pictures (cat/0.dcm, cat/1.dcm, cat/2.dcm, …); "
        "1 pictures outside of the splits and classes (1.png)."
    ]


# --- what becomes of pictures, said once with a count ------------------------------------------------


def test_transparent_pictures_become_white_there_and_this_is_said(image_folder, tmp_path, caplog):
    black = np.zeros((32, 32, 4), np.uint8)
    black[10:14, :, 3] = 255  # a line on a transparent ground, which is black below its transparency
    add(encoded(Image.fromarray(black)), "train/one/black.png")(image_folder)
    add(encoded(NOISE.convert("RGBA")), "train/one/opaque.png")(image_folder)
    process(images(image_folder), tmp_path)
    column = load_split(tmp_path / "processed", "train").images[4, :, 0, 0]  # after 0 to 3
    assert column.tolist() == [255] * 10 + [0] * 4 + [255] * 18
    assert (
        "1 pictures are transparent in places, which become white (train/one/black.png)." in caplog.messages
    )


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_pages_the_first_is_taken_and_this_is_said(form):
    first, second = Image.new("RGB", (32, 32), (200, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 200))
    many = encoded(first, form, save_all=True, append_images=[second])
    picture = read_picture(io.BytesIO(many), "x", "stretch")
    red, _, blue = picture.pixels[5, 5].tolist()
    assert red > 190 > 20 > blue
    assert picture.remarks == ("have several pages or frames, of which the first is taken",)
    assert read_picture(io.BytesIO(encoded(NOISE, form)), "x", "stretch").remarks == ()


def bands(count: int) -> bytes:
    """A TIFF of 8x8 pixels with `count` bands of 8 bits, as satellites give them."""
    values = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 0, 277: count, 278: 8, 279: 64 * count}  # by tag
    offset = 8 + 2 + 12 * len(values) + 4
    written = b"".join(struct.pack("<HHII", tag, 4, 1, value or offset) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + written + bytes(4 + 64 * count)


def test_a_reason_stands_once_for_all_its_pictures_in_the_librarys_words(image_folder, tmp_path, capfd):
    for i in range(25):
        deep = Image.fromarray(np.full((8, 8), i, np.uint16))
        add(encoded(deep), f"train/one/deep{i:02}.png")(image_folder)
    add(encoded(Image.new("LAB", (8, 8)), "TIFF"), "train/two/lab.tif")(image_folder)
    add(bands(13), "train/two/sentinel.tif")(image_folder)
    with pytest.raises(ResgridError, match=r"broken pictures: 27\.") as caught:
        process(images(image_folder), tmp_path)
    lines = str(caught.value).splitlines()
    names = ", ".join(f"train/one/deep{i:02}.png" for i in range(20))
    assert lines[1:4] == [
        f"  25 × pixels of type I;16: save it as RGB with 8 bits a channel: {names}, …",
        "  1 × pixels of type LAB: save it as RGB with 8 bits a channel: train/two/lab.tif",
        "  1 × cannot identify image file: More samples per pixel than can be decoded: 13: train/two/sentinel.tif",
    ]
    assert "More samples" not in capfd.readouterr().err


def test_a_channel_that_never_varies_is_said(tmp_path, caplog):
    for i in range(8):
        name = f"{('train', 'test')[i % 2]}/{'ab'[i // 4]}/{i}.png"
        add(encoded(Image.new("RGB", (32, 32), (i, 0, 0))), name)(tmp_path / "images")
    process(images(tmp_path / "images"), tmp_path)
    assert (
        "Of the training images the green and blue never varies, so normalization: {name: per_channel} would "
        "divide by 0. {name: scalar} does not."
    ) in caplog.messages


# --- the same picture twice --------------------------------------------------------------------------


def test_pictures_that_are_in_two_splits_are_counted_and_named(image_folder, tmp_path, caplog):
    shutil.copy(image_folder / "train/one/1.png", image_folder / "test/one/copy (1).png")
    with Image.open(image_folder / "train/two/0.jpg") as image:  # the same pixels in another format
        image.save(image_folder / "test/two/other.bmp")
    shutil.copy(image_folder / "train/two/0.jpg", image_folder / "train/two/00.jpg")  # in one split: no harm
    meta = process(images(image_folder), tmp_path)
    across = meta.duplicates["across_splits"]
    assert across.num_images == 2
    assert across.first == ("test/one/copy (1).png = train/one/1.png", "test/two/other.bmp = train/two/0.jpg")
    assert load_meta(tmp_path / "processed") == meta
    said = "2 images are in two splits, and their scores say little of new images:"
    assert f"{said} {', '.join(across.first)}." in caplog.messages


def test_a_picture_in_two_classes_is_refused_or_left_out(image_folder, tmp_path, caplog):
    shutil.copy(image_folder / "train/one/1.png", image_folder / "train/two/9.png")
    shutil.copy(image_folder / "train/three/1.png", image_folder / "test/one/9.png")
    message = (
        r"2 images are equal to one of another class: train/two/9\.png = train/one/1\.png, test/one/9\.png ="
    )
    with pytest.raises(ResgridError, match=rf"raw: {message}.*data\.on_broken: skip .* leaves them out"):
        process(images(image_folder), tmp_path)
    meta = process(images(image_folder, on_broken="skip"), tmp_path)
    assert meta.num_images == {"train": 10, "test": 6}
    assert meta.left_out == {
        "train": ["train/one/1.png", "train/three/1.png", "train/two/9.png"], "test": ["test/one/9.png"],
    }  # fmt: skip
    assert meta.duplicates["across_classes"].num_images == 2
    assert re.search(rf"Left out, both: {message}", caplog.text)


def test_of_published_data_a_picture_in_two_classes_is_said_and_kept(tmp_path, caplog):
    """CIFAR-100 has some."""
    batch = cifar_forms(tmp_path / "forms")["bin10"] / "cifar/data_batch_1.bin"
    content = bytearray(batch.read_bytes())
    content[3074 : 2 * 3073] = content[1:3073]  # the second image is the first, of another class
    batch.write_bytes(content)
    meta = process(config.Archive(source="archive", location=str(batch.parent), checksum=None), tmp_path)
    assert meta.num_images == {"train": 6, "test": 4}
    assert meta.duplicates["across_classes"].first == ("train image 1 = train image 0",)
    assert "1 images are equal to one of another class: train image 1 = train image 0." in caplog.messages


def test_equal_pictures_are_drawn_to_one_side(tmp_path):
    """Each of 20 pictures of a class under three names: a quarter of 20 is 5, and so 15 images."""
    names = [f"{name}/{i:02}.png" for name in ("cat", "dog") for i in range(20)]
    folder = drawn(tmp_path / "images", *names)
    for name in names:
        for copy in ("(1)", "(2)"):
            shutil.copy(folder / name, folder / name.replace(".png", f" {copy}.png"))
    meta = process(images(folder, test_fraction=0.25), tmp_path, with_validation(0.2))
    assert meta.num_images == {"train": 72, "validation": 18, "test": 30}
    assert meta.duplicates == {}


def test_the_draw_without_equal_pictures_is_that_of_earlier_versions(tmp_path):
    """Digests of version 1.0's files: cells that were trained on them stay current."""
    meta = process(
        DIGITS, tmp_path / "a", with_validation(0.1, seed=3).model_copy(update={"training_fraction": 0.5})
    )
    assert meta.digest == "sha256:0f05c48932d6119a138b09d56515e843342ea33110c4bc8aabe97f7eb47e498f"
    folder = drawn(tmp_path / "images", *[f"{name}/{i:02}.png" for name in "abc" for i in range(40)])
    add(b"GIF89a", "b/bad.png")(folder)  # a broken one takes part in the draw
    meta = process(images(folder, 0.2, "skip"), tmp_path / "b", with_validation(0.1, seed=3))
    assert meta.digest == "sha256:81ee7aa4628f59eafb4d20d579c05ebb02448fe5b6eb36681a8b643fcf04f90a"
    assert "duplicates" not in (tmp_path / "b/processed/meta.json").read_text()


# --- sizes ------------------------------------------------------------------------------------------


def square(array: np.ndarray, resize: config.Resize) -> np.ndarray:
    return np.asarray(to_square(Image.fromarray(array), resize))


def test_crop_takes_the_square_in_the_middle():
    wide = np.zeros((32, 64), np.uint8)
    wide[:, 16:48] = np.arange(32)
    np.testing.assert_array_equal(square(wide, "crop"), wide[:, 16:48])
    np.testing.assert_array_equal(square(wide.T.copy(), "crop"), wide[:, 16:48].T)


def test_pad_keeps_the_shape_and_adds_black_on_two_sides():
    padded = square(np.full((64, 128), 200, np.uint8), "pad")
    assert (padded[8:24] == 200).all()  # 128 x 64 becomes 32 x 16
    assert padded[:8].max() == padded[24:].max() == 0
    odd = square(np.full((1, 500), 200, np.uint8), "pad")  # of 31 rows of black 15 are above
    assert odd[15].min() == 200
    assert odd.sum() == 32 * 200


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (31, 33), (32, 32)])
def test_any_shape_becomes_a_square(resize, size):
    assert to_square(Image.new("RGB", size, (1, 2, 3)), resize).size == (32, 32)


def test_making_smaller_averages_so_that_a_fine_grid_becomes_grey():
    """Every second column white, eight columns to a pixel; without antialiasing each is black or white."""
    grid = np.zeros((256, 256), np.uint8)
    grid[:, ::2] = 255
    small = square(grid, "stretch")
    assert 120 <= small.min() <= small.max() <= 135


def test_making_larger_is_bilinear():
    """Two pixels 0 and 160 to 32: centres at 8 and 24, so 5 from one pixel to the next between them."""
    row = square(np.array([[0, 160]] * 2, np.uint8), "stretch")[0].astype(int)
    expected = [min(160, max(0, 10 * (x + 0.5 - 8))) for x in range(32)]
    assert np.abs(row - expected).max() <= 1


# --- digits -----------------------------------------------------------------------------------------


def test_digits_are_enlarged_on_the_scale_of_0_to_255_and_split_within_each_class(tmp_path):
    meta = process(DIGITS, tmp_path)
    assert meta.class_names == tuple("0123456789")
    train, test = load_split(tmp_path / "processed", "train"), load_split(tmp_path / "processed", "test")
    counts = np.bincount(load_digits().target)
    assert np.bincount(test.labels).tolist() == [round(0.2 * int(count)) for count in counts]
    assert np.bincount(train.labels).tolist() == [int(n) - round(0.2 * int(n)) for n in counts]
    assert (train.images[..., 0] == train.images[..., 1]).all()
    assert train.images.max() == 255


def test_a_value_of_0_to_16_becomes_its_nearest_of_0_to_255(tmp_path):
    levels = np.arange(17, dtype=np.uint8)  # image i is i everywhere; two classes
    arrays = {"images": np.repeat(levels, 64).reshape(17, 8, 8), "labels": np.array([0] * 9 + [1] * 8)}
    save_file(arrays, tmp_path / "d.safetensors")
    source = Digits(tmp_path / "d.safetensors")
    found = source.load("train").images[:, 0, 0, 0]
    with pytest.raises(ResgridError, match="there is no split 'validation', only train"):
        source.load("validation")
    assert sorted(found.tolist()) == [
        0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255,
    ]  # i * 15.9375  # fmt: skip


# --- splits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.1, [10, 3, 1, 1]), (0.5, [50, 15, 2, 1]), (0.99, [99, 29, 2, 1]), (0.001, [1, 1, 1, 1])],
)
def test_the_draw_takes_the_rounded_part_of_each_class_at_least_one_and_never_all(fraction, expected):
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 3], [100, 30, 3, 2]))
    drawn = draw(labels, "abcd", fraction, seed=3)
    assert np.bincount(labels[drawn]).tolist() == expected


def test_the_draw_is_pcg64s_own_and_so_the_same_with_every_numpy():
    """The three smallest of PCG64(0)'s first ten raw numbers are those at 3, 2 and 1."""
    raw = [int(number) for number in np.random.PCG64(0).random_raw(10)]
    assert raw[0] == 11749869230777074271
    assert sorted(range(10), key=raw.__getitem__)[:3] == [3, 2, 1]
    assert np.flatnonzero(draw(np.zeros(10, np.int64), "a", 0.3, 0)).tolist() == [1, 2, 3]


def test_a_class_of_one_image_cannot_be_split(image_folder, tmp_path):
    for path in sorted((image_folder / "train/three").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ResgridError, match=r"class 'three' has a single image.*validation_fraction: 0\.0"):
        process(images(image_folder), tmp_path, with_validation(0.25))


def test_the_validation_split_is_taken_from_training_alone_and_the_order_stays(tmp_path):
    process(DIGITS, tmp_path / "whole")
    meta = process(DIGITS, tmp_path / "parted", with_validation(0.1, seed=5))
    whole = load_split(tmp_path / "whole/processed", "train")
    train, validation, test = (
        load_split(tmp_path / "parted/processed", split) for split in ("train", "validation", "test")
    )
    held_out = torch.from_numpy(draw(whole.labels.numpy(), "0123456789", 0.1, 5))
    assert torch.equal(train.images, whole.images[~held_out])
    assert torch.equal(validation.images, whole.images[held_out])
    assert torch.equal(validation.labels, whole.labels[held_out])
    assert torch.equal(test.images, load_split(tmp_path / "whole/processed", "test").images)
    held = sum(round(0.1 * int(count)) for count in np.bincount(whole.labels))
    assert meta.num_images == {"train": 1438 - held, "validation": held, "test": 359}
    # statistics are those of what is left for training
    values = train.images.numpy().astype(np.float64) / 255
    assert meta.scalar_mean == pytest.approx(values.mean(), rel=1e-12)
    assert meta.scalar_std == pytest.approx(values.std(), rel=1e-12)


def test_a_part_of_the_training_images_is_drawn_within_each_class_from_what_validation_leaves(tmp_path):
    whole = process(DIGITS, tmp_path / "whole", with_validation(0.1))
    part = process(
        DIGITS, tmp_path / "part", with_validation(0.1).model_copy(update={"training_fraction": 0.25})
    )
    assert part.split_digests["validation"] == whole.split_digests["validation"]
    assert part.split_digests["test"] == whole.split_digests["test"]
    assert part.digest != whole.digest
    left, kept = (load_split(tmp_path / name / "processed", "train") for name in ("whole", "part"))
    expected = [round(0.25 * count) for count in torch.bincount(left.labels).tolist()]
    assert torch.bincount(kept.labels).tolist() == expected
    assert part.num_images["train"] == sum(expected) < whole.num_images["train"]
    drawn = torch.from_numpy(draw(left.labels.numpy(), "0123456789", 0.25, 0))
    assert torch.equal(kept.images, left.images[drawn])


# --- statistics -------------------------------------------------------------------------------------


def test_moments_are_those_of_a_hand_calculation():
    """0, 0, 255, 51: mean 306 / 4 = 76.5; mean square (65025 + 2601) / 4 = 16906.5; variance 11054.25."""
    counts = np.zeros(256, np.int64)
    counts[[0, 255, 51]] = 2, 1, 1
    assert moments(counts) == (0.3, math.sqrt(11054.25) / 255)


def test_the_figures_to_normalise_with_are_those_that_the_params_name(image_folder, tmp_path):
    for path in sorted(image_folder.glob("*/*/*")):
        path.unlink()
    for i, split in enumerate(("train", "test", "train", "test")):
        for name, colour in (("a", (0, 255, 51)), ("b", (255, 255, 51))):
            add(encoded(Image.new("RGB", (32, 32), colour)), f"{split}/{name}/{i}.png")(image_folder)
    meta = process(images(image_folder), tmp_path)
    assert meta.channel_mean == (0.5, 1.0, 0.2)
    assert meta.channel_std == (0.5, 0.0, 0.0)
    # 0, 255, 51, 255, 255, 51 -> mean 867 / 6, variance of (0, 1, .2, 1, 1, .2): 3.08 / 6 - (3.4 / 6)^2
    assert meta.scalar_mean == pytest.approx(3.4 / 6, abs=1e-15)
    assert meta.scalar_std == pytest.approx(math.sqrt(3.08 / 6 - (3.4 / 6) ** 2), abs=1e-15)
    mean, std = statistics(meta, config.ScalarStatistics(name="scalar"))
    assert mean == (meta.scalar_mean,) * 3
    assert std == (meta.scalar_std,) * 3
    fixed = config.FixedStatistics(name="fixed", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert statistics(meta, fixed) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(ResgridError, match=r"normalization per_channel: .*deviation of 0"):
        statistics(meta, config.ChannelStatistics(name="per_channel"))


# --- the processed form -----------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes_and_replaces_the_whole_folder(image_folder, tmp_path):
    written = []
    for where in "ab":
        process(images(image_folder), tmp_path / where, with_validation(0.25))
        folder = tmp_path / where / "processed"
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert sorted(written[0]) == [
        "meta.json", "test.safetensors", "train.safetensors", "validation.safetensors",
    ]  # fmt: skip
    process(images(image_folder), tmp_path / "b")
    assert not (tmp_path / "b/processed/validation.safetensors").exists()


def test_the_digest_follows_content_and_class_names_and_nothing_else(cifar_archive, image_folder, tmp_path):
    one = process(images(image_folder), tmp_path / "a")
    renamed = image_folder.rename(tmp_path / "elsewhere")
    assert process(images(renamed), tmp_path / "b").digest == one.digest
    for split in ("train", "test"):
        (renamed / split / "two").rename(renamed / split / "zwei")
    other_names = process(images(renamed), tmp_path / "c")
    assert other_names.split_digests == one.split_digests
    assert other_names.digest != one.digest
    # a split's digest is that of its raw bytes, as anyone can make it
    arrays = load_file(tmp_path / "a/processed/test.safetensors")
    by_hand = hashlib.sha256(arrays["images"].tobytes() + arrays["labels"].tobytes()).hexdigest()
    assert one.split_digests["test"] == f"sha256:{by_hand}"


def damage(path: Path, at: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("at", [0.0, 0.001, 0.5, 1.0])
def test_one_altered_bit_in_a_split_is_noticed(at, tmp_path):
    process(DIGITS, tmp_path)
    damage(tmp_path / "processed/test.safetensors", at)
    with pytest.raises(
        ResgridError, match=r"test\.safetensors: .*(damaged|cannot be read) .*`dvc repro preprocess`"
    ):
        load_split(tmp_path / "processed", "test")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("meta.json", lambda text: None, "No such file"),
        ("meta.json", lambda text: text.replace(b'"7"', b'"seven"'), "its digest is not that of its content"),
        ("meta.json", lambda text: text[:100], "cannot be read"),
        ("train.safetensors", lambda text: None, "No such file"),
    ],
)
def test_what_is_missing_or_changed_is_named_with_the_way_to_make_it(name, change, message, tmp_path):
    process(DIGITS, tmp_path)
    path = tmp_path / "processed" / name
    changed = change(path.read_bytes())
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    with pytest.raises(ResgridError, match=rf"(?s){re.escape(name)}: .*{message}.*`dvc repro preprocess`"):
        load_split(tmp_path / "processed", "train")


# --- what to score on -------------------------------------------------------------------------------


def test_a_source_is_known_by_its_content_whatever_form_it_has(cifar_archive, image_folder, tmp_path):
    meta = process(images(image_folder), tmp_path)
    expected = load_split(tmp_path / "processed", "test")
    for path in (
        image_folder,
        pack(image_folder, tmp_path / "i.zip"),
        tmp_path / "raw",
        tmp_path / "processed",
    ):
        source = open_source(path, "stretch")
        assert source.class_names == meta.class_names
        loaded = source.load("test")
        assert torch.equal(loaded.images, expected.images)
        assert torch.equal(loaded.labels, expected.labels)

    # a folder with the archive alone in it
    assert open_source(cifar_archive.parent, "stretch").class_names == ("ant", "bee", "cow", "dog")


def test_what_is_no_source_or_split_is_refused(tmp_path, cifar_archive, image_folder):
    with pytest.raises(ResgridError, match="absent: there is no such file"):
        open_source(tmp_path / "absent", "stretch")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResgridError, match="empty: there are no images: an image folder holds"):
        open_source(tmp_path / "empty", "stretch")
    with pytest.raises(ResgridError, match="there is no split 'validation', only train and test"):
        open_source(cifar_archive, "stretch").load("validation")
    process(DIGITS, tmp_path)
    with pytest.raises(ResgridError, match=r"only train, test\. preprocess\.validation_fraction above 0"):
        load_split(tmp_path / "processed", "validation")
    shutil.rmtree(image_folder / "train")  # an image folder to score on needs no training images
    assert open_source(image_folder, "stretch").load("test").images.shape == (6, 32, 32, 3)


@pytest.mark.long
def test_all_of_cifar_10_as_60_000_jpegs_in_a_tar_xz(reference_data, tmp_path):
    """Mean and deviation are those of CIFAR-10, 120.7076 and 64.1501, but for what JPEG loses."""
    meta = process(images(reference_data / "cifar10-images.tar.xz"), tmp_path)
    assert meta.num_images == {"train": 50_000, "test": 10_000}
    assert torch.bincount(load_split(tmp_path / "processed", "train").labels).tolist() == [5000] * 10
    assert (255 * meta.scalar_mean, 255 * meta.scalar_std) == pytest.approx((120.7076, 64.1501), rel=0.006)
