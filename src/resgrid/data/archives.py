"""Archives read as a stream of names and contents.

Nothing is ever unpacked, so a name from an archive is text and never a path. A folder, a tar (gzip, xz, bzip2
or plain) and a zip look alike from here: `names` and `contents`.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn, cast

from resgrid.errors import ResgridError
from resgrid.filetype import first_bytes, unreadable

# A bomb is what inflates past these.
MAX_MEMBER_BYTES = 256 * 2**20  # CIFAR-100's training batch has 155 MB, a photograph 5 to 30
MAX_RATIO = 250  # of all inflated bytes to the packed ones: 5 for JPEGs in a tar.xz, 1,000 for zeros …
FREE_BYTES = 256 * 2**20  # … and not looked at below this

_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open, b"": open}
# What tarfile, zipfile and the decompressors raise on an archive that is damaged, or that they do not read.
_ERRORS = (
    OSError, EOFError, ValueError, OverflowError, IndexError, RuntimeError, tarfile.TarError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip

log = logging.getLogger(__name__)


def names(path: Path) -> list[str]:
    """The files of an archive or a folder as `a/b/c`, in its own order. DVC and JSON refuse
    names that are no UTF-8: each of their other bytes becomes `%E9`.

    Raises ResgridError for an archive that cannot be read, is a bomb, or holds a name twice.
    """
    members = [name for name, _ in _members(path, wanted=())]
    if twice := [name for name, count in Counter(members).items() if count > 1]:
        raise ResgridError(f"{path}: holds {twice[0]!r} twice. Make the archive again.")
    return members


def contents(path: Path, wanted: Container[str], size: int = -1) -> Iterator[tuple[str, bytes]]:
    """Name and content, or its first `size` bytes, of the files in `wanted`, in the archive's order.

    A link in a folder that leads nowhere is left out; one in a tar is empty. Raises as `names` does.
    """
    for name, content in _members(path, wanted, size):
        if content is not None:
            yield name, content


def _members(path: Path, wanted: Container[str], size: int = -1) -> Iterator[tuple[str, bytes | None]]:
    if path.is_dir():
        yield from _folder_members(path, wanted, size)
        return
    read = _zip_members if first_bytes(path).startswith(b"PK") else _tar_members
    try:
        yield from read(path, wanted, size)
    except _ERRORS as error:
        raise unreadable(path, "a tar or a zip", error, "Fetch it again, or pack it anew.") from None


def _folder_members(path: Path, wanted: Container[str], size: int) -> Iterator[tuple[str, bytes | None]]:
    def refuse(error: OSError) -> NoReturn:
        raise ResgridError(f"{error.filename}: cannot be read ({error.strerror}).")

    for folder, subfolders, files in os.walk(path, onerror=refuse, followlinks=True):
        here = Path(folder).resolve()
        # a link to a folder that it lies in leads in a circle
        subfolders[:] = sorted(
            name for name in subfolders if not here.is_relative_to((here / name).resolve())
        )
        for file in sorted(files):
            whole = Path(folder, file)
            name = _utf8(whole.relative_to(path).as_posix())
            if name not in wanted or (whole.is_symlink() and not whole.exists()):
                yield name, None
                continue
            try:
                if not whole.is_file() or (size < 0 and whole.stat().st_size > MAX_MEMBER_BYTES):
                    raise ResgridError(f"{whole}: not a file of at most {MAX_MEMBER_BYTES / 2**20:.0f} MiB.")
                with whole.open("rb") as opened:
                    content = opened.read(size)
            except OSError as error:
                refuse(error)
            yield name, content


class _Inflated:
    """The inflated bytes of a tar, for tarfile: it reads forward only, so xz need never start again."""

    def __init__(self, path: Path) -> None:
        start = first_bytes(path)
        opener = next(opener for magic, opener in _OPENERS.items() if start.startswith(magic))
        self._file: BinaryIO = opener(path, "rb")
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


def _tar_members(path: Path, wanted: Container[str], size: int) -> Iterator[tuple[str, bytes | None]]:
    inflated = _Inflated(path)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, inflated), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all of them: 1 kB each
                name = _plain(member.name)
                if member.isdir():
                    continue
                content = b"" if name in wanted else None
                if not member.isreg():
                    _warn_once(f"{path}: its links are read as empty files. Pack the files themselves.")
                elif name in wanted:
                    if size < 0:
                        _limit_member(path, name, member.size)
                    stream = tar.extractfile(member)
                    assert stream is not None
                    content = stream.read(member.size if size < 0 else min(size, member.size))
                    if size < 0 and len(content) != member.size:
                        raise tarfile.ReadError(f"{name} ends early")
                yield name, content
        if inflated.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a bad header for the end
            raise tarfile.ReadError("a header is damaged, or the end is missing")
        while inflated.read(2**20):  # to the very end, where the decompressor compares its checksum
            pass
    finally:
        inflated.close()


def _zip_members(path: Path, wanted: Container[str], size: int) -> Iterator[tuple[str, bytes | None]]:
    """Names without the flag for UTF-8, as macOS writes them, are UTF-8 where all of them can be."""
    try:
        archive = zipfile.ZipFile(path, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        archive = zipfile.ZipFile(path)
        _warn_once(f"{path}: its names are no UTF-8, and are read as cp437. Check the names of the classes.")
    with archive:
        total = 0
        for member in archive.infolist():
            name = _plain(member.filename)
            total += member.file_size
            _limit_total(path, total)
            if not member.is_dir() and name in wanted:
                if size < 0:
                    _limit_member(path, name, member.file_size)
                # zipfile stops at the size that the directory claims, and compares the checksum there
                with archive.open(member) as stream:
                    yield name, stream.read(size)
            elif not member.is_dir():
                yield name, None


def _limit_member(path: Path, name: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise ResgridError(f"{path}: {name} of {size:,} bytes is refused; the limit is {MAX_MEMBER_BYTES:,}.")


def _limit_total(path: Path, total: int) -> None:
    """Refuse an archive that inflates to `total` bytes, those of members that are passed over included."""
    limit = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
    if total > limit:
        raise ResgridError(f"{path}: inflates to more than {limit:,} bytes, as no archive of images does.")


def _plain(name: str) -> str:
    """`name` with single forward slashes and no `./`; backslashes, from Windows, separate as well."""
    return _utf8(PurePosixPath(name.replace("\\", "/")).as_posix())


def _utf8(name: str) -> str:
    return re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", name)


@cache
def _warn_once(message: str) -> None:
    log.warning(message)
