"""Image-to-text maps: a deterministic pass of their own.

With the maximum and the sum of a row's softmax known, a map costs the scores of the text columns and nothing
else. The loop over heads is inside the program: no atomics, and nothing per head is written unless asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Inputs, Request
from . import tuning
from .forward import attention
from .launch import Launch, readable_inputs, strided, strided_bias, strided_by_head
from .primitives import LOG2_E, at, inner_products, load_bias, load_tile


@triton.jit(do_not_specialize=["tokens", "first", "last", "heads"])
def map_kernel(
    query,
    text_key,
    bias,
    peak,
    weight,
    maps,
    tokens,
    first,
    last,
    heads,
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    LOGIT: tl.constexpr,
    EACH: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One tile of the map, image rows by the text columns ``first`` to ``last``, for all heads.

    Columns whose ``bias`` is -inf are 0; a logit does not contain the bias otherwise.

    ``factor`` is the scale, times log2(e) for probabilities; ``peak`` and ``weight`` of the rows are unused
    for LOGIT. EACH: keep the heads apart, else their mean.
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
    offsets = here[:, None] * maps.token + there[None, :]  # [ROWS, COLUMNS]
    entry = at(maps, batch, 0, row) + column

    rows = at(query, batch, 0, row)
    keys = at(text_key, batch, 0, first + column)
    if not LOGIT:
        peaks = at(peak, batch, 0, row) + here
        weights = at(weight, batch, 0, row) + here
        row_peak = tl.load(peaks, mask=here < row_count, other=0.0)
        row_weight = tl.load(weights, mask=here < row_count, other=0.0)
    if BIAS:
        added = load_bias(bias, batch, first + column, column_count, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for head in range(heads):
        q = load_tile(rows, query.token, row_count, ROWS, D, True)
        k = load_tile(keys, text_key.token, column_count, COLUMNS, D, True)
        entries = inner_products(q, k) * factor
        if BIAS:
            if LOGIT:
                entries = tl.where(added == float("-inf"), 0.0, entries)
            else:
                entries += added * LOG2_E
        if not LOGIT:
            entries = tl.exp2(entries - row_peak[:, None]) * row_weight[:, None]
            # Those of the next head, a pass ahead: the loads are too small for the compiler's pipeline.
            peaks += peak.head
            weights += weight.head
            follows = (here < row_count) & (head + 1 < heads)
            row_peak = tl.load(peaks, mask=follows, other=0.0)
            row_weight = tl.load(weights, mask=follows, other=0.0)
        if EACH:
            tl.store(entry + offsets, entries, mask=inside)
            entry += maps.head
        else:
            total += entries
        rows += query.head
        keys += text_key.head
    if not EACH:
        tl.store(entry + offsets, total / heads, mask=inside)


def text_log_sum_exp(inputs: Inputs, scale: float, for_map: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Log-sum-exp of the image rows over the text keys alone, float32 [B, H, N]."""
    query, text_key = inputs.query, inputs.text_key
    batch, tokens, heads, _ = query.shape
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    alone = Inputs(query, None, None, None, text_key, None, None, inputs.text_bias)
    attention(alone, scale, lse, for_map=for_map)
    return lse


def write_maps(maps: Tensor, inputs: Inputs, softmax: tuple[Tensor, Tensor] | None, request: Request) -> None:
    """Fill the float32 ``maps`` that ``request`` describes.

    ``softmax``: peak and weight of the rows, [B, H, at least N] each, of the softmax over all keys for
    ``"probability"``, over the text keys for ``"text_probability"``; None for ``"logit"``. The mean of logits
    is linear: the loop over heads is then one matrix product of the un-split projections, accumulated in
    float32.
    """
    query = inputs.query
    batch, tokens, heads, head_dim = query.shape
    each = request.heads == "each"
    config = tuning.tuning_for(query).scores
    peak, weight = softmax or (None, None)
    arguments: dict[str, Any] = {
        "query": strided(query),
        "text_key": strided(inputs.text_key),
        "bias": strided_bias(inputs.text_bias),
        "peak": strided_by_head(peak),
        "weight": strided_by_head(weight),
        "maps": strided_by_head(maps) if each else strided(maps.unsqueeze(2)),
        "tokens": tokens,
        "first": request.start,
        "last": request.stop,
        "heads": heads,
        "factor": request.scale * (1.0 if softmax is None else math.log2(math.e)),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "D": head_dim,
        "LOGIT": softmax is None,
        "EACH": each,
        "BIAS": inputs.text_bias is not None,
    }
    tiles = triton.cdiv(tokens, config.rows) * triton.cdiv(request.stop - request.start, config.columns)
    Launch(map_kernel, batch * tiles, arguments, config).start()


def write_normalised_maps(maps: Tensor, inputs: Inputs, lse: Tensor, request: Request) -> None:
    """:func:`write_maps` of ``"probability"``, from a natural log-sum-exp over all keys [B, H, N or more]."""
    exact = lse.double() * math.log2(math.e)
    peak = exact.round()
    write_maps(maps, readable_inputs(inputs), (peak.float(), (peak - exact).exp2().float()), request)
