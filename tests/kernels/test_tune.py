"""The measurement behind `seg4diff kernels tune`: what counts, and who wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seg4diff.kernels import providers
from seg4diff.kernels.tune import fastest, tune
from tests.support.provider import OWN


def scaled_output(*given: Any) -> tuple[Tensor, Tensor]:
    out, lse = OWN.forward(*given)
    return out * 1.02, lse


def scaled_gradient(*given: Any) -> tuple[Tensor, ...]:
    d_query, d_key, d_value = OWN.backward(*given)
    return d_query, d_key * 1.05, d_value


def without_row_sum(*given: Any) -> tuple[Tensor, ...]:
    return OWN.backward(*given[:6], None, given[7])


def failing(*given: Any) -> Any:
    raise TypeError("forward() has another signature in this version")


WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "output": {"forward": scaled_output},
    "lse": {"forward": lambda *given: (OWN.forward(*given)[0], OWN.forward(*given)[1] + 0.01)},
    "gradient": {"backward": scaled_gradient},
    "row-sum": {"backward": without_row_sum},
    "failing": {"forward": failing},
    "refused": {"refusal": lambda query: "needs a GPU"},
}


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(providers, "PROVIDERS", {})
    providers.add(replace(OWN, name="right"))
    for name, functions in WRONG.items():
        providers.add(replace(OWN, name=f"wrong-{name}", **functions))  # type: ignore[arg-type]
    yield
    for name in providers.PROVIDERS:
        del providers.ATTEND[name]


def test_a_provider_that_is_wrong_is_rejected(candidates: None) -> None:
    row = tune(330, 20, 2, 16, rounds=2, device="cpu")
    assert (row.architecture, row.head_dim, row.tokens) == ("cpu", 16, 350)
    rejected, measured = row.evidence["rejected"], row.evidence["milliseconds"]
    assert set(rejected) == {"triton", *(f"wrong-{name}" for name in WRONG)}
    assert rejected["wrong-refused"] == "needs a GPU"
    assert "image" in rejected["wrong-output"]
    assert "maps" in rejected["wrong-lse"]
    assert "d_key" in rejected["wrong-gradient"]
    assert "d_query" in rejected["wrong-row-sum"]
    assert rejected["wrong-failing"] == f"failed (TypeError: {WORDS})"
    assert set(measured) == {"aten", "right"}
    assert all(0 < forward < both for forward, both in measured.values())
    assert {row.forward, row.training} <= {"aten", "right"}


WORDS = "forward() has another signature in this version"


def test_an_error_of_the_gpu_ends_the_measurement(candidates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    providers.add(replace(OWN, name="wild", forward=fail))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune(20, 10, 2, 16, rounds=1, device="cpu")


def test_medians_decide_and_noise_does_not() -> None:
    usual = [(1.0, 4.0)] * 3
    assert fastest({"triton": usual, "a": [(0.5, 3.99)] * 3}, "triton") == ("a", "triton")
    assert fastest({"triton": usual, "a": [(2.0, 1.0)] * 3}, "triton") == ("triton", "a")
    assert fastest({"triton": usual, "a": [(0.1, 9.0), (1.1, 9.0), (1.1, 9.0)]}, "triton")[0] == "triton"
    times = {"triton": usual, "a": [(0.9, 4.0)] * 3, "b": [(0.8, 4.0)] * 3}
    assert fastest(times, "triton")[0] == "b"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_is_installed_keeps_its_budget(head_dim: int) -> None:
    """Every provider that takes this GPU is right; only what it refuses is rejected."""
    row = tune(1024, 154, 8, head_dim, rounds=3, device="cuda")
    accepted = ("is not installed", "is not one of", "is not a multiple of")
    assert all(any(words in reason for words in accepted) for reason in row.evidence["rejected"].values())
    assert "triton" in row.evidence["milliseconds"]
