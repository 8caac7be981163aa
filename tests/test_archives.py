"""Archives and pickles that are damaged or mean harm: nothing of them is unpacked or run, and what is refused is named."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resgrid import config
from resgrid.data.archives import contents, files
from resgrid.data.cifar import load_pickle
from resgrid.data.fetch import download
from resgrid.data.sources import ImageFolder
from resgrid.errors import ResgridError

FILES = {"b/2.txt": b"two", "a/1.txt": b"one" * 1000, "empty": b"", "a/3.txt": bytes(range(256))}
RANDOM = {f"{i}.bin": os.urandom(3000) for i in range(20)}


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz", **fields: Any) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return path


def write(path: Path, members: dict[str, bytes], form: str) -> Path:
    """`members` as a folder, a zip, or a tar in tarfile's mode `form`."""
    if form == "zip":
        return write_zip(path, members)
    if form != "folder":
        return write_tar(path, members, form)
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def names(path: Path) -> list[str]:
    return [name for name, _ in files(path)]


def read(path: Path) -> dict[str, bytes | None]:
    return dict(files(path, lambda name: -1))


# --- what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["w:gz", "w:xz", "w:bz2", "w:", "zip", "folder"])
def test_every_form_gives_the_same_names_and_contents(form, tmp_path):
    path = write(tmp_path / "thing", FILES, form)
    assert sorted(names(path)) == sorted(FILES)
    assert read(path) == FILES
    assert dict(contents(path, {"a/1.txt", "absent"})) == {"a/1.txt": b"one" * 1000}
    assert dict(files(path, lambda name: 4)) == {name: content[:4] for name, content in FILES.items()}


@pytest.mark.parametrize(
    ("form", "name", "plain"),
    [
        ("w:", "./train/cat/1.png", "train/cat/1.png"),
        ("zip", "train\\cat\\1.png", "train/cat/1.png"),  # from Windows
        ("w:", "caf\udce9/%41.png", "caf%E9/%41.png"),
        ("folder", "caf\udce9/%41.png", "caf%E9/%41.png"),
    ],
)
def test_names_are_plain_text_with_forward_slashes(form, name, plain, tmp_path):
    assert read(write(tmp_path / "a", {name: b"x"}, form)) == {plain: b"x"}


def test_links_in_a_folder_of_ones_own_are_followed_and_a_circle_ends(tmp_path):
    (tmp_path / "real").write_bytes(b"x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "real")
    (folder / "circle").symlink_to(folder)
    (folder / "gone").symlink_to("nowhere")
    assert read(folder) == {"gone": None, "link": b"x"}


def test_a_name_from_an_archive_is_never_a_path_and_its_links_are_empty(tmp_path, caplog):
    outside = ["/etc/passwd", "../x", "a/../../x", "..\\y", "C:\\x", "\\\\host\\x", str(tmp_path / "x")]
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    images = [f"{split}/{kind}/1.png" for split in ("train", "test") for kind in "ab"]
    path = write_tar(tmp_path / "bad.tar", dict.fromkeys([*outside, *images], picture.getvalue()), "w:")
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"link{kind.decode()}")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    content = read(path)
    assert len(content) == len(outside) + len(images) + 4
    assert {content[name] for name in content if name.startswith("link")} == {b""}
    assert caplog.messages == [f"{path}: its links are read as empty files. Pack the files themselves."]
    checksum = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    data = config.ImageFolder(
        source="image-folder", location=str(path), checksum=checksum, test_fraction=0.0, on_broken="refuse"
    )
    download(data, tmp_path / "in/raw")
    assert ImageFolder(tmp_path / "in/raw/bad.tar", "stretch").class_names == ("a", "b")
    assert {each.name for each in tmp_path.rglob("*")} == {"bad.tar", "in", "raw"}


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", []),  # as macOS packs them; read as cp437, which is zip's own, it would be `k├ñse`
        ("cp437", ["its names are no UTF-8, and are read as cp437. Check the names of the classes."]),
    ],
)
def test_names_of_a_zip_without_the_flag_for_utf_8_are_utf_8_where_they_can_be(
    encoding, said, tmp_path, caplog
):
    name = "käse".encode(encoding)
    path = write_zip(tmp_path / "a.zip", {f"train/k{'X' * (len(name) - 3)}se/1.png": b"x"})
    path.write_bytes(path.read_bytes().replace(b"k" + b"X" * (len(name) - 3) + b"se", name))
    assert read(path) == read(path) == {"train/käse/1.png": b"x"}
    assert caplog.messages == [f"{path}: {each}" for each in said]


