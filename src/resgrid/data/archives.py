"""The files of a folder, a tar (gzip, xz, bzip2 or plain) or a zip as a stream of names and contents.

Nothing is ever unpacked, so a name from an archive is text and never a path.
"""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import closing
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from resgrid.errors import ResgridError
from resgrid.filetype import first_bytes, unreadable

# A bomb is what inflates past these.
MAX_MEMBER_BYTES = 256 * 2**20  # CIFAR-100's training batch has 155 MB, a photograph 5 to 30
MAX_RATIO = 250  # of all inflated bytes to the packed ones: 5 for JPEGs in a tar.xz, 1,000 for zeros …
FREE_BYTES = 256 * 2**20  # … and not looked at below this

_INFLATE: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open, b"": open}
# What tarfile, zipfile and the decompressors raise on an archive that is damaged, or that they do not read.
_ERRORS = (
    OSError, EOFError, ValueError, OverflowError, IndexError, RuntimeError, tarfile.TarError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip

_Open = Callable[[], IO[bytes]]  # it works until the next file is asked for

_warn_once = cache(logging.getLogger(__name__).warning)


def files(path: Path, num_bytes: Callable[[str], int] = lambda name: 0) -> Iterator[tuple[str, bytes | None]]:
    """Name, as `a/b/c`, and content of each file in a folder or an archive, in its own order.

    `num_bytes` says how much of a name's content is read: -1 for all of it. A link in a tar is empty; one
    in a folder that leads nowhere has None. DVC and JSON refuse names that are not UTF-8: each of their other
    bytes becomes `%E9`.

    Raises ResgridError for an archive that cannot be read, is a bomb, or holds a name twice.
    """
    kind = _folder if path.is_dir() else _zip if first_bytes(path).startswith(b"PK") else _tar
    names = set()
    try:
        for stored_name, size, opened in kind(path):
            name = PurePosixPath(stored_name.replace("\\", "/")).as_posix()  # backslashes: from Windows
            name = re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", name)
            if name in names:
                raise ResgridError(f"{path}: holds {name!r} twice. Make the archive again.")
            names.add(name)
            wanted = num_bytes(name)
            content: bytes | None = None if opened is None else b""
            if wanted and opened is not None:
                if wanted < 0:
                    _limit_member(path, name, size)
                with opened() as stream:
                    content = stream.read(size if wanted < 0 else min(wanted, size))
                if wanted < 0 and len(content) != size:
                    raise EOFError(f"{name} ends early")
            yield name, content
    except _ERRORS as error:
        wanted_kind = "a folder, a tar or a zip"
        raise unreadable(path, wanted_kind, error, "Fetch it again, or pack it anew.") from None


def contents(path: Path, names: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Those of `files` that are in `names`, whole."""
    for name, content in files(path, lambda name: -1 if name in names else 0):
        if content is not None and name in names:
            yield name, content


def _folder(path: Path) -> Iterator[tuple[str, int, _Open | None]]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, file_names in os.walk(path, onerror=refuse, followlinks=True):
        here = Path(folder).resolve()
        # a link to a folder that it lies in leads in a circle
        subfolders[:] = sorted(
            name for name in subfolders if not here.is_relative_to((here / name).resolve())
        )
        for file in (Path(folder, name) for name in sorted(file_names)):
            is_file = file.is_file()
            size = file.stat().st_size if is_file else 0
            yield file.relative_to(path).as_posix(), size, partial(io.FileIO, file) if is_file else None


class _Inflated:
    """The inflated bytes of a tar, for tarfile: it reads forward only, so xz need never start again."""

    def __init__(self, path: Path) -> None:
        start = first_bytes(path)
        inflate = next(opener for magic, opener in _INFLATE.items() if start.startswith(magic))
        self._file: BinaryIO = inflate(path, "rb")
        self._path = path
        self.last = b""  # what was read last
        self.tell, self.close = self._file.tell, self._file.close

    def read(self, size: int) -> bytes:
        _limit_member(self._path, "a header", size)  # tarfile reads those whole
        self.last = self._file.read(size)
        _limit_total(self._path, self.tell())
        return self.last

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise ValueError("a member starts before the archive")
        _limit_total(self._path, offset)
        return self._file.seek(offset)


def _tar(path: Path) -> Iterator[tuple[str, int, _Open]]:
    with closing(_Inflated(path)) as inflated:
        with tarfile.open(fileobj=cast(BinaryIO, inflated), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all of them: 1 kB each
                if member.isreg():
                    yield member.name, member.size, cast(_Open, partial(tar.extractfile, member))
                elif not member.isdir():
                    _warn_once(f"{path}: its links are read as empty files. Pack the files themselves.")
                    yield member.name, 0, io.BytesIO
        if inflated.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a bad header for the end
            raise tarfile.ReadError("a header is damaged, or the end is missing")
        while inflated.read(2**20):  # to the very end, where the decompressor compares its checksum
            pass


def _zip(path: Path) -> Iterator[tuple[str, int, _Open]]:
    """Names without the flag for UTF-8, as macOS writes them, are UTF-8 where all of them can be."""
    try:
        archive = zipfile.ZipFile(path, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        archive = zipfile.ZipFile(path)
        _warn_once(f"{path}: its names are no UTF-8, and are read as cp437. Check the names of the classes.")
    with archive:
        total = 0
        for member in archive.infolist():
            total += member.file_size
            _limit_total(path, total)
            if not member.is_dir():
                yield member.filename, member.file_size, partial(archive.open, member)


def _limit_member(path: Path, name: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise ResgridError(f"{path}: {name} of {size:,} bytes is refused; the limit is {MAX_MEMBER_BYTES:,}.")


def _limit_total(path: Path, total: int) -> None:
    """Refuse an archive that inflates to `total` bytes, those of members that are passed over included."""
    limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
    if total > limit:
        raise ResgridError(f"{path}: inflates to more than {limit:,} bytes, as no archive of images does.")
