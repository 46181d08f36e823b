"""What the tests of edits share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seg4diff
from tests.support import tiny
from tests.support.edits import CALL
from tests.support.tiny import seeded


@pytest.fixture(scope="module")
def pipe() -> Any:
    """In float64, so that nothing but a mistake separates the library from brute force."""
    return seg4diff.patch(tiny.pipeline().to(torch.float64))


@pytest.fixture(scope="module")
def stock(pipe: Any) -> Tensor:
    """The images of the unchanged pipeline."""
    return pipe(**CALL, generator=seeded()).images
