"""Registers a backend's forward, backward and statistics functions as PyTorch operators.

A backend brings four functions; this file makes them operators with fake (shape-only) implementations and one
autograd formula, so that ``torch.compile(fullgraph=True)``, autocast and ``opcheck`` work for every backend
alike. Operators have a fixed number of outputs: what was not asked for is a tensor with an empty axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .types import (
    AttentionMaps,
    AttentionStatistics,
    Inputs,
    JointAttention,
    MapRequest,
    Request,
    wide_dtype,
)

_INPUTS = (
    "Tensor query, Tensor key, Tensor? value, Tensor? text_query, Tensor text_key, Tensor? text_value, "
    "Tensor? text_value_for_image, Tensor? text_bias"
)
_REQUEST = "float scale, str? kind, str heads, SymInt start, SymInt stop"
_FORWARD_SCHEMA = f"({_INPUTS}, {_REQUEST}) -> (Tensor image, Tensor text, Tensor lse, Tensor maps)"
_BACKWARD_SCHEMA = (
    f"(Tensor? d_image, Tensor? d_text, Tensor? d_maps, {_INPUTS}, Tensor image, Tensor text, Tensor lse, "
    f"{_REQUEST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_VALUE_NORM_SCHEMA = "(Tensor value) -> Tensor"
_MASS_SCHEMA = (
    "(Tensor query, Tensor text_query, Tensor text_key, Tensor lse, float scale, Tensor? text_bias) "
    "-> (Tensor image_to_text, Tensor text_to_text)"
)


Forward = Callable[[Inputs, Request], tuple[Tensor, Tensor, Tensor, Tensor]]
Backward = Callable[
    [Tensor | None, Tensor | None, Tensor | None, Inputs, Tensor, Tensor, Tensor, Request], tuple[Tensor, ...]
]
AttentionMass = Callable[..., tuple[Tensor, Tensor]]
ValueNorm = Callable[[Tensor], Tensor]
Attend = Callable[[Inputs, float, MapRequest | None, bool], JointAttention | AttentionMaps]


def empty_outputs(inputs: Inputs, request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised image output, text output, log-sum-exp and maps, with an empty axis where not wanted."""
    query, text_key = inputs.query, inputs.text_key
    batch, tokens, heads, width = query.shape
    text_tokens = text_key.shape[1]
    wide = wide_dtype(query.dtype)
    with_values = inputs.value is not None
    image = query.new_empty((batch, tokens if with_values else 0, heads, width))
    text = query.new_empty((batch, text_tokens if with_values else 0, heads, width))
    image_rows = with_values or inputs.text_query is not None or request.kind == "probability"
    rows = (tokens if image_rows else 0) + (text_tokens if inputs.text_query is not None else 0)
    lse = query.new_empty((batch, heads, rows), dtype=wide)
    columns = request.stop - request.start
    if request.kind is None:
        maps = query.new_empty((0,), dtype=wide)
    elif request.heads == "each":
        maps = query.new_empty((batch, heads, tokens, columns), dtype=wide)
    else:
        maps = query.new_empty((batch, tokens, columns), dtype=wide)
    return image, text, lse, maps


def empty_gradients(inputs: Inputs) -> tuple[Tensor, ...]:
    """Uninitialised, contiguous gradients of the seven inputs, with zero elements for absent ones."""
    return tuple(inputs.query.new_empty((0,) if t is None else tuple(t.shape)) for t in inputs.tensors())


