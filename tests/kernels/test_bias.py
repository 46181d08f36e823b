"""The text bias: what it does to the softmax, to maps, statistics and gradients, in both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.testing import (
    assert_accurate,
    attention_inputs,
    exact_attention,
    exact_maps,
    pytorch_attention,
)
from seg4diff.kernels.types import JointAttention, MapRequest

KINDS = ["probability", "logit", "text_probability"]
HEADS = ["mean", "each"]
PARTS = ("image", "text", "lse", "maps")
BOTH = pytest.mark.parametrize("name", ["reference", "aten"])


def some_bias(batch: int, text: int) -> Tensor:
    """Another one for each batch element, with masked columns on the left, in the middle and on the right."""
    bias = torch.randn(batch, text, generator=torch.Generator().manual_seed(5)) * 2
    for row in range(batch):
        bias[row, row] = bias[row, text // 2] = bias[row, -1 - row] = -torch.inf
    return bias


@BOTH
def test_a_masked_token_is_as_good_as_absent(name: Any) -> None:
    """Each batch element against a call without its masked columns and without a bias."""
    inputs = attention_inputs(2, 7, 6, 3, 8, torch.float64, edited=True)
    masked = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    bias = torch.zeros(2, 6).masked_fill(masked, -torch.inf)
    for kind in KINDS:
        request = MapRequest(kind, "each")  # type: ignore[arg-type]
        with backend(name):
            found = joint_attention(**inputs, maps=request, statistics=True, text_bias=bias)
        for row in range(2):
            kept = ~masked[row]
            alone = {
                n: t[row : row + 1, kept] if n.startswith("text_") else t[row : row + 1]
                for n, t in inputs.items()
            }
            expected = exact_attention(**alone, maps=request, statistics=True)
            torch.testing.assert_close(found.image[row], expected.image[0])
            torch.testing.assert_close(found.text[row, kept], expected.text[0])
            torch.testing.assert_close(found.lse[row, :, :7], expected.lse[0, :, :7])
            torch.testing.assert_close(found.maps[row, :, :, kept], expected.maps[0])
            assert not found.maps[row, :, :, masked[row]].any()
            shown, plain = found.statistics, expected.statistics
            torch.testing.assert_close(shown.image_to_text[row], plain.image_to_text[0])
            torch.testing.assert_close(shown.text_to_text[row][:, kept], plain.text_to_text[0])


@BOTH
def test_a_bias_of_log_3_is_three_equal_tokens(name: Any) -> None:
    inputs = attention_inputs(1, 7, 4, 2, 8, torch.float64)
    bias = torch.tensor([[0.0, 0.0, 3.0, 0.0]]).log_().nan_to_num_(neginf=0.0)
    tripled = {
        n: torch.cat([t, t[:, 2:3], t[:, 2:3]], dim=1) if n.startswith("text_") else t
        for n, t in inputs.items()
    }
    with backend(name):
        found = joint_attention(**inputs, maps=MapRequest(), text_bias=bias)
    expected = exact_attention(**tripled, maps=MapRequest())
    torch.testing.assert_close(found.image, expected.image, rtol=1e-6, atol=1e-7)  # log 3 is a float32
    torch.testing.assert_close(found.maps[..., 2], expected.maps[..., [2, 4, 5]].sum(-1), rtol=1e-6, atol=0)


@BOTH
def test_the_logit_map_does_not_contain_the_bias(name: Any) -> None:
    inputs = attention_inputs(2, 7, 6, 3, 8, torch.float64)
    bias = some_bias(2, 6)
    for heads in HEADS:
        request = MapRequest("logit", heads)  # type: ignore[arg-type]
        with backend(name):
            found = joint_attention(**inputs, maps=request, text_bias=bias).maps
        masked = (bias == -torch.inf)[:, None] if heads == "mean" else (bias == -torch.inf)[:, None, None]
        torch.testing.assert_close(found, exact_attention(**inputs, maps=request).maps.masked_fill(masked, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_keeps_the_error_budget(dtype: torch.dtype) -> None:
    inputs = attention_inputs(3, 63, 21, 2, 64, dtype, edited=True)
    bias = some_bias(3, 21)
    for kind in KINDS:
        options: dict[str, Any] = {"maps": MapRequest(kind), "statistics": True, "text_bias": bias}  # type: ignore[arg-type]
        found = joint_attention(**inputs, **options)
        exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
        for part in ("image", "text"):
            assert_accurate(getattr(found, part), getattr(exact, part), getattr(baseline, part), name=part)
        # In half precision PyTorch's flash attention on a CPU knows its log-sum-exp to 20 bits.
        rtol = 2e-4 if dtype == torch.bfloat16 else 1e-5
        masses = (result.statistics.image_to_text for result in (found, exact))
        torch.testing.assert_close(next(masses).double(), next(masses), rtol=rtol, atol=0)
        if dtype == torch.float32:
            assert_accurate(found.maps, exact.maps, baseline.maps, name=kind)
        else:
            torch.testing.assert_close(found.maps.double(), exact.maps, rtol=rtol, atol=1e-5)


def all_gradients(attend: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    result: JointAttention = attend(**leaves, **options)
    generator = torch.Generator().manual_seed(3)
    loss: Any = 0.0
    for part in ("image", "text", "maps"):
        output = getattr(result, part)
        if output is not None and output.requires_grad:
            loss = loss + (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return list(found)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_reference_s(kind: Any, heads: Any) -> None:
    inputs = attention_inputs(2, 21, 9, 3, 16, torch.float64, edited=True)
    bias = some_bias(2, 9)
    bias[1] = -torch.inf  # no valid text at all
    options: dict[str, Any] = {
        "maps": MapRequest(kind, heads, columns=("text", slice(0, 7))),
        "text_bias": bias,
    }
    found = all_gradients(joint_attention, inputs, **options)
    for name, ours, exact in zip(
        inputs, found, all_gradients(exact_attention, inputs, **options), strict=True
    ):
        torch.testing.assert_close(ours, exact, msg=name)
    masked = bias == -torch.inf
    for name, gradient in zip(inputs, found, strict=True):
        if name in ("text_key", "text_value_for_image", "text_value"):
            assert not gradient[masked].any(), name
            assert gradient[~masked].abs().amin(dim=(1, 2)).min() > 0, name
        if name == "text_query":  # the row of a masked token is a row like any other
            assert gradient[masked].abs().amin(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_of_the_reference(kind: Any) -> None:
    inputs = attention_inputs(2, 4, 3, 2, 4, torch.float64, edited=True)
    bias = torch.tensor([[0.5, -torch.inf, -1.0], [-torch.inf] * 3])

    def outputs(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        result = joint_attention(**given, maps=MapRequest(kind), text_bias=bias)
        return result.image, result.text, result.maps

    with backend("reference"):
        assert torch.autograd.gradcheck(outputs, tuple(t.requires_grad_() for t in inputs.values()))


@BOTH
def test_no_valid_text_token_at_all(name: Any) -> None:
    inputs = attention_inputs(2, 7, 4, 3, 8, torch.float64)
    bias = torch.zeros(2, 4)
    bias[1] = -torch.inf
    for kind in KINDS:
        options: dict[str, Any] = {"maps": MapRequest(kind), "text_bias": bias, "statistics": True}  # type: ignore[arg-type]
        with backend(name):
            found = joint_attention(**inputs, **options)
            assert not found.maps[1].any()
            assert found.maps[0].all()
            assert not found.statistics.image_to_text[1].any()
            gradients = all_gradients(joint_attention, inputs, **options)
        q, k, v = (inputs[n][1].transpose(0, 1) for n in ("query", "key", "value"))
        image = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        torch.testing.assert_close(found.image[1], image)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_alone(kind: Any) -> None:
    inputs = attention_inputs(2, 30, 9, 3, 16, torch.float64)
    streams = {n: t for n, t in inputs.items() if not n.endswith("value")}
    options: dict[str, Any] = {"maps": MapRequest(kind), "text_bias": some_bias(2, 9), "statistics": True}
    found, exact = attention_maps(**streams, **options), exact_maps(**streams, **options)
    torch.testing.assert_close(found.maps, exact.maps)
    torch.testing.assert_close(found.statistics.text_to_text, exact.statistics.text_to_text)
    ours, theirs = (
        all_gradients(f, streams, **options) for f in (MapsOnly(attention_maps), MapsOnly(exact_maps))
    )
    for name, one, other in zip(streams, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=name)


class MapsOnly:
    """`attention_maps` as `all_gradients` wants it."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, **arguments: Any) -> Any:
        maps = self.function(**arguments).maps
        nothing = maps.detach()
        return JointAttention(nothing, image=nothing, text=nothing, lse=maps, maps=maps, statistics=None)


