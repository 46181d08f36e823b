"""What many tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import seg4diff
from tests.support import tiny


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("extra"):
        extra, module = mark.args
        pytest.importorskip(module, reason=f"needs {module}: pip install 'seg4diff[{extra}]'")


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A patched pipeline of three layers; a module that changes it has a `pipe` of its own."""
    return seg4diff.patch(tiny.pipeline())


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    """Path of an image file of 80 x 48 pixels, `image.png`."""
    from PIL import Image

    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)).save(path)
    return str(path)
