"""Downloads against a real HTTP server on loopback that breaks off, crawls, lies and refuses."""

from __future__ import annotations

import hashlib
import http.server
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from test_preprocess import images

from resgrid import config
from resgrid.data.fetch import download, fetch
from resgrid.errors import ResgridError

CONTENT = random.Random(0).randbytes(1_000_000)
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Host(http.server.ThreadingHTTPServer):
    """Serves CONTENT; the tests set how well."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.breaks: list[int] = []  # an entry a request: bytes sent before the connection is cut
        self.crawls = False
        self.type = "application/gzip"
        self.asked: list[tuple[str, str | None]] = []  # path and Range of each request

    def url(self, path: str = "archive.tar.gz") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Host

    def do_GET(self) -> None:
        host, wanted = self.server, self.headers["Range"]
        host.asked.append((self.path, wanted))
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and host.ranges else 0
        if start >= len(host.content):
            self.send_error(416)
            return
        body = host.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(host.content) - 1}/{len(host.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", host.type)
        self.end_headers()
        if host.breaks:
            body = body[: host.breaks.pop(0)]
        try:
            for at in range(0, len(body), 10_000):
                if host.crawls or self.path.startswith("/crawl"):
                    time.sleep(0.1)
                self.wfile.write(body[at : at + 10_000])
        except (BrokenPipeError, ConnectionResetError):  # the client went to another host
            pass

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("RESGRID_ARCHIVE", raising=False)
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def part_of(folder: Path, checksum: str = MD5) -> Path:
    return folder / f"{checksum.partition(':')[2][:16]}.part"


def quiet(done: int, total: int | None) -> None:
    pass


# --- going on ---------------------------------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on_where_it_was(host, tmp_path):
    host.breaks = [400_000, 300_000]
    seen = []
    path = fetch([host.url()], tmp_path, MD5, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in host.asked] == [None, "bytes=400000-", "bytes=700000-"]
    assert seen[-1] == (1_000_000, 1_000_000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_server_without_ranges_starts_again_and_no_byte_that_came_is_lost_meanwhile(host, tmp_path):
    host.ranges = False
    host.breaks = [600_000, 200_000]
    with pytest.raises(ResgridError, match="broke off at 200,000"):
        fetch([host.url()], tmp_path, MD5, quiet)
    assert part_of(tmp_path).stat().st_size == 600_000
    assert fetch([host.url()], tmp_path, MD5, quiet).read_bytes() == CONTENT


def test_another_mirror_goes_on_with_what_the_first_one_sent(host, tmp_path):
    host.breaks = [500_000, 0]
    path = fetch([host.url("first"), host.url("second")], tmp_path, MD5, quiet)
    assert path.read_bytes() == CONTENT
    assert host.asked == [("/first", None), ("/first", "bytes=500000-"), ("/second", "bytes=500000-")]


def test_control_c_keeps_what_came(host, tmp_path):
    def press(done: int, total: int | None) -> None:
        if done >= 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch([host.url()], tmp_path, MD5, press)
    kept = part_of(tmp_path).stat().st_size
    assert kept >= 300_000
    assert part_of(tmp_path).read_bytes() == CONTENT[:kept]
    assert fetch([host.url()], tmp_path, MD5, quiet).read_bytes() == CONTENT
    assert host.asked[-1] == ("/archive.tar.gz", f"bytes={kept}-")


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (CONTENT, ["bytes=1000000-"]),
        (b"x" * 100_000, ["bytes=100000-", None]),
    ],  # the first is answered with 416
)
def test_a_part_that_is_there_is_used_if_it_is_right_and_fetched_again_if_not(content, asked, host, tmp_path):
    part_of(tmp_path).write_bytes(content)
    assert fetch([host.url()], tmp_path, MD5, quiet).read_bytes() == CONTENT
    assert [each for _, each in host.asked] == asked


def test_a_slow_host_gives_way_to_the_next(host, tmp_path):
    """100 kB/s at /crawl: below the 300 kB/s that a host must reach while there is another."""
    path = fetch([host.url("crawl"), host.url("quick")], tmp_path, MD5, quiet, patience_seconds=0.5)
    assert path.read_bytes() == CONTENT
    (_, (second, resumed)) = host.asked
    assert second == "/quick"
    assert 0 < int(resumed.removeprefix("bytes=").removesuffix("-")) < 200_000


def test_a_slow_host_is_used_after_all_if_there_is_no_other(host, tmp_path):
    host.content = CONTENT[:150_000]
    checksum = "sha256:" + hashlib.sha256(host.content).hexdigest()
    urls = [host.url("crawl"), host.url("absent")]
    assert fetch(urls, tmp_path, checksum, quiet, patience_seconds=0.5).read_bytes() == host.content
    assert [path for path, _ in host.asked] == ["/crawl", "/absent", "/crawl"]


# --- what cannot be used ----------------------------------------------------------------------------


def test_a_wrong_checksum_removes_what_came_and_says_so(host, tmp_path):
    host.content = CONTENT[::-1]
    other = hashlib.md5(host.content).hexdigest()
    with pytest.raises(ResgridError, match=f"the checksum md5:{other}, not {MD5}; it was removed"):
        fetch([host.url()], tmp_path, MD5, quiet)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_one_error_lists_every_url_with_its_reason(host, tmp_path):
    closed = "http://127.0.0.1:1/archive.tar.gz"
    with pytest.raises(ResgridError) as caught:
        fetch([closed, host.url("absent/a"), "http://nowhere.invalid/a"], tmp_path, MD5, quiet)
    message = str(caught.value)
    assert re.search(rf"{closed}: .*refused", message)
    assert f"{host.url('absent/a')}: HTTP Error 404: Not Found" in message
    assert re.search(r"http://nowhere.invalid/a: .+", message)
    assert "RESGRID_ARCHIVE=" in message


def test_a_host_that_does_not_answer_is_given_up(host, tmp_path):
    host.crawls = True  # the first bytes come after 0.1 s
    with pytest.raises(ResgridError, match="timed out"):
        fetch([host.url()], tmp_path, MD5, quiet, timeout_seconds=0.03)


def test_an_error_page_in_place_of_the_archive_is_not_fetched(host, tmp_path):
    part_of(tmp_path).write_bytes(CONTENT[:10])
    host.ranges, host.type = False, "text/html; charset=utf-8"
    with pytest.raises(ResgridError, match="a web page in place of the file"):
        fetch([host.url()], tmp_path, MD5, quiet)
    assert part_of(tmp_path).read_bytes() == CONTENT[:10]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the stage --------------------------------------------------------------------------------------


def archive(location: str | Path, content: bytes = CONTENT) -> config.Archive:
    checksum = "sha256:" + hashlib.sha256(content).hexdigest()
    return config.Archive(source="archive", location=str(location), checksum=checksum)


def test_the_stage_fetches_a_url_and_leaves_the_folder_as_it_was_if_another_fails(host, tmp_path):
    out = tmp_path / "data/raw"
    download(archive(host.url("some/tiny.tar.gz?key=1")), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"tiny.tar.gz": CONTENT}
    assert [path.name for path in out.parent.iterdir()] == ["raw"]
    with pytest.raises(ResgridError, match="404"):
        download(archive(host.url("absent"), b"something else"), out)
    assert (out / "tiny.tar.gz").read_bytes() == CONTENT


def test_the_stage_goes_on_although_dvc_has_emptied_its_folder(host, tmp_path):
    out, data = tmp_path / "data/raw", archive(host.url())
    host.breaks = [250_000, 0]
    with pytest.raises(ResgridError, match=r"broke off at 250,000 of 1,000,000(.|\n)*from the 250,000 bytes"):
        download(data, out)
    shutil.rmtree(out, ignore_errors=True)
    download(data, out)
    assert (out / "archive.tar.gz").read_bytes() == CONTENT
    assert host.asked[-1] == ("/archive.tar.gz", "bytes=250000-")


@pytest.mark.parametrize("form", ["relative", "absolute", "file URL"])
def test_a_location_may_be_a_path_or_a_file_url(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my archive.tar.gz"
    path.write_bytes(CONTENT)
    location = {"relative": path.name, "absolute": str(path), "file URL": path.as_uri()}[form]
    download(archive(location), Path("data/raw"))
    assert Path("data/raw/my archive.tar.gz").read_bytes() == CONTENT
    assert Path("data/raw/my archive.tar.gz").stat().st_nlink == 1


def test_an_own_archive_stands_in_for_the_download_if_its_checksum_is_right(host, tmp_path, monkeypatch):
    own = tmp_path / "mine.tgz"
    own.write_bytes(CONTENT)
    monkeypatch.setenv("RESGRID_ARCHIVE", str(own))
    download(archive(host.url("absent")), tmp_path / "raw")
    assert (tmp_path / "raw/mine.tgz").read_bytes() == CONTENT
    assert host.asked == []
    wrong = r"mine\.tgz: its checksum is md5:.*, not md5:c58f3.*RESGRID_ARCHIVE"
    with pytest.raises(ResgridError, match=wrong):
        download(config.Cifar10(source="cifar10"), tmp_path / "raw")
    own.unlink()
    with pytest.raises(ResgridError, match=r"RESGRID_ARCHIVE: .*mine\.tgz: no such file"):
        download(config.Cifar10(source="cifar10"), tmp_path / "raw")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"location": "absent.tar.gz"}, r"data\.location: absent\.tar\.gz: no such file"),
        ({"location": "s3://bucket/a.tar.gz"}, r"data\.location: s3:/bucket/a\.tar\.gz: no such file"),
        ({"location": "."}, "is a folder, which has none"),
        ({"source": "image-folder", "location": "."}, "is a folder, which has none"),
        ({"source": "image-folder", "location": "http://a.invalid/b", "checksum": None}, "must have one"),
    ],
)
def test_a_location_that_cannot_be_used_is_named(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"source": "archive", "checksum": MD5} | data
    kind = config.Archive
    if given["source"] != "archive":
        kind, given = config.ImageFolder, given | {"test_fraction": 0.0, "on_broken": "refuse"}
    with pytest.raises(ResgridError, match=message):
        download(kind(**given), Path("raw"))
    assert not Path("raw").exists()


def test_the_images_of_a_folder_are_copied_and_nothing_else(image_folder, tmp_path):
    originals = contents(image_folder)
    assert len(originals) == 18
    for name in ("train/one/Thumbs.db", "train/one/.hidden.png", "notes.txt"):
        (image_folder / name).write_bytes(b"x")
    seen = []
    download(images(image_folder), tmp_path / "raw", lambda done, total: seen.append(done))
    assert contents(tmp_path / "raw") == originals
    assert (len(seen), seen[-1]) == (18, sum(map(len, originals.values())))


def test_digits_are_stored_as_scikit_learn_has_them_in_the_same_bytes_each_time(tmp_path):
    data = config.Digits(source="digits", test_fraction=0.2, split_seed=0)
    download(data, tmp_path / "a")
    download(data, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    arrays = load_file(tmp_path / "a/digits.safetensors")
    assert arrays["images"].shape == (1797, 8, 8)
    assert arrays["images"].max() == 16
    assert arrays["labels"][:10].tolist() == list(range(10))
