"""Map entries of any rows and columns, given the log-sum-exp of the rows, as one PyTorch operator.

An attention backend fills the map of image rows and text columns on its way. Every other relation, and a map
whose log-sum-exp somebody else computed, is a product of the chosen rows and columns. The gradient of the
log-sum-exp is handed on: the attention that it came from adds it to the gradient of its scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .aten.blocks import products, text_mask
from .types import wide_dtype

_ARGUMENTS = "Tensor rows, Tensor columns, Tensor? bias, Tensor? lse, float scale, bool mean"


def _entries(
    rows: Tensor, columns: Tensor, bias: Tensor | None, lse: Tensor | None, scale: float, mean: bool
) -> Tensor:
    maps = _empty(rows, columns, bias, lse, scale, mean)
    heads = rows.shape[2]
    with torch.autocast(rows.device.type, enabled=False):
        if lse is None and mean:  # linear: one product of the un-split projections
            flat_rows, flat_columns = (tensor.flatten(2).to(maps.dtype) for tensor in (rows, columns))
            torch.bmm(flat_rows, flat_columns.transpose(1, 2) * (scale / heads), out=maps)
        else:
            for head in range(heads):
                entries = _of_head(rows, columns, bias, lse, scale, head)
                if not mean:
                    maps[:, head] = entries
                elif head == 0:
                    maps.copy_(entries)
                else:
                    maps.add_(entries)
            if mean:
                maps.div_(heads)
    if lse is None and bias is not None:
        masked = text_mask(bias)
        maps.masked_fill_(masked if mean else masked[:, None], 0.0)
    return maps


def _of_head(
    rows: Tensor, columns: Tensor, bias: Tensor | None, lse: Tensor | None, scale: float, head: int
) -> Tensor:
    """Entries of one head, [B, M, C]: probabilities, or logits without a log-sum-exp."""
    scores = products(rows[:, :, head], columns[:, :, head]).mul_(scale)
    if lse is None:
        return scores
    if bias is not None:
        scores.add_(bias[:, None])
    norm = lse[:, head]
    return scores.sub_(norm.masked_fill(norm == -torch.inf, torch.inf)[..., None]).exp_()


def _gradients(
    d_maps: Tensor,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    lse: Tensor | None,
    scale: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(rows.dtype)
    heads = rows.shape[2]
    d_rows, d_columns, d_lse = _empty_gradients(d_maps, rows, columns, bias, lse)
    d_maps = (d_maps / heads)[:, None].expand(-1, heads, -1, -1) if mean else d_maps
    if bias is not None:
        d_maps = d_maps.masked_fill(text_mask(bias)[:, None], 0.0)
    with torch.autocast(rows.device.type, enabled=False):
        for head in range(heads):
            d_scores = d_maps[:, head]
            if lse is not None:
                d_scores = d_scores * _of_head(rows, columns, bias, lse, scale, head)
                d_lse[:, head] = -d_scores.sum(dim=-1)
            d_scores = d_scores * scale
            d_rows[:, :, head] = torch.bmm(d_scores, columns[:, :, head].to(wide))
            d_columns[:, :, head] = torch.bmm(d_scores.transpose(1, 2), rows[:, :, head].to(wide))
    return d_rows, d_columns, d_lse


def _empty(rows: Tensor, columns: Tensor, bias: Any, lse: Any, scale: float, mean: bool) -> Tensor:
    batch, count, heads, _ = rows.shape
    shape = (batch, count, columns.shape[1]) if mean else (batch, heads, count, columns.shape[1])
    return rows.new_empty(shape, dtype=wide_dtype(rows.dtype))


def _empty_gradients(
    d_maps: Tensor, rows: Tensor, columns: Tensor, bias: Any, lse: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_lse = rows.new_empty((0,)) if lse is None else lse.new_empty(lse.shape)
    return rows.new_empty(rows.shape), columns.new_empty(columns.shape), d_lse


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, d_maps: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns, bias, lse = ctx.saved_tensors
    given = (d_maps, rows, columns, bias, lse, *ctx.options)
    d_rows, d_columns, d_lse = torch.ops.seg4diff.map_entries_backward.default(*given)
    return d_rows, d_columns, None, None if lse is None else d_lse, None, None


_custom_op: Any = torch.library.custom_op
_entries_op = _custom_op(
    "seg4diff::map_entries", _entries, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_gradients_op = _custom_op(
    "seg4diff::map_entries_backward",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor d_maps, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
_entries_op.register_fake(_empty)
_gradients_op.register_fake(_empty_gradients)
_entries_op.register_autograd(_differentiate, setup_context=_setup_context)


def map_entries(
    rows: Tensor, columns: Tensor, bias: Tensor | None, lse: Tensor | None, scale: float, heads: str
) -> Tensor:
    """Probabilities of ``rows`` [B, M, H, D] reading ``columns`` [B, C, H, D], or their scaled logits.

    Differentiable with respect to rows, columns and log-sum-exp.

    Args:
        rows, columns: queries and keys, any strides.
        bias: of the columns, float32 [B, C], or None; a logit does not contain it, but is 0 where it masks.
        lse: natural log-sum-exp of the rows over all keys, [B, H, M], wide; None for logits. A row of -inf
            has read nothing: its entries are 0.
        scale: factor of the scores.
        heads: ``"mean"`` -> [B, M, C], ``"each"`` -> [B, H, M, C], in the wide dtype.
    """
    operator = torch.ops.seg4diff.map_entries.default
    entries: Tensor = operator(rows, columns, bias, lse, scale, heads == "mean")
    return entries