def register(
    name: str, forward: Forward, backward: Backward, mass: AttentionMass, value_norm: ValueNorm
) -> Attend:
    """Register ``seg4diff::{name}_forward``, ``_backward``, ``_mass``, ``_value_norm``; return attend."""
    namespace = f"seg4diff::{name}"

    # Autocast has done its work on the arguments; matrix products inside are to stay as precise as written.
    def run_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(args[0].device.type, enabled=False):
            return forward(Inputs(*args[:8]), Request(*args[8:]))

    def run_backward(*args: Any) -> tuple[Tensor, ...]:
        d_image, d_text, d_maps, *tensors = args[:11]
        image, text, lse, *request = args[11:]
        with torch.autocast(lse.device.type, enabled=False):
            return backward(d_image, d_text, d_maps, Inputs(*tensors), image, text, lse, Request(*request))

    def run_mass(*args: Any) -> tuple[Tensor, Tensor]:
        *others, text_bias = args
        with torch.autocast(args[0].device.type, enabled=False):
            return mass(*others) if text_bias is None else mass(*others, text_bias=text_bias)

    def run_value_norm(value: Tensor) -> Tensor:
        return value_norm(value).contiguous()

    custom_op: Any = torch.library.custom_op
    forward_op = custom_op(f"{namespace}_forward", run_forward, mutates_args=(), schema=_FORWARD_SCHEMA)
    backward_op = custom_op(f"{namespace}_backward", run_backward, mutates_args=(), schema=_BACKWARD_SCHEMA)
    mass_op = custom_op(f"{namespace}_mass", run_mass, mutates_args=(), schema=_MASS_SCHEMA)
    norm_op = custom_op(f"{namespace}_value_norm", run_value_norm, mutates_args=(), schema=_VALUE_NORM_SCHEMA)

    forward_op.register_fake(lambda *args: empty_outputs(Inputs(*args[:8]), Request(*args[8:])))
    backward_op.register_fake(lambda *args: empty_gradients(Inputs(*args[3:11])))

    def fake_mass(query: Tensor, text_query: Tensor, text_key: Tensor, lse: Tensor, *rest: Any) -> Any:
        batch, heads = query.shape[0], query.shape[2]
        return tuple(lse.new_empty((batch, heads, rows.shape[1])) for rows in (query, text_query))

    def fake_value_norm(value: Tensor) -> Tensor:
        batch, tokens, heads, _ = value.shape
        return value.new_empty((batch, heads, tokens), dtype=wide_dtype(value.dtype))

    mass_op.register_fake(fake_mass)
    norm_op.register_fake(fake_value_norm)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        image, text, lse, _ = output
        ctx.save_for_backward(*inputs[:8], image, text, lse)
        ctx.request = inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)

    def differentiate(ctx: Any, d_image: Any, d_text: Any, d_lse: Any, d_maps: Any) -> Any:
        saved = ctx.saved_tensors
        inputs, outputs = saved[:8], saved[8:]
        if inputs[2] is None:  # no values, hence no outputs to differentiate
            d_image = d_text = None
        if ctx.request[1] is None:
            d_maps = None
        if d_image is None and d_text is None and d_maps is None:
            return (None,) * 13
        gradients = call_backward(d_image, d_text, d_maps, *inputs, *outputs, *ctx.request)
        return *(None if t is None else g for t, g in zip(inputs[:7], gradients, strict=True)), *(None,) * 6

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    # Dynamo traces calls of the operators themselves, not of the objects that define them.
    call_forward = getattr(torch.ops.seg4diff, f"{name}_forward").default
    call_backward = getattr(torch.ops.seg4diff, f"{name}_backward").default
    call_mass = getattr(torch.ops.seg4diff, f"{name}_mass").default
    call_value_norm = getattr(torch.ops.seg4diff, f"{name}_value_norm").default

    def attend(
        inputs: Inputs, scale: float, maps: MapRequest | None, statistics: bool
    ) -> JointAttention | AttentionMaps:
        query, text_query, text_key = inputs.query, inputs.text_query, inputs.text_key
        if maps is None:
            request: tuple[Any, ...] = (scale, None, "mean", 0, 0)
        else:
            request = (scale, maps.kind, maps.heads, *maps.columns(text_key.shape[1]))
        image, text, lse, entries = call_forward(*inputs.tensors(), inputs.text_bias, *request)
        shown = None
        if statistics and text_query is not None:
            value, text_value = inputs.value, inputs.text_value
            with torch.no_grad():
                image_to_text, text_to_text = call_mass(
                    query, text_query, text_key, lse, scale, inputs.text_bias
                )
                shown = AttentionStatistics(
                    image_to_text=image_to_text,
                    text_to_text=text_to_text,
                    image_value_norm=None if value is None else call_value_norm(value),
                    text_value_norm=None if text_value is None else call_value_norm(text_value),
                )
        if inputs.value is None:
            return AttentionMaps(maps=entries, statistics=shown, lse=lse if lse.shape[-1] > 0 else None)
        return JointAttention(
            image=image, text=text, lse=lse, maps=None if maps is None else entries, statistics=shown
        )

    return attend
