"""What a reorganisation must not move: each cell's numbers, and the bytes of the weights that they give.

`data/before.json` was made by `python tests/test_before.py` before the code was reorganised, and is made anew
only by a change that is meant to change results.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from test_run import CPU, PLAIN, folder, train  # noqa: F401  # `folder` is a fixture

from resgrid.config import Engine, Recipe, load_params
from resgrid.grid import Cell, expand
from resgrid.provenance import code_digest
from resgrid.training.device import device_name

ROOT = Path(__file__).parents[1]
BEFORE = Path(__file__).parent / "data/before.json"
PIPELINES = (".", "examples/depth", "examples/digits", "examples/optimizers")
CODE_DIGEST = "sha256:a6bf0722e227ac3f4ae88fcce7887cfd1775364e6cc5e68a32518e0a40174caf"
TRAINED = {  # one a family, and one an optimizer
    "resnet20": "resnet20-sgd-0",
    "resnet10": "resnet10-adam-0",
    "vgg16": "vgg16-rmsprop-0",
    "resnet20v1": "resnet20v1-adagrad-0",
}


def numbers(pipeline: str) -> dict[str, Any]:
    return {each.id: each.numbers for each in expand(load_params(ROOT / pipeline / "params.yaml"))}


def machine() -> list[str]:
    """Sums round differently with another CPU, or another torch."""
    return [device_name(CPU), torch.backends.cpu.get_cpu_capability(), torch.__version__]


def small(architecture: str, folder: Path) -> Cell:  # noqa: F811
    """A cell of the root's params, with few epochs and all that draws random numbers."""
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    optimizer = TRAINED[architecture].split("-")[1]
    params["grid"] |= {"architectures": [architecture], "optimizers": [optimizer], "seeds": [0]}
    params["studies"] = {}
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)
    [found] = expand(load_params(folder / "params.yaml"))
    lively = {"flip": True, "crop_padding": 2, "rotation_degrees": 5.0, "shift_fraction": 0.1}
    recipe = Recipe.model_validate(found.recipe.model_dump() | PLAIN | {"augmentation": lively})
    engine = Engine(precision="fp32", compile="never", scored_epochs="all")
    return found.model_copy(update={"recipe": recipe, "engine": engine})


def weights_digest(architecture: str, data: Path, out: Path) -> str:
    out.mkdir(exist_ok=True)
    train(small(architecture, out), data, out / "run")
    return hashlib.sha256((out / "run/weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    return json.loads(BEFORE.read_text())


@pytest.fixture
def one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_each_cell_has_the_numbers_that_it_had(before: dict[str, Any], pipeline: str) -> None:
    assert numbers(pipeline) == before["numbers"][pipeline]


@pytest.mark.parametrize("architecture", TRAINED)
@pytest.mark.usefixtures("one_thread")
def test_a_cell_of_each_family_has_the_weights_that_it_had(
    before: dict[str, Any], architecture: str, folder: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    if machine() != before["machine"]:
        pytest.skip(f"the digests are of {', '.join(before['machine'])}; here it is {', '.join(machine())}")
    assert weights_digest(architecture, folder, tmp_path) == before["weights"][architecture]


def test_recorded_results_are_of_the_code_as_it_is() -> None:
    """Another digest makes every result stale, those in docs/results among them: change it only on purpose."""
    assert code_digest() == CODE_DIGEST


def test_make_it_anew(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    if not os.environ.get("RESGRID_TEST_WRITE_BEFORE"):
        pytest.skip("writes the table; only `python tests/test_before.py` asks for it")
    torch.set_num_threads(1)
    content = {
        "machine": machine(),
        "weights": {name: weights_digest(name, folder, tmp_path / name) for name in TRAINED},
        "numbers": {pipeline: numbers(pipeline) for pipeline in PIPELINES},
    }
    # A line a cell, so that a difference shows where it is.
    lines = [
        f'"machine": {json.dumps(content["machine"])}',
        f'"weights": {json.dumps(content["weights"], indent=1)}',
    ]
    tables = []
    for pipeline, cells in content["numbers"].items():
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in cells.items())
        tables.append(f"{json.dumps(pipeline)}: {{\n{rows}\n}}")
    lines.append('"numbers": {\n' + ",\n".join(tables) + "\n}")
    BEFORE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"{__file__}::test_make_it_anew",
    ]
    sys.exit(
        subprocess.run(command, env=os.environ | {"RESGRID_TEST_WRITE_BEFORE": "1"}, check=False).returncode
    )
