"""Propagation of maps along image-to-image attention, and the average key of a row, as operators.

Neither keeps a matrix of rows by keys: one block of rows at a time exists, summed over the heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..types import wide_dtype
from .forward import by_head, flash

_BLOCK_ELEMENTS = 2**19  # of one head's scores: 2 MiB in float32, which a cache holds

_ARGUMENTS = "Tensor query, Tensor key, Tensor maps, Tensor? lse, float scale"


def _propagate(query: Tensor, key: Tensor, maps: Tensor, lse: Tensor | None, scale: float) -> Tensor:
    out = _empty(query, key, maps, lse, scale)
    with torch.autocast(query.device.type, enabled=False):
        for block, attention in _mean_attention(query, key, lse, scale):
            out[:, block] = torch.bmm(attention, maps)
    return out


def _propagate_backward(
    d_out: Tensor, query: Tensor, key: Tensor, lse: Tensor | None, scale: float
) -> Tensor:
    d_maps = d_out.new_zeros((d_out.shape[0], key.shape[1], d_out.shape[2]))
    with torch.autocast(query.device.type, enabled=False):
        for block, attention in _mean_attention(query, key, lse, scale):
            d_maps.baddbmm_(attention.transpose(1, 2), d_out[:, block])
    return d_maps


def _mean_attention(
    query: Tensor, key: Tensor, lse: Tensor | None, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows and their probabilities, the mean over heads, wide [B, rows, M]."""
    batch, rows, heads, _ = query.shape
    wide = wide_dtype(query.dtype)
    keys = key.to(wide).permute(2, 0, 3, 1).contiguous()  # [H, B, D, M]
    count = min(rows, max(1, _BLOCK_ELEMENTS // (batch * key.shape[1])))
    norm = None if lse is None else lse.masked_fill(lse == -torch.inf, torch.inf)
    buffers = keys.new_empty((3, batch * count * key.shape[1]))
    for first in range(0, rows, count):
        block = slice(first, min(first + count, rows))
        shape = (batch, block.stop - first, key.shape[1])
        scores, probability, total = (b[: math.prod(shape)].view(shape) for b in buffers)
        queries = query[:, block].to(wide).transpose(0, 2).transpose(1, 2).contiguous()  # [H, B, rows, D]
        total.zero_()
        for head in range(heads):
            torch.baddbmm(scores, queries[head], keys[head], beta=0, alpha=scale, out=scores)
            if norm is None:
                total.add_(torch.softmax(scores, dim=-1, out=probability))
            else:
                total.add_(scores.sub_(norm[:, head, block, None]).exp_())
        yield block, total.div_(heads)


def _empty(query: Tensor, key: Tensor, maps: Tensor, lse: Any, scale: float) -> Tensor:
    return maps.new_empty((maps.shape[0], query.shape[1], maps.shape[2]))


def _key_average(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(query.dtype)
    keys = by_head(key.to(wide))
    with torch.autocast(query.device.type, enabled=False):
        average, lse = flash(query.to(wide), keys, keys, scale)
    return average.contiguous(), lse.contiguous()


def _empty_average(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = query.shape
    wide = wide_dtype(query.dtype)
    return query.new_empty(query.shape, dtype=wide), query.new_empty((batch, heads, rows), dtype=wide)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, _, lse, ctx.scale = inputs
    ctx.save_for_backward(query, key, lse)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, lse = ctx.saved_tensors
    d_maps = torch.ops.seg4diff.propagate_backward.default(d_out, query, key, lse, ctx.scale)
    return None, None, d_maps, None, None


_custom_op: Any = torch.library.custom_op
_propagate_op = _custom_op(
    "seg4diff::propagate", _propagate, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_propagate_backward_op = _custom_op(
    "seg4diff::propagate_backward",
    _propagate_backward,
    mutates_args=(),
    schema="(Tensor d_out, Tensor query, Tensor key, Tensor? lse, float scale) -> Tensor",
)
_key_average_op = _custom_op(
    "seg4diff::key_average",
    _key_average,
    mutates_args=(),
    schema="(Tensor query, Tensor key, float scale) -> (Tensor kbar, Tensor lse)",
)
_propagate_op.register_fake(_empty)
_propagate_op.register_autograd(_differentiate, setup_context=_setup_context)
_propagate_backward_op.register_fake(
    lambda d_out, query, key, lse, scale: d_out.new_empty((d_out.shape[0], key.shape[1], d_out.shape[2]))
)
_key_average_op.register_fake(_empty_average)

propagate: Any = torch.ops.seg4diff.propagate.default
"""(query, key, maps, lse, scale): mean over heads of the attention, times wide maps [B, M, C]."""

key_average: Any = torch.ops.seg4diff.key_average.default
"""(query, key, scale): the average key of every row, wide [B, N, H, D], and its log-sum-exp [B, H, N]."""
