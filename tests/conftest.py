"""What several tests share: where the reference data lies, small real images, and small real disks."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from small import Project, trained

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Cores are divided, never shared: two processes with a thread for each core are slower than one.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))
    os.environ["OMP_WAIT_POLICY"] = "passive"  # where a test asks for more, its threads do not spin

# These begin first, so that no worker is left alone with minutes of work at the end. Those without the small
# trained pipeline come before those with it: while one worker makes it, the others need not wait for it.
LONGEST = (
    "train_all", "pool", "services", "checkpoint", "offline", "engine", "rates", "faults", "pages", "plan",
    "lockfile", "experiments", "extending", "init", "pipeline", "run_status", "tracking", "stage", "registry",
    "report", "predict", "export", "graph", "convert",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def reference_data():
    """The folder of published weights and real CIFAR-10 images that RESGRID_REFERENCE_DATA names."""
    folder = os.environ.get("RESGRID_REFERENCE_DATA")
    if not folder:
        pytest.skip("RESGRID_REFERENCE_DATA names no folder of reference data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"RESGRID_REFERENCE_DATA={folder} is no folder")
    return path


@pytest.fixture
def image_folder(tmp_path):
    """Handwritten digits as PNG and JPEG: train/ has 4 of each of "one", "three" and "two", test/ has 2."""
    digits = load_digits()
    for number, class_name in ((1, "one"), (2, "two"), (3, "three")):
        pixels = (digits.images[digits.target == number] * 15).astype("uint8")
        for i in range(6):
            folder = tmp_path / "images" / ("train" if i < 4 else "test") / class_name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def cifar_archive(tmp_path_factory):
    """Two batches and a test batch of 20 drawn images in 4 classes, pickled and packed as CIFAR-10 is."""
    path = tmp_path_factory.mktemp("cifar") / "tiny.tar.gz"
    values = np.random.default_rng(0)
    held: dict[str, Any] = {
        "batches.meta": {b"label_names": [b"ant", b"bee", b"cow", b"dog"], b"num_vis": 3072}
    }
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        rows = values.integers(0, 256, (20, 3072), dtype=np.uint8)
        held[name] = {b"batch_label": name.encode(), b"labels": [i % 4 for i in range(20)], b"data": rows}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in held.items():
            pickled = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small pipeline, trained and compared once: a test that changes anything works on a copy."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers: the first that needs it makes it
    with FileLock(base / "small.lock"):
        kept = base / "small.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(trained(base / "small" / "a project")))
        project: Project = pickle.loads(kept.read_bytes())
    return project


class SmallDisks:
    """Disks of a chosen size, as only root can mount them; the test is skipped for others."""

    def __init__(self) -> None:
        self.mounted: list[Path] = []

    def mount(self, place: Path, size: str) -> Path:
        """An empty disk at `place`; `size` as in 3m."""
        place.mkdir(exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
        self.mounted.append(place)
        return place

    def resize(self, place: Path, size: str) -> None:
        self._mount("-o", f"remount,size={size}", str(place))

    def protect(self, place: Path) -> None:
        """Let nobody write to what stands at `place`, root neither."""
        self._mount("--bind", str(place), str(place))
        self.mounted.append(place)
        self._mount("-o", "remount,ro,bind", str(place))

    def release(self, place: Path) -> None:
        self.mounted.remove(place)
        subprocess.run(["umount", str(place)], check=True)

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disks():
    made = SmallDisks()
    yield made
    for place in reversed(made.mounted):
        # Lazy: MLflow keeps the databases open that this process has looked into.
        subprocess.run(["umount", "--lazy", str(place)], check=True)
