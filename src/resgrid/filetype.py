"""What a file is, told from its content, not its name: one answer for every reader of foreign files.

A reader that was given something else says so with `name` and `advice`, which are written for a person.
"""

from __future__ import annotations

import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from resgrid.errors import ResgridError

START_BYTES = 4096  # enough for every signature below
UNREADABLE = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow formats that need another program


@dataclass(frozen=True)
class FileType:
    name: str  # with its article, as in "a PNG picture"
    advice: str = ""  # how to go on with it here
    is_picture: bool = False


_UNPACK: Final = "If it is packed weights, unpack it first."
EMPTY: Final = FileType("an empty file", "Copy or fetch it again.")
UNKNOWN: Final = FileType("a file of no known type")
TEXT: Final = FileType("a text file")
FOLDER: Final = FileType("a folder")
TORCH: Final = FileType("a PyTorch file", "`resgrid import-torch` makes a weights file of it.")
HDF5: Final = FileType("an HDF5 file", "`resgrid import-keras` makes a weights file of it if Keras wrote it.")
KERAS: Final = FileType("a Keras 3 file", "`resgrid import-keras` makes a weights file of it.")
SAFETENSORS: Final = FileType("a safetensors file", "`resgrid import-torch` makes a weights file of it.")
TAR: Final = FileType("a tar archive", _UNPACK)
GZIP: Final = FileType("a gzip archive", _UNPACK)
XZ: Final = FileType("an xz archive", _UNPACK)
BZIP2: Final = FileType("a bzip2 archive", _UNPACK)
ZIP: Final = FileType("a zip archive", _UNPACK)
HEIF: Final = FileType("a HEIC picture", "Pillow does not read HEIC: convert it to JPEG or PNG.")

# How files begin, looked for in this order, and before what Pillow reads.
_SIGNATURES: tuple[tuple[bytes, FileType], ...] = (
    (rb"\x89HDF\r\n\x1a\n", HDF5),
    (rb"PK\x03\x04", ZIP),
    (rb"PK\x05\x06", FileType("an empty zip archive", "Pack or fetch it again.")),
    (rb"\x1f\x8b", GZIP),
    (rb"\xfd7zXZ\0", XZ),
    (rb"BZh[1-9]1AY&SY", BZIP2),
    (rb".{257}ustar", TAR),
    (rb"7z\xbc\xaf\x27\x1c", FileType("a 7-Zip archive", "Unpack it first.")),
    (rb"Rar!\x1a", FileType("a RAR archive", "Unpack it first.")),
    (rb"\x93NUMPY", FileType("a NumPy array", "Save the model's state dict with torch.save.")),
    (
        rb"MATLAB 5\.0 MAT-file",
        FileType("a MATLAB file", "Take the Python or the binary version of the data."),
    ),
    (rb".{4}TFL3", FileType("a TensorFlow Lite model", "Save the Keras model that it was made of.")),
    (rb"GGUF", FileType("a GGUF file")),
    (rb"%PDF", FileType("a PDF document", "Save its pictures as PNG or JPEG.")),
    (rb"\xd0\xcf\x11\xe0", FileType("a file of Windows or an old Office document")),  # Thumbs.db
    (rb"SQLite format 3\0", FileType("an SQLite database")),
    (rb"\x80[\2-\5].?.{0,12}\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", TORCH),  # before torch 1.6
    (
        rb"\x80[\2-\5]",
        FileType("a pickle", "If it holds weights, save them with torch.save(model.state_dict(), FILE)."),
    ),
    (rb".{5}\0\0\0\{", SAFETENSORS),
    (rb".{4}ftyp(hei[cxms]|hevc|(mif1|msf1).{4,40}hei[cx])", HEIF),
    (
        rb".{4}ftyp(?!.{0,60}avi[fs])|\x1aE\xdf\xa3|RIFF.{4}AVI ",
        FileType("a video", "Save its frames as pictures."),
    ),
    (
        rb"version https://git-lfs",
        FileType("a Git LFS pointer and not the file itself", "`git lfs pull` fetches the file."),
    ),
    (
        rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype html|html)",
        FileType("a web page", "The download brought it in place of the file: fetch that again."),
    ),
    (rb"\s*(<.{0,1000})?<svg", FileType("an SVG drawing", "Export it as PNG.")),
)


def identify(path: Path) -> FileType:
    """What stands at `path`; raises ResgridError if nothing can be read there."""
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return FileType("a TensorFlow SavedModel", "Save it in Keras as FILE.weights.h5.")
        return FOLDER
    if path.is_symlink() and not path.exists():
        raise ResgridError(f"{path}: a link that leads nowhere (to {path.readlink()}).")
    if not path.is_file():  # a pipe would never end
        raise ResgridError(f"{path}: there is no such file.")
    kind = begins_as(path)
    return _zipped(path) if kind is ZIP else kind


def begins_as(path: Path) -> FileType:
    """The same of a file by its first bytes alone, whatever is in a zip."""
    try:
        with path.open("rb") as file:
            return identify_bytes(file.read(START_BYTES))
    except OSError as error:
        raise ResgridError(f"{path}: cannot be read: {error.strerror}.") from None


def identify_bytes(start: bytes) -> FileType:
    """What a file is that begins with `start`, its first `START_BYTES`."""
    if not start:
        return EMPTY
    signed = next((kind for pattern, kind in _SIGNATURES if re.match(pattern, start, re.DOTALL)), None)
    return signed or (TEXT if _is_text(start) else _picture(start) or UNKNOWN)


def refuse(path: Path, kind: FileType, wanted: str) -> ResgridError:
    """The error for a reader that wants `wanted` and was given a file of another `kind`."""
    return ResgridError(f"{path}: this is {kind.name}, not {wanted}. {kind.advice}".rstrip())


def _zipped(path: Path) -> FileType:
    """The kind of a zip, by the names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return FileType(
            "a zip archive (PyTorch and Keras write such) that is cut or damaged", "Copy it again."
        )
    bases = {name.partition("/")[2] for name in names}
    if "constants.pkl" in bases:
        return FileType(
            "a TorchScript program",
            "Save its weights: torch.save(torch.jit.load(FILE).state_dict(), OTHER).",
        )
    if "data.pkl" in bases:
        return TORCH
    if "archive_format" in bases:
        return FileType("a torch.export program", "Save the state dict of the model that it was made of.")
    if "model.weights.h5" in names:
        return KERAS
    if names and all(name.endswith(".npy") for name in names):
        return FileType("an archive of NumPy arrays", "Save the model's state dict with torch.save.")
    return ZIP


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # a character may be cut there
            return False
        text = start[: error.start].decode("utf-8")
    return re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text) is None


def picture_formats() -> tuple[str, ...]:
    """The formats that Pillow reads here without another program."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in UNREADABLE)


def _picture(start: bytes) -> FileType | None:
    """By the signatures that Pillow's own readers look for."""
    for name in picture_formats():
        _, accepts = Image.OPEN[name]
        try:
            if accepts is not None and accepts(start[:16]):
                return FileType(f"a picture ({name})", is_picture=True)
        except (IndexError, ValueError, struct.error):  # shorter than the signature
            continue
    return None
