"""params.yaml is edited in place: by `resgrid set`, and by DVC's own writer, whose layout it has."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides  # what `dvc exp run -S` does to the file
from ruamel.yaml import YAML
from test_stale import keys_of

from resgrid.cli import main
from resgrid.edit import assign, changed_lines, rewritten

ROOT = Path(__file__).parents[1]
FILES = sorted([ROOT / "params.yaml", *ROOT.glob("examples/*/params.yaml")])


def as_hydra(value: Any) -> str:
    match value:
        case list():
            return f"[{','.join(map(as_hydra, value))}]"
        case bool():
            return str(value).lower()
        case _:
            return repr(value)


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 12345
        case _:
            return f"{value}x"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_dvc_leaves_every_byte_but_those_of_the_value_that_it_sets(file: Path, tmp_path: Path) -> None:
    text = file.read_text()
    copy = tmp_path / "params.yaml"
    keys = dict(keys_of(YAML(typ="safe").load(text)))
    assert len(keys) > 40
    copy.write_text(text)
    apply_overrides(str(copy), [f"{key}={as_hydra(value)}" for key, value in keys.items()])
    assert copy.read_text() == text
    scalars = {key: another(value) for key, value in keys.items() if not isinstance(value, list)}
    apply_overrides(str(copy), [f"{key}={as_hydra(value)}" for key, value in scalars.items()])
    assert len(copy.read_text().splitlines()) == len(text.splitlines())  # no line is broken, none is lost
    assert dict(keys_of(YAML(typ="safe").load(copy.read_text()))) == keys | scalars
    for assignment in (
        "name=other",
        "tuning.resnet20.sgd.lr=0.1234",
        "recipes.resnet20.epochs=1",
        "preprocess.seed=7",
    ):
        copy.write_text(text)
        apply_overrides(str(copy), [assignment])
        pairs = zip(text.splitlines(), copy.read_text().splitlines(), strict=True)
        assert sum(old != new for old, new in pairs) == 1, assignment


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_the_files_have_no_aliases_and_no_null(file: Path) -> None:
    text = file.read_text()
    assert rewritten(text) == text
    assert "null" not in text
    assert not any(line.split("#")[0].count(sign) for line in text.splitlines() for sign in ("&", "*", "<<"))


def test_a_pattern_sets_a_number_in_every_place_and_keeps_the_rest() -> None:
    text = (ROOT / "params.yaml").read_text()
    new = assign(text, ["recipes.*.epochs=7", "tuning.resnet1?.sgd.lr=0.5", "grid.seeds=[0, 1]"])
    changed = [line for line in difflib.ndiff(text.splitlines(), new.splitlines()) if line[0] in "+-"]
    assert sum(line.startswith("+") for line in changed) == 10 + 2 + 1
    assert [line for line in changed_lines(text, new) if "- 1" in line] == ["  42: +   - 1"]
    params = YAML(typ="safe").load(new)
    assert {recipe["epochs"] for recipe in params["recipes"].values()} == {7}
    rates = [params["tuning"][name]["sgd"]["lr"] for name in ("resnet20", "resnet10", "resnet18")]
    assert rates == [0.1, 0.5, 0.5]


def test_one_list_in_many_places_is_written_in_each() -> None:
    text = (ROOT / "examples/digits/params.yaml").read_text()
    new = assign(text, ["recipes.*.normalization={name: fixed, mean: [0.5, 0.5, 0.5], std: [1.0, 1.0, 1.0]}"])
    assert "&" not in new
    assert new.count("mean:") == 3


def test_a_dry_run_shows_the_lines_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "examples/digits/params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["set", "tuning.resnet20.sgd.lr=0.5", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("lr: 0.5") == 1
    assert (tmp_path / "params.yaml").read_text() == text
    assert main(["set", "tuning.resnet20.sgd.lr=0.5"]) == 0
    assert (tmp_path / "params.yaml").read_text() == text.replace("sgd: {lr: 0.1}", "sgd: {lr: 0.5}", 1)
