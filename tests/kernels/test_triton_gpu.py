"""The Triton kernels on a GPU, at the sizes of Stable Diffusion 3, 3.5-large and Flux."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.testing import (
    assert_accurate,
    attention_inputs,
    attention_rows,
    exact_attention,
    pytorch_attention,
)
from seg4diff.kernels.types import JointAttention, MapRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SIZES = [  # image tokens, text tokens, heads, head dim, dtype
    pytest.param(4096, 77, 24, 64, torch.bfloat16, id="sd3-T77"),
    pytest.param(4096, 154, 24, 64, torch.bfloat16, id="sd3-T154"),
    pytest.param(4096, 154, 24, 64, torch.float16, id="sd3-T154-fp16"),
    pytest.param(4096, 333, 24, 64, torch.bfloat16, id="sd3-T333"),
    pytest.param(16384, 154, 24, 64, torch.bfloat16, id="sd3-2048px"),
    pytest.param(4096, 154, 38, 64, torch.bfloat16, id="sd3.5-large"),
    pytest.param(4096, 512, 24, 128, torch.bfloat16, id="flux"),
]
# Every kind of map, and every dtype with some of them: each is a compilation.
KINDS = [
    ("probability", "mean", torch.float32),
    ("probability", "each", torch.float16),
    ("logit", "mean", torch.bfloat16),
    ("logit", "each", torch.float32),
    ("text_probability", "mean", torch.float16),
    ("text_probability", "each", torch.bfloat16),
]
WIDTHS = [(width, torch.bfloat16) for width in (16, 24, 32, 96, 128, 160, 256)]
WIDTHS += [(width, torch.float32) for width in (40, 128, 256)]


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    with backend("triton"):
        yield


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 baselines multiply in float32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize(("tokens", "text_tokens", "heads", "head_dim", "dtype"), SIZES)
def test_forward(tokens: int, text_tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Image rows across the sequence, tails included, and every row's mass through its log-sum-exp."""
    inputs = attention_inputs(1, tokens, text_tokens, heads, head_dim, dtype, device="cuda")
    result = joint_attention(**inputs, maps=MapRequest(), statistics=True)
    rows = torch.cat([torch.arange(0, tokens, 61), torch.arange(tokens - 20, tokens)]).cuda()
    for part in rows.split(64):
        exact, exact_maps = attention_rows(inputs, part, torch.float64)
        _, usual_maps = attention_rows(inputs, part, torch.float32)
        usual, _ = attention_rows(inputs, part, dtype)
        assert_accurate(result.image[:, part], exact, usual, name="output")
        assert_accurate(result.maps[:, part], exact_maps, usual_maps, name="map")
    shown = result.maps.sum(dim=-1)
    torch.testing.assert_close(result.statistics.image_to_text.mean(dim=1), shown, rtol=1e-5, atol=0)


def gradients(
    attend: Callable[..., JointAttention], inputs: dict[str, Tensor], given: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    result = attend(**leaves, **options)
    outputs = [getattr(result, name) for name in given]
    upstreams = [gradient.to(output.dtype) for gradient, output in zip(given.values(), outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), upstreams, allow_unused=True)
    return {
        n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)
    }


