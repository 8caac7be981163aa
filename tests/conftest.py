"""What several tests share: where the reference data lies, and small real images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of published weights and real CIFAR-10 images that RESGRID_REFERENCE_DATA names."""
    folder = os.environ.get("RESGRID_REFERENCE_DATA")
    if not folder:
        pytest.skip("RESGRID_REFERENCE_DATA names no folder of reference data")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"RESGRID_REFERENCE_DATA={folder} is no folder")
    return path
