"""What comes from outside, broken at random: it is refused by name or read rightly, and never does harm.

Each kind is tried in a process of its own, whose end, time and memory are looked at.
"""

from __future__ import annotations

import ast
import hashlib
import multiprocessing
import pickle
import random
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
from resgrid.data.archives import contents, names
from resgrid.data.cifar_pickle import load_pickle
from resgrid.data.sources import ImageFolder
from resgrid.errors import ResgridError
from resgrid.models import build_model
from resgrid.weights import WeightsInfo, load_weights, save_weights

ROOT = Path(__file__).parents[1]
MAX_SECONDS = 5.0  # for one input, on a busy machine
MAX_BYTES = 600_000_000  # more memory than before, for all inputs of a kind
SHARE = {"keras": 0.5, "torch": 0.5, "weights": 0.7}  # of the inputs that the quicker kinds get


# --- a good file of each kind, and its reader --------------------------------------------------------


def _good_tar(path: Path) -> None:
    write_tar(path, FILES, "w:")


def _good_tar_gz(path: Path) -> None:
    write_tar(path, FILES, "w:gz")


def _good_zip(path: Path) -> None:
    write_zip(path, FILES)


def _read_archive(path: Path) -> None:
    dict(contents(path, names(path)))


def _good_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(BATCH, protocol=2))


def _read_pickle(path: Path) -> None:
    load_pickle(path.read_bytes(), str(path))


def _good_png(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def _good_jpeg(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


def _read_image(path: Path) -> None:
    root = path.parent / "folder"
    for split in ("train", "test"):
        for class_name in ("a", "b"):
            (root / split / class_name).mkdir(parents=True, exist_ok=True)
            (root / split / class_name / "1.png").write_bytes(path.read_bytes())
    images = ImageFolder(root, "stretch").load("train").images
    assert images.shape == (2, 32, 32, 3)


def _good_keras(path: Path) -> None:
    _keras_file(path, "resnet20", _random_model("resnet20"))


def _read_keras(path: Path) -> None:
    import_weights(path, "resnet20", path.parent / "out.safetensors")


def _good_torch(path: Path) -> None:
    torch.save(build_model("resnet20", 10).state_dict(), path)


def _read_torch(path: Path) -> None:
    import_weights(path, "resnet20", path.parent / "out.safetensors")


def _good_weights(path: Path) -> None:
    info = WeightsInfo(architecture="resnet20", class_names=("a", "b"), mean=(0.5,) * 3, std=(0.2,) * 3)
    save_weights(path, build_model("resnet20", 2), info)


def _read_weights(path: Path) -> None:
    load_weights(path)


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


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "tar": (_good_tar, _read_archive),
    "tar.gz": (_good_tar_gz, _read_archive),
    "zip": (_good_zip, _read_archive),
    "pickle": (_good_pickle, _read_pickle),
    "png": (_good_png, _read_image),
    "jpeg": (_good_jpeg, _read_image),
    "keras": (_good_keras, _read_keras),
    "torch": (_good_torch, _read_torch),
    "weights": (_good_weights, _read_weights),
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

FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.loads", "cPickle.loads", "dill.load",
    "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads",
    "shelve.open", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load", "torch.package.PackageImporter",
    "mlflow.pyfunc.load_model", "mlflow.pytorch.load_model", "yaml.unsafe_load", "yaml.full_load", "eval", "exec",
}  # fmt: skip


def _calls(source: str) -> list[tuple[str, ast.Call | None]]:
    """Dotted names that are used in `source`, with the call where one is made."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found: list[tuple[str, ast.Call | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", None) for alias in node.names]
        elif isinstance(node, ast.Name | ast.Attribute):
            found.append((ast.unparse(node), called.get(id(node))))
    return found


def _unsafe(source: str) -> list[str]:
    unsafe = []
    for name, call in _calls(source):
        settings = {each.arg: ast.unparse(each.value) for each in call.keywords} if call else {}
        if (
            name in FORBIDDEN
            or (name == "torch.load" and settings.get("weights_only") != "True")
            or settings.get("allow_pickle", "False") != "False"
            or settings.get("weights_only", "True") != "True"
        ):
            unsafe.append(name)
    return unsafe


def test_no_general_unpickling_stands_anywhere_in_the_source() -> None:
    files = [
        path for folder in ("src", "tasks", "flows", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 40
    # whose find_class knows stand-ins alone
    allowed = {"cifar_pickle.py": ["pickle.Unpickler"]}
    assert {path.name: found for path in files if (found := _unsafe(path.read_text()))} == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load = torch.load",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert _unsafe(source)


def test_the_search_lets_the_safe_forms_pass() -> None:
    assert (
        _unsafe("torch.load(path, weights_only=True)\nnp.load(path)\njson.loads(text)\nre.compile('eval')")
        == []
    )