@pytest.mark.parametrize("given", [("image", "text", "maps"), ("maps",)], ids="-".join)
@pytest.mark.parametrize(("tokens", "text_tokens", "heads", "head_dim", "dtype"), SIZES)
def test_gradients(
    tokens: int, text_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, given: tuple[str, ...]
) -> None:
    """All heads at once against float64 for one head at a time: heads do not mix in the mean's gradient."""
    inputs = attention_inputs(1, tokens, text_tokens, heads, head_dim, dtype, device="cuda", edited=True)
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = {
        "image": (1, tokens, heads, head_dim),
        "text": (1, text_tokens, heads, head_dim),
        "maps": (1, tokens, text_tokens),
    }
    # The map's gradient is scaled to weigh as much as the output's.
    weight = {"image": 1.0, "text": 1.0, "maps": heads * (tokens + text_tokens) ** 0.5}
    wanted = {
        name: (weight[name] * torch.randn(shapes[name], generator=generator, device="cuda")).to(
            torch.float32 if name == "maps" else dtype
        )
        for name in given
    }
    actual = gradients(joint_attention, inputs, wanted, maps=MapRequest())
    for head in {0, heads // 2, heads - 1}:
        one = {name: tensor[:, :, head : head + 1] for name, tensor in inputs.items()}
        of_head = {
            name: gradient / heads if name == "maps" else gradient[:, :, head : head + 1]
            for name, gradient in wanted.items()
        }
        wide = {name: tensor.double() for name, tensor in one.items()}
        exact = gradients(exact_attention, wide, of_head, maps=MapRequest())
        usual = gradients(pytorch_attention, one, of_head, maps=MapRequest())
        for name, gradient in actual.items():
            found = gradient[:, :, head : head + 1]
            if exact[name].any():
                assert_accurate(found, exact[name], usual[name], name=f"d_{name} of head {head}")
            else:
                assert not found.any()


@pytest.mark.parametrize(("kind", "heads", "dtype"), KINDS)
def test_every_map(kind: Any, heads: Any, dtype: torch.dtype) -> None:
    inputs = attention_inputs(2, 1000, 154, 6, 64, dtype, device="cuda")
    options: dict[str, Any] = {"maps": MapRequest(kind, heads, columns=("text", slice(0, 77)))}
    generator = torch.Generator("cuda").manual_seed(1)
    exact = exact_attention(**inputs, **options)
    baseline = pytorch_attention(**inputs, **options)
    actual = joint_attention(**inputs, **options)
    streams = {name: tensor for name, tensor in inputs.items() if not name.endswith("value")}
    alone = attention_maps(**streams, **options)
    for result in (actual, alone):
        assert_accurate(result.maps, exact.maps, baseline.maps)
    shape = exact.maps.shape
    wanted = {
        "image": torch.randn(inputs["query"].shape, generator=generator, device="cuda").to(dtype),
        "maps": 100 * torch.randn(shape, generator=generator, device="cuda"),
    }
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    found = gradients(joint_attention, inputs, wanted, **options)
    true = gradients(exact_attention, wide, wanted, **options)
    usual = gradients(pytorch_attention, inputs, wanted, **options)
    for name in ("query", "key", "value", "text_key", "text_value"):
        assert_accurate(found[name], true[name], usual[name], name=f"d_{name}")


@pytest.mark.parametrize(("head_dim", "dtype"), WIDTHS)
def test_every_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    inputs = attention_inputs(1, 255, 77, 2, head_dim, dtype, device="cuda")
    options: dict[str, Any] = {"maps": MapRequest()}
    exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
    actual = joint_attention(**inputs, **options)
    wanted = {name: torch.randn_like(getattr(exact, name)).to(dtype) for name in ("image", "text")}
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    found = gradients(joint_attention, inputs, wanted, **options)
    true = gradients(exact_attention, wide, wanted, **options)
    usual = gradients(pytorch_attention, inputs, wanted, **options)
    for name in ("image", "text", "maps"):
        assert_accurate(*(getattr(result, name) for result in (actual, exact, baseline)), name=name)
    for name in inputs:
        assert_accurate(found[name], true[name], usual[name], name=f"d_{name}")


def test_two_runs_are_bitwise_equal() -> None:
    inputs = attention_inputs(2, 4096, 154, 24, 64, torch.bfloat16, device="cuda")
    wanted = {"image": torch.randn_like(inputs["query"]), "maps": torch.randn(2, 4096, 154, device="cuda")}
    runs = [gradients(joint_attention, inputs, wanted, maps=MapRequest()) for _ in range(3)]
    for other in runs[1:]:
        for name, gradient in runs[0].items():
            assert torch.equal(gradient, other[name]), name


def test_replay_of_a_cuda_graph() -> None:
    inputs = attention_inputs(1, 1024, 154, 8, 64, torch.bfloat16, device="cuda")

    def run() -> JointAttention:
        return joint_attention(**inputs, maps=MapRequest(), statistics=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    inputs["query"].normal_()
    graph.replay()
    expected = run()
    for name in ("image", "text", "maps"):
        assert torch.equal(getattr(captured, name), getattr(expected, name))


def test_more_than_two_billion_elements() -> None:
    """Offsets are 64-bit: two images far apart in one tensor."""
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    apart = 2**31 + 2**20
    small = attention_inputs(2, 130, 77, 2, 64, torch.bfloat16, device="cuda")
    memory = torch.zeros(apart + 130 * 2 * 64, dtype=torch.bfloat16, device="cuda")
    far = torch.as_strided(memory, (2, 130, 2, 64), (apart, 128, 64, 1))
    far.copy_(small["query"])
    expected = joint_attention(**small, maps=MapRequest())
    found = joint_attention(**{**small, "query": far}, maps=MapRequest())
    for name in ("image", "maps"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = attention_inputs(1, 130, 77, 2, 64, torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    result = joint_attention(**inputs, maps=MapRequest())
    exact = exact_attention(**inputs, maps=MapRequest())
    baseline = pytorch_attention(**inputs, maps=MapRequest())
    for name in ("image", "maps"):
        assert_accurate(*(getattr(r, name) for r in (result, exact, baseline)), name=name)


def test_compiles_as_one_graph() -> None:
    inputs = attention_inputs(1, 300, 77, 4, 64, torch.bfloat16, device="cuda")

    def model(scale: Tensor, **streams: Tensor) -> Tensor:
        streams["query"] = streams["query"] * scale
        result = joint_attention(**streams, maps=MapRequest(), statistics=True)
        return (
            result.image.float().sum() + result.maps.square().sum() + result.statistics.image_value_norm.sum()
        )

    losses, found = [], []
    for function in (model, torch.compile(model, fullgraph=True)):
        scale = torch.tensor(1.5, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        losses.append(function(scale, **inputs))
        found.append(torch.autograd.grad(losses[-1], scale)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=0)


def test_auto_takes_triton_here() -> None:
    inputs = attention_inputs(1, 64, 16, 2, 64, torch.bfloat16, device="cuda")
    named = joint_attention(**inputs)
    with backend("auto"):
        assert torch.equal(joint_attention(**inputs).image, named.image)
    with backend("aten"):
        assert not torch.equal(joint_attention(**inputs).image, named.image)


def test_nothing_larger_than_the_outputs_is_kept() -> None:
    """Peak memory over the outputs stays under 5 % of one S x S matrix of one head."""
    inputs = attention_inputs(1, 4096, 154, 24, 64, torch.bfloat16, device="cuda")
    joint_attention(**inputs, maps=MapRequest())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = joint_attention(**inputs, maps=MapRequest())
    kept = sum(
        tensor.untyped_storage().nbytes() for tensor in (result.image, result.text, result.maps, result.lse)
    )
    extra = torch.cuda.max_memory_allocated() - before - kept
    assert extra < 0.05 * (4096 + 154) ** 2 * 4
