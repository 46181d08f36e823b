"""Average keys, divergences and entropies, against a dense float64 softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from seg4diff.kernels.api import backend, key_average, row_divergence, row_entropy
from seg4diff.kernels.testing import assert_accurate, attention_inputs

BOTH = pytest.mark.parametrize("name", ["reference", "aten"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = torch.tensor([[0, 1], [7, 3], [20, 32], [5, 5]])


def tensors(dtype: torch.dtype, keys: int = 33) -> tuple[Tensor, Tensor]:
    inputs = attention_inputs(2, 33, 5, 3, 16, dtype)
    return inputs["query"], inputs["key"][:, :keys]


def near_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """600 rows of which each second one is 1e-3 from the one before, and the pairs of those."""
    inputs = attention_inputs(1, 600, 5, 2, 64, torch.float32)
    query = inputs["query"]
    step = torch.randn(query[:, ::2].shape, generator=torch.Generator().manual_seed(4))
    query[:, 1::2] = query[:, ::2] * (1 + 1e-3 * step)
    return query.to(dtype), inputs["key"].to(dtype), torch.arange(600).view(300, 2)


def log_probability(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return (scale * torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double())).log_softmax(-1)


def dense_divergence(query: Tensor, key: Tensor, pairs: Tensor, scale: float) -> Tensor:
    first, second = (log_probability(query, key, scale)[:, :, rows] for rows in pairs.unbind(1))
    return ((first.exp() - second.exp()) * (first - second)).sum(-1)


def within(query: Tensor, kbar: Tensor, pairs: Tensor, scale: float) -> Tensor:
    """What errors are relative to: scale |dq| (|kbar_a| + |kbar_b|), [B, H, P]."""
    a, b = pairs.unbind(1)
    sizes = kbar.double().norm(dim=-1).transpose(1, 2)
    d_query = (query[:, a].double() - query[:, b].double()).norm(dim=-1).transpose(1, 2)
    return scale * d_query * (sizes[:, :, a] + sizes[:, :, b])


@pytest.mark.parametrize("scale", [None, 0.6])
@BOTH
def test_every_quantity_in_float64(name: Any, scale: float | None) -> None:
    factor = 0.25 if scale is None else scale
    query, key = tensors(torch.float64, keys=29)
    log_p = log_probability(query, key, factor)
    with backend(name):
        kbar, lse = key_average(query, key, scale=scale)
    torch.testing.assert_close(kbar, torch.einsum("bhqk,bkhd->bqhd", log_p.exp(), key))
    torch.testing.assert_close(lse, (factor * torch.einsum("bqhd,bkhd->bhqk", query, key)).logsumexp(-1))
    found = row_divergence(query, kbar, PAIRS, scale=scale)
    torch.testing.assert_close(found, dense_divergence(query, key, PAIRS, factor))
    assert not found[..., 3].any()  # a row with itself
    assert (found[..., :3] > 0.01).all()
    torch.testing.assert_close(row_entropy(query, kbar, lse, scale=scale), -(log_p.exp() * log_p).sum(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_average_keys_are_float32_and_exact(dtype: torch.dtype) -> None:
    query, key = tensors(dtype)
    kbar, lse = key_average(query, key)
    log_p = log_probability(query, key, 0.25)
    usual = (0.25 * torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float())).log_softmax(-1)
    exact, baseline = (torch.einsum("bhqk,bkhd->bqhd", p.exp(), key.to(p.dtype)) for p in (log_p, usual))
    assert kbar.dtype == lse.dtype == torch.float32
    assert_accurate(kbar, exact, baseline)
    entropies = row_entropy(query, kbar, lse).double()
    exact = -(log_p.exp() * log_p).sum(-1)
    sizes = lse.abs() + 0.25 * (query.float().norm(dim=-1) * kbar.norm(dim=-1)).transpose(1, 2)
    assert ((entropies - exact).abs() <= 1e-6 * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_nearly_equal(dtype: torch.dtype) -> None:
    query, key, pairs = near_rows(dtype)
    kbar, _ = key_average(query, key)
    found = row_divergence(query, kbar, pairs).double()
    exact = dense_divergence(query, key, pairs, 0.125)
    budget = 1e-6 * within(query, kbar, pairs, 0.125)
    differ = (query[:, ::2] != query[:, 1::2]).any(-1).transpose(1, 2)  # half precision rounds some together
    assert differ.float().mean() > 0.9
    assert ((found - exact).abs() <= budget).all()
    assert (found >= 0).all()
    assert not found[~differ].any()
    rounded = row_divergence(query, kbar.bfloat16().float(), pairs).double()
    assert ((rounded - exact).abs() > budget)[differ].float().mean() > 0.9  # the budget has teeth


def test_neither_divergence_nor_entropy_is_negative() -> None:
    """Where rounding would make it so."""
    query, key, pairs = near_rows(torch.bfloat16)
    kbar, _ = key_average(query, key)
    assert (row_divergence(query, kbar.bfloat16().float(), pairs) >= 0).all()
    sharp = 100 * query
    assert (row_entropy(sharp, *key_average(sharp, key)) >= 0).all()


def test_nothing_is_differentiable() -> None:
    query, key = (t.requires_grad_() for t in tensors(torch.float32))
    kbar, lse = key_average(query, key)
    shown = (kbar, lse, row_divergence(query, kbar, PAIRS), row_entropy(query, kbar, lse))
    assert not any(tensor.requires_grad for tensor in shown)


def test_shards_of_keys_merge() -> None:
    query, key = tensors(torch.float64)
    whole, parts = key_average(query, key), [key_average(query, k) for k in (key[:, :9], key[:, 9:])]
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    kbar = sum(kbar * (part - lse).exp().transpose(1, 2)[..., None] for kbar, part in parts)
    torch.testing.assert_close(lse, whole[1])
    torch.testing.assert_close(kbar, whole[0])


def test_compiles_as_one_graph() -> None:
    query, key = tensors(torch.bfloat16)

    def model(query: Tensor, key: Tensor, pairs: Tensor) -> tuple[Tensor, ...]:
        kbar, lse = key_average(query, key)
        return row_divergence(query, kbar, pairs), row_entropy(query, kbar, lse)

    torch.compiler.reset()
    counter = CompileCounter()
    found = torch.compile(model, fullgraph=True, backend=counter)(query, key, PAIRS)
    for one, other in zip(found, model(query, key, PAIRS), strict=True):
        torch.testing.assert_close(one, other)
    assert counter.frame_count == 1
    torch.library.opcheck(torch.ops.seg4diff.key_average.default, (query, key, 0.25))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"query": torch.zeros(2, 33, 3)},
            ValueError,
            r"query has shape \[2, 33, 3\]; expected \[batch, tok",
        ),
        (
            {"kbar": None},
            TypeError,
            r"kbar must be a tensor, got NoneType; accepted: float32 \[2, 33, 3, 16\]",
        ),
        (
            {"kbar": torch.zeros(2, 33, 3, 16).bfloat16()},
            ValueError,
            r"kbar is torch.bfloat16 \[2, 33, 3, 16\] on cpu; accepted: float32",
        ),
        ({"pairs": torch.zeros(2, 3).long()}, ValueError, r"pairs is .*accepted: int64 \[any, 2\] on cpu"),
        ({"pairs": torch.zeros(0, 2).long()}, ValueError, r"pairs is torch.int64 \[0, 2\]"),
        (
            {"pairs": torch.zeros(3, 2)},
            ValueError,
            r"pairs is torch.float32 \[3, 2\] on cpu; accepted: int64",
        ),
        (
            {"pairs": torch.tensor([[0, 33]])},
            ValueError,
            "pairs has the row 33 outside the 33 rows; accepted: 0",
        ),
        ({"pairs": torch.tensor([[-1, 3]])}, ValueError, "pairs has the row -1 outside"),
        ({"scale": "big"}, TypeError, "scale='big' must be a number or None"),
    ],
)
def test_arguments_that_mean_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key = tensors(torch.bfloat16)
    kbar, lse = key_average(query, key)
    with pytest.raises(error, match=message):
        row_divergence(**{"query": query, "kbar": kbar, "pairs": PAIRS, **changes})
    if "pairs" not in changes:
        with pytest.raises(error, match=message):
            row_entropy(**{"query": query, "kbar": kbar, "lse": lse, **changes})


def test_a_log_sum_exp_and_keys_that_mean_nothing() -> None:
    query, key = tensors(torch.bfloat16)
    kbar, lse = key_average(query, key)
    with pytest.raises(
        ValueError, match=r"lse is torch.float32 \[2, 33, 3\] on cpu; accepted: float32 \[2, 3,"
    ):
        row_entropy(query, kbar, lse.transpose(1, 2))
    with pytest.raises(TypeError, match="key has dtype torch.float32, but query has torch.bfloat16"):
        key_average(query, key.float())
    with pytest.raises(ValueError, match="scale=0 must be"):
        key_average(query, key, scale=0)
