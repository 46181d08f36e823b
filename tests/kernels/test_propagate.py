"""Propagation of maps along the attention, against the dense matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from seg4diff.kernels.api import attention_maps, backend, joint_attention, propagate
from seg4diff.kernels.aten import affinity
from seg4diff.kernels.testing import assert_accurate, attention_inputs
from seg4diff.kernels.types import MapRequest

BOTH = pytest.mark.parametrize("name", ["reference", "aten"])


def tensors(dtype: torch.dtype = torch.float64, rows: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, [2, tokens, 3, 16], and five maps of the 37 keys, in float32 at most."""
    inputs = attention_inputs(2, 37, 5, 3, 16, dtype)
    maps = torch.rand(2, 37, 5, generator=torch.Generator().manual_seed(1)).double() ** 3
    return inputs["query"][:, :rows], inputs["key"], maps.to(torch.promote_types(dtype, torch.float32))


def matrix(query: Tensor, key: Tensor, lse: Tensor | None = None, scale: float = 0.25) -> Tensor:
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    norm = scores.logsumexp(-1) if lse is None else lse
    return (scores - norm[..., None]).exp().mean(dim=1)  # [B, N, M]


@pytest.fixture(params=[37 * 2 * 8, 2**20], ids=["several blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "_BLOCK_ELEMENTS", request.param)  # 8 of 37 rows, and a part


@pytest.mark.usefixtures("blocks")
@BOTH
def test_is_the_dense_product_and_so_is_its_gradient(name: Any) -> None:
    for rows in (37, 11):
        for scale in (None, 0.7):
            query, key, maps = tensors(rows=rows)
            dense = matrix(query, key, scale=0.25 if scale is None else scale)
            leaf, upstream = maps.clone().requires_grad_(), torch.randn(2, rows, 5).double()
            with backend(name):
                found = propagate(query, key, leaf, scale=scale)
                gradient = torch.autograd.grad(found, leaf, upstream)[0]
            torch.testing.assert_close(found, dense @ maps)
            torch.testing.assert_close(gradient, dense.mT @ upstream)


@pytest.mark.usefixtures("blocks")
@BOTH
def test_hops(name: Any) -> None:
    query, key, maps = tensors()
    dense, leaf = matrix(query, key), maps.clone().requires_grad_()
    with backend(name):
        found = propagate(query, key, leaf, hops=3)
        gradient = torch.autograd.grad(found.square().sum(), leaf)[0]
    expected = dense @ (dense @ (dense @ maps))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, (dense @ dense @ dense).mT @ (2 * expected))


@pytest.mark.usefixtures("blocks")
@BOTH
def test_a_log_sum_exp_over_more_keys(name: Any) -> None:
    inputs = attention_inputs(2, 37, 5, 3, 16, torch.float64)
    _, _, maps = tensors()
    lse = joint_attention(**inputs).lse[:, :, :37].clone()
    lse[:, :, 4] = -torch.inf
    query, key = inputs["query"], inputs["key"]
    relation = MapRequest(columns=("image", slice(None)))
    image_to_image = attention_maps(query, key, None, inputs["text_key"], maps=relation).maps
    image_to_image = image_to_image * (torch.arange(37) != 4)[:, None]
    leaf = maps.clone().requires_grad_()
    with backend(name):
        found = propagate(query, key, leaf, lse=lse)
        gradient = torch.autograd.grad(found.sum(), leaf)[0]
    torch.testing.assert_close(found, image_to_image @ maps)
    torch.testing.assert_close(gradient, image_to_image.sum(1)[..., None].expand_as(maps))
    assert not found[:, 4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_the_error_budget(dtype: torch.dtype) -> None:
    query, key, maps = tensors(dtype)
    found = propagate(query, key, maps)
    exact = matrix(query.double(), key.double()) @ maps.double()
    usual = (0.25 * torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float())).softmax(-1).mean(1) @ maps
    assert found.dtype == torch.float32
    assert_accurate(found, exact, usual)


def test_no_matrix_of_rows_by_keys_exists() -> None:
    inputs = attention_inputs(1, 3000, 5, 2, 16, torch.float32)
    given = (inputs["query"], inputs["key"], torch.rand(1, 3000, 20), None, 0.25)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    with Watch():  # a mode does not see inside an operator
        affinity._propagate(*given)
        affinity._propagate_backward(torch.rand(1, 3000, 20), *given[:2], *given[3:])
    assert 4 * affinity._BLOCK_ELEMENTS < largest < 4 * 3000**2


def test_compiles_as_one_graph() -> None:
    query, key, maps = tensors(torch.float32)
    torch.compiler.reset()
    counter, found = CompileCounter(), []
    for function in (propagate, torch.compile(propagate, fullgraph=True, backend=counter)):
        leaf = maps.clone().requires_grad_()
        out = function(query, key, leaf, hops=2)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(found[0], found[1])
    assert counter.frame_count == 1
    given = (query, key, maps.requires_grad_(), torch.zeros(2, 3, 37), 0.25)
    torch.library.opcheck(torch.ops.seg4diff.propagate.default, given)


def test_autocast_does_not_round() -> None:
    query, key, maps = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = propagate(query, key, maps)
    assert torch.equal(found, propagate(query, key, maps))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        (
            {"key": torch.zeros(2, 37, 3, 8)},
            TypeError,
            "key has dtype torch.float32, but query has torch.float64",
        ),
        ({"key": torch.zeros(2, 37, 2, 16).double()}, ValueError, "key has number of heads 2"),
        (
            {"maps": [1]},
            TypeError,
            r"maps must be a tensor, got list; accepted: .*float64 \[2, 37, any\] on cpu",
        ),
        ({"maps": torch.zeros(2, 36, 5)}, ValueError, r"maps is torch.float32 \[2, 36, 5\] on cpu; accepted"),
        ({"maps": torch.zeros(2, 37)}, ValueError, r"maps is torch.float32 \[2, 37\] on cpu; accepted"),
        ({"maps": torch.zeros(2, 37, 0)}, ValueError, r"maps is torch.float32 \[2, 37, 0\]"),
        (
            {"maps": torch.zeros(2, 37, 5).long()},
            ValueError,
            "maps is torch.int64 .*accepted: float16, bfloat16",
        ),
        (
            {"lse": torch.zeros(2, 3, 42).double()},
            ValueError,
            r"lse is .*accepted: float64 \[2, 3, 37\] on cpu",
        ),
        ({"lse": torch.zeros(2, 3, 37)}, ValueError, "lse is torch.float32 .*accepted: float64"),
        ({"lse": torch.full((2, 3, 37), torch.nan).double()}, ValueError, "lse has a value of nan; accepted"),
        ({"hops": 0}, ValueError, "hops=0 must be an integer of at least 1"),
        ({"hops": True}, ValueError, "hops=True must be"),
        ({"hops": 2.0}, ValueError, "hops=2.0 must be"),
        (
            {"query": torch.zeros(2, 36, 3, 16).double(), "hops": 2},
            ValueError,
            "hops=2 needs as many keys as",
        ),
        ({"scale": -1.0}, ValueError, "scale=-1.0 must be"),
    ],
)
def test_arguments_that_mean_nothing(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = dict(zip(("query", "key", "maps"), tensors(), strict=True))
    with pytest.raises(error, match=message):
        propagate(**{**given, **changes})
