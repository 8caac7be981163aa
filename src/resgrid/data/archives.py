"""Archives read member by member in memory.

Nothing is ever extracted, so nothing can leave a folder; a member that tries to is refused all the same,
for then the archive is not what it says. A folder, a tar (gzip, xz, bzip2 or plain) and a zip look alike from
here: `names` and `contents`.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn, cast

from resgrid.errors import ResgridError
from resgrid.filetype import BZIP2, GZIP, TAR, XZ, ZIP, FileType, begins_as, refuse

# A bomb is what inflates past these. A batch of the official archive has 31 MB, a photograph 5 to 30 MB.
MAX_MEMBERS = 2_000_000
MAX_MEMBER_BYTES = 128 * 2**20
MAX_TOTAL_BYTES = 256 * 2**30
MAX_RATIO = 250  # of inflated to packed bytes: 5 for JPEGs in a tar.xz, 1,000 and more for zeros …
FREE_BYTES = 256 * 2**20  # … and not looked at below this

# What a damaged archive or member raises, by way of tarfile, zipfile and the decompressors.
_DAMAGE = (
    OSError, EOFError, ValueError, OverflowError, NotImplementedError, tarfile.TarError, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip


class Escaped(str):
    """A name that is no UTF-8, which DVC and JSON refuse, with each of its other bytes as `%E9`."""


def names(path: Path) -> list[str]:
    """The files of an archive or a folder as `a/b/c`, in its own order, after a check of every member.

    A name that is no UTF-8 is `Escaped`, here and in `contents`. Raises ResgridError, naming archive and
    member, for whatever is damaged, unsafe or there twice.
    """
    found = [name for name, _ in _members(path, wanted=())]
    if len(set(found)) != len(found):
        seen: set[str] = set()
        twice = next(name for name in found if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ResgridError(f"{path}: holds {twice!r} twice. Make the archive again.")
    return found


def contents(path: Path, wanted: Container[str], size: int = -1) -> Iterator[tuple[str, bytes]]:
    """Name and content, or its first `size` bytes, of the files in `wanted`, in the archive's order.

    A link that leads nowhere is left out. Raises as `names` does.
    """
    for name, content in _members(path, wanted, size):
        if content is not None:
            yield name, content


def _members(path: Path, wanted: Container[str], size: int = -1) -> Iterator[tuple[str, bytes | None]]:
    if not path.exists():
        raise ResgridError(f"{path}: no such file or folder.")
    if path.is_dir():
        yield from _folder_members(path, wanted, size)
        return
    kind = begins_as(path)
    if kind is not ZIP and kind not in _OPENERS:
        raise refuse(path, kind, "a tar (gzip, xz, bzip2 or plain) or a zip")
    try:
        yield from (_zip_members if kind is ZIP else _tar_members)(path, wanted, size)
    except _DAMAGE as error:
        raise ResgridError(
            f"{path}: the archive is cut or damaged ({reason(error)}). Fetch or make it again."
        ) from None


def reason(error: BaseException) -> str:
    """The first line of an exception's text, or its type's name."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _folder_members(path: Path, wanted: Container[str], size: int) -> Iterator[tuple[str, bytes | None]]:
    def unreadable(error: OSError) -> NoReturn:
        raise ResgridError(f"{error.filename}: cannot be read ({error.strerror}).")

    for folder, subfolders, files in os.walk(path, onerror=unreadable, followlinks=True):
        within, here = Path(folder).relative_to(path), Path(folder).resolve()
        # a link to a folder that it lies in leads in a circle
        subfolders[:] = sorted(
            name for name in subfolders if not here.is_relative_to((here / name).resolve())
        )
        for file in sorted(files):
            name = _utf8((within / file).as_posix())
            whole = Path(folder, file)
            if name not in wanted or (whole.is_symlink() and not whole.exists()):
                yield name, None
                continue
            try:
                if not whole.is_file() or (size < 0 and whole.stat().st_size > MAX_MEMBER_BYTES):
                    raise ResgridError(f"{whole}: not a file of at most {MAX_MEMBER_BYTES / 2**20:.0f} MiB.")
                with whole.open("rb") as opened:
                    content = opened.read(size)
            except OSError as error:
                unreadable(error)
            yield name, content


# --- tar --------------------------------------------------------------------------------------------


