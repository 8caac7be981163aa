"""docs/extending.md, followed word by word: a network of a person's own, of a package, and toys in ResGrid."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from small import ROOT, Project

import resgrid
from resgrid.config import load_params, parse_params
from resgrid.errors import ResgridError
from resgrid.grid import expand
from resgrid.run_status import find_runs
from resgrid.summary import summarize

PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = [
    textwrap.dedent(f"{indent}{text}")
    for indent, text in re.findall(r"```\w+\n( *)(.*?)```", PAGE, re.DOTALL)
]


def block(start: str) -> str:
    """The example on the page that begins so."""
    [found] = [text for text in BLOCKS if text.startswith(start)]
    return found


def with_network(project: Project, name: str, grid: dict[str, Any]) -> None:
    """`name` in params.yaml, with the recipe and the rates of resnet20, as the page says."""
    file = project.root / "params.yaml"
    params = YAML(typ="safe").load(file)
    for section in ("recipes", "tuning"):
        params[section][name] = params[section]["resnet20"]
    params["grid"] |= grid
    file.write_text(json.dumps(params))  # which is YAML as well


@pytest.fixture(scope="module")
def project(small: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small pipeline, in which a cell of the page's own network has been trained and compared."""
    project = small.copy(tmp_path_factory.mktemp("extending") / "a project", mirrored=True)
    (project.root / "architectures").mkdir(exist_ok=True)
    (project.root / "architectures/tiny.py").write_text(block("from torch import nn"))
    with_network(project, "tiny", YAML(typ="safe").load(block("grid:"))["grid"])
    for stage in ("train-own@tiny-sgd-0", "evaluate"):
        done = project.run("dvc", "repro", "--single-item", stage)
        assert done.returncode == 0, done.stdout + done.stderr
    return project


def test_a_network_of_ones_own_is_trained_compared_and_loaded_from_anywhere(project: Project) -> None:
    pipeline = resgrid.load(project.root)
    row = pipeline.results.set_index("cell").loc["tiny-sgd-0"]
    assert (row["status"], row["num_parameters"]) == ("completed", 3 * 8 * 9 + 4 * 8 + 8 * 10 + 10)
    record = json.loads((project.root / "runs/tiny-sgd-0/run.json").read_text())
    assert (record["architecture_origin"], record["depth"], record["family"]) == (
        "architectures/tiny.py",
        None,
        "tiny",
    )
    assert pipeline.model("tiny-sgd-0")(torch.rand(3, 3, 32, 32)).sum(1) == pytest.approx(torch.ones(3))
    assert "tiny-sgd-0" in (project.root / "reports/report.md").read_text()
    assert summarize("tiny", pipeline=project.root).total == 338
    synced = project.run("resgrid", "sync")
    assert synced.returncode == 0, synced.stderr
    current = project.runs().query("`tags.grid` == 'current'").set_index("tags.cell")
    assert current.loc["tiny-sgd-0", "params.architecture"] == "tiny"


