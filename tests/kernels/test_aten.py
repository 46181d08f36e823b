"""The ATen backend: the error budget, the gradients, and PyTorch's own machinery around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.aten import backward, blocks, forward
from seg4diff.kernels.testing import (
    assert_accurate,
    attention_inputs,
    exact_attention,
    pytorch_attention,
)
from seg4diff.kernels.types import AttentionMaps, Backend, Inputs, JointAttention, MapRequest, Request
from tests.support.materialised import joint_scores

KINDS = ["probability", "logit", "text_probability"]
HEADS = ["mean", "each"]
SHAPES = [(1, 1, 5, 1, 16), (3, 63, 77, 2, 64), (1, 255, 33, 3, 40)]  # batch, N, T, H, D
UPSTREAM = {
    "both": ("image", "text", "maps"),
    "outputs": ("image", "text"),
    "map": ("maps",),
    "image": ("image",),
    "text": ("text",),
}


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    with backend("aten"):
        yield


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, edited: bool) -> None:
    inputs = attention_inputs(*shape, dtype, edited=edited)
    for kind in KINDS:
        for heads in HEADS:
            request = MapRequest(kind, heads, columns=("text", slice(1, 4)))  # type: ignore[arg-type]
            options: dict[str, Any] = {"maps": request, "statistics": True}
            actual = joint_attention(**inputs, **options)
            exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
            if kind == "probability" and dtype in (torch.bfloat16, torch.float16):
                baseline = replace(baseline, maps=materialised(inputs, request))
            compare(actual, exact, baseline, dtype, f"{kind} {heads}")


def materialised(inputs: dict[str, Tensor], request: MapRequest) -> Tensor:
    """Probabilities from scores in the dtype of the inputs, as code does that materialises them.

    On the CPU, PyTorch's flash attention in half precision calculates exponentials, and so its log-sum-exp,
    to 20 bits: a map from it cannot be as exact as a float32 softmax, which holds everywhere else.
    """
    tokens = inputs["query"].shape[1]
    scores = joint_scores(*(inputs[name] for name in ("query", "key", "text_query", "text_key")))
    entries = scores[:, :, :tokens].float().softmax(dim=-1)[..., tokens:]
    entries = entries[..., request.columns[1]]
    return entries.mean(dim=1) if request.heads == "mean" else entries


def compare(
    actual: JointAttention, exact: JointAttention, baseline: JointAttention, dtype: torch.dtype, name: str
) -> None:
    for part in ("image", "text", "maps"):
        results = [getattr(result, part) for result in (actual, exact, baseline)]
        if dtype == torch.float64:
            torch.testing.assert_close(results[0], results[1])
        else:
            assert_accurate(*results, name=f"{part} with {name}")
    for part in ("image_to_text", "text_to_text", "image_value_norm", "text_value_norm"):
        results = [getattr(result.statistics, part) for result in (actual, exact, baseline)]
        # Relative to each entry; in half precision a mass is as exact as the log-sum-exp (see below).
        rtol = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-4)
        torch.testing.assert_close(results[0].double(), results[1], rtol=rtol, atol=0)


def upstream(result: JointAttention, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Random upstream gradients; the map's is scaled to weigh as much as the output's."""
    generator = torch.Generator().manual_seed(3)
    drawn = {}
    for name in names:
        output = getattr(result, name)
        gradient = torch.randn(output.shape, generator=generator).to(output.dtype)
        drawn[name] = 10 * gradient if name == "maps" else gradient
    return drawn


