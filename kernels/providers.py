"""Kernels of others as backends: they compute output and log-sum-exp, the map and its gradient stay ours.

With the log-sum-exp, whoever computed it, our pass over the text columns gives the map. Backward, that pass
gives what the map adds on its own columns and the row sum of dM * P~; the provider's backward computes the
rest, with that sum in its delta.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .aten import backend as aten
from .aten.backward import gradients_by, joined, parts, with_row_sum
from .fallback import falling_back, query_of
from .operators import Attend, empty_outputs, register
from .types import Inputs, Request

_CHANNELS = 8  # the kernels want head dims that are multiples of 8

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Provider:
    """A kernel of softmax attention over tensors [B, tokens, H, D].

    Attributes:
        name: for :func:`seg4diff.kernels.api.backend`.
        refusal: why it cannot take queries like these, or None if it can.
        forward: ``(query, key, value, scale)`` -> output and natural log-sum-exp, float32 [B, H, rows].
        backward: ``(d_out, query, key, value, out, lse, row_sum, scale)`` -> gradients of query, key and
            value. ``row_sum`` [B, H, rows] is added to <dO, O>; it may be None.
        map_head_dim: largest head dim at which ``backward`` takes a row sum; above it, our own backward runs.
    """

    name: str
    refusal: Callable[[Tensor], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    map_head_dim: int


PROVIDERS: dict[str, Provider] = {}
ATTEND: dict[str, Attend] = {}


def add(provider: Provider) -> None:
    """Make a provider a backend of its name, with operators, a gradient formula and the fall-back."""
    name = provider.name
    parts = {"forward": partial(_forward, provider), "backward": partial(_backward, provider)}
    forward, backward = (falling_back(name, part, run, _by_ours(part)) for part, run in parts.items())
    operators = name.replace("-", "_")
    ATTEND[name] = register(operators, forward, backward, _by_ours("attention_mass"), _by_ours("value_norm"))
    PROVIDERS[name] = provider


def refusal(name: str, inputs: Inputs) -> str | None:
    """Why a provider cannot take a call, or None if it can."""
    if inputs.key is None:
        return "attention without image keys is not supported"
    if inputs.text_bias is not None:
        return "a text bias is not supported"
    return PROVIDERS[name].refusal(inputs.query)


def _ours(query: Tensor) -> Any:
    """The backend whose map pass and whose other parts a provider uses: Triton where it runs, else ATen."""
    try:
        from .triton import backend as triton
    except ImportError:
        return aten
    return aten if triton.refusal(query) else triton


def _by_ours(part: str) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        return getattr(_ours(query_of(args)), part)(*args, **options)

    return falling_back("triton", part, run, getattr(aten, part))


def _together(inputs: Inputs, names: Sequence[str]) -> Tensor:
    return joined([getattr(inputs, name) for name in names])


def _alone(inputs: Inputs) -> Inputs:
    """What a map of image rows and text columns reads."""
    return Inputs(inputs.query, inputs.key, None, None, inputs.text_key, None, None)


def _forward(provider: Provider, inputs: Inputs, request: Request) -> tuple[Tensor, ...]:
    """As any backend's; without values, ours."""
    ours = _ours(inputs.query)
    if inputs.value is None:
        return tuple(ours.forward(inputs, request))
    joint, lse, maps = empty_outputs(inputs, request)
    key, tokens, outs = _together(inputs, ("key", "text_key")), inputs.query.shape[1], []
    for names, read in parts(inputs):
        rows = _together(inputs, names)
        first = 0 if names[0] == "query" else tokens
        out, found = provider.forward(rows, key, _together(inputs, ("value", read)), request.scale)
        lse[:, :, first : first + rows.shape[1]] = found
        outs.append(out)
    image, text = request.split(joint, tokens)
    found = joined(outs)
    image.copy_(found[:, :tokens])
    text.copy_(found[:, tokens:])
    if request.kind in ("logit", "text_probability"):
        maps = ours.forward(_alone(inputs), request)[-1]
    elif request.kind is not None and ours is aten:
        columns = inputs.text_key[:, request.start : request.stop]
        entries = torch.ops.seg4diff.map_entries.default
        maps = entries(
            inputs.query, columns, None, lse[:, :, :tokens], request.scale, request.heads == "mean"
        )
    elif request.kind is not None:
        ours.write_normalised_maps(maps, inputs, lse, request)
    return joint, lse, maps


