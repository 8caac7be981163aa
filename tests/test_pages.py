"""The services' pages in a real browser, after `prefect deployment run train-all` has trained a real grid."""

from __future__ import annotations

import re
import shutil
import subprocess
import time

import httpx
import pytest
from ports import free_port
from small import Project as Pipeline
from test_services import ROOT, Project

from resgrid.tracking.view import VIEW_QUERY

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("chromium") is None,
        reason="chromium is not on the PATH (Debian's packages chromium, chromium-driver)",
    ),
]

CELLS = ["resnet20-sgd-0", "resnet20-adam-0"]


@pytest.fixture(scope="module")
def project(small, tmp_path_factory):
    """A checkout with a grid of two cells, one of which the real flow has trained, its services still up."""
    project = Project(tmp_path_factory.mktemp("pages") / "project")
    shutil.copytree(small.root, project.root, symlinks=True, dirs_exist_ok=True)
    shutil.copytree(ROOT / "flows", project.root / "flows", dirs_exist_ok=True)
    pipeline = Pipeline(project.root)
    pipeline.set("grid.seeds=[0]", "tuning.resnet20.adam.lr=0.002", "studies={}")
    assert pipeline.run("resgrid", "sync", "--rebuild").returncode == 0
    try:
        project.start((free_port(), free_port()))
        done = project.run("prefect", "deployment", "run", "train-all", "--watch")
        assert done.returncode == 0, done.stdout + done.stderr
        page = re.search(r"URL: (http\S+)", done.stdout)
        assert page
        project.page = page[1]
        yield project
    finally:
        project.close()


def browse(url, folder):
    """Open a page: its elements after 15 seconds of its own time, and `page.png` in `folder`."""
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    flags += ["disable-background-networking", "disable-component-update", "window-size=1400,900"]
    flags += [f"user-data-dir={folder / 'profile'}", f"screenshot={folder / 'page.png'}", "dump-dom"]
    command = ["chromium", *(f"--{flag}" for flag in flags), "--virtual-time-budget=15000", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def read(url, folder, *wanted):
    """The text of a page once it shows all that is `wanted`; a screenshot of it is left in `folder`."""
    deadline = time.monotonic() + 90
    while True:
        done = browse(url, folder)
        text = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", done.stdout, flags=re.DOTALL)
        if all(each in text for each in wanted):
            return text
        missing = [each for each in wanted if each not in text]
        assert time.monotonic() < deadline, (
            f"{url} does not show {missing}, but:\n{text[-3000:]}\n{done.stderr[-500:]}"
        )


def test_the_flow_runs_page_shows_its_state_and_every_cell_by_its_name(project, tmp_path):
    text = read(project.page, tmp_path, *CELLS, "download", "evaluate")
    assert "Completed" in text
    assert "Failed" not in text


def artifact(project, key):
    """The latest one with this key, from the server."""
    url = f"{project.services['prefect']}/api/artifacts/latest/filter"
    [latest] = httpx.post(url, json={"artifacts": {"key": {"any_": [key]}}}, trust_env=False).json()
    return latest


def test_prefects_pages_show_the_leaderboard_and_lead_to_the_run_in_mlflow(project, tmp_path):
    number = artifact(project, "leaderboard-root")["latest_id"]
    read(f"{project.services['prefect']}/artifacts/artifact/{number}", tmp_path, *CELLS, "test_accuracy")
    text, address = artifact(project, f"mlflow-{CELLS[1]}")["data"].strip("[)").split("](")
    assert text == f"{CELLS[1]} in MLflow"
    assert CELLS[0] not in read(address, tmp_path, CELLS[1], "test_accuracy")


def test_mlflows_pages_show_every_cell_as_a_run_and_in_the_view_of_the_grid_the_current_ones(
    project, tmp_path
):
    mlflow = project.services["mlflow"]
    url = f"{mlflow}/api/2.0/mlflow/experiments/get-by-name"
    answer = httpx.get(url, params={"experiment_name": "small"}, trust_env=False).json()
    page = f"{mlflow}/#/experiments/{answer['experiment']['experiment_id']}/runs?"
    text = read(f"{page}workflowType=machine_learning", tmp_path, *CELLS, "comparison")
    num_runs = len(Pipeline(project.root).runs())
    assert f"{num_runs} matching runs" in re.sub(r"\s+", " ", text)
    page += VIEW_QUERY
    text = read(page, tmp_path, *CELLS, "test_accuracy", "test_loss")  # columns that fit on the page
    assert "2 matching runs" in re.sub(r"\s+", " ", text)  # without the comparison
    read(f"{page}&compareRunsMode=CHART", tmp_path, "Model metrics")