@pytest.mark.parametrize(
    ("local", "central", "value", "why"),
    [
        (8, 10, 9, "That compression method is not supported"),
        (6, 8, 1, ".* is encrypted, password required for extraction"),
    ],
)
def test_a_zip_that_is_whole_but_cannot_be_read_is_not_called_damaged(local, central, value, why, tmp_path):
    path = write_zip(tmp_path / "bad.zip", {"thing": b"x" * 100})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x03\x04") + local] = raw[raw.index(b"PK\x01\x02") + central] = value
    path.write_bytes(raw)
    with pytest.raises(ResgridError, match=rf"bad\.zip: cannot be read as a .*zip \({why}\)") as caught:
        read(path)
    assert "damaged" not in str(caught.value)


# --- what is refused --------------------------------------------------------------------------------


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a", "b", "./a"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ResgridError, match=r"bad\.tar: holds 'a' twice"):
        names(path)


@pytest.mark.parametrize("form", ["w:gz", "zip"])
def test_bombs_are_refused_before_they_inflate(form, tmp_path):
    """285 MB of zeros in 285 kB: more than 250 times its size, and more than 256 MiB."""
    path = write(tmp_path / "bomb", {str(i): bytes(95_000_000) for i in range(3)}, form)
    with pytest.raises(ResgridError, match="inflates to more than 268,435,456 bytes"):
        names(path)


def test_a_member_of_too_many_bytes_is_refused_unread_and_may_be_passed_over(tmp_path):
    refused = "huge of 268,435,457 bytes is refused; the limit is 268,435,456"
    header = tarfile.TarInfo("huge")
    header.size = 2**28 + 1
    (tmp_path / "big.tar").write_bytes(header.tobuf())
    with pytest.raises(ResgridError, match=refused):
        read(tmp_path / "big.tar")
    members = {"huge": bytes(2**28 + 1), "small": b"x"} | {f"{i}": os.urandom(2**20) for i in range(2)}
    path = write_zip(tmp_path / "big.zip", members)
    assert dict(contents(path, {"small"})) == {"small": b"x"}
    assert next(files(path, lambda name: 4)) == ("huge", bytes(4))
    with pytest.raises(ResgridError, match=refused):
        read(path)


def test_a_batch_as_large_as_cifar_100s_is_read(tmp_path):
    """50,000 images of 3,072 bytes, their labels and names: 155 MB."""
    path = write_tar(tmp_path / "large.tgz", {"train": bytes(155_249_918)}, "w:gz")
    [(_, content)] = contents(path, {"train"})
    assert len(content) == 155_249_918


def test_a_tar_header_that_asks_for_much_memory_is_refused(tmp_path):
    """A pax header is read whole, so its size is an attack as well."""
    header = tarfile.TarInfo("long")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    path = tmp_path / "bad.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    refused = r"a header of 4,294,967,296 bytes is refused|cannot be read as a"  # 3.14 reads it in parts
    with pytest.raises(ResgridError, match=refused):
        names(path)


# --- cut and damaged --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["w:gz", "w:xz", "w:bz2", "w:", "zip"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_cut_archive_is_named(form, part, tmp_path):
    path = write(tmp_path / "cut", RANDOM, form)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(part * len(raw))])
    with pytest.raises(ResgridError, match=r"cut: cannot be read as a .*zip \(.+\)\. Fetch it again"):
        names(path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:1024], lambda raw: raw[:1024] + b"B" + raw[1025:]])
def test_a_plain_tar_that_ends_early_or_has_a_wrong_header_is_refused(damage, tmp_path):
    """tarfile takes both for the end: a cut behind a's block, and another name than b's checksum is of."""
    path = write_tar(tmp_path / "cut.tar", {"a": b"x", "b": b"y"}, "w:")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ResgridError, match="a header is damaged, or the end is missing"):
        names(path)


