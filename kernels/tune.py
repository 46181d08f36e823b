"""Measures on a GPU who computes attention fastest, for the table of ``measured.py``.

A provider counts only if output, map and all gradients keep their error budget against float64. The variants
take turns, so that a change of clocks meets all alike, and medians are compared.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import api, fallback, measured, providers
from .measured import Row
from .testing import (
    assert_accurate,
    attention_inputs,
    attention_rows,
    exact_attention,
    pytorch_attention,
)
from .types import Inputs, JointAttention, MapRequest

log = logging.getLogger(__name__)

_WORTH = 0.98
"""Another provider than our own kernels has to take at most this part of their time: less is noise."""


def tune(
    image_tokens: int, text_tokens: int, heads: int, head_dim: int, *, rounds: int, device: torch.device | str
) -> Row:
    """Measure one shape, a single image in bfloat16, with a map: forward, and forward and backward.

    Args:
        image_tokens, text_tokens, heads, head_dim: the shape.
        rounds: how often each provider runs.
        device: a GPU.

    Returns:
        A row of the table. Its evidence has the medians in milliseconds, ``[forward, training]`` by provider,
        and why others were rejected.
    """
    device = torch.device(device)
    inputs = attention_inputs(1, image_tokens, text_tokens, heads, head_dim, torch.bfloat16, device=device)
    given = Inputs(**inputs, text_value_for_image=None)
    times: dict[str, list[tuple[float, float]]] = {}
    rejected: dict[str, str] = {}
    for name in ("triton", *providers.PROVIDERS):
        reason = api.refusal(name, given) or _fault(name, inputs)
        if reason is None:
            times[name] = []
        else:
            rejected[name] = reason
            log.info("%s is not measured: %s", name, reason)
    usual = "triton" if "triton" in times else "aten"
    times.setdefault(usual, [])
    learned: dict[str, Any] = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    for turn in range(rounds + 1):
        order = deque(times)
        order.rotate(turn)
        for name in order:
            with api.backend(name):
                with torch.no_grad():
                    forward = _seconds(lambda: api.joint_attention(**learned, maps=MapRequest()), device)
                both = _seconds(functools.partial(_gradients, api.joint_attention, learned), device)
            if turn > 0:  # the first compiles
                times[name].append((forward, both))
    chosen = fastest(times, usual)
    medians = {
        name: [round(1e3 * median(column), 4) for column in zip(*pairs, strict=True)]
        for name, pairs in times.items()
    }
    evidence = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "heads": heads,
        "rounds": rounds,
        "milliseconds": medians,
        "rejected": rejected,
    }
    architecture = measured.architecture(device) or device.type
    return Row(architecture, head_dim, image_tokens + text_tokens, *chosen, evidence)


def fastest(times: Mapping[str, list[tuple[float, float]]], usual: str) -> tuple[str, str]:
    """Who is fastest in forward, and in forward and backward; ``usual`` unless another is clearly faster."""
    found = []
    for column in range(2):
        medians = {name: median(pair[column] for pair in pairs) for name, pairs in times.items()}
        best = min(medians, key=lambda name: medians[name])
        found.append(best if medians[best] < _WORTH * medians[usual] else usual)
    return found[0], found[1]


def _fault(name: str, inputs: Mapping[str, Any]) -> str | None:
    """Why the results of a provider are not to be had or not to be trusted, or None if they are right."""
    few = {n: tensor[:, : 300 + 7 * n.startswith("text_"), :2] for n, tensor in inputs.items()}
    wide = {n: tensor.double() for n, tensor in few.items()}
    try:
        with api.backend(name):
            found = _gradients(api.joint_attention, few)
            whole = api.joint_attention(**inputs, maps=MapRequest())
    except Exception as error:
        if "CUDA error" in str(error):  # nothing that follows could be believed
            raise
        built = "could not be built" if fallback.is_failed_build(error) else "failed"
        return f"{built} ({type(error).__name__}: {error})"
    rows = torch.arange(0, inputs["query"].shape[1], 97, device=inputs["query"].device)
    image, maps = attention_rows(inputs, rows, torch.float64)
    image_by_torch, _ = attention_rows(inputs, rows, torch.float32)
    usual = list(_gradients(pytorch_attention, few))
    usual[2] = _maps_by_lse(few, slice(None))
    assert whole.maps is not None
    try:
        labels = ("image", "text", "maps", *(f"d_{name}" for name in few))
        for label, *three in zip(labels, found, _gradients(exact_attention, wide), usual, strict=True):
            assert_accurate(*three, name=label)
        assert_accurate(whole.image[:, rows], image, image_by_torch.bfloat16(), name="image of all tokens")
        assert_accurate(whole.maps[:, rows], maps, _maps_by_lse(inputs, rows), name="maps of all tokens")
    except AssertionError as error:
        return str(error)
    return None


def _maps_by_lse(inputs: Mapping[str, Tensor], rows: slice | Tensor) -> Tensor:
    """The map of some image rows from a log-sum-exp in float32, which is all that a provider returns."""
    keys = torch.cat([inputs["key"], inputs["text_key"]], dim=1).float()
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs["query"][:, rows].float(), keys) * keys.shape[-1] ** -0.5
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return (scores[..., inputs["key"].shape[1] :] - lse).exp().mean(dim=1)


def _gradients(attend: Callable[..., JointAttention], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Outputs, map and the gradients of all inputs, for upstream gradients of fixed random numbers."""
    leaves: dict[str, Any] = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    result = attend(**leaves, maps=MapRequest())
    assert result.maps is not None
    outputs = [result.image, result.text, result.maps]
    upstream = [_noise(tuple(o.shape), o.device).to(o.dtype) for o in outputs]
    return *outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)


@functools.lru_cache(maxsize=8)
def _noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random numbers of bfloat16, whose values all precisions hold."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        first.record()
        run()
        last.record()
    last.synchronize()
    return 1e-3 * first.elapsed_time(last)
