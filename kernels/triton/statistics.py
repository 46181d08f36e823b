"""Statistics of the whole attention matrix: attention mass and value norms, each a pass of its own."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import Launch, readable, strided, strided_bias, strided_by_head
from .primitives import LOG2_E, at, inner_products, load_bias, load_norm, load_tile, row_products


@triton.jit(do_not_specialize=["row_tokens", "text_tokens", "heads"])
def mass_kernel(
    rows,
    text_key,
    bias,
    lse,
    mass,
    row_tokens,
    text_tokens,
    heads,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Probability mass that a tile of rows of a head gives to all text columns."""
    tiles = tl.cdiv(row_tokens, ROWS)
    row = (tl.program_id(0) % tiles * ROWS).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    count = row_tokens - row
    here = tl.arange(0, ROWS)
    there = tl.arange(0, COLUMNS)
    q = load_tile(at(rows, batch, head, row), rows.token, count, ROWS, D, True)
    norm = load_norm(at(lse, batch, head, row) + here, here < count, BIAS)
    total = tl.zeros([ROWS], dtype=tl.float32)
    keys = at(text_key, batch, head, 0)
    for start in range(0, text_tokens, COLUMNS):
        k = load_tile(keys, text_key.token, text_tokens - start, COLUMNS, D, True)
        if BIAS:
            added = load_bias(bias, batch, start, text_tokens - start, COLUMNS)[None, :] - norm[:, None]
        else:
            added = -norm[:, None]
        scores = tl.fma(inner_products(q, k), scale, added)  # [ROWS, COLUMNS]
        scores = tl.where((there < text_tokens - start)[None, :], scores, float("-inf"))
        total += tl.sum(tl.exp2(scores * LOG2_E), 1)
        keys += COLUMNS * text_key.token
    tl.store(at(mass, batch, head, row) + here, total, mask=here < count)


@triton.jit(do_not_specialize=["tokens", "heads"])
def value_norm_kernel(value, norm, tokens, heads, TOKENS: tl.constexpr, D: tl.constexpr):
    """Euclidean norms of one tile of value vectors of one head."""
    tiles = tl.cdiv(tokens, TOKENS)
    first = (tl.program_id(0) % tiles * TOKENS).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    count = tokens - first
    v = load_tile(at(value, batch, head, first), value.token, count, TOKENS, D, True)
    here = tl.arange(0, TOKENS)
    tl.store(at(norm, batch, head, first) + here, tl.sqrt(row_products(v, v)), mask=here < count)


def attention_mass(
    query: Tensor,
    text_query: Tensor,
    text_key: Tensor,
    lse: Tensor,
    scale: float,
    text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention mass that image rows, float32 [B, H, N], and text rows, [B, H, T], give to text columns."""
    tokens = query.shape[1]
    text_key = readable(text_key)
    bias = None if text_bias is None else text_bias.contiguous()
    return (
        _mass(readable(query), text_key, lse[:, :, :tokens], scale, bias),
        _mass(readable(text_query), text_key, lse[:, :, tokens:], scale, bias),
    )


def _mass(rows: Tensor, text_key: Tensor, lse: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    batch, row_tokens, heads, head_dim = rows.shape
    config = tuning.tuning_for(rows).scores
    sums = torch.empty((batch, heads, row_tokens), dtype=torch.float32, device=rows.device)
    arguments: dict[str, Any] = {
        "rows": strided(rows),
        "text_key": strided(text_key),
        "bias": strided_bias(bias),
        "lse": strided_by_head(lse),
        "mass": strided_by_head(sums),
        "row_tokens": row_tokens,
        "text_tokens": text_key.shape[1],
        "heads": heads,
        "scale": scale,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "D": head_dim,
        "BIAS": bias is not None,
    }
    Launch(mass_kernel, batch * heads * triton.cdiv(row_tokens, config.rows), arguments, config).start()
    return sums


def value_norm(value: Tensor) -> Tensor:
    """Euclidean norm of every value vector: [B, tokens, H, D] -> float32 [B, H, tokens]."""
    value = readable(value)
    batch, tokens, heads, head_dim = value.shape
    config = tuning.VALUE_NORM
    norm = torch.empty((batch, heads, tokens), dtype=torch.float32, device=value.device)
    arguments: dict[str, Any] = {
        "value": strided(value),
        "norm": strided_by_head(norm),
        "tokens": tokens,
        "heads": heads,
        "TOKENS": config.rows,
        "D": head_dim,
    }
    Launch(value_norm_kernel, batch * heads * triton.cdiv(tokens, config.rows), arguments, config).start()
    return norm
