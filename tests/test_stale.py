"""Which cells an edit makes stale: every key of params.yaml, by the real `dvc status`, against the rules."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from sleeping import ROOT, Sleeping
from small import GRID, Project

from resgrid.config import load_params
from resgrid.edit import assign
from resgrid.grid import expand
from resgrid.provenance import CODE

NUM_SHORT = 3  # keys in the short form


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Sleeping:
    """The project's own params.yaml and dvc.yaml, every stage recorded, with commands that only make files.

    In the short form with a part of the grid, and all of its studies.
    """
    root = tmp_path_factory.mktemp("a repository")
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")
    for stage in (stages["stages"][name] for name in ("download", "preprocess", "train", "evaluate")):
        _make_only_files(stage)
    _make_only_files(stages["stages"]["train-study"]["do"])
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "params.yaml").read_text()
    if in_short_form(request):
        text = assign(text, ["grid.architectures=[resnet20, resnet10, vgg16]", "grid.optimizers=[sgd, adam]"])
    (root / "params.yaml").write_text(text)
    with (root / "dvc.yaml").open("w") as file:
        YAML().dump(stages, file)
    repository = Sleeping(root)
    repository.initialize()
    done = repository.run("dvc", "repro")
    assert done.returncode == 0, done.stderr
    return repository


def in_short_form(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("-m") == "not long"


def _make_only_files(stage: dict[str, Any]) -> None:
    outs = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
    paths = [next(iter(out)) if isinstance(out, dict) else out for out in outs]
    stage["cmd"] = [f"mkdir -p $(dirname {path}) && touch {path}" for path in paths]


def stale(repository: Sleeping) -> set[str]:
    done = repository.run("dvc", "status", "--json")
    assert done.returncode == 0, done.stderr
    return {name for name in json.loads(done.stdout) if name.startswith("train")}


def keys_of(node: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def edited(value: Any) -> Any:
    """Another value; DVC does not ask whether it is a valid one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}-other"
        case list():
            return value[:-1]


def test_every_key_makes_exactly_the_cells_stale_that_use_it(
    grid: Sleeping, request: pytest.FixtureRequest
) -> None:
    file = grid.root / "params.yaml"
    text = file.read_text()
    cells = expand(load_params(file))
    rules: dict[str, Callable[[list[str], Any], bool]] = {
        "recipes": lambda path, cell: cell.architecture == path[1],
        "tuning": lambda path, cell: (cell.architecture, cell.optimizer.name) == (path[1], path[2]),
        "optimizers": lambda path, cell: cell.optimizer.name == path[1],
        "studies": lambda path, cell: cell.study == path[1],
        "engine": lambda path, cell: True,
    }
    keys = [
        (key, edited(value))
        for key, value in keys_of(YAML(typ="safe").load(text))
        # These name stages and what they depend on; without one, another stage is made of the study or cell.
        if not key.startswith("grid.") and not key.endswith((".architecture", ".optimizer"))
    ]
    assert len(keys) > 200
    if in_short_form(request):
        keys = random.Random(0).sample(keys, NUM_SHORT)
    for key, new in keys:
        section, *_ = path = key.split(".")
        expected = {cell.stage for cell in cells if section in rules and rules[section](path, cell)}
        params = node = YAML(typ="safe").load(text)
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = new
        file.write_text(json.dumps(params))  # which is YAML as well
        assert stale(grid) == expected, key
    file.write_text(text)
    assert stale(grid) == set()


def test_no_source_file_outside_the_named_folders_makes_a_cell_stale(small: Project, tmp_path: Path) -> None:
    project = small.copy(tmp_path / "a project")
    package = project.root / "src/resgrid"
    named = [package / name for name in CODE]
    others = [path for path in package.rglob("*.py") if not any(path.is_relative_to(name) for name in named)]
    assert len(others) > 40
    for path in others:
        path.write_text(path.read_text() + "\n# edited\n")
    cells = {f"train@{cell}" for cell in GRID} | {"train-study@too-fast"}
    assert project.stale() & cells == set()
    (package / "models/vgg.py").write_text("# edited\n")
    assert project.stale() & cells == cells
