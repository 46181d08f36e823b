"""What the tests of edits share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support import tiny

CALL: dict[str, Any] = {"prompt": "a red cat, a dog on a sofa", **tiny.CALL}


def assert_same(output: Tensor, expected: Tensor, stock: Tensor) -> None:
    """``output`` equals ``expected`` far closer than either comes to ``stock``."""
    assert output.dtype == expected.dtype == torch.float64
    assert (output - expected).abs().max() < 1e-10
    assert (expected - stock).abs().max() > 1e-4
