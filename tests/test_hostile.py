"""What comes from outside, broken at random: it is refused by name or read rightly, and never does harm.

Each kind is tried in a process of its own, whose end, time and memory are looked at.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import random
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_archives import BATCH, FILES, write_tar, write_zip
from test_convert import _keras_file, _random_model

from resgrid import checkpoint
from resgrid.checkpoint import Checkpoint
from resgrid.convert import import_weights
from resgrid.data.archives import files
from resgrid.data.cifar import load_pickle
from resgrid.data.sources import ImageFolder
from resgrid.errors import ResgridError
from resgrid.models import build_model
from resgrid.weights import WeightsInfo, load_weights, save_weights

ROOT = Path(__file__).parents[1]
MAX_SECONDS = 5.0  # for one input, on a busy machine
MAX_BYTES = 600_000_000  # more memory than before, for all inputs of a kind
SHARE = {"keras": 0.5, "torch": 0.5, "weights": 0.7}  # of the inputs that the quicker kinds get


# --- a good file of each kind, and its reader --------------------------------------------------------


def _read_archive(path: Path) -> None:
    dict(files(path, lambda name: -1))


def _good_image(path: Path, form: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, form)


def _read_image(path: Path) -> None:
    root = path.parent / "folder"
    for split in ("train", "test"):
        for class_name in ("a", "b"):
            (root / split / class_name).mkdir(parents=True, exist_ok=True)
            (root / split / class_name / "1.png").write_bytes(path.read_bytes())
    images = ImageFolder(root, "stretch").load("train").images
    assert images.shape == (2, 32, 32, 3)


def _import(path: Path) -> None:
    import_weights(path, "resnet20", path.parent / "out.safetensors")


def _good_weights(path: Path) -> None:
    info = WeightsInfo(architecture="resnet20", class_names=("a", "b"), mean=(0.5,) * 3, std=(0.2,) * 3)
    save_weights(path, build_model("resnet20", 2), info)


def _good_checkpoint(path: Path) -> None:
    tensors = {"model.weight": torch.arange(300.0), "generator.batches": torch.get_rng_state()}
    epochs = [{"epoch": 1, "step": 3, "train_loss": 2.25}]
    path.write_bytes(
        b"".join(
            checkpoint.encode(
                Checkpoint({"cell": "sha256:0"}, 1_764_374_400_123_456, 2, epochs, None, tensors)
            )
        )
    )


def _read_checkpoint(path: Path) -> None:
    """As it is; and as if whoever broke it had put its checksum right."""
    try:
        checkpoint.read(path)
    except ResgridError:
        _, _, content = path.read_bytes().partition(b"\n")
        path.write_bytes(f"{checkpoint.MAGIC} {hashlib.sha256(content).hexdigest()}\n".encode() + content)
        checkpoint.read(path)


KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "tar": (lambda path: write_tar(path, FILES, "w:"), _read_archive),
    "tar.gz": (lambda path: write_tar(path, FILES, "w:gz"), _read_archive),
    "zip": (lambda path: write_zip(path, FILES), _read_archive),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps(BATCH, protocol=2)),
        lambda path: load_pickle(path.read_bytes(), str(path)),
    ),
    "png": (lambda path: _good_image(path, "PNG"), _read_image),
    "jpeg": (lambda path: _good_image(path, "JPEG"), _read_image),
    "keras": (lambda path: _keras_file(path, _random_model("resnet20")), _import),
    "torch": (lambda path: torch.save(build_model("resnet20", 10).state_dict(), path), _import),
    "weights": (_good_weights, load_weights),
    "checkpoint": (_good_checkpoint, _read_checkpoint),
}


def mutate(good: bytes, draw: random.Random) -> bytes:
    """One to four changes, half of them in the first 4 kB, where formats say what follows."""
    content = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        end = min(len(content), 4096) if draw.random() < 0.5 else len(content)
        at = draw.randrange(max(1, end))
        length = draw.choice([1, 1, 2, 4, 8, 64, 512])
        match draw.randrange(7):
            case 0:
                content[at : at + 1] = bytes([(content[at] if content else 0) ^ (1 << draw.randrange(8))])
            case 1:
                content[at : at + length] = draw.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * length
            case 2:
                content[at : at + length] = draw.randbytes(length)
            case 3:
                content[at:at] = draw.randbytes(length)
            case 4:
                del content[at : at + length]
            case 5:
                content[at:at] = content[draw.randrange(max(1, end)) :][:length]
            case 6:
                del content[max(1, at) :]
    return bytes(content)


def _try_all(kind: str, folder: Path, seed: int, count: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    make, read = KINDS[kind]
    make(folder / "good")
    good = (folder / "good").read_bytes()
    read(folder / "good")
    draw = random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, faults, slowest = 0, [], 0.0
    for number in range(count):
        path = folder / f"{number}.{kind}"
        path.write_bytes(mutate(good, draw))
        began = time.process_time()
        try:
            read(path)
        except ResgridError as error:
            refused += 1
            if folder.name not in str(error):
                faults.append(f"{number}: {error}")
        except BaseException:
            faults.append(f"{number}: {traceback.format_exc()}")
        slowest = max(slowest, time.process_time() - began)
        path.unlink()
    unit = 1 if sys.platform == "darwin" else 1024
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    answer.send((refused, faults, slowest, taken))


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", "resgrid.tracking", __name__])
    return context


@pytest.mark.parametrize("count", [130, pytest.param(1300, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_input_is_refused_or_read(
    kind: str, count: int, tmp_path: Path, processes: ForkServerContext
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    count = round(count * SHARE.get(kind, 1.0))
    mine, theirs = processes.Pipe()
    process = processes.Process(target=_try_all, args=(kind, tmp_path, seed, count, theirs))
    process.start()
    theirs.close()
    try:
        refused, faults, slowest, taken = mine.recv()
    except EOFError:
        process.join()
        pytest.fail(f"seed {seed}: the process ended with {process.exitcode}")
    process.join()
    assert faults == [], f"seed {seed}"
    assert refused > count / 10  # the inputs are broken indeed
    assert slowest < MAX_SECONDS
    assert taken < MAX_BYTES
    assert not {path.name for path in tmp_path.iterdir()} - {"good", "folder", "out.safetensors"}
    assert {path.name for path in tmp_path.parent.iterdir() if path.name.startswith("out")} == set()


# --- no pickle is ever unpickled ---------------------------------------------------------------------

UNSAFE = re.compile(
    r"\b(pickle|dill|cloudpickle|joblib|marshal|shelve)\.\w*([Ll]oad|Unpickler|open)|from (pickle|marshal) import|"
    r"read_pickle|allow_pickle|torch\.load\b(?!\(.*weights_only=True\))|jit\.load|PackageImporter|"
    r"(pyfunc|pytorch)\.load_model|yaml\.(unsafe|full)_load|(?<![.\w])(eval|exec)\("
)


def test_no_general_unpickling_stands_anywhere_in_the_source() -> None:
    files = [
        path for folder in ("src", "tasks", "flows", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 40
    lines = [line.strip() for path in files for line in path.read_text().splitlines() if UNSAFE.search(line)]
    assert lines == []
    assert not UNSAFE.search("torch.load(path, weights_only=True); np.load(path); re.compile('eval')")
    for line in ("pickle.load(file)", "from pickle import loads", "np.load(p, allow_pickle=True)"):
        assert UNSAFE.search(line)