ACCEPTED = r"accepted: float32 \[B, T\], here \[2, 4\], values up to 88 or -inf"


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.bool), rf"dtype torch.bool; {ACCEPTED}; a mask becomes"),
        (torch.zeros(2, 4).double(), f"dtype torch.float64; {ACCEPTED}"),
        (torch.zeros(2, 3), rf"shape \[2, 3\]; {ACCEPTED}"),
        (torch.zeros(1, 4), rf"shape \[1, 4\]; {ACCEPTED}"),
        (torch.zeros(2, 1, 1, 4), rf"shape \[2, 1, 1, 4\]; {ACCEPTED}"),
        (torch.full((2, 4), torch.nan), f"a value of nan; {ACCEPTED}"),
        (torch.full((2, 4), torch.inf), f"a value of inf; {ACCEPTED}"),
        (torch.full((2, 4), 88.5), f"a value of 88.5; {ACCEPTED}"),
        (torch.zeros(2, 4, device="meta"), "text_bias is on meta, but text_key is on cpu"),
        (torch.zeros(2, 4, requires_grad=True), "text_bias requires grad, but it is not differentiable"),
    ],
)
def test_a_bias_that_means_nothing(bias: Tensor, message: str) -> None:
    inputs = attention_inputs(2, 6, 4, 3, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        joint_attention(**inputs, text_bias=bias)
    with pytest.raises(ValueError, match=message):
        attention_maps(*(inputs[n] for n in ("query", "key", "text_query", "text_key")), text_bias=bias)


def test_a_bias_that_is_no_tensor() -> None:
    inputs = attention_inputs(2, 6, 4, 3, 8, torch.float32)
    with pytest.raises(TypeError, match=f"text_bias must be a tensor, got float; {ACCEPTED}"):
        joint_attention(**inputs, text_bias=0.5)  # type: ignore[arg-type]


def test_the_largest_bias_is_accepted() -> None:
    inputs = attention_inputs(2, 6, 4, 3, 8, torch.float32)
    bias = torch.zeros(2, 4)
    bias[:, 1] = 88
    found = joint_attention(**inputs, text_bias=bias, maps=MapRequest("probability"))
    torch.testing.assert_close(found.maps[..., 1], torch.ones(2, 6))
    assert found.image.isfinite().all()


def test_traces_without_reading_values() -> None:
    inputs = attention_inputs(2, 20, 9, 2, 16, torch.float32)
    bias = some_bias(2, 9)

    def model(scale: Tensor, bias: Tensor) -> Tensor:
        given = {**inputs, "query": inputs["query"] * scale}
        result = joint_attention(**given, maps=MapRequest(), statistics=True, text_bias=bias)
        return result.image.sum() + result.maps.square().sum() + result.statistics.image_to_text.sum()

    torch.compiler.reset()
    counter = CompileCounter()
    found = []
    for function in (model, torch.compile(model, fullgraph=True, backend=counter)):
        scale = torch.tensor(1.5, requires_grad=True)
        loss = function(scale, bias)
        found.append((loss.detach(), *torch.autograd.grad(loss, scale)))
    torch.testing.assert_close(found[0], found[1])
    assert counter.frame_count == 1
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(t) for n, t in inputs.items()}
        assert joint_attention(**fake, text_bias=mode.from_tensor(bias)).image.shape == inputs["query"].shape


def test_autocast_leaves_the_bias_alone() -> None:
    inputs = attention_inputs(2, 20, 9, 2, 16, torch.float32)
    bias = some_bias(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = joint_attention(**inputs, text_bias=bias).image
    expected = joint_attention(**{n: t.bfloat16() for n, t in inputs.items()}, text_bias=bias).image
    assert torch.equal(found, expected)