@pytest.mark.parametrize("form", ["w:gz", "w:xz", "w:bz2", "zip"])
def test_one_altered_bit_in_the_packed_bytes_is_noticed(form, tmp_path):
    path = write(tmp_path / "altered", RANDOM, form)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ResgridError, match=r"altered: cannot be read as a"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is an empty file"),
        (b"<html>Not found</html>", "it is a web page, .* fetch that again"),
        (b"PK\x03\x04", "File is not a zip file"),
        (None, "no such file"),
    ],
)
def test_what_is_no_archive_is_refused(content, message, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResgridError, match=message):
        names(path)


# --- pickles ----------------------------------------------------------------------------------------

ROWS = np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072)
BATCH = {
    b"batch_label": b"training batch 1 of 5",
    b"labels": [6, 9, 300],
    b"data": ROWS,
    b"filenames": [b"a.png"] * 3,
}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_batch_reads_as_pickle_itself_reads_it(protocol, order):
    pickled = pickle.dumps(BATCH | {b"data": np.array(ROWS, order=order)}, protocol=protocol)
    batch = load_pickle(pickled, "data_batch_1")
    data = batch.pop("data")
    assert batch == {
        "batch_label": "training batch 1 of 5", "labels": [6, 9, 300], "filenames": ["a.png"] * 3,
    }  # fmt: skip
    assert data.dtype == np.uint8
    np.testing.assert_array_equal(data, ROWS)


def python2_batch(rows: np.ndarray) -> bytes:
    """The opcodes that Python 2's cPickle and NumPy 1 wrote into the official archive, by hand."""
    raw = rows.tobytes()
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03"
        b"U\x06labelsq\x04]q\x05(K\x06K\x09e"
        b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09U\x01bq\x0a"
        b"\x87q\x0bRq\x0c(K\x01K\x02M\x00\x0c\x86q\x0dcnumpy\ndtype\nq\x0eU\x02u1q\x0fK\x00K\x01\x87q\x10Rq\x11"
        b"(K\x03U\x01|q\x12NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(raw)) + raw +
        b"q\x13tbU\x09filenamesq\x14]q\x15(U\x05a.pngq\x16U\x05b.pngq\x17eu."
    )  # fmt: skip


def test_the_official_archives_own_opcodes_are_read():
    batch = load_pickle(python2_batch(ROWS[:2]), "data_batch_1")
    np.testing.assert_array_equal(batch["data"], ROWS[:2])
    assert batch["labels"] == [6, 9]
    assert batch["filenames"] == ["a.png", "b.png"]
    wrong = python2_batch(ROWS[:2]).replace(b"K\x01K\x02M\x00\x0c", b"K\x01K\x03M\x00\x0c")
    with pytest.raises(ResgridError, match=r"batch: this pickle is refused \(cannot reshape"):
        load_pickle(wrong, "batch")


