"""The attention output and its log-sum-exp: one flash-attention kernel over two streams of keys.

A program owns a tile of query rows of one head, image rows or text rows, and reads the image keys and then
the text keys from their own tensors: nothing is concatenated and nothing transposed. Statistics stay out of
the main loop, which is bound by the exponential at head dim 64; maps and statistics are passes of their own
(``maps.py``, ``statistics.py``). Forward and map are two launches: as an epilogue, the map would need a
read-modify-write of every entry for every head, or the sum over heads across programs, which only atomics
give.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..types import Inputs
from . import tuning
from .launch import Launch, strided, strided_by_head
from .primitives import (
    LN_2,
    at,
    float32,
    inner_products,
    load_tile,
    scaled,
    store_tile,
    weighted_sums,
    zeros_like,
)

# Start of the running maximum: below any score, yet finite, so that a row whose first tile holds only -inf
# does not turn into NaN.
_LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def _attend(
    sums,
    maximum,
    total,
    q,
    key,
    key_token,
    value,
    value_token,
    count,
    factor,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Let the query tile attend to one tile of keys: a step of the online softmax."""
    k = load_tile(key, key_token, count, COLUMNS, D, MASKED)
    scores = inner_products(q, k)  # [ROWS, COLUMNS]
    if MASKED:
        scores = tl.where((tl.arange(0, COLUMNS) < count)[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, 1)
    if OUTPUT:
        v = load_tile(value, value_token, count, COLUMNS, D, MASKED)
        sums = weighted_sums(weights, v, scaled(sums, correction[:, None]))
    return sums, new_maximum, total


@triton.jit
def attention_kernel(
    query,
    key,
    value,
    text_query,
    text_key,
    text_value,
    edited,
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
):
    """Log-sum-exp and, if OUTPUT, output rows of one tile of image or text rows of one head.

    FOR_MAP: also the rows' ``peak``, the greatest score times log2(e), and ``weight``, the reciprocal of the
    sum of exp2(score log2(e) - peak). A probability is their exp2(score log2(e) - peak) * weight, as exact as
    an ordinary softmax; a log-sum-exp of 10, rounded to float32, is off by several units in its last place.
    ``edited`` are the text values that image rows read. ``image_keys`` is ``tokens``, or 0 for a softmax over
    the text keys alone. ``tiles`` are those of a head, of image rows and then of text rows, if any.
    ``factor`` is the scale times log2(e); ``residue`` makes up for its rounding in the log-sum-exp.
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
    maximum = tl.full([ROWS], _LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = zeros_like(q, ROWS)
    whole = image_keys // COLUMNS
    for _ in range(whole):
        sums, maximum, total = _attend(
            sums, maximum, total, q, keys, key.token, values, value.token, COLUMNS, factor,
            COLUMNS, D, OUTPUT, False,
        )  # fmt: skip
        keys += COLUMNS * key.token
        values += COLUMNS * value.token
    # What does not fill a tile: the last image keys, if any are left, and the text keys.
    left = image_keys - whole * COLUMNS
    tail = tl.where(left > 0, 1, 0)
    for tile in range(tail + tl.cdiv(text_tokens, COLUMNS)):
        of_image = tile < tail
        column = (tile - tail) * COLUMNS
        first = tl.cast(column, tl.int64)
        sums, maximum, total = _attend(
            sums, maximum, total, q,
            tl.where(of_image, keys, text_keys + first * text_key.token),
            tl.where(of_image, key.token, text_key.token),
            tl.where(of_image, values, text_values + first * text_values_token),
            tl.where(of_image, value.token, text_values_token),
            tl.where(of_image, left, text_tokens - column), factor, COLUMNS, D, OUTPUT, True,
        )  # fmt: skip

    here = tl.arange(0, ROWS)
    stream_row = tl.where(from_text, tokens, 0) + row
    inverse = 1.0 / total
    norm = tl.fma(maximum, LN_2, tl.fma(maximum, residue, tl.log(total)))  # rounded once
    tl.store(at(lse, batch, head, stream_row) + here, norm, mask=here < count)
    if FOR_MAP:
        tl.store(at(peak, batch, head, stream_row) + here, maximum, mask=here < count)
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
    over_text_alone: bool = False,
) -> None:
    """Fill the natural log-sum-exp of the rows and, if there are values, the outputs of both streams.

    Args:
        inputs: without text queries, only image rows count.
        scale: factor of the scores.
        lse: float32 [B, H, N + T] or, without text queries, [B, H, N]; last axis contiguous.
        image: [B, N, H, D], last axis contiguous; not written without values.
        text: [B, T, H, D], likewise.
        for_map: ``peak`` and ``weight`` of the rows, see the kernel, to be filled as ``lse``.
        over_text_alone: the softmax runs over the text keys only.
    """
    query, text_query = inputs.query, inputs.text_query
    batch, tokens, heads, head_dim = query.shape
    text_tokens = inputs.text_key.shape[1]
    configs = tuning.tuning_for(query)
    config = configs.scores if inputs.value is None else configs.forward
    tiles = triton.cdiv(tokens, config.rows)
    if text_query is not None:
        tiles += triton.cdiv(text_tokens, config.rows)
    edited = inputs.text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
    peak, weight = for_map or (None, None)
    factor = float32(scale * math.log2(math.e))
    arguments: dict[str, Any] = {
        "query": strided(query),
        "key": strided(inputs.key),
        "value": strided(inputs.value),
        "text_query": strided(query if text_query is None else text_query),
        "text_key": strided(inputs.text_key),
        "text_value": strided(inputs.text_value),
        "edited": strided(edited),
        "image": strided(image),
        "text": strided(text),
        "lse": strided_by_head(lse),
        "peak": strided_by_head(peak),
        "weight": strided_by_head(weight),
        "tokens": tokens,
        "text_tokens": text_tokens,
        "image_keys": 0 if over_text_alone or inputs.key is None else inputs.key.shape[1],
        "tiles": tiles,
        "heads": heads,
        "factor": factor,
        "residue": scale / factor - math.log(2),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "D": head_dim,
        "OUTPUT": inputs.value is not None,
        "FOR_MAP": for_map is not None,
    }
    Launch(attention_kernel, batch * heads * tiles, arguments, config).start()