def _backward(
    provider: Provider,
    d_image: Tensor | None,
    d_text: Tensor | None,
    d_maps: Tensor | None,
    inputs: Inputs,
    image: Tensor,
    text: Tensor,
    lse: Tensor,
    request: Request,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As any backend's; ours without values, or where the provider cannot take a row sum."""
    ours = _ours(inputs.query)
    through_lse = d_lse is not None or (d_maps is not None and request.kind == "probability")
    if inputs.value is None or (through_lse and inputs.query.shape[-1] > provider.map_head_dim):
        return tuple(ours.backward(d_image, d_text, d_maps, inputs, image, text, lse, request, d_lse=d_lse))
    of_map = None if d_maps is None else _map_gradient(ours, d_maps, inputs, lse, request)

    def differentiate(d_out: Tensor | None, rows: Tensor, *others: Any) -> Gradients:
        key, value, out, found, row_sum, scale, _ = others
        if d_out is None:
            d_out = out = torch.zeros_like(rows)
        return provider.backward(d_out, rows, key, value, out, found, row_sum, scale)

    return gradients_by(
        differentiate, of_map, d_image, d_text, inputs, image, text, lse, request.scale, d_lse
    )


def _map_gradient(
    ours: Any, d_maps: Tensor, inputs: Inputs, lse: Tensor, request: Request
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a map adds to the gradients of image queries and text keys, and its row sum [B, H, N], if any."""
    if ours is aten or request.kind == "probability":
        return tuple(ours.map_gradient(d_maps, inputs, lse, request))
    nothing = inputs.query[:, :0]
    found = ours.backward(None, None, d_maps, _alone(inputs), nothing, nothing, lse, request)
    return found[0], found[4], None


def by_free_channels(differentiate: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward with a row sum from one without: ``(d_out, query, key, value, out, lse, scale)``."""

    def backward(
        d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        row_sum: Tensor | None, scale: float,
    ) -> Gradients:  # fmt: skip
        width = query.shape[-1]
        given: tuple[Tensor, ...] = (d_out, query, key, value, out)
        if row_sum is not None:
            given = with_row_sum(d_out, query, key, value, out, row_sum, channels=_CHANNELS)
        d_query, d_key, d_value = differentiate(*given, lse, scale)
        return d_query[..., :width], d_key[..., :width], d_value[..., :width]

    return backward


# PyTorch's own, whose tensors are [B, H, tokens, D].


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = attend(q, k, v, None, True, scale=scale)[:2]
    return out.transpose(1, 2), lse.reshape(lse.shape[:3])


def _cudnn_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    d_o, q, k, v, o = (tensor.transpose(1, 2) for tensor in (d_out, query, key, value, out))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout
    differentiate = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    found = differentiate(
        d_o, q, k, v, o, lse.unsqueeze(-1), unused, unused, None, None, None, q.shape[2], k.shape[2],
        0.0, False, scale=scale,
    )  # fmt: skip
    d_query, d_key, d_value = (gradient.transpose(1, 2) for gradient in found)
    return d_query, d_key, d_value


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out.transpose(1, 2), lse


def _flash_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    d_o, q, k, v, o = (tensor.transpose(1, 2) for tensor in (d_out, query, key, value, out))
    unused = torch.zeros((2,), dtype=torch.uint64, device=q.device)  # of dropout
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_backward
    found = differentiate(
        d_o, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, False, unused, unused, scale=scale
    )
    d_query, d_key, d_value = (gradient.transpose(1, 2) for gradient in found)
    return d_query, d_key, d_value


# The packages of flash-attention 2, 3 and 4, by the functions under their autograd: the public ones drop the
# gradient of the log-sum-exp.


def _flash_2(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    functions: Any = importlib.import_module("flash_attn.flash_attn_interface")
    found = functions._flash_attn_forward(query, key, value, 0.0, scale, False, -1, -1, 0.0, None, False)
    return found[0], found[1]


def _flash_2_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    functions: Any = importlib.import_module("flash_attn.flash_attn_interface")
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    given = (d_out, query, key, value, out, lse, *found, 0.0, scale, False, -1, -1, 0.0, None)
    functions._flash_attn_backward(*given, torch.are_deterministic_algorithms_enabled())
    return found


def _flash_3(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    functions: Any = importlib.import_module("flash_attn_interface")
    found = functions._flash_attn_forward(query, key, value, softmax_scale=scale)
    return found[0], found[1]


def _flash_3_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    functions: Any = importlib.import_module("flash_attn_interface")
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    written = dict(zip(("dq", "dk", "dv"), found, strict=True))
    deterministic = torch.are_deterministic_algorithms_enabled()
    given = (d_out, query, key, value, out, lse)
    functions._flash_attn_backward(*given, **written, softmax_scale=scale, deterministic=deterministic)
    return found


def _flash_4(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    functions: Any = importlib.import_module("flash_attn.cute.interface")
    found = functions._flash_attn_fwd(query, key, value, softmax_scale=scale, return_lse=True)
    return found[0], found[1]


def _flash_4_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    row_sum: Tensor | None, scale: float,
) -> Gradients:  # fmt: skip
    functions: Any = importlib.import_module("flash_attn.cute.interface")
    deterministic = torch.are_deterministic_algorithms_enabled()
    given = (query, key, value, out, d_out, lse)
    d_lse = None if row_sum is None else -row_sum
    found = functions._flash_attn_bwd(*given, softmax_scale=scale, deterministic=deterministic, dlse=d_lse)
    return found[0], found[1], found[2]


def _on_nvidia(
    largest_head_dim: int, capabilities: range, missing: str | None = None
) -> Callable[[Tensor], str | None]:
    """The refusal of a provider; ``missing`` names a package that is not installed."""

    def refusal(query: Tensor) -> str | None:
        if missing is not None:
            return f"{missing} is not installed"
        if query.device.type != "cuda" or torch.version.hip is not None:
            return f"device {query.device} is not an NVIDIA GPU"
        if query.dtype not in (torch.float16, torch.bfloat16):
            return f"dtype {query.dtype} is not float16 or bfloat16"
        if query.shape[-1] % 8 or query.shape[-1] > largest_head_dim:
            return f"head dim {query.shape[-1]} is not a multiple of 8 up to {largest_head_dim}"
        major = torch.cuda.get_device_capability(query.device)[0]
        if major not in capabilities:
            shown = ", ".join(f"{capability}.x" for capability in capabilities)
            return f"compute capability {major}.x is not one of {shown}"
        return None

    return refusal


def _without_module(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"the module {name}"


def _without_package(name: str) -> str | None:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {name}"
    return None


for _provider in (
    Provider("cudnn", _on_nvidia(128, range(8, 13)), _cudnn, by_free_channels(_cudnn_backward), 120),
    Provider("flash", _on_nvidia(256, range(8, 13)), _flash, by_free_channels(_flash_backward), 248),
    Provider(
        "flash-attn-2", _on_nvidia(256, range(8, 13), _without_module("flash_attn_2_cuda")),
        _flash_2, by_free_channels(_flash_2_backward), 248,
    ),
    Provider(
        "flash-attn-3", _on_nvidia(256, range(9, 10), _without_module("flash_attn_interface")),
        _flash_3, by_free_channels(_flash_3_backward), 248,
    ),
    Provider(
        "flash-attn-4", _on_nvidia(128, range(9, 12), _without_package("flash-attn-4")),
        _flash_4, _flash_4_backward, 128,
    ),
):  # fmt: skip
    add(_provider)
