"""What runs on a GPU alone runs here as well, in its dry form: minutes on a card are not lost to mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RESGRID_THREADS": "1", "OMP_NUM_THREADS": "1"} | extra
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_benchmark_goes_through_all_of_its_sections(tmp_path):
    done = run("benchmarks/gpu.py", "--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results-gpu.json").read_text())
    assert found["steps"]["resnet20"]["convolutions_ms"] > 0
    assert [images > 0 for *_, images in found["shares"]] == [True, True, True]
    assert found["standard"] > 0
    assert found["compiled"]["resnet20"]["graphed_ms"] > 0
    page = (tmp_path / "results-gpu.md").read_text()
    assert "| 2 eager under MPS | " in page
    assert "cells of params.yaml take" in page
    assert "Error" not in page


@pytest.mark.long
def test_the_tests_for_a_gpu_pass_dry_without_the_other_tests_fixtures():
    done = run(
        "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "tests/test_gpu.py", RESGRID_GPU_DRY="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
