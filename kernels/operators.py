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

from .relations import map_entries
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
    "Tensor query, Tensor? key, Tensor? value, Tensor? text_query, Tensor text_key, Tensor? text_value, "
    "Tensor? text_value_for_image, Tensor? text_bias"
)
_REQUEST = "float scale, str? kind, str heads, SymInt start, SymInt stop, bool text_first"
_FORWARD_SCHEMA = f"({_INPUTS}, {_REQUEST}) -> (Tensor joint, Tensor lse, Tensor maps)"
_BACKWARD_SCHEMA = (
    f"(Tensor? d_joint, Tensor? d_maps, Tensor? d_lse, {_INPUTS}, Tensor joint, Tensor lse, {_REQUEST}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_VALUE_NORM_SCHEMA = "(Tensor value) -> Tensor"
_MASS_SCHEMA = (
    "(Tensor query, Tensor text_query, Tensor text_key, Tensor lse, float scale, Tensor? text_bias) "
    "-> (Tensor image_to_text, Tensor text_to_text)"
)


Forward = Callable[[Inputs, Request], tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, ...]]
AttentionMass = Callable[..., tuple[Tensor, Tensor]]
ValueNorm = Callable[[Tensor], Tensor]
Attend = Callable[
    [Inputs, float, MapRequest | None, bool, Tensor | None, bool], JointAttention | AttentionMaps
]


def empty_outputs(inputs: Inputs, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised output of all rows, log-sum-exp and maps, with an empty axis where not wanted."""
    query, text_key = inputs.query, inputs.text_key
    batch, tokens, heads, width = query.shape
    text_tokens = text_key.shape[1]
    wide = wide_dtype(query.dtype)
    with_values = inputs.text_value is not None
    text_rows = 0 if inputs.text_query is None else text_tokens
    joint = query.new_empty((batch, tokens + text_rows if with_values else 0, heads, width))
    of_text_alone = request.kind in ("logit", "text_probability")
    image_rows = tokens if with_values or text_rows > 0 or not of_text_alone else 0
    rows = image_rows + text_rows
    lse = query.new_empty((batch, heads, rows), dtype=wide)
    columns = request.stop - request.start
    if request.kind is None:
        maps = query.new_empty((0,), dtype=wide)
    elif request.heads == "each":
        maps = query.new_empty((batch, heads, tokens, columns), dtype=wide)
    else:
        maps = query.new_empty((batch, tokens, columns), dtype=wide)
    return joint, lse, maps


def empty_gradients(inputs: Inputs) -> tuple[Tensor, ...]:
    """Uninitialised, contiguous gradients of the seven inputs, with zero elements for absent ones."""
    return tuple(inputs.query.new_empty((0,) if t is None else tuple(t.shape)) for t in inputs.tensors())


def backward_arguments(*args: Any) -> tuple[Any, ...]:
    """The arguments of a backend's backward from those of the operator."""
    d_joint, d_maps, d_lse, *tensors = args[:11]
    joint, lse, *options = args[11:]
    inputs, request = Inputs(*tensors), Request(*options)
    tokens = inputs.query.shape[1]
    d_image, d_text = (None, None) if d_joint is None else request.split(d_joint, tokens)
    if inputs.text_query is None:
        d_text = None
    return (d_image, d_text, d_maps, inputs, *request.split(joint, tokens), lse, request, d_lse)


def register(
    name: str, forward: Forward, backward: Backward, mass: AttentionMass, value_norm: ValueNorm
) -> Attend:
    """Register ``seg4diff::{name}_forward``, ``_backward``, ``_mass``, ``_value_norm``; return attend."""
    namespace = f"seg4diff::{name}"

    # Autocast has done its work on the arguments; matrix products inside are to stay as precise as written.
    def run_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(args[0].device.type, enabled=False):
            return forward(Inputs(*args[:8]), Request(*args[8:]))

    def run_backward(*args: Any) -> tuple[Tensor, ...]:
        with torch.autocast(args[3].device.type, enabled=False):
            return backward(*backward_arguments(*args))

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
        ctx.save_for_backward(*inputs[:8], *output[:2])
        ctx.request = inputs[8:]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, d_joint: Any, d_lse: Any, d_maps: Any) -> Any:
        saved = ctx.saved_tensors
        inputs, outputs = saved[:8], saved[8:]
        if inputs[5] is None:  # no values, hence no outputs to differentiate
            d_joint = None
        if ctx.request[1] is None:
            d_maps = None
        if d_joint is None and d_maps is None and d_lse is None:
            return (None,) * 14
        gradients = call_backward(d_joint, d_maps, d_lse, *inputs, *outputs, *ctx.request)
        return *(None if t is None else g for t, g in zip(inputs[:7], gradients, strict=True)), *(None,) * 7

    forward_op.register_autograd(differentiate, setup_context=setup_context)
    # Dynamo traces calls of the operators themselves, not of the objects that define them.
    call_forward = getattr(torch.ops.seg4diff, f"{name}_forward").default
    call_backward = getattr(torch.ops.seg4diff, f"{name}_backward").default
    call_mass = getattr(torch.ops.seg4diff, f"{name}_mass").default
    call_value_norm = getattr(torch.ops.seg4diff, f"{name}_value_norm").default

    def attention_statistics(inputs: Inputs, scale: float, lse: Tensor) -> AttentionStatistics:
        query, text_query, value, text_value = (
            inputs.query,
            inputs.text_query,
            inputs.value,
            inputs.text_value,
        )
        text_rows = query[:, :0] if text_query is None else text_query
        with torch.no_grad():
            masses = call_mass(query, text_rows, inputs.text_key, lse, scale, inputs.text_bias)
            norms = (None if values is None else call_value_norm(values) for values in (value, text_value))
            return AttentionStatistics(*masses, *norms)

    def text_map(inputs: Inputs, rows: Tensor, scale: float, maps: MapRequest) -> tuple[Tensor, Tensor]:
        """The map of ``rows`` and text columns, and the rows' log-sum-exp if it was needed."""
        streams = (rows, inputs.key, None, None, inputs.text_key, None, None, inputs.text_bias)
        _, lse, entries = call_forward(*streams, *_text_request(scale, maps, inputs))
        return _chosen_columns(entries, maps), lse

    def any_map(inputs: Inputs, scale: float, maps: MapRequest, lse: Tensor | None) -> Tensor:
        """The map of any relation; ``lse`` [B, H, M] of the chosen rows, for probabilities."""
        rows = _chosen_rows(inputs, maps)
        if maps.kind == "text_probability":
            return text_map(inputs, rows, scale, maps)[0]
        stream, tokens = maps.columns
        columns = inputs.text_key if stream == "text" else inputs.key
        bias = inputs.text_bias if stream == "text" else None
        assert columns is not None
        columns, bias = pick(columns, 1, tokens), None if bias is None else pick(bias, 1, tokens)
        return map_entries(rows, columns, bias, lse, scale, maps.heads)

    def attend(
        inputs: Inputs,
        scale: float,
        maps: MapRequest | None,
        statistics: bool,
        given: Tensor | None = None,
        text_first: bool = False,
    ) -> JointAttention | AttentionMaps:
        if inputs.text_value is None and not statistics:
            assert maps is not None
            lse = given
            if given is not None:
                lse = _of_rows(given, inputs, maps)
            elif maps.columns[0] == "text":
                entries, lse = text_map(inputs, _chosen_rows(inputs, maps), scale, maps)
                return AttentionMaps(entries, None, lse.detach() if lse.shape[-1] > 0 else None)
            elif maps.kind == "probability":
                streams = (_chosen_rows(inputs, maps), inputs.key, None, None, inputs.text_key, None, None)
                lse = call_forward(*streams, inputs.text_bias, scale, *_NO_MAP)[1]
            entries = any_map(inputs, scale, maps, lse)
            shown = given if given is not None or lse is None else lse.detach()
            return AttentionMaps(entries, None, shown)

        with_text_map = maps is not None and maps.image_to_text
        request = _text_request(scale, maps, inputs) if maps and with_text_map else (scale, *_NO_MAP)
        request = (*request[:-1], text_first)
        joint, lse, entries = call_forward(*inputs.tensors(), inputs.text_bias, *request)
        masses = attention_statistics(inputs, scale, lse) if statistics else None
        if maps is not None and with_text_map:
            entries = pick(_chosen_columns(entries, maps), entries.dim() - 2, maps.rows[1])
        elif maps is not None:
            norm = _of_rows(lse, inputs, maps) if maps.kind == "probability" else None
            entries = any_map(inputs, scale, maps, norm)
        if inputs.text_value is None:
            return AttentionMaps(entries, masses, lse.detach())
        outputs = Request(*request).split(joint, inputs.query.shape[1])
        return JointAttention(joint, *outputs, lse.detach(), None if maps is None else entries, masses)

    return attend


