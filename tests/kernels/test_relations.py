"""Maps of any relation, a log-sum-exp from outside, and calls without image keys or without text queries.

The oracle is one softmax over the whole matrix in float64, differentiated by autograd; it shares no code with
the backends.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.testing import assert_accurate, attention_inputs
from seg4diff.kernels.types import MapRequest

BOTH = pytest.mark.parametrize("name", ["reference", "aten"])
HEADS = ["mean", "each"]
N, T = 13, 7
SOME: dict[str, list[slice | Tensor]] = {
    "image": [slice(None), slice(3, 8), torch.tensor([5, 0, 12, 5])],
    "text": [slice(None), slice(2, 5), torch.tensor([6, 1])],
}


def matrix(inputs: dict[str, Tensor], bias: Tensor | None, kind: str) -> Tensor:
    """Entries of all rows and columns before the reduction, [B, H, N + T, N + T]; NaN where undefined."""
    queries = torch.cat([inputs["query"], inputs["text_query"]], dim=1)
    keys = torch.cat([inputs["key"], inputs["text_key"]], dim=1)
    tokens = inputs["query"].shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / queries.shape[-1] ** 0.5
    mask = torch.zeros(scores.shape[0], 1, 1, scores.shape[-1], dtype=scores.dtype)
    if bias is not None:
        mask[:, 0, 0, tokens:] = bias
    if kind == "logit":
        return torch.where(mask == -torch.inf, 0.0, scores)
    if kind == "text_probability":
        entries = (scores + mask)[..., tokens:].softmax(dim=-1)
        return torch.nn.functional.pad(entries, (tokens, 0), value=torch.nan)
    return (scores + mask).softmax(dim=-1)


def chosen(whole: Tensor, tokens: int, request: MapRequest) -> Tensor:
    parts = {"image": slice(0, tokens), "text": slice(tokens, None)}
    (row_stream, rows), (column_stream, columns) = request.rows, request.columns
    entries = whole[:, :, parts[row_stream]][:, :, rows][..., parts[column_stream]][..., columns]
    return entries.mean(dim=1) if request.heads == "mean" else entries


def some_bias() -> Tensor:
    return torch.tensor([[0.5, -torch.inf, 1, -2, 0, 0, -torch.inf], [-torch.inf, 0, 0, 2, -torch.inf, 0, 1]])


def maps_of(way: str, inputs: dict[str, Tensor], request: MapRequest, bias: Tensor | None) -> Tensor:
    """By way of the output, of maps alone, or of maps alone with the statistics."""
    if way == "output":
        found = joint_attention(**inputs, maps=request, text_bias=bias).maps
        assert found is not None
        return found
    streams = {n: t for n, t in inputs.items() if not n.endswith("value")}
    return attention_maps(**streams, maps=request, text_bias=bias, statistics=way == "statistics").maps


REQUESTS = [
    MapRequest(kind, heads, (row_stream, rows), (column_stream, columns))  # type: ignore[arg-type]
    for kind in ("probability", "logit", "text_probability")
    for row_stream in ("image", "text")
    for column_stream in ("image", "text")
    if (kind, column_stream) != ("text_probability", "image")
    for heads, rows, columns in zip(
        ["mean", "each", "mean"], SOME[row_stream], reversed(SOME[column_stream]), strict=True
    )
]


@pytest.mark.parametrize("way", ["output", "maps", "statistics"])
@BOTH
def test_every_relation_and_its_gradients(name: Any, way: str) -> None:
    inputs = attention_inputs(2, N, T, 3, 8, torch.float64)
    for bias in (None, some_bias()):
        for request in REQUESTS:
            leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
            expected = chosen(matrix(leaves, bias, request.kind), N, request)
            upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
            wanted = [leaves[n] for n in ("query", "key", "text_query", "text_key")]
            true = torch.autograd.grad(expected, wanted, upstream, materialize_grads=True)
            with backend(name):
                found = maps_of(way, leaves, request, bias)
                gradients = torch.autograd.grad(found, wanted, upstream, materialize_grads=True)
            torch.testing.assert_close(found, expected, msg=str(request))
            for stream, one, other in zip(("q", "k", "tq", "tk"), gradients, true, strict=True):
                torch.testing.assert_close(one, other, msg=f"{stream} of {request}")


@pytest.mark.parametrize("relation", [("text", "image"), ("image", "image"), ("text", "text")], ids=str)
def test_gradients_of_map_and_outputs_add_up(relation: Any) -> None:
    """The gradient that the log-sum-exp hands on, beside those of both outputs."""
    inputs = attention_inputs(2, N, T, 3, 8, torch.float64, edited=True)
    request = MapRequest(rows=(relation[0], slice(1, 6)), columns=(relation[1], slice(2, 5)))
    found = []
    for name in ("reference", "aten"):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        with backend(name):  # type: ignore[arg-type]
            result = joint_attention(**leaves, maps=request, text_bias=some_bias())
        loss = result.image.square().sum() + result.text.square().sum() + 9 * result.maps.square().sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for stream, one, other in zip(inputs, *found, strict=True):
        torch.testing.assert_close(one, other, msg=stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["image", "text"])
@pytest.mark.parametrize("columns", ["image", "text"])
def test_relations_keep_the_error_budget(rows: Any, columns: Any, dtype: torch.dtype) -> None:
    """Against what the log-sum-exp alone allows: it is a float32 of about 7, rounded once."""
    inputs = attention_inputs(2, 150, 33, 3, 32, dtype)
    request = MapRequest(rows=(rows, slice(None)), columns=(columns, slice(None)))
    streams = {n: t for n, t in inputs.items() if not n.endswith("value")}
    found = attention_maps(**streams, maps=request).maps
    exact = chosen(matrix({n: t.double() for n, t in inputs.items()}, None, "probability"), 150, request)
    scores = matrix({n: t.float() for n, t in inputs.items()}, None, "logit")
    usual = chosen((scores - scores.logsumexp(-1, keepdim=True)).exp(), 150, request)
    assert_accurate(found, exact, usual, name=f"{rows} to {columns}")


@BOTH
def test_without_text_queries(name: Any) -> None:
    inputs = attention_inputs(2, N, T, 3, 8, torch.float64, edited=True)
    whole = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    part = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    options: dict[str, Any] = {"maps": MapRequest(), "statistics": True, "text_bias": some_bias()}
    with backend(name):
        expected = joint_attention(**whole, **options)
        found = joint_attention(**{**part, "text_query": None}, **options)
        for result in (expected, found):
            (result.image.square().sum() + result.maps.square().sum()).backward()
    torch.testing.assert_close(found.image, expected.image)
    torch.testing.assert_close(found.maps, expected.maps)
    torch.testing.assert_close(found.lse, expected.lse[:, :, :N])
    torch.testing.assert_close(found.statistics.image_to_text, expected.statistics.image_to_text)
    torch.testing.assert_close(found.statistics.text_value_norm, expected.statistics.text_value_norm)
    assert found.text.shape == (2, 0, 3, 8)
    assert found.statistics.text_to_text.shape == (2, 3, 0)
    for stream in inputs:
        one, other = part[stream].grad, whole[stream].grad
        if one is None:
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(one, other, msg=stream)


@pytest.mark.parametrize("with_text_rows", [False, True])
@pytest.mark.parametrize("kind", [None, "probability", "logit", "text_probability"])
@BOTH
def test_without_image_keys(name: Any, kind: Any, with_text_rows: bool) -> None:
    """Cross-attention, against PyTorch's; the second batch element has no valid text token."""
    inputs = attention_inputs(3, N, T, 3, 8, torch.float64)
    bias = torch.zeros(3, T)
    bias[0] = some_bias()[0]
    bias[1] = -torch.inf
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    request = None if kind is None else MapRequest(kind, "each")
    streams = (leaves["query"], None, None, leaves["text_query"] if with_text_rows else None)
    with backend(name):
        result = joint_attention(
            *streams, leaves["text_key"], leaves["text_value"], maps=request, statistics=True, text_bias=bias
        )
        outputs = [result.image] + [result.text] * with_text_rows + [result.maps] * (kind is not None)
        wanted = [leaves[n] for n in ("query", "text_query", "text_key", "text_value")]
        upstream = [
            torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).double() for o in outputs
        ]
        gradients = torch.autograd.grad(outputs, wanted, upstream, allow_unused=True, materialize_grads=True)

    expected = []
    valid = torch.tensor([True, False, True])[:, None, None, None]
    k, v = (leaves[f"text_{n}"].transpose(1, 2) for n in ("key", "value"))
    logits = {}
    for stream in ("query", "text_query")[: 1 + with_text_rows]:
        logits[stream] = leaves[stream].transpose(1, 2) @ k.mT / 8**0.5
        scores = torch.where(valid, logits[stream] + bias[:, None, None], 0.0)
        probability = torch.where(valid, scores.softmax(-1), 0.0)
        expected.append((probability @ v).transpose(1, 2))
        if stream == "query":
            entries = torch.where((bias == -torch.inf)[:, None, None], 0.0, logits[stream])
            entries = entries if kind == "logit" else probability
    expected += [entries] * (kind is not None)
    for found, true in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, true)
    every = torch.cat([logits[stream] for stream in logits], dim=2) + bias[:, None, None]
    torch.testing.assert_close(result.lse, every.logsumexp(-1))
    assert (result.lse[1] == -torch.inf).all()
    masses = result.statistics.image_to_text
    torch.testing.assert_close(masses, valid[..., 0].expand_as(masses).double())
    for found, true in zip(
        gradients,
        torch.autograd.grad(expected, wanted, upstream, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(found, true)
    with backend(name):
        if kind is not None:
            alone = attention_maps(*streams[:2], None, leaves["text_key"], maps=request, text_bias=bias)
            torch.testing.assert_close(alone.maps, entries)


@pytest.mark.parametrize("heads", HEADS)
@BOTH
def test_a_log_sum_exp_from_outside(name: Any, heads: Any) -> None:
    inputs = attention_inputs(2, N, T, 3, 8, torch.float64)
    bias = some_bias()
    lse = joint_attention(**inputs, text_bias=bias).lse
    query, text_query, text_key = (inputs[n] for n in ("query", "text_query", "text_key"))
    whole = matrix(inputs, bias, "probability")
    for rows in SOME["image"]:
        request = MapRequest(heads=heads, rows=("image", rows), columns=("text", slice(2, 6)))
        for given in (lse, lse[:, :, :N]):
            with backend(name):
                found = attention_maps(query, None, None, text_key, maps=request, text_bias=bias, lse=given)
            torch.testing.assert_close(found.maps, chosen(whole, N, request))
    request = MapRequest(heads=heads, rows=("text", slice(1, 4)), columns=("image", SOME["image"][2]))
    with backend(name):
        found = attention_maps(query, inputs["key"], text_query, text_key, maps=request, lse=lse)
    torch.testing.assert_close(found.maps, chosen(whole, N, request))


@BOTH
def test_rows_that_have_read_nothing(name: Any) -> None:
    inputs = attention_inputs(1, N, T, 2, 8, torch.float64)
    query, text_key = (inputs[n].clone().requires_grad_() for n in ("query", "text_key"))
    lse = torch.zeros(1, 2, N, dtype=torch.float64)
    lse[:, :, 4] = -torch.inf
    with backend(name):
        maps = attention_maps(query, None, None, text_key, lse=lse).maps
    gradients = torch.autograd.grad(maps.square().sum(), (query, text_key))
    assert not maps[:, 4].any()
    assert maps[:, 5].all()
    assert not gradients[0][:, 4].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@BOTH
def test_the_map_is_differentiable_in_a_log_sum_exp_from_outside(name: Any) -> None:
    """With the caller's own graph behind it the gradient is the whole one; without, the key has no say."""
    inputs = attention_inputs(2, N, T, 3, 8, torch.float64)
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("query", "key", "text_query", "text_key")}
    whole = chosen(matrix(leaves, None, "probability"), N, MapRequest())
    lse = matrix(leaves, None, "logit").logsumexp(-1)[:, :, :N]
    query, key, text_key = leaves["query"], leaves["key"], leaves["text_key"]
    with backend(name):
        maps = attention_maps(query, None, None, text_key, lse=lse).maps
        constant = attention_maps(query, None, None, text_key, lse=lse.detach()).maps
    true = torch.autograd.grad(whole.square().sum(), (query, key, text_key))
    found = torch.autograd.grad(maps.square().sum(), (query, key, text_key), retain_graph=True)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.grad(constant.square().sum(), key, allow_unused=True) == (None,)


def test_shards_of_keys_merge() -> None:
    """The log-sum-exp over parts of the keys: text alone, and the image keys in two."""
    inputs = attention_inputs(2, N, T, 3, 8, torch.float64)
    query, key, text_key = (inputs[n] for n in ("query", "key", "text_key"))
    parts = [attention_maps(query, None, None, text_key, text_bias=some_bias()).lse]
    for shard in (key[:, :5], key[:, 5:]):
        parts.append((query.transpose(1, 2) @ shard.permute(0, 2, 3, 1) / 8**0.5).logsumexp(-1))
    lse = torch.stack(parts).logsumexp(0)  # type: ignore[arg-type]
    found = attention_maps(query, None, None, text_key, text_bias=some_bias(), lse=lse).maps
    torch.testing.assert_close(found, chosen(matrix(inputs, some_bias(), "probability"), N, MapRequest()))


def test_relations_compile_as_one_graph() -> None:
    inputs = attention_inputs(2, N, T, 2, 16, torch.float32)
    index = torch.tensor([5, 0, 12, 5])

    def model(scale: Tensor, index: Tensor) -> Tensor:
        given = {**inputs, "query": inputs["query"] * scale}
        loss = scale * 0
        for request in (
            MapRequest(rows=("image", index)),
            MapRequest(rows=("text", slice(1, 4)), columns=("image", index)),
            MapRequest("logit", rows=("image", index), columns=("image", index)),
        ):
            result = joint_attention(**given, maps=request, text_bias=some_bias())
            streams = (given[n] for n in ("query", "key", "text_query", "text_key"))
            alone = attention_maps(*streams, maps=request)
            loss = loss + result.image.sum() + result.maps.square().sum() + alone.maps.square().sum()
        lse = result.lse
        return loss + attention_maps(given["query"], None, None, given["text_key"], lse=lse).maps.sum()

    torch.compiler.reset()
    counter, found = CompileCounter(), []
    for function in (model, torch.compile(model, fullgraph=True, backend=counter)):
        scale = torch.tensor(1.5, requires_grad=True)
        loss = function(scale, index)
        found.append((loss.detach(), *torch.autograd.grad(loss, scale)))
    torch.testing.assert_close(found[0], found[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_operator_keeps_the_rules_of_torch_library(mean: bool, normalised: bool) -> None:
    inputs = attention_inputs(2, N, T, 2, 16, torch.float32)
    rows, columns = (inputs[n].requires_grad_() for n in ("query", "text_key"))
    lse = torch.full((2, 2, N), 5.0, requires_grad=True) if normalised else None
    given = (rows, columns, some_bias(), lse, 0.25, mean)
    torch.library.opcheck(torch.ops.seg4diff.map_entries.default, given)
