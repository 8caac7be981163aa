"""Files that people give in place of another. What else is wrong with a file, its reader's own error says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from resgrid import project
from resgrid.errors import ResgridError

START_BYTES: Final = 4096  # enough for every pattern below
_IMPORT: Final = "`resgrid import` makes a weights file of it"
_HEIC = rb".{4}ftyp(hei[cxms]|hevc|(mif1|msf1).{4,40}hei[cx])"
_WEB_PAGE = rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype html|html)"
_TORCH = rb"PK\x03\x04.{26}[^/]+/data\.pkl|\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\."  # the latter before 1.6
_KERAS = rb"\x89HDF\r\n\x1a\n|PK\x03\x04.{26}(metadata|config)\.json"
_CONFUSIONS: Final = (
    (rb"\Z", "an empty file: copy or fetch it again"),
    (rb"version https://git-lfs", "a Git LFS pointer and not the file itself: `git lfs pull` fetches it"),
    (_WEB_PAGE, "a web page, which came in place of the file: fetch that again"),
    (_HEIC, "a HEIC picture, which Pillow does not read: convert it to JPEG or PNG"),
    (_TORCH, f"a PyTorch file: {_IMPORT}"),
    (_KERAS, f"a Keras (HDF5) file: {_IMPORT}"),
)


def confusion(start: bytes) -> str | None:
    """What a file is that begins with `start`, and the way on, if it is one that people often give."""
    return next((text for pattern, text in _CONFUSIONS if re.match(pattern, start, re.DOTALL)), None)


def is_keras(start: bytes) -> bool:
    """Whether a file that begins with `start` is HDF5, or the archive that Keras 3 puts around it."""
    return re.match(_KERAS, start, re.DOTALL) is not None


def first_bytes(path: Path) -> bytes:
    """The first `START_BYTES` of a file; raises ResgridError where there is none that can be read."""
    if path.is_symlink() and not path.exists():
        raise ResgridError(f"{path}: a link that leads nowhere (to {path.readlink()}).")
    if not path.is_file():  # a pipe would never end
        raise ResgridError(f"{path}: {'this is a folder' if path.is_dir() else 'there is no such file'}.")
    try:
        with path.open("rb") as file:
            return file.read(START_BYTES)
    except OSError as error:
        raise project.unreadable(path, error, "") from None


def unreadable(path: Path, wanted: str, error: BaseException | str, way_on: str) -> ResgridError:
    """The error of a reader of `wanted`: what it was given instead, or its library's words and a way on."""
    known = confusion(first_bytes(path)) if path.is_file() else None
    why = f": it is {known}." if known and not known.startswith(wanted) else f" ({reason(error)}). {way_on}"
    return ResgridError(f"{path}: cannot be read as {wanted}{why}")


def reason(error: BaseException | str) -> str:
    """The first line of an exception's text, or its type's name."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
