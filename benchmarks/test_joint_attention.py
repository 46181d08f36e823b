"""Joint attention with a map against what it replaces, at the sizes of Stable Diffusion 3.

Rivals, timed in turns in the same run:

* ``sdpa``: PyTorch's attention with the concatenation that diffusers does, and *no* map: the price of the
  model
  alone. On a GPU its flash and cuDNN backends are timed by name as well.
* ``materialising``: what the paper's public code does: all scores, their softmax, the mean over heads and a
  slice
  of it, and then attention again for the output.
* ``aten``: PyTorch's flash attention, its log-sum-exp and a pass for the map. On a CPU that is ours.

A case is timed only once its results have passed the error budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import compare
from benchmarks.memory import peak_bytes
from seg4diff.kernels.api import backend, joint_attention
from seg4diff.kernels.testing import assert_accurate, attention_inputs, attention_rows
from seg4diff.kernels.types import Backend, MapRequest
from tests.support.materialised import joint_scores

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MAP = MapRequest(columns=("text", slice(0, 77)))  # CLIP's tokens
MIB = 2**20
Inputs = dict[str, Tensor]
Attend = Callable[[Inputs], tuple[Tensor, ...]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One size: pixels on a side, images at once, text tokens, heads, head dim and dtype."""

    pixels: int
    batch: int = 1
    text_tokens: int = 154
    heads: int = 24
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = f"{self.pixels}px-B{self.batch}-T{self.text_tokens}-{self.heads}x{self.head_dim}"
        return f"{shape}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def tokens(self) -> int:
        """Image tokens: one for 16 x 16 pixels."""
        return (self.pixels // 16) ** 2

    def inputs(self) -> Inputs:
        shape = (self.batch, self.tokens, self.text_tokens, self.heads, self.head_dim)
        return attention_inputs(*shape, self.dtype, device=DEVICE)

    def operations(self, direction: str) -> float:
        """Multiplications and additions of the attention's matrix products, without the map's."""
        keys = self.tokens + self.text_tokens
        products = {"forward": 2, "backward": 5, "both": 7}[direction]
        return 2.0 * products * self.batch * self.heads * keys**2 * self.head_dim


FORWARD = [Case(1024, dtype=torch.float32), Case(1024)]
BACKWARD = [Case(512, dtype=torch.float32)]
if GPU:
    FORWARD = [Case(pixels, batch) for pixels in (512, 1024) for batch in (1, 2, 8)]
    FORWARD += [Case(2048), Case(1024, text_tokens=333), Case(1024, heads=38), Case(1024, head_dim=128)]
    BACKWARD = [Case(512), Case(1024), Case(1024, batch=2), Case(2048), Case(1024, head_dim=128)]


def concatenated(inputs: Inputs) -> tuple[Tensor, ...]:
    """Queries, keys and values of both streams, [B, H, S, D], as diffusers' processor makes them."""
    names = ("query", "key", "value")
    streams = [(inputs[name].transpose(1, 2), inputs[f"text_{name}"].transpose(1, 2)) for name in names]
    return tuple(torch.cat(pair, dim=2) for pair in streams)


def sdpa(inputs: Inputs) -> tuple[Tensor, ...]:
    """Image and text output, [B, tokens, H D], without a map."""
    tokens = inputs["query"].shape[1]
    query, key, value = concatenated(inputs)
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return out[:, :tokens], out[:, tokens:]


def materialising(inputs: Inputs) -> tuple[Tensor, ...]:
    """The map out of the whole matrix of probabilities, and the attention once more for its output."""
    tokens = inputs["query"].shape[1]
    scores = joint_scores(*(inputs[name] for name in ("query", "key", "text_query", "text_key")))
    probability = scores.softmax(dim=-1)  # [B, H, S, S]
    del scores
    maps = probability.mean(dim=1)[:, :tokens, tokens:][..., MAP.columns[1]]
    del probability
    return *sdpa(inputs), maps


def with_map(name: Backend) -> Attend:
    """Image and text output, [B, tokens, H D], and the map."""

    def attend(inputs: Inputs) -> tuple[Tensor, ...]:
        with backend(name):
            result = joint_attention(**inputs, maps=MAP)
        assert result.maps is not None
        return result.image.flatten(2), result.text.flatten(2), result.maps

    return attend


OURS = with_map("triton" if GPU else "aten")


def gate(case: Case, inputs: Inputs) -> None:
    """Output and map keep the error budget, in a few image rows of the case itself."""
    rows = torch.linspace(0, case.tokens - 1, 32, device=DEVICE).long()
    image, _, maps = OURS(inputs)
    exact, exact_maps = attention_rows(inputs, rows, torch.float64)
    _, usual_maps = attention_rows(inputs, rows, torch.float32)
    usual = sdpa(inputs)[0]
    assert_accurate(image[:, rows], exact.flatten(2), usual[:, rows], name="output")
    exact_maps, usual_maps = exact_maps[..., MAP.columns[1]], usual_maps[..., MAP.columns[1]]
    if GPU or case.dtype == torch.float32:
        assert_accurate(maps[:, rows], exact_maps, usual_maps, name="map")
    else:  # exponentials of PyTorch's flash attention on a CPU have 20 bits in half precision
        torch.testing.assert_close(maps[:, rows].double(), exact_maps, rtol=2e-4, atol=0)


def gradient_gate(case: Case) -> None:
    """Gradients keep it too, at the case's head dim and dtype and a size that float64 can hold."""
    small = attention_inputs(1, 320, 154, 2, case.head_dim, case.dtype, device=DEVICE)
    wide = {name: tensor.double() for name, tensor in small.items()}
    exact, usual = gradients(with_map("reference"), wide), gradients(plainly, small)
    for name, gradient in gradients(OURS, small).items():
        assert_accurate(gradient, exact[name], usual[name], name=f"d_{name}")


def plainly(inputs: Inputs) -> tuple[Tensor, ...]:
    """The output by PyTorch's attention, the map by a float32 softmax."""
    return *sdpa(inputs), materialising({name: tensor.float() for name, tensor in inputs.items()})[2]


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs, the same at every call; the map's weighs about as much as the others'."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = (1, 1, 100)
    drawn = [torch.randn(out.shape, generator=generator, device=DEVICE) for out in outputs]
    return [(weight * g).to(out.dtype) for weight, g, out in zip(weights, drawn, outputs, strict=False)]


def gradients(attend: Attend, inputs: Inputs) -> Inputs:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = attend(leaves)
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream(outputs))
    return dict(zip(leaves, found, strict=True))


