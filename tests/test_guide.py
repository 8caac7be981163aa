"""README and guide: their commands are taken by the command line, and those that are cheap are run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT, Project

from resgrid.cli import COMMANDS, make_parser

PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/guide").glob("*.md")),
]
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(info string, text) of each fenced block that is for a shell."""
    fences = re.finditer(r"^ *```(bash[^\n]*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(fence[1], fence[2].replace("\\\n", " ")) for fence in fences]


def resgrid_commands(text: str) -> list[list[str]]:
    """The arguments of every `resgrid` in a shell's lines."""
    commands: list[list[str]] = []
    for line in text.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("&|;<>"):
                if "resgrid" in command[:1] or command[:3] == ["python3", "-m", "resgrid"]:
                    commands.append(command[1 if command[0] == "resgrid" else 3 :])
                command = []
            else:
                command.append(word)
    return commands


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_page_names_commands_that_there_are_and_no_link_of_it_leads_nowhere(page):
    for _, text in blocks(page):
        for arguments in resgrid_commands(text):
            make_parser().parse_args(arguments)
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]+))?\)", page.read_text()):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, anchor


def test_every_command_is_listed_and_takes_its_example():
    parser = make_parser()
    for name, command in COMMANDS.items():
        assert f"  {name:13} {command.text}\n" in parser.format_help()
        for arguments in resgrid_commands(command.example):
            assert arguments[0] == name
            parser.parse_args(arguments)


def test_every_command_and_block_of_params_is_in_the_guide():
    page = (ROOT / "docs/guide/commands.md").read_text()
    for name in COMMANDS:
        assert re.search(rf"`(resgrid )?{name}\b", page), name
    for key in re.findall(r"^(\w+):", (ROOT / "params.yaml").read_text(), flags=re.MULTILINE):
        assert re.search(rf"^\| `{key}\b", page, flags=re.MULTILINE), key


def test_the_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text().split()) <= 1100


@pytest.fixture(scope="module")
def project(small: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small trained pipeline, with the pictures that the guide speaks of."""
    project = small.copy(tmp_path_factory.mktemp("guide") / "project")
    picture = next((project.root / "images/test").rglob("*.png"))
    (project.root / "holiday").mkdir()
    for name in ("photo.jpg", "holiday/beach.png"):
        shutil.copy(picture, project.root / name)
    return project


RUN = [
    pytest.param(text, marks=[pytest.mark.long] if "long" in info.split() else [], id=f"{name}-{number}")
    for page, name in zip(PAGES, IDS, strict=True)
    for number, (info, text) in enumerate(blocks(page))
    if "run" in info.split()
]


@pytest.mark.parametrize("text", RUN)
def test_a_block_of_the_guide_does_what_it_says(project, text):
    for line in text.splitlines():
        done = project.run(*shlex.split(line, comments=True))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip()


def test_the_picture_of_the_architecture_is_what_the_imports_give():
    drawn = subprocess.run(
        [sys.executable, "-c", "import picture; print(picture.picture(), end='')"],
        cwd=ROOT / "docs", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"<!-- picture -->\n{drawn}<!-- /picture -->" in (ROOT / "ARCHITECTURE.md").read_text()