_OPENERS: dict[FileType, Any] = {GZIP: gzip.open, XZ: lzma.open, BZIP2: bz2.open, TAR: open}


class _Inflated:
    """The inflated bytes of a tar, for tarfile: no header may ask for more than a member may have."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = _OPENERS[begins_as(path)](path, "rb")
        self._path = path
        self.last = b""  # what was read last

    def read(self, size: int) -> bytes:
        if size > MAX_MEMBER_BYTES:
            raise ResgridError(f"{self._path}: a header of {size:,} bytes is refused: no tar needs it.")
        self.last = self._file.read(size)
        return self.last

    def seek(self, offset: int) -> int:
        if offset < 0:
            raise ValueError("a member starts before the archive")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _tar_members(path: Path, wanted: Container[str], size: int) -> Iterator[tuple[str, bytes | None]]:
    inflated = _Inflated(path)
    budget = _Budget(path)
    try:
        # It reads forward only: no name is looked up, so xz need never start again.
        with tarfile.open(fileobj=cast(BinaryIO, inflated), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all of them: 1 kB each
                name = _safe_name(path, member.name)
                if member.islnk() or member.issym():
                    _refuse(path, name, f"a link to {member.linkname!r}; pack the file that it points to")
                if not member.isdir() and (not member.isreg() or member.issparse()):
                    _refuse(path, name, "neither a file nor a folder")
                budget.spend(name, member.size, member.offset_data + member.size)
                if member.isdir():
                    continue
                content = None
                if name in wanted:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    content = stream.read(member.size if size < 0 else min(size, member.size))
                    if size < 0 and len(content) != member.size:
                        raise tarfile.ReadError(f"{name} ends early")
                yield name, content
        if inflated.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes a bad header for the end
            raise tarfile.ReadError("a header is damaged, or the end is missing")
        while inflated.read(2**20):  # to the very end, where the decompressor compares its checksum
            budget.spend("the end", 0, inflated.tell())
    finally:
        inflated.close()


# --- zip --------------------------------------------------------------------------------------------


def _zip_members(path: Path, wanted: Container[str], size: int) -> Iterator[tuple[str, bytes | None]]:
    budget = _Budget(path)
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename:
                _refuse(path, "a member", "without a name; fetch the archive again")
            name = _safe_name(path, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where it was not packed on Unix
            if kind == stat.S_IFLNK:
                _refuse(path, name, "a link; pack the file that it points to")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                _refuse(path, name, "neither a file nor a folder")
            if member.flag_bits & 1:
                _refuse(path, name, "encrypted; pack it without a password")
            total += member.file_size
            budget.spend(name, member.file_size, total)
            if not member.is_dir():
                # zipfile stops at the size that the directory claims, and compares the checksum there
                if name not in wanted:
                    yield name, None
                    continue
                with archive.open(member) as stream:
                    yield name, stream.read(size)


# --- what no archive may do -------------------------------------------------------------------------


class _Budget:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._members = 0
        self._limit = min(MAX_TOTAL_BYTES, max(FREE_BYTES, MAX_RATIO * path.stat().st_size))

    def spend(self, name: str, size: int, total: int) -> None:
        """One more member of `size` bytes, which ends `total` inflated bytes after the archive's start."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise ResgridError(f"{self._path}: more than {MAX_MEMBERS:,} members. Take a smaller archive.")
        if size > MAX_MEMBER_BYTES:
            _refuse(self._path, name, f"{size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
        if total > self._limit:
            _refuse(self._path, name, f"at it the archive has inflated to more than {self._limit:,} bytes")


def _refuse(path: Path, name: str, why: str) -> NoReturn:
    raise ResgridError(f"{path}: member {name!r} is refused: {why}.")


def _safe_name(path: Path, name: str) -> str:
    """`name` with single forward slashes and no `./`; backslashes, from Windows, separate as well."""
    slashed = name.replace("\\", "/")
    if slashed.startswith("/") or re.match(r"[A-Za-z]:", slashed) or ".." in slashed.split("/"):
        _refuse(path, name, "its name points outside of the archive")
    return _utf8(PurePosixPath(slashed).as_posix())


def _utf8(name: str) -> str:
    escaped = re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match[0]) - 0xDC00:02X}", name)
    return name if escaped == name else Escaped(escaped)
