"""The attention output and its log-sum-exp: one flash-attention kernel over two streams of keys.

A program owns a tile of query rows of one head, image rows or text rows, and reads the image keys and then
the text keys from their own tensors: nothing is concatenated and nothing transposed. Statistics stay out of
the main loop, which is bound by the exponential at head dim 64; maps and statistics are passes of their own
(``maps.py``, ``statistics.py``). Forward and map are two launches: as an epilogue, the map would need a
read-modify-write of every entry for every head, or the sum over heads across programs, which only atomics
give.

A softmax may be shifted by anything that does not overflow. So the text keys, the image keys that fill no
tile, and the first full tile of image keys settle the shift of a row (SHIFTED); the other tiles look for no
maximum and rescale nothing, and none of them waits for another. Should the total of a row reach 2**64 all
the same, its tile of rows is done again with the online softmax. Weights in float16 end at 2**16: there the
softmax is always online.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Inputs
from . import tuning
from .launch import Launch, strided, strided_bias, strided_by_head
from .primitives import (
    LN_2,
    LOG2_E,
    at,
    float32,
    inner_products,
    load_at,
    load_bias,
    load_tile,
    moved,
    scaled,
    store_tile,
    tile_pointers,
    weighted_sums,
    zeros_like,
)

# Where the shift starts: below any score, yet finite, so that a row whose first tile holds only -inf does not
# turn into NaN.
_LOWEST = tl.constexpr(-1.0e38)
# A total that shows a shift to be too small. Weights of bfloat16 and float32, and sums of values below 2**63
# that they weigh, are finite up to 2**127.
_LARGE = tl.constexpr(2.0**64)


@triton.jit
def _lane_sums(weights, LANES: tl.constexpr):
    """Sums of each row, [ROWS, LANES]: of all, or of those that one thread holds, without exchange."""
    if LANES > 1:
        return tl.sum(tl.reshape(weights, [weights.shape[0], weights.shape[1] // LANES, LANES]), 1)
    else:
        return tl.sum(weights, 1)[:, None]


@triton.jit
def _raise_shift(sums, shift, total, scores, factor):
    """Raise the shift of each row to the greatest of its scores, and rescale what was summed."""
    raised = tl.maximum(shift, tl.max(scores, 1) * factor)
    correction = tl.exp2(shift - raised)[:, None]
    return scaled(sums, correction), raised, total * correction


@triton.jit
def _attend_online(
    sums,
    shift,
    total,
    q,
    key,
    value,
    text_key,
    keys,
    values,
    text_keys,
    text_values,
    bias,
    batch,
    image_keys,
    text_tokens,
    settling,
    factor,
    text_value_token,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    OUTPUT: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Let the query tile attend to the first ``settling`` full tiles of image keys, to what image keys do not
    fill a tile, and to all text keys: each may raise the shift of a row.
    """
    whole = image_keys // COLUMNS
    image_tiles = tl.cdiv(image_keys, COLUMNS)
    for tile in tl.range(whole - settling, image_tiles + tl.cdiv(text_tokens, COLUMNS), num_stages=STAGES):
        of_image = tile < image_tiles
        column = tl.where(of_image, tl.where(tile < whole, tile - whole + settling, tile), tile - image_tiles)
        column *= COLUMNS
        count = tl.where(of_image, image_keys, text_tokens) - column
        wide = tl.cast(column, tl.int64)
        key_token = tl.where(of_image, key.token, text_key.token)
        k = load_tile(
            tl.where(of_image, keys, text_keys) + wide * key_token, key_token, count, COLUMNS, D, True
        )
        scores = inner_products(q, k)  # [ROWS, COLUMNS]
        unit = factor
        if BIAS:
            added = load_bias(bias, batch, column, tl.where(of_image, 0, count), COLUMNS)
            scores = scores * factor + (added * LOG2_E)[None, :]
            unit = 1.0
        scores = tl.where((tl.arange(0, COLUMNS) < count)[None, :], scores, float("-inf"))
        sums, shift, total = _raise_shift(sums, shift, total, scores, unit)
        weights = tl.exp2(scores * unit - shift[:, None])
        total += _lane_sums(weights, LANES)
        if OUTPUT:
            value_token = tl.where(of_image, value.token, text_value_token)
            v = load_tile(
                tl.where(of_image, values, text_values) + wide * value_token,
                value_token, count, COLUMNS, D, True,
            )  # fmt: skip
            sums = weighted_sums(weights, v, sums)
    return sums, shift, total