class Harm:
    """Unpickling it calls `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("harm", "asked"),
    [
        (Harm(os.system, "touch /tmp/harm"), r"(posix|nt)\.system"),
        (Harm(eval, "1"), r"(__builtin__|builtins)\.eval"),
        (Harm(np.load, "x"), r"numpy\.load"),
        (np.float64(1.0), r"numpy\._?core\.multiarray\.scalar"),
        (Path("x"), r"pathlib"),
        ({1, 2}, r"set|EMPTY_SET"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_anything_executable_is_refused_by_name(harm, asked, protocol):
    with pytest.raises(ResgridError, match=rf"tiny\.tar\.gz: data_batch_1: this pickle is refused .*{asked}"):
        load_pickle(pickle.dumps({b"data": harm}, protocol=protocol), "tiny.tar.gz: data_batch_1")


ENCODE = b"c_codecs\nencode\n"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (pickle.dumps({b"data": Harm(np.dtype, "O")}, 2), "uses REDUCE as no CIFAR batch does"),
        (pickle.dumps({b"data": np.zeros(2, np.float32)}, 2), "uses REDUCE as no"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00ax\x05\x00\x00\x00rot13\x86R.", "expected|opcode"),
        (b"\x80\x02" + ENCODE + b"X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "uses REDUCE as no"),
        (b"\x80\x02]K\x01R.", "uses REDUCE as no"),
        (b"\x80\x02" + ENCODE + b"}X\x08\x00\x00\x00__code__K\x01sb.", "uses BUILD as no"),
        (b"\x80\x02cnumpy\nndarray\n}X\x08\x00\x00\x00__code__K\x01sb.", "uses BUILD as no"),
        (b"\x80\x02" + ENCODE + b")\x81.", "uses NEWOBJ"),
        (b"\x80\x02(i__main__\nx\n.", "uses INST"),
        (b"\x80\x02K\x01Q.", "uses BINPERSID"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "expected .* bytes"),
        (b"\x80\x02K\x01.", "holds a int"),
        (b"\x80\x02}))s.", "a key is a tuple"),
        (b"\x80\x02}K\x01K\x01s.", "a key is a int"),
        (b"\x80\x02]q\x00.", "holds a list, not a dictionary"),
        (b"", "pickle exhausted"),
        (b"not a pickle", "opcode|uses"),
    ],
)  # fmt: skip
def test_a_pickle_with_anything_else_than_a_batch_holds_is_refused(pickled, message):
    with pytest.raises(ResgridError, match=rf"(?s)^batch: .*({message})"):
        load_pickle(pickled, "batch")


def doubled(times: int) -> bytes:
    """(((), ()), ((), ())) …: each tuple holds the former one twice, so that its hash takes 2^times steps."""
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(times))


LARGE = pickle.dumps({b"filenames": [b"%d" % i for i in range(300)]}, 2)
ONE_ARRAY = (  # of a memo's bytes
    b"U\x01acnumpy.core.multiarray\n_reconstruct\n)R"
    b"(K\x01J\x00\x00\x10\x00\x85cnumpy\ndtype\nU\x02u1\x85R\x89h\x00tb"
)
HOSTILE = {  # what it holds, and whether it is read
    "a memo index of 2^27": (b"\x80\x02K\x01r\0\0\0\x08.", False),
    "a memo index with one flipped bit": (LARGE.replace(b"r\x2c\1\0\0", b"r\x2c\1\0\x08"), True),
    "an array of 2^28 objects": (b"\x80\x02cnumpy\nndarray\nJ\0\0\0\x10\x85X\1\0\0\0O\x86R.", False),
    "the same by _reconstruct": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R.", False
    ),
    "a chain of encodings": (b"\x80\x02" + ENCODE * 40 + b"X\1\0\0\0a" + b"X\3\0\0\0hex\x86R" * 40 + b".", False),
    "a thousand arrays of the same bytes": (
        b"\x80\x02}(U\x01bT\0\0\x10\0" + bytes(2**20) + b"q\x00" + ONE_ARRAY * 1000 + b"u.", True
    ),
    "doubled tuples as a key": (b"\x80\x02}" + doubled(28) + b"Ns.", False),
    "the same in a row of items": (b"\x80\x02}(X\1\0\0\0aN" + doubled(28) + b"Nu.", False),
    "the same after a state was set": (b"\x80\x02}" + doubled(28) + b"NbNs.", False),
    "the same from the memo": (b"\x80\x02}" + doubled(28) + b"q\x400h\x40Ns.", False),
    "deep tuples as a key": (b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.", False),
    "a million opcodes": (b"\x80\x04]" + b"\x94" * 1_200_000 + b".", False),
    "a million marks": (b"\x80\x02]" + b"(" * 500_000 + b"t" * 500_000 + b".", False),
}  # fmt: skip


def attempt(pickled: bytes) -> str:
    try:
        load_pickle(pickled, "batch")
    except ResgridError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_takes_little_time_and_memory(what):
    pickled, is_read = HOSTILE[what]
    assert pickled != LARGE
    began = time.process_time()
    refused = attempt(pickled)
    assert time.process_time() - began < 5  # about 1 s at most; with tracing it takes ten times as long
    assert refused.startswith("" if is_read else "batch: this pickle is refused")
    assert bool(refused) is not is_read
    tracemalloc.start()
    try:
        attempt(pickled)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6 if "million" in what else peak < 20e6