def gradients(
    attend: Callable[..., JointAttention],
    inputs: dict[str, Tensor],
    given: dict[str, Tensor],
    **options: Any,
) -> dict[str, Tensor | None]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    result = attend(**leaves, **options)
    outputs = [getattr(result, name) for name in given]
    upstreams = [gradient.to(output.dtype) for gradient, output in zip(given.values(), outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), upstreams, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("given", UPSTREAM)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_reference_s(kind: Any, heads: Any, given: str) -> None:
    """In float64, where a missing term cannot hide: every upstream gradient, alone and together."""
    inputs = attention_inputs(2, 21, 9, 3, 16, torch.float64, edited=True)
    options: dict[str, Any] = {"maps": MapRequest(kind, heads, columns=("text", slice(2, 7)))}
    wanted = upstream(joint_attention(**inputs, **options), UPSTREAM[given])
    actual = gradients(joint_attention, inputs, wanted, **options)
    exact = gradients(exact_attention, inputs, wanted, **options)
    for name in inputs:
        true, found = exact[name], actual[name]
        assert found is not None
        torch.testing.assert_close(found, torch.zeros_like(found) if true is None else true, msg=name)


@pytest.mark.parametrize("given", UPSTREAM)
@pytest.mark.parametrize("kind", KINDS)
def test_devices_without_these_operators(kind: Any, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch has no flash attention, blocks of rows take its place; several blocks, and a part."""

    def in_blocks(query: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = forward._attention_in_blocks(query.transpose(1, 2), k, v, scale)
        return out.transpose(1, 2), lse

    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 8 * 2 * 3 * 21)  # 8 of 21 rows
    monkeypatch.setattr(forward, "flash", in_blocks)
    monkeypatch.setattr(backward, "_flash_gradients", backward._gradients_in_blocks)
    test_gradients_are_the_reference_s(kind, "mean", given)


@pytest.mark.parametrize("given", ["both", "map", "outputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_keep_the_error_budget(dtype: torch.dtype, given: str) -> None:
    inputs = attention_inputs(2, 100, 33, 3, 64, dtype)
    options: dict[str, Any] = {"maps": MapRequest()}
    wanted = upstream(joint_attention(**inputs, **options), UPSTREAM[given])
    actual = gradients(joint_attention, inputs, wanted, **options)
    exact = gradients(exact_attention, {n: t.double() for n, t in inputs.items()}, wanted, **options)
    baseline = gradients(pytorch_attention, inputs, wanted, **options)
    for name in inputs:
        true, found, usual = exact[name], actual[name], baseline[name]
        assert found is not None
        if true is None or not true.any():
            assert not found.any()
        else:
            assert_accurate(found, true, usual, name=f"d_{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ["all", "some-zero", "tiny"])
def test_the_sum_that_a_map_adds(rows: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes into another output along dO, or where that cannot hold it, into channels of its own."""
    taken: list[bool] = []

    def along(*given: Tensor) -> Tensor | None:
        found = along_gradient(*given)
        taken.append(found is not None)
        return found

    along_gradient = backward._along_gradient
    monkeypatch.setattr(backward, "_along_gradient", along)
    inputs = attention_inputs(2, 70, 33, 2, 64, dtype)
    options: dict[str, Any] = {"maps": MapRequest()}
    wanted = upstream(joint_attention(**inputs, **options), UPSTREAM["both"])
    if rows == "some-zero":
        wanted["image"][:, 3:9] = 0
    elif rows == "tiny":  # its square is 0 in float32
        wanted["image"][:, 3:9] *= 1e-30
    actual = gradients(joint_attention, inputs, wanted, **options)
    exact = gradients(exact_attention, {n: t.double() for n, t in inputs.items()}, wanted, **options)
    baseline = gradients(pytorch_attention, inputs, wanted, **options)
    for name in inputs:
        assert_accurate(actual[name], exact[name], baseline[name], name=f"d_{name}")  # type: ignore[arg-type]
    assert taken == [rows == "all" and dtype != torch.float16]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_alone(kind: Any) -> None:
    """The same map and gradients as with values, and only the log-sum-exp that was needed."""
    inputs = attention_inputs(2, 50, 20, 3, 32, torch.float64)
    streams = {name: t for name, t in inputs.items() if not name.endswith("value")}
    request = MapRequest(kind, "mean", columns=("text", slice(3, 17)))
    whole = joint_attention(**inputs, maps=request, statistics=True)
    for statistics in (False, True):
        alone = attention_maps(**streams, maps=request, statistics=statistics)
        assert isinstance(alone, AttentionMaps)
        torch.testing.assert_close(alone.maps, whole.maps)
    torch.testing.assert_close(alone.statistics.text_to_text, whole.statistics.text_to_text)
    query, key, text_key = (streams[name] for name in ("query", "key", "text_key"))
    bare = attention_maps(query, key, None, text_key, maps=request)
    assert (bare.lse is None) == (kind != "probability")
    wanted = upstream(whole, ("maps",))
    expected = gradients(joint_attention, inputs, wanted, maps=request)
    found = gradients(attention_maps, streams, wanted, maps=request)
    for name, gradient in found.items():
        reference = expected[name]
        if gradient is None:
            assert reference is None or not reference.any()
        else:
            torch.testing.assert_close(gradient, reference)


def test_strided_views_give_the_same_numbers() -> None:
    inputs = attention_inputs(2, 63, 20, 2, 32, torch.float32)
    views = {}
    for prefix in ("", "text_"):
        names = [f"{prefix}{name}" for name in ("query", "key", "value")]
        fused = torch.stack([inputs[name] for name in names], dim=2)  # [B, tokens, 3, H, D]
        views.update({name: fused[:, :, index] for index, name in enumerate(names)})
    assert not any(view.is_contiguous() for view in views.values())
    results = [joint_attention(**given, maps=MapRequest()) for given in (inputs, views)]
    for part in ("image", "text", "maps", "lse"):
        torch.testing.assert_close(*(getattr(result, part) for result in results), rtol=1e-6, atol=1e-6)


def stepped(tensor: Tensor) -> Tensor:
    """Every second element of a tensor whose others are NaN."""
    wide = torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)
    return wide.flatten(-2)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv features": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "heads innermost": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every second channel": stepped,
    "one channel for all": lambda t: t[..., :1].expand_as(t),
    "one head for all": lambda t: t[:, :, :1].expand_as(t),
    "one element for all": lambda t: t[:1, :1, :1, :1].expand_as(t),
}
ALL_STREAMS = ("query", "key", "value", "text_query", "text_key", "text_value", "text_value_for_image")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, compiled: bool) -> None:
    """Each of the seven tensors alone and all of them together, outputs and gradients."""
    ours: Callable[..., JointAttention] = joint_attention
    if compiled:
        torch.compiler.reset()  # each set of strides is one more compilation
        ours = torch.compile(joint_attention, backend="eager", fullgraph=True)
    inputs = attention_inputs(2, 21, 9, 3, 16, torch.float32, edited=True)
    options: dict[str, Any] = {"maps": MapRequest(columns=("text", slice(1, 8))), "statistics": True}
    for strided in [ALL_STREAMS] if compiled else [(name,) for name in ALL_STREAMS] + [ALL_STREAMS]:
        label = f"{layout}: {', '.join(strided)}"
        views = {name: LAYOUTS[layout](t) if name in strided else t for name, t in inputs.items()}
        copies = {name: t.contiguous() for name, t in views.items()}
        assert not any(views[name].is_contiguous() for name in strided)
        actual = ours(**views, **options)
        exact, baseline = exact_attention(**copies, **options), pytorch_attention(**copies, **options)
        compare(actual, exact, baseline, torch.float32, label)
        assert_accurate(actual.lse, exact.lse, baseline.lse, name=f"lse with {label}")
        wanted = upstream(actual, ("image", "text", "maps"))
        found = gradients(ours, views, wanted, **options)
        expected = gradients(joint_attention, copies, wanted, **options)
        for stream in ALL_STREAMS:
            largest = float(expected[stream].abs().max())
            torch.testing.assert_close(
                found[stream], expected[stream], rtol=0, atol=1e-5 * largest, msg=f"d_{stream}, {label}"
            )


