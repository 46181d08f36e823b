"""The error budget itself: what it must let pass, and the faults that it must catch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seg4diff.kernels.testing import (
    assert_accurate,
    attention_inputs,
    error_ratio,
    exact_attention,
    pytorch_attention,
)
from seg4diff.kernels.types import MapRequest


@pytest.fixture(scope="module")
def maps() -> tuple[Tensor, Tensor]:
    """Exact and baseline map, [2, 300, 77], entries about 1 / 377."""
    inputs = attention_inputs(2, 300, 77, 3, 32, torch.bfloat16)
    exact = exact_attention(**inputs, maps=MapRequest(heads="each")).maps
    baseline = pytorch_attention(**inputs, maps=MapRequest(heads="each")).maps
    return exact, baseline


def test_baseline_and_twice_its_error_pass(maps: tuple[Tensor, Tensor]) -> None:
    exact, baseline = maps
    assert_accurate(baseline, exact, baseline)
    assert_accurate((exact + 2 * (baseline - exact)).float(), exact, baseline)
    assert_accurate(exact.float(), exact, exact)  # one rounding is always granted


def test_three_times_the_error_fails(maps: tuple[Tensor, Tensor]) -> None:
    exact, _ = maps
    coarse = exact.bfloat16().float()  # an error that dwarfs the one rounding of float32
    with pytest.raises(AssertionError, match="1.5 times its budget"):
        assert_accurate((exact + 3 * (coarse - exact)).float(), exact, coarse, name="map")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(torch.zeros_like, id="zeros"),
        pytest.param(lambda t: t.roll(1, dims=1), id="wrong-head"),
        pytest.param(lambda t: t.roll(1, dims=2), id="shifted-row"),
        pytest.param(lambda t: t.roll(1, dims=3), id="shifted-text-token"),
        pytest.param(lambda t: t * 1.001, id="scaled"),
        pytest.param(lambda t: torch.cat([t[..., :-1], t[..., -1:] * 0], dim=-1), id="unwritten-column"),
        pytest.param(lambda t: torch.where(t == t.max(), torch.nan, t), id="one-nan"),
    ],
)
def test_faults_are_caught(maps: tuple[Tensor, Tensor], fault: object) -> None:
    exact, baseline = maps
    assert callable(fault)
    with pytest.raises(AssertionError):
        assert_accurate(fault(baseline), exact, baseline)


def test_one_wrong_entry_among_many_is_caught(maps: tuple[Tensor, Tensor]) -> None:
    exact, baseline = maps
    wrong = baseline.clone()
    wrong[1, 2, 299, 76] += wrong.max() / 1000
    assert error_ratio(wrong, exact, baseline) > 1


def test_a_comparison_without_content_is_refused(maps: tuple[Tensor, Tensor]) -> None:
    exact, baseline = maps
    with pytest.raises(ValueError, match="all zeros"):
        error_ratio(baseline, torch.zeros_like(exact), baseline)
    with pytest.raises(ValueError, match="expected float64"):
        error_ratio(baseline, exact.float(), baseline)
    with pytest.raises(ValueError, match="not equal"):
        error_ratio(baseline[:1], exact, baseline)
