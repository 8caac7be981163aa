"""params.yaml is edited in place: by `resgrid set`, and by DVC's own writer, whose layout it has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides  # what `dvc exp run -S` does to the file
from ruamel.yaml import YAML

from resgrid.cli import main
from resgrid.edit import assign, changed_lines, rewritten

ROOT = Path(__file__).parents[1]
FILES = sorted([ROOT / "params.yaml", *ROOT.glob("examples/*/params.yaml")])


def leaves(node: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def as_hydra(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(as_hydra, value))}]"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"'{value}'"
        if isinstance(value, str)
        else repr(value)
    )


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
    keys = dict(leaves(YAML(typ="safe").load(text)))
    assert len(keys) > 40
    copy.write_text(text)
    apply_overrides(str(copy), [f"{key}={as_hydra(value)}" for key, value in keys.items()])
    assert copy.read_text() == text
    scalars = {key: another(value) for key, value in keys.items() if not isinstance(value, list)}
    apply_overrides(str(copy), [f"{key}={as_hydra(value)}" for key, value in scalars.items()])
    assert len(copy.read_text().splitlines()) == len(text.splitlines())  # no line is broken, none is lost
    assert dict(leaves(YAML(typ="safe").load(copy.read_text()))) == keys | scalars
    one = (
        "name=other",
        "tuning.resnet20.sgd.lr=0.123456",
        "recipes.resnet44.epochs=12345",
        "preprocess.seed=7",
    )
    for assignment in one:
        copy.write_text(text)
        if assignment.split("=")[0] in keys:
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
    assert [params["tuning"][name]["sgd"]["lr"] for name in ("resnet20", "resnet10", "resnet18")] == [
        0.1,
        0.5,
        0.5,
    ]


def test_one_list_in_many_places_is_written_in_each() -> None:
    text = (ROOT / "examples/digits/params.yaml").read_text()
    new = assign(text, ["recipes.*.normalization={name: fixed, mean: [0.5, 0.5, 0.5], std: [1.0, 1.0, 1.0]}"])
    assert "&" not in new
    assert new.count("mean:") == 3


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("recipes.*.epoch=1", "no key matches 'recipes.*.epoch'; did you mean recipes."),
        ("recipes.*.epochs=ten", "recipes.resnet110.epochs: Input should be a valid integer"),
        ("recipes.*.epochs", "write KEY=VALUE"),
        ("grid.seeds=[0, 0]", "seeds holds a value twice"),
        ("name=[", "the value is no YAML"),
    ],
)
def test_what_cannot_be_set_is_refused_and_nothing_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    assignment: str,
    said: str,
) -> None:
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["set", "recipes.*.batch_size=64", assignment]) == 1
    assert said in capsys.readouterr().err
    assert (tmp_path / "params.yaml").read_text() == text


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"params\.yaml: no such file here"),
        (b"name: [mine", r"params\.yaml: cannot be read \(while parsing"),
        (b"name: caf\xe9", r"params\.yaml: cannot be read \('utf-8' codec"),
    ],
)
def test_a_file_that_cannot_be_read_ends_with_one_message(
    content: bytes | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "params.yaml").write_bytes(content)
    assert main(["set", "name=other"]) == 1
    assert re.search(said, capsys.readouterr().err)