@triton.jit
def _attend_full(
    sums,
    shift,
    total,
    q,
    key,
    value,
    keys,
    values,
    tiles,
    factor,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    OUTPUT: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Let the query tile attend to full tiles of keys; unless SHIFTED, they may raise the shift of a row."""
    k_at = tile_pointers(keys, key.token, COLUMNS, D)
    v_at = k_at
    if OUTPUT:
        v_at = tile_pointers(values, value.token, COLUMNS, D)
    k_offset, v_offset = 0, 0  # 32 bits suffice for tensors that are `readable`
    for _ in range(tiles):
        scores = inner_products(q, load_at(moved(k_at, k_offset), COLUMNS, D, False))  # [ROWS, COLUMNS]
        if not SHIFTED:
            sums, shift, total = _raise_shift(sums, shift, total, scores, factor)
        weights = tl.exp2(scores * factor - shift[:, None])
        total += _lane_sums(weights, LANES)
        k_offset += COLUMNS * key.token
        if OUTPUT:
            sums = weighted_sums(weights, load_at(moved(v_at, v_offset), COLUMNS, D, False), sums)
            v_offset += COLUMNS * value.token
    return sums, shift, total


@triton.jit(do_not_specialize=["tokens", "text_tokens", "image_keys", "tiles", "heads"])
def attention_kernel(
    query,
    key,
    value,
    text_query,
    text_key,
    text_value,
    edited,
    bias,
    image,
    text,
    lse,
    peak,
    weight,
    tokens,
    text_tokens,
    image_keys,
    tiles,
    heads,
    factor,
    residue,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    FOR_MAP: tl.constexpr,
    SHIFTED: tl.constexpr,
    LANES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Log-sum-exp and, if OUTPUT, output rows of one tile of image or text rows of one head.

    FOR_MAP: also the rows' ``peak``, the shift of their softmax, which is about the greatest score times
    log2(e), and ``weight``, the reciprocal of the sum of exp2(score log2(e) - peak). A probability is their
    exp2(score log2(e) - peak) * weight, as exact as an ordinary softmax; a log-sum-exp of 10, rounded to
    float32, is off by several units in its last place.
    ``edited`` are the text values that image rows read. ``image_keys`` is ``tokens``, or 0 for a softmax over
    the text keys alone. ``tiles`` are those of a head, of image rows and then of text rows, if any.
    ``bias``, if BIAS, is added to the scores of text columns; where all keys of a row are masked, its
    log-sum-exp is -inf and its output 0. ``factor`` is the scale times log2(e); ``residue``
    makes up for its rounding in the log-sum-exp.
    """
    image_tiles = tl.cdiv(tokens, ROWS)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    from_text = tile >= image_tiles
    row = (tl.where(from_text, tile - image_tiles, tile) * ROWS).to(tl.int64)
    count = tl.where(from_text, text_tokens, tokens) - row
    keys = at(key, batch, head, 0)
    text_keys = at(text_key, batch, head, 0)
    values, text_values, text_values_token = keys, text_keys, text_key.token  # never read without OUTPUT
    if from_text:
        rows = at(text_query, batch, head, row)
        if OUTPUT:
            text_values = at(text_value, batch, head, 0)
    else:
        rows = at(query, batch, head, row)
        if OUTPUT:
            text_values = at(edited, batch, head, 0)
    if OUTPUT:
        values = at(value, batch, head, 0)
        text_values_token = tl.where(from_text, text_value.token, edited.token)

    q = load_tile(rows, tl.where(from_text, text_query.token, query.token), count, ROWS, D, True)
    shift = tl.full([ROWS], _LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    sums = zeros_like(q, ROWS)
    whole = image_keys // COLUMNS
    settling = tl.minimum(whole, 1) if SHIFTED else 0
    # Large tiles and a softmax that is online throughout leave no registers to load these few tiles ahead.
    STAGES: tl.constexpr = None if SHIFTED or COLUMNS * D < 128 * 128 else 1
    sums, shift, total = _attend_online(
        sums, shift, total, q, key, value, text_key, keys, values, text_keys, text_values, bias, batch,
        image_keys, text_tokens, settling, factor, text_values_token, COLUMNS, D, LANES, OUTPUT, BIAS, STAGES,
    )  # fmt: skip
    keys_left, values_left = keys, values
    if SHIFTED:
        keys_left += settling * COLUMNS * key.token
        if OUTPUT:
            values_left += settling * COLUMNS * value.token
    sums, shift, total = _attend_full(
        sums, shift, total, q, key, value, keys_left, values_left, whole - settling, factor,
        COLUMNS, D, LANES, OUTPUT, SHIFTED,
    )  # fmt: skip
    if SHIFTED:  # noqa: SIM102
        if tl.max(tl.max(tl.where(total < _LARGE, 0, 1), 1), 0) > 0:  # NaN counts as large
            shift = tl.full([ROWS], _LOWEST, dtype=tl.float32)
            total = tl.zeros([ROWS, LANES], dtype=tl.float32)
            sums, shift, total = _attend_online(
                zeros_like(q, ROWS), shift, total, q, key, value, text_key, keys, values,
                text_keys, text_values, bias, batch, image_keys, text_tokens, whole, factor,
                text_values_token, COLUMNS, D, LANES, OUTPUT, BIAS, STAGES,
            )  # fmt: skip

    here = tl.arange(0, ROWS)
    stream_row = tl.where(from_text, tokens, 0) + row
    row_total = tl.sum(total, 1)
    if BIAS:
        masked = row_total == 0.0
        row_total = tl.where(masked, 1.0, row_total)
    inverse = 1.0 / row_total
    norm = tl.fma(shift, LN_2, tl.fma(shift, residue, tl.log(row_total)))  # rounded once
    if BIAS:
        norm = tl.where(masked, float("-inf"), norm)
        shift = tl.where(masked, 0.0, shift)
    tl.store(at(lse, batch, head, stream_row) + here, norm, mask=here < count)
    if FOR_MAP:
        tl.store(at(peak, batch, head, stream_row) + here, shift, mask=here < count)
        tl.store(at(weight, batch, head, stream_row) + here, inverse, mask=here < count)
    if OUTPUT:
        if from_text:
            out = at(text, batch, head, row)
        else:
            out = at(image, batch, head, row)
        out_token = tl.where(from_text, text.token, image.token)
        store_tile(out, out_token, count, scaled(sums, inverse[:, None]), D)


def attention(
    inputs: Inputs,
    scale: float,
    lse: Tensor,
    image: Tensor | None = None,
    text: Tensor | None = None,
    *,
    for_map: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill the natural log-sum-exp of the rows and, if there are values, the outputs of both streams.

    Args:
        inputs: without text queries, only image rows count; without image keys, the softmax runs over the
            text keys alone.
        scale: factor of the scores.
        lse: float32 [B, H, N + T] or, without text queries, [B, H, N]; last axis contiguous.
        image: [B, N, H, D], last axis contiguous; not written without values.
        text: [B, T, H, D], likewise.
        for_map: ``peak`` and ``weight`` of the rows, see the kernel, to be filled as ``lse``.
    """
    query, text_query = inputs.query, inputs.text_query
    batch, tokens, heads, head_dim = query.shape
    text_tokens = inputs.text_key.shape[1]
    configs = tuning.tuning_for(query)
    config = configs.log_sum_exp if inputs.text_value is None else configs.forward
    tiles = triton.cdiv(tokens, config.rows)
    if text_query is not None:
        tiles += triton.cdiv(text_tokens, config.rows)
    edited = inputs.text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
    peak, weight = for_map or (None, None)
    factor = float32(scale * math.log2(math.e))
    arguments: dict[str, Any] = {
        "query": strided(query),
        "key": strided(inputs.text_key if inputs.key is None else inputs.key),
        "value": strided(inputs.text_value if inputs.value is None else inputs.value),
        "text_query": strided(query if text_query is None else text_query),
        "text_key": strided(inputs.text_key),
        "text_value": strided(inputs.text_value),
        "edited": strided(edited),
        "bias": strided_bias(inputs.text_bias),
        "image": strided(image),
        "text": strided(text),
        "lse": strided_by_head(lse),
        "peak": strided_by_head(peak),
        "weight": strided_by_head(weight),
        "tokens": tokens,
        "text_tokens": text_tokens,
        "image_keys": 0 if inputs.key is None else inputs.key.shape[1],
        "tiles": tiles,
        "heads": heads,
        "factor": factor,
        "residue": scale / factor - math.log(2),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "D": head_dim,
        "OUTPUT": inputs.text_value is not None,
        "FOR_MAP": for_map is not None,
        "SHIFTED": config.shifted and query.dtype != torch.float16,
        "LANES": config.lanes,
        "BIAS": inputs.text_bias is not None,
    }
    Launch(attention_kernel, batch * heads * tiles, arguments, config).start()