def test_an_edit_of_the_file_makes_its_cells_stale_and_no_others(project: Project) -> None:
    def status() -> dict[str, tuple[str, str | None]]:
        cells = expand(load_params(project.root / "params.yaml"))
        return {run.cell.id: (run.status, run.reason) for run in find_runs(cells, project.root)}

    before, dvc = status(), project.stale()
    project.edit("architectures/tiny.py", "from torch", "# edited\nfrom torch")
    try:
        assert project.stale() - dvc == {"train-own@tiny-sgd-0"}
        after = status()
        changed = {cell for cell in after if after[cell] != before[cell]}
        assert changed == {"tiny-sgd-0"}
        assert after["tiny-sgd-0"][0] == "stale"
        assert "trained by other code in architectures/tiny.py" in str(after["tiny-sgd-0"][1])
    finally:
        project.edit("architectures/tiny.py", "# edited\n", "")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1", "AttributeError: module 'architectures.tiny' has no attribute 'build'"),
        ("build = 1 +", "SyntaxError"),
        ("from torch import nn\nbuild = lambda n, d: (nn.Flatten(), nn.Linear(3072, 7))", r"gives \(2, 7\), where logits have \(2, 10\)"),
        ("from torch import nn\nbuild = lambda n, d: nn.Flatten()", "TypeError: it returns one Flatten, where base and head are expected"),
        (None, "there is no architectures/tiny.py. Known are resnet20, "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_file_is_said_with_its_name(
    code: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resgrid.models import build_model

    monkeypatch.chdir(tmp_path)
    if code is not None:
        (tmp_path / "architectures").mkdir()
        (tmp_path / "architectures/tiny.py").write_text(code)
    with pytest.raises(ResgridError, match=rf"architectures/tiny\.py.*{said}|{said}"):
        build_model("tiny", 10)


def test_names_that_would_be_ambiguous_are_refused() -> None:
    raw = YAML(typ="safe").load(ROOT / "params.yaml")
    for own, said in (
        (["resnet20"], r"grid\.own_architectures: resnet20 is the name of a package's network"),
        (["not-one-word"], r"grid\.own_architectures\.0: String should match pattern"),
        (["tiny"], r"recipes\.tiny: is missing, but the grid has tiny"),
    ):
        with pytest.raises(ResgridError, match=said):
            parse_params(raw | {"grid": raw["grid"] | {"own_architectures": own}})
    study = {"architecture": "tiny", "optimizer": "sgd", "seed": 0}
    own = {key: raw[key] | {"tiny": raw[key]["resnet20"]} for key in ("recipes", "tuning")}
    with pytest.raises(ResgridError, match=r"studies\.x\.architecture: tiny is an architecture of your own"):
        parse_params(
            raw | own | {"grid": raw["grid"] | {"own_architectures": ["tiny"]}, "studies": {"x": study}}
        )


def test_an_installed_package_offers_a_network_and_its_version_is_recorded(
    project: Project, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    (site / "my_package-1.2.dist-info").mkdir(parents=True)
    (site / "my_package-1.2.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-package\nVersion: 1.2\n"
    )
    declared = (
        block("[project.entry-points").replace("project.entry-points.", "").replace('"resgrid', "resgrid")
    )
    (site / "my_package-1.2.dist-info/entry_points.txt").write_text(
        declared.replace('architectures"]', "architectures]").replace('"', "")
    )
    (site / "my_package").mkdir()
    (site / "my_package/nets.py").write_text(block("from torch import nn"))
    copy = project.copy(tmp_path / "project")
    with_network(copy, "offered", {"architectures": ["offered"]})
    done = copy.run("resgrid", "train", "offered-sgd-0", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    record = json.loads((copy.root / "runs/offered-sgd-0/run.json").read_text())
    assert record["architecture_origin"] == "my-package 1.2"
    refused = copy.run("resgrid", "cells")
    assert "grid.architectures.0: must be 'resnet20'" in refused.stderr


def test_a_toy_network_and_a_toy_optimizer_by_the_page_alone(small: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    for name in ("src", "data"):
        shutil.copytree(small.root / name, project.root / name, symlinks=True)
    shutil.copy(small.root / "params.yaml", project.root)
    package = project.root / "src/resgrid"
    (package / "models/toy.py").write_text(block('"""A toy'))
    for file, marker, added in (
        ("models/__init__.py", "    )\n}\n\n\n@cache", f"        {block('Architecture(')}"),
        ("optimizers.py", "\n\n@dataclass", f"\n\n{block('class NAdam')}"),
        ("optimizers.py", "}\n", f"    {block(chr(34) + 'nadam')}"),
    ):
        head, found, tail = (package / file).read_text().rpartition(marker)
        assert found
        (package / file).write_text(head + added + found + tail)
    params = YAML(typ="safe").load(project.root / "params.yaml")
    params["optimizers"] |= YAML(typ="safe").load(block("optimizers:"))["optimizers"]
    for name in ("recipes", "tuning"):
        params[name]["toy2"] = params[name]["resnet20"]
    params["tuning"] = {name: rates | {"nadam": {"lr": 0.001}} for name, rates in params["tuning"].items()}
    params["grid"] |= {"architectures": ["toy2"], "optimizers": ["nadam"], "seeds": [0]}
    (project.root / "params.yaml").write_text(json.dumps(params | {"studies": {}}))
    command = (sys.executable, "-m", "resgrid", "train", "toy2-nadam-0")
    done = project.run(*command, PYTHONPATH=str(project.root / "src"))
    assert done.returncode == 0, done.stderr
    assert "Total parameters: 898" in (project.root / "runs/toy2-nadam-0/summary.txt").read_text()