def limited(attend: Attend, kernel: SDPBackend) -> Attend:
    """``attend`` with one of SDPA's backends."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        with sdpa_kernel([kernel]):
            return attend(inputs)

    return run


def rivals() -> dict[str, Attend]:
    named: dict[str, Attend] = {"sdpa": sdpa, "materialising": materialising}
    if GPU:
        named["aten"] = with_map("aten")
        named["sdpa flash"] = limited(sdpa, SDPBackend.FLASH_ATTENTION)
        named["sdpa cudnn"] = limited(sdpa, SDPBackend.CUDNN_ATTENTION)
    return named


def possible(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The calls that fit into memory and that this device has a backend for."""
    kept = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:  # out of memory is one
            log.warning("%s cannot run: %s", name, str(error).splitlines()[0])
        else:
            kept[name] = call
        if GPU:
            torch.cuda.empty_cache()
    return kept


def repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def measure(
    results: list[dict[str, Any]],
    case: Case,
    direction: str,
    calls: dict[str, Callable[[], object]],
    inputs: Inputs,
) -> dict[str, Any]:
    """Time and peak memory of ``calls["ours"]`` against the others, which are also put into the results."""
    operations = case.operations(direction)
    # In a row, as in a model, so that the time of a launch does not count on a GPU.
    times = max(1, round(5e12 / operations)) if GPU else 1
    kept = possible(calls)
    runs = {name: repeated(call, times) for name, call in kept.items()}
    medians = compare(runs.pop("ours"), runs, rounds=15 if GPU else 8)
    query, key, value = (tensor.detach() for tensor in concatenated(inputs))
    record = {
        "case": str(case),
        "direction": direction,
        "milliseconds": {name: 1e3 * seconds / times for name, seconds in medians.items()},
        "teraflops": {name: operations * times / seconds / 1e12 for name, seconds in medians.items()},
        "peak_mebibytes": {
            name: peak_bytes(call, list(inputs.values())) / MIB for name, call in kept.items()
        },
        "cannot_run": [name for name in calls if name not in kept],
        "sdpa_backend": SDPBackend(torch._fused_sdp_choice(query, key, value)).name,
    }
    results.append(record)
    return record


@pytest.mark.parametrize("case", FORWARD, ids=str)
@torch.no_grad()
def test_forward(results: list[dict[str, Any]], case: Case) -> None:
    inputs = case.inputs()
    gate(case, inputs)
    named = {"ours": OURS, **rivals()}
    if not GPU and case.dtype != torch.float32:
        del named["materialising"]  # minutes
    calls = {name: lambda attend=attend: attend(inputs) for name, attend in named.items()}
    memory = measure(results, case, "forward", calls, inputs)["peak_mebibytes"]
    if not GPU:
        assert memory["ours"] - memory["sdpa"] <= 64


@pytest.mark.parametrize("direction", ["backward", "both"])
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_gradients(results: list[dict[str, Any]], case: Case, direction: str) -> None:
    """The backward alone, and forward and backward, with gradients of both outputs and the map."""
    gradient_gate(case)
    inputs = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    leaves = list(inputs.values())

    def step(attend: Attend) -> Callable[[], object]:
        given = upstream(attend(inputs))
        if direction == "both":
            return lambda: torch.autograd.grad(attend(inputs), leaves, given)
        outputs = attend(inputs)
        return lambda: torch.autograd.grad(outputs, leaves, given, retain_graph=True)

    calls = {}
    for name, attend in {"ours": OURS, **rivals()}.items():
        if name == "materialising":
            continue  # its matrices, kept for the backward, are what nobody has memory for
        try:
            calls[name] = step(attend)
        except RuntimeError as error:
            log.warning("%s cannot run: %s", name, str(error).splitlines()[0])
    measure(results, case, direction, calls, inputs)