def test_compiles_as_one_graph() -> None:
    inputs = attention_inputs(1, 20, 9, 2, 16, torch.float32)

    def model(scale: Tensor, **streams: Tensor) -> Tensor:
        streams["query"] = streams["query"] * scale
        result = joint_attention(**streams, maps=MapRequest(), statistics=True)
        return result.image.sum() + result.maps.square().sum() + result.statistics.image_to_text.sum()

    losses, found, counter = [], [], CompileCounter()
    for function in (model, torch.compile(model, fullgraph=True, backend=counter)):
        scale = torch.tensor(1.5, requires_grad=True)
        losses.append(function(scale, **inputs))
        found.append(torch.autograd.grad(losses[-1], scale)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(found[0], found[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", [None, "probability", "logit"])
def test_operators_keep_the_rules_of_torch_library(kind: str | None) -> None:
    inputs = attention_inputs(1, 9, 5, 2, 16, torch.float32, edited=True)
    tensors = tuple(tensor.requires_grad_() for tensor in inputs.values())
    bias = torch.tensor([[0.5, -torch.inf, 0.0, 1.0, 0.0]])
    request = (bias, 0.25, kind, "mean", 0, 0 if kind is None else 5, True)
    torch.library.opcheck(torch.ops.seg4diff.aten_forward.default, (*tensors, *request))
    lse = torch.zeros(1, 2, 14)
    given = (tensors[0], tensors[3], tensors[4], lse, 0.25, bias)
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
    torch.library.opcheck(torch.ops.seg4diff.aten_mass.default, detached)
    torch.library.opcheck(torch.ops.seg4diff.aten_value_norm.default, (tensors[2].detach(),))


def test_autocast_casts_as_pytorch_s_attention_does() -> None:
    inputs = attention_inputs(1, 20, 9, 2, 16, torch.float32)
    inputs["value"] = inputs["value"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = joint_attention(**inputs, maps=MapRequest())
    rounded = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    expected = joint_attention(**rounded, maps=MapRequest())
    assert result.image.dtype == torch.bfloat16
    assert torch.equal(result.image, expected.image)


@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("text_first", [False, True])
def test_both_streams_are_parts_of_one_output(text_first: bool, name: Backend) -> None:
    """In the order asked for, with the gradients of its parts."""
    inputs = attention_inputs(2, 20, 9, 2, 16, torch.float32)
    with backend(name):
        result = joint_attention(**inputs, text_first=text_first)
        plain = joint_attention(**inputs)
        parts = [plain.text, plain.image] if text_first else [plain.image, plain.text]
        assert torch.equal(result.joint, torch.cat(parts, dim=1))
        assert torch.equal(result.image, plain.image)
        start = 9 if text_first else 0
        if name == "aten":
            assert result.image.data_ptr() == result.joint[:, start:].data_ptr()
        given = {"joint": torch.randn(result.joint.shape, generator=torch.Generator().manual_seed(4))}
        found = gradients(joint_attention, inputs, given, text_first=text_first)
        order = (slice(9, None), slice(9)) if text_first else (slice(20), slice(20, None))
        apart = {
            stream: given["joint"][:, rows] for stream, rows in zip(("image", "text"), order, strict=True)
        }
        expected = gradients(joint_attention, inputs, apart)
    for stream, gradient in found.items():
        torch.testing.assert_close(gradient, expected[stream], msg=stream)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    inputs = {n: t.requires_grad_() for n, t in attention_inputs(1, 20, 9, 2, 16, torch.float32).items()}
    expected = joint_attention(**inputs, maps=MapRequest(), statistics=True)
    with mode():
        result = joint_attention(**inputs, maps=MapRequest(), statistics=True)
    for part in ("image", "text", "maps", "lse"):
        assert not getattr(result, part).requires_grad
        assert torch.equal(getattr(result, part), getattr(expected, part))
    assert expected.maps.requires_grad
    assert not expected.lse.requires_grad


def test_no_matrix_of_all_tokens_exists() -> None:
    """Neither direction allocates a tensor as large as one head's S x S scores."""
    tokens, text = 3000, 100
    inputs = attention_inputs(1, tokens, text, 2, 16, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    given = Inputs(**inputs, text_value_for_image=None)
    request = Request(0.25, "probability", "mean", 0, text)
    with Watch():  # a mode does not see inside an operator
        joint, lse, maps = forward.forward(given, request)
        streams = request.split(joint, tokens)
        gradients = backward.backward(*streams, maps, given, *streams, lse, request)
    assert gradients[4].any()
    assert maps.untyped_storage().nbytes() < largest < 4 * (tokens + text) ** 2
