"""Joint attention with a map against attention without one, and against materialising the scores.

At Stable Diffusion 3's real size, 24 heads of 64, with 154 text tokens. Each case first passes its correctness
gate; rivals are timed in the same run, in turns. On a CPU the ATen backend, on a GPU Triton and ATen.

* ``sdpa``: what diffusers does, concatenation and ``scaled_dot_product_attention``, and no map: the price of the
  model alone.
* ``materialised``: what the paper's public code does: all scores, their softmax, the mean over heads and a slice
  of it, and then ``scaled_dot_product_attention`` for the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import compare
from benchmarks.memory import peak_bytes
from seg4diff.kernels.api import Backend, MapRequest, joint_attention
from seg4diff.kernels.testing import attention_inputs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HEADS, HEAD_DIM, TEXT = 24, 64, 154
MAP = MapRequest(text=slice(0, 77))
MIB = 2**20

Call = Callable[..., tuple[Tensor, ...]]


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, text_query: Tensor, text_key: Tensor, text_value: Tensor
) -> Any:
    """Image and text output, no map."""
    streams = ((query, text_query), (key, text_key), (value, text_value))
    q, k, v = (torch.cat([i.transpose(1, 2), t.transpose(1, 2)], dim=2) for i, t in streams)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return out[:, : query.shape[1]], out[:, query.shape[1] :]


def materialised(*inputs: Tensor) -> Any:
    """Image and text output, and the map from the matrix of all scores."""
    query, key, _, text_query, text_key, _ = inputs
    q = torch.cat([query, text_query], dim=1).transpose(1, 2)
    k = torch.cat([key, text_key], dim=1).transpose(1, 2)
    probability = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(dim=-1)  # [B, H, S, S]
    tokens = query.shape[1]
    maps = probability.mean(dim=1)[:, :tokens, tokens : tokens + 77]
    del probability
    return *sdpa(*inputs), maps


def with_map(backend: Backend) -> Call:
    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        result = joint_attention(*inputs, maps=MAP, backend=backend)
        assert result.image is not None
        assert result.text is not None
        assert result.maps is not None
        return result.image, result.text, result.maps

    return call


def backends() -> list[Backend]:
    return ["triton", "aten"] if GPU else ["aten"]


def inputs_of(pixels: int, batch: int, dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, ...]:
    tokens = (pixels // 16) ** 2
    drawn = attention_inputs(batch, tokens, TEXT, HEADS, HEAD_DIM, dtype, device=DEVICE)
    return tuple(tensor.requires_grad_(requires_grad) for tensor in drawn.values())


def both(call: Call, inputs: tuple[Tensor, ...]) -> None:
    """Forward and backward, through every output."""
    torch.autograd.backward([out.float().square().mean() for out in call(*inputs)])
    for tensor in inputs:
        tensor.grad = None


def gate(call: Call, inputs: tuple[Tensor, ...]) -> None:
    """The map equals the softmax, row by row for a sample of the image tokens; the outputs equal SDPA's."""
    image, text, maps = call(*inputs)
    query, key, _, _, text_key, _ = (tensor.double() for tensor in inputs)
    rows = torch.arange(0, query.shape[1], query.shape[1] // 16, device=query.device)
    keys = torch.cat([key, text_key], dim=1)
    scores = torch.einsum("bnhd,bshd->bhns", query[:, rows], keys) * HEAD_DIM**-0.5
    tokens = query.shape[1]
    exact = scores.softmax(dim=-1).mean(dim=1)[:, :, tokens : tokens + 77]
    torch.testing.assert_close(maps[:, rows].double(), exact, rtol=1e-3, atol=0)
    expected_image, expected_text = sdpa(*inputs)
    tolerance = 1e-4 if inputs[0].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(image, expected_image, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(text, expected_text, rtol=tolerance, atol=tolerance)


def report(benchmark: Any, medians: dict[str, float], inputs: tuple[Tensor, ...], products: int) -> None:
    batch, tokens = inputs[0].shape[:2]
    operations = products * 2 * batch * HEADS * (tokens + TEXT) ** 2 * HEAD_DIM
    benchmark.extra_info["TFLOP/s"] = {n: round(operations / s / 1e12, 3) for n, s in medians.items()}
    ratios = "  ".join(f"{name} {medians['ours'] / s:.3f}" for name, s in medians.items() if name != "ours")
    print(f"\nours {1e3 * medians['ours']:.1f} ms; ratio to: {ratios}")


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.bfloat16] if GPU else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("pixels", "batch"),
    [(512, 1), (512, 8), (1024, 1), (1024, 2), (1024, 8), (2048, 1)] if GPU else [(1024, 1)],
)
@torch.no_grad()
def test_forward(benchmark: Any, pixels: int, batch: int, dtype: torch.dtype, backend: Backend) -> None:
    inputs = inputs_of(pixels, batch, dtype)
    ours = with_map(backend)
    gate(ours, inputs)
    rivals: dict[str, Callable[[], object]] = {"sdpa": lambda: sdpa(*inputs)}
    if pixels <= 1024 and batch <= 2 and dtype == (torch.bfloat16 if GPU else torch.float32):
        rivals["materialised"] = lambda: materialised(*inputs)
    medians = compare(benchmark, lambda: ours(*inputs), rivals, rounds=30 if GPU else 3)
    report(benchmark, medians, inputs, products=2)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("pixels", "batch"), [(512, 1), (1024, 1), (1024, 2), (2048, 1)] if GPU else [(512, 1)]
)
def test_forward_and_backward(benchmark: Any, pixels: int, batch: int, backend: Backend) -> None:
    dtype = torch.bfloat16 if GPU else torch.float32
    inputs = inputs_of(pixels, batch, dtype, requires_grad=True)
    ours = with_map(backend)
    rivals = {"sdpa": lambda: both(sdpa, inputs)}
    medians = compare(benchmark, lambda: both(ours, inputs), rivals, rounds=20 if GPU else 3)
    report(benchmark, medians, inputs, products=7)


@pytest.mark.parametrize("backend", backends())
@torch.no_grad()
def test_memory(backend: Backend) -> None:
    """Peak beyond the inputs at 1024 px: with the map, without it, and materialising."""
    inputs = inputs_of(1024, 1, torch.bfloat16 if GPU else torch.float32)
    before = sum(tensor.nbytes for tensor in inputs)
    calls: dict[str, Call] = {"ours": with_map(backend), "sdpa": sdpa, "materialised": materialised}
    peaks = {
        name: peak_bytes(lambda call=call: call(*inputs), inputs) - before for name, call in calls.items()
    }
    print("\npeak memory beyond the inputs: " + ", ".join(f"{n} {p / MIB:.0f} MiB" for n, p in peaks.items()))
    matrix = HEADS * (4096 + TEXT) ** 2 * inputs[0].element_size()
    assert peaks["ours"] - peaks["sdpa"] <= 64 * MIB
    assert peaks["materialised"] > matrix
