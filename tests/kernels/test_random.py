"""A sample of the random calls of `tests.support.random_attention`, which runs thousands."""

from __future__ import annotations

import pytest

from tests.support import random_attention


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_calls(first: int) -> None:
    for number in range(first, first + 25):
        random_attention.check(number)