_NO_MAP = (None, "mean", 0, 0, False)


def pick(tensor: Tensor, axis: int, tokens: slice | Tensor) -> Tensor:
    """Some tokens of a tensor."""
    if isinstance(tokens, Tensor):
        return tensor.index_select(axis, tokens)
    return tensor[(slice(None),) * axis + (tokens,)]


def _text_request(scale: float, maps: MapRequest, inputs: Inputs) -> tuple[Any, ...]:
    """The request of all columns that are a range, else of all text columns."""
    text_tokens = inputs.text_key.shape[1]
    chosen = isinstance(maps.columns[1], slice)
    return (
        scale,
        maps.kind,
        maps.heads,
        *(maps.text_range(text_tokens) if chosen else (0, text_tokens)),
        False,
    )


def _chosen_columns(entries: Tensor, maps: MapRequest) -> Tensor:
    """The map of the columns wanted, out of what :func:`_text_request` asks for."""
    tokens = maps.columns[1]
    return entries.index_select(-1, tokens) if isinstance(tokens, Tensor) else entries


def _chosen_rows(inputs: Inputs, maps: MapRequest) -> Tensor:
    stream, tokens = maps.rows
    rows = inputs.text_query if stream == "text" else inputs.query
    assert rows is not None
    return pick(rows, 1, tokens)


def _of_rows(lse: Tensor, inputs: Inputs, maps: MapRequest) -> Tensor:
    """The log-sum-exp of the chosen rows, [B, H, M], out of that of all, image rows first."""
    stream, tokens = maps.rows
    image_tokens = inputs.query.shape[1]
    return pick(lse[:, :, image_tokens:] if stream == "text" else lse[:, :, :image_tokens], 2, tokens)
