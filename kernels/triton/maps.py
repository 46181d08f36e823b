"""What the attention saw: maps, attention budgets and value norms, each a deterministic pass of its own.

With the log-sum-exp of a row known, a probability is ``exp(score - lse)``, so a map costs the scores of the
text columns and nothing else. The loop over heads is inside the program: no atomics, and nothing per head is
written unless asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Request
from .forward import log_sum_exp
from .launching import Launch, readable, strides
from .tiles import LOG2_E, head_parts, inner_products, load_tile
from .tuning import VALUE_NORM_TOKENS, VALUE_NORM_WARPS, Config, tuning_for


@triton.jit
def map_kernel(
    query,
    query_batch,
    query_token,
    query_head,
    text_key,
    text_key_batch,
    text_key_token,
    text_key_head,
    lse,
    lse_rest,
    lse_batch,
    lse_head,
    maps,
    maps_batch,
    maps_token,
    maps_head,
    tokens,
    first,
    last,
    heads,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    LOGIT: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One tile of the map, image rows by the text columns ``first`` to ``last``, over all heads.

    ``lse`` plus ``lse_rest`` is what the probabilities are normalised by; unused for LOGIT. HEADS is "mean",
    "each", "max" or "winner": the head that holds the maximum, the first of equals, int16.
    """
    row_tiles = tl.cdiv(tokens, ROWS)
    column_tiles = tl.cdiv(last - first, COLUMNS)
    row = (tl.program_id(0) % row_tiles * ROWS).to(tl.int64)
    column = (tl.program_id(0) // row_tiles % column_tiles * COLUMNS).to(tl.int64)
    batch = (tl.program_id(0) // row_tiles // column_tiles).to(tl.int64)
    row_count = tokens - row
    column_count = last - first - column
    here = tl.arange(0, ROWS)
    there = tl.arange(0, COLUMNS)
    inside = (here < row_count)[:, None] & (there < column_count)[None, :]
    offsets = here[:, None] * maps_token + there[None, :]  # [ROWS, COLUMNS]
    entry = maps + batch * maps_batch + row * maps_token + column

    rows = query + batch * query_batch + row * query_token
    keys = text_key + batch * text_key_batch + (first + column) * text_key_token
    if not LOGIT:
        norms = lse + batch * lse_batch + row
        if HEADS != "winner":
            rests = lse_rest + batch * lse_batch + row
    # A maximum starts below any score, a sum at zero.
    result = tl.full([ROWS, COLUMNS], 0.0 if HEADS == "mean" else float("-inf"), dtype=tl.float32)
    best = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
    for head in range(heads):
        q, q_rest = load_tile(rows, query_token, row_count, ROWS, WIDTH, REST, D, True)
        k, k_rest = load_tile(keys, text_key_token, column_count, COLUMNS, WIDTH, REST, D, True)
        entries = inner_products(q, q_rest, k, k_rest, REST)
        if LOGIT:
            entries = entries * scale
        else:
            norm = tl.load(norms + here, mask=here < row_count, other=0.0)
            # The difference first: it is small and so exact, where products with log2(e) are rounded.
            entries = entries * scale - norm[:, None]
            if HEADS != "winner":
                rest = tl.load(rests + here, mask=here < row_count, other=0.0)
                entries -= rest[:, None]
            entries = tl.exp2(entries * LOG2_E)
        if HEADS == "each":
            tl.store(entry + offsets, entries, mask=inside)
            entry += maps_head
        elif HEADS == "mean":
            result += entries
        elif HEADS == "max":
            # NaN wins, as in torch.amax.
            result = tl.maximum(result, entries, propagate_nan=tl.PropagateNan.ALL)
        else:
            best = tl.where(entries > result, head, best)
            result = tl.maximum(result, entries)
        rows += query_head
        keys += text_key_head
        if not LOGIT:
            norms += lse_head
            if HEADS != "winner":
                rests += lse_head
    if HEADS == "mean":
        tl.store(entry + offsets, result / heads, mask=inside)
    elif HEADS == "max":
        tl.store(entry + offsets, result, mask=inside)
    elif HEADS == "winner":
        tl.store(entry + offsets, best.to(tl.int16), mask=inside)


@triton.jit
def budget_kernel(
    rows,
    rows_batch,
    rows_token,
    rows_head,
    text_key,
    text_key_batch,
    text_key_token,
    text_key_head,
    lse,
    lse_batch,
    lse_head,
    mass,
    row_tokens,
    text_tokens,
    heads,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
):
    """Probability mass that a tile of rows of a head gives to all text columns, into ``mass`` [B, H, M]."""
    tiles = tl.cdiv(row_tokens, ROWS)
    row = (tl.program_id(0) % tiles * ROWS).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    count = row_tokens - row
    here = tl.arange(0, ROWS)
    there = tl.arange(0, COLUMNS)
    tile = rows + batch * rows_batch + head * rows_head + row * rows_token
    q, q_rest = load_tile(tile, rows_token, count, ROWS, WIDTH, REST, D, True)
    norm = tl.load(lse + batch * lse_batch + head * lse_head + row + here, mask=here < count, other=0.0)
    total = tl.zeros([ROWS], dtype=tl.float32)
    keys = text_key + batch * text_key_batch + head * text_key_head
    for start in range(0, text_tokens, COLUMNS):
        k, k_rest = load_tile(keys, text_key_token, text_tokens - start, COLUMNS, WIDTH, REST, D, True)
        scores = inner_products(q, q_rest, k, k_rest, REST) * scale - norm[:, None]  # [ROWS, COLUMNS]
        scores = tl.where((there < text_tokens - start)[None, :], scores, float("-inf"))
        total += tl.sum(tl.exp2(scores * LOG2_E), 1)
        keys += COLUMNS * text_key_token
    tl.store(mass + (batch * heads + head) * row_tokens + row + here, total, mask=here < count)


@triton.jit
def value_norm_kernel(
    value,
    value_batch,
    value_token,
    value_head,
    norm,
    tokens,
    heads,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
):
    """Euclidean norms of one tile of value vectors of one head, into ``norm`` [B, H, tokens]."""
    tiles = tl.cdiv(tokens, TOKENS)
    first = (tl.program_id(0) % tiles * TOKENS).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    count = tokens - first
    vectors = value + batch * value_batch + head * value_head + first * value_token
    v, v_rest = load_tile(vectors, value_token, count, TOKENS, WIDTH, REST, D, True)
    v = v.to(tl.float32)
    squares = tl.sum(v * v, 1)
    if REST > 0:
        v_rest = v_rest.to(tl.float32)
        squares += tl.sum(v_rest * v_rest, 1)
    here = tl.arange(0, TOKENS)
    tl.store(norm + (batch * heads + head) * tokens + first + here, tl.sqrt(squares), mask=here < count)


def text_log_sum_exp(query: Tensor, text_key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the image rows over the text keys alone, float32 [B, H, N], and its rounding rest."""
    batch, tokens, heads, _ = query.shape
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    rest = torch.empty_like(lse)
    log_sum_exp(query, None, text_key, scale, lse, rest)
    return lse, rest


def write_maps(
    maps: Tensor,
    query: Tensor,
    text_key: Tensor,
    lse: Tensor | None,
    lse_rest: Tensor | None,
    request: Request,
) -> None:
    """Fill the float32 ``maps`` that ``request`` describes.

    ``lse`` plus ``lse_rest``, [B, H, at least N], normalises the rows: over all keys for ``"probability"``,
    over the text keys for ``"text_probability"``; None for ``"logit"``. The mean of logits is linear: the
    loop over heads is then one matrix product of the un-split projections, accumulated in float32.
    """
    _launch_map(maps, query, text_key, lse, lse_rest, request, request.heads)


def winning_head(
    query: Tensor, text_key: Tensor, lse: Tensor | None, request: Request, columns: int
) -> Tensor:
    """The head that holds the maximum of a map entry, the one its gradient goes to: int16 [B, N,
    ``columns``].

    The requested text columns are at their places; -1 elsewhere.
    """
    batch, tokens = query.shape[:2]
    winner = torch.full((batch, tokens, columns), -1, dtype=torch.int16, device=query.device)
    _launch_map(winner[..., request.start : request.stop], query, text_key, lse, None, request, "winner")
    return winner


def _launch_map(
    maps: Tensor,
    query: Tensor,
    text_key: Tensor,
    lse: Tensor | None,
    lse_rest: Tensor | None,
    request: Request,
    reduction: str,
) -> None:
    batch, tokens, heads, head_dim = query.shape
    width, rest = head_parts(head_dim, query.dtype)
    config = tuning_for(query).scores
    arguments: dict[str, Any] = {
        **strides("query", query),
        **strides("text_key", text_key),
        "lse": lse,
        "lse_rest": lse_rest,
        "lse_batch": 0 if lse is None else lse.stride(0),
        "lse_head": 0 if lse is None else lse.stride(1),
        "maps": maps,
        "maps_batch": maps.stride(0),
        "maps_token": maps.stride(-2),
        "maps_head": maps.stride(1),
        "tokens": tokens,
        "first": request.start,
        "last": request.stop,
        "heads": heads,
        "scale": request.scale,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "WIDTH": width,
        "REST": rest,
        "D": head_dim,
        "LOGIT": request.kind == "logit",
        "HEADS": reduction,
    }
    tiles = triton.cdiv(tokens, config.rows) * triton.cdiv(request.stop - request.start, config.columns)
    Launch(map_kernel, batch * tiles, arguments, config).start()


def budget(
    query: Tensor, text_query: Tensor, text_key: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Mass that image rows, float32 [B, H, N], and text rows, [B, H, T], give to the text columns."""
    tokens = query.shape[1]
    text_key = readable(text_key)
    return (
        _mass(readable(query), text_key, lse[:, :, :tokens], scale),
        _mass(readable(text_query), text_key, lse[:, :, tokens:], scale),
    )


def _mass(rows: Tensor, text_key: Tensor, lse: Tensor, scale: float) -> Tensor:
    batch, row_tokens, heads, head_dim = rows.shape
    width, rest = head_parts(head_dim, rows.dtype)
    config = tuning_for(rows).scores
    mass = torch.empty((batch, heads, row_tokens), dtype=torch.float32, device=rows.device)
    arguments: dict[str, Any] = {
        **strides("rows", rows),
        **strides("text_key", text_key),
        "lse": lse,
        "lse_batch": lse.stride(0),
        "lse_head": lse.stride(1),
        "mass": mass,
        "row_tokens": row_tokens,
        "text_tokens": text_key.shape[1],
        "heads": heads,
        "scale": scale,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "WIDTH": width,
        "REST": rest,
        "D": head_dim,
    }
    Launch(budget_kernel, batch * heads * triton.cdiv(row_tokens, config.rows), arguments, config).start()
    return mass


def value_norm(value: Tensor) -> Tensor:
    """Euclidean norm of every value vector: [B, tokens, H, D] -> float32 [B, H, tokens]."""
    value = readable(value)
    batch, tokens, heads, head_dim = value.shape
    width, rest = head_parts(head_dim, value.dtype)
    config = Config(VALUE_NORM_TOKENS, 1, VALUE_NORM_WARPS, 1)
    norm = torch.empty((batch, heads, tokens), dtype=torch.float32, device=value.device)
    arguments: dict[str, Any] = {
        **strides("value", value),
        "norm": norm,
        "tokens": tokens,
        "heads": heads,
        "TOKENS": config.rows,
        "WIDTH": width,
        "REST": rest,
        "D": head_dim,
    }
    Launch(value_norm_kernel, batch * heads * triton.cdiv(tokens, config.rows), arguments, config).start()
    return norm
