"""The attention output and its log-sum-exp: one flash-attention kernel over two streams of keys.

A program owns a tile of query rows of one head, image rows or text rows, and reads the image keys and then
the text keys from their own tensors: nothing is concatenated and nothing transposed. Statistics stay out of
the main loop, which is bound by the exponential at head dim 64; maps, budgets and norms are passes of their
own (``maps.py``). Forward and map are two launches: as an epilogue, the map would need a read-modify-write of
every entry for every head, or the sum over heads across programs, which only atomics give.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..types import Inputs
from .launching import Launch, strides
from .tiles import (
    float32,
    head_parts,
    inner_products,
    load_tile,
    negated,
    store_tile,
    weighted_sums,
    zero_tile,
)
from .tuning import tuning_for

# Start of the running maximum: below any score, yet finite, so that a row whose first tile holds only -inf
# does not turn into NaN.
_LOWEST = tl.constexpr(-1.0e38)
# log(2) in two parts: the first has 12 bits, so that its product with a whole number up to 4096 is exact.
_LN_2_FEW_BITS = tl.constexpr(0.693115234375)
_LN_2_OTHER_BITS = tl.constexpr(math.log(2) - 0.693115234375)


@triton.jit
def _attend(
    sums,
    sums_rest,
    maximum,
    total,
    query,
    query_rest,
    key,
    key_token,
    value,
    value_token,
    count,
    factor,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Let the query tile attend to one tile of keys: a step of the online softmax."""
    k, k_rest = load_tile(key, key_token, count, COLUMNS, WIDTH, REST, D, MASKED)
    scores = inner_products(query, query_rest, k, k_rest, REST)  # [ROWS, COLUMNS]
    if MASKED:
        scores = tl.where((tl.arange(0, COLUMNS) < count)[None, :], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.ceil(tl.max(scores, 1) * factor))
    weights = tl.exp2(scores * factor - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, 1)
    sums = sums * correction[:, None]
    if REST > 0:
        sums_rest = sums_rest * correction[:, None]
    v, v_rest = load_tile(value, value_token, count, COLUMNS, WIDTH, REST, D, MASKED)
    sums, sums_rest = weighted_sums(weights, v, v_rest, sums, sums_rest, REST)
    return sums, sums_rest, new_maximum, total


@triton.jit
def _store_lse(lse, lse_rest, offsets, maximum, total, residue, inside, WITH_REST: tl.constexpr):
    """Natural log-sum-exp from the online softmax's maximum, a whole number of log 2, and its total.

    A log-sum-exp of 10 rounded to float32 is wrong by several units in the last place of a probability that
    is recomputed from it. So the forward's own passes read what rounding took away, too, from ``lse_rest``.
    ``residue`` makes up for the rounding of the factor that the scores were multiplied by.
    """
    large = maximum * _LN_2_FEW_BITS  # exact
    small = maximum * _LN_2_OTHER_BITS + maximum * residue + tl.log(total)
    rounded = large + small
    tl.store(lse + offsets, rounded, mask=inside)
    if WITH_REST:
        of_small = rounded - large
        rest = (large - (rounded - of_small)) + (small - of_small)
        tl.store(lse_rest + offsets, rest, mask=inside)


@triton.jit
def attention_kernel(
    query,
    query_batch,
    query_token,
    query_head,
    key,
    key_batch,
    key_token,
    key_head,
    value,
    value_batch,
    value_token,
    value_head,
    text_query,
    text_query_batch,
    text_query_token,
    text_query_head,
    text_key,
    text_key_batch,
    text_key_token,
    text_key_head,
    text_value,
    text_value_batch,
    text_value_token,
    text_value_head,
    edited,
    edited_batch,
    edited_token,
    edited_head,
    image,
    text,
    lse,
    lse_rest,
    tokens,
    text_tokens,
    heads,
    factor,
    residue,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    WITH_REST: tl.constexpr,
    NEGATED: tl.constexpr,
):
    """Output rows and log-sum-exp of one tile of image or text rows of one head.

    ``edited`` are the text values that image rows read. ``factor`` is |scale| log2(e), and NEGATED says that
    the scale is negative.
    """
    image_tiles = tl.cdiv(tokens, ROWS)
    tiles = image_tiles + tl.cdiv(text_tokens, ROWS)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    from_text = tile >= image_tiles
    row = (tl.where(from_text, tile - image_tiles, tile) * ROWS).to(tl.int64)
    count = tl.where(from_text, text_tokens, tokens) - row
    if from_text:
        rows = text_query + batch * text_query_batch + head * text_query_head + row * text_query_token
        text_values = text_value + batch * text_value_batch + head * text_value_head
        out = text + ((batch * text_tokens + row) * heads + head) * D
    else:
        rows = query + batch * query_batch + head * query_head + row * query_token
        text_values = edited + batch * edited_batch + head * edited_head
        out = image + ((batch * tokens + row) * heads + head) * D
    rows_token = tl.where(from_text, text_query_token, query_token)
    text_values_token = tl.where(from_text, text_value_token, edited_token)

    q, q_rest = load_tile(rows, rows_token, count, ROWS, WIDTH, REST, D, True)
    if NEGATED:  # exact, and so the scores need one factor and no sign
        q, q_rest = negated(q), negated(q_rest)
    maximum = tl.full([ROWS], _LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums, sums_rest = zero_tile(ROWS, WIDTH, REST)

    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    whole = tokens // COLUMNS
    for _ in range(whole):
        sums, sums_rest, maximum, total = _attend(
            sums, sums_rest, maximum, total, q, q_rest, keys, key_token, values, value_token,
            COLUMNS, factor, COLUMNS, WIDTH, REST, D, False,
        )  # fmt: skip
        keys += COLUMNS * key_token
        values += COLUMNS * value_token
    # What does not fill a tile: the last image keys, if any are left, and the text keys.
    left = tokens - whole * COLUMNS
    tail = tl.where(left > 0, 1, 0)
    text_keys = text_key + batch * text_key_batch + head * text_key_head
    for tile in range(tail + tl.cdiv(text_tokens, COLUMNS)):
        of_image = tile < tail
        column = (tile - tail) * COLUMNS
        first = tl.cast(column, tl.int64)
        sums, sums_rest, maximum, total = _attend(
            sums, sums_rest, maximum, total, q, q_rest,
            tl.where(of_image, keys, text_keys + first * text_key_token),
            tl.where(of_image, key_token, text_key_token),
            tl.where(of_image, values, text_values + first * text_values_token),
            tl.where(of_image, value_token, text_values_token),
            tl.where(of_image, left, text_tokens - column), factor, COLUMNS, WIDTH, REST, D, True,
        )  # fmt: skip

    sums = sums / total[:, None]
    if REST > 0:
        sums_rest = sums_rest / total[:, None]
    store_tile(out, heads * D, count, sums, sums_rest, ROWS, WIDTH, REST, D)
    here = tl.arange(0, ROWS)
    rows_before = (batch * heads + head) * (tokens + text_tokens) + tl.where(from_text, tokens, 0) + row
    _store_lse(lse, lse_rest, rows_before + here, maximum, total, residue, here < count, WITH_REST)


@triton.jit
def _accumulate(
    maximum,
    total,
    query,
    query_rest,
    key,
    key_token,
    first,
    last,
    factor,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online log-sum-exp over the keys ``first`` to ``last`` of a stream."""
    for start in range(first, last, COLUMNS):
        k, k_rest = load_tile(key, key_token, last - start, COLUMNS, WIDTH, REST, D, MASKED)
        scores = inner_products(query, query_rest, k, k_rest, REST)  # [ROWS, COLUMNS]
        if MASKED:
            scores = tl.where((tl.arange(0, COLUMNS) < last - start)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.ceil(tl.max(scores, 1) * factor))
        weights = tl.exp2(scores * factor - new_maximum[:, None])
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(weights, 1)
        maximum = new_maximum
        key += COLUMNS * key_token
    return maximum, total


@triton.jit
def log_sum_exp_kernel(
    rows,
    rows_batch,
    rows_token,
    rows_head,
    key,
    key_batch,
    key_token,
    key_head,
    text_key,
    text_key_batch,
    text_key_token,
    text_key_head,
    lse,
    lse_rest,
    lse_batch,
    lse_head,
    row_tokens,
    tokens,
    text_tokens,
    heads,
    factor,
    residue,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    WITH_REST: tl.constexpr,
    NEGATED: tl.constexpr,
    IMAGE_KEYS: tl.constexpr,
):
    """Log-sum-exp of one tile of rows of one head, over all keys or over the text keys alone."""
    tiles = tl.cdiv(row_tokens, ROWS)
    tile = tl.program_id(0) % tiles
    head = ((tl.program_id(0) // tiles) % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    row = (tile * ROWS).to(tl.int64)
    count = row_tokens - row
    here = rows + batch * rows_batch + head * rows_head + row * rows_token
    q, q_rest = load_tile(here, rows_token, count, ROWS, WIDTH, REST, D, True)
    if NEGATED:
        q, q_rest = negated(q), negated(q_rest)
    maximum = tl.full([ROWS], _LOWEST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if IMAGE_KEYS:
        keys = key + batch * key_batch + head * key_head
        whole = tokens // COLUMNS * COLUMNS
        maximum, total = _accumulate(
            maximum, total, q, q_rest, keys, key_token, 0, whole, factor, COLUMNS, WIDTH, REST, D, False
        )
        keys += tl.cast(whole, tl.int64) * key_token
        maximum, total = _accumulate(
            maximum, total, q, q_rest, keys, key_token, whole, tokens, factor, COLUMNS, WIDTH, REST, D, True
        )
    text_keys = text_key + batch * text_key_batch + head * text_key_head
    maximum, total = _accumulate(
        maximum, total, q, q_rest, text_keys, text_key_token, 0, text_tokens, factor,
        COLUMNS, WIDTH, REST, D, True,
    )  # fmt: skip
    numbers = tl.arange(0, ROWS)
    offsets = batch * lse_batch + head * lse_head + row + numbers
    _store_lse(lse, lse_rest, offsets, maximum, total, residue, numbers < count, WITH_REST)


def attention(
    inputs: Inputs, scale: float, image: Tensor, text: Tensor, lse: Tensor, lse_rest: Tensor | None
) -> None:
    """Fill ``image`` [B, N, H, D], ``text`` [B, T, H, D] and the natural ``lse`` [B, H, N + T], float32.

    ``lse_rest``, of the shape of ``lse``: what was lost as ``lse`` was rounded; may be None.
    """
    query, text_query, text_value = inputs.query, inputs.text_query, inputs.text_value
    assert inputs.value is not None
    assert text_query is not None
    assert text_value is not None
    batch, tokens, heads, head_dim = query.shape
    text_tokens = text_query.shape[1]
    width, rest = head_parts(head_dim, query.dtype)
    factor = float32(
        max(abs(scale) * math.log2(math.e), 1e-30)
    )  # not 0: times a masked score, it would be NaN
    config = tuning_for(query).forward
    edited = text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
    arguments: dict[str, Any] = {
        **strides("query", query),
        **strides("key", inputs.key),
        **strides("value", inputs.value),
        **strides("text_query", text_query),
        **strides("text_key", inputs.text_key),
        **strides("text_value", text_value),
        **strides("edited", edited),
        "image": image,
        "text": text,
        "lse": lse,
        "lse_rest": lse_rest,
        "tokens": tokens,
        "text_tokens": text_tokens,
        "heads": heads,
        "factor": factor,
        "residue": abs(float32(scale)) / factor - math.log(2),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "WIDTH": width,
        "REST": rest,
        "D": head_dim,
        "WITH_REST": lse_rest is not None,
        "NEGATED": scale < 0,
    }
    tiles = triton.cdiv(tokens, config.rows) + triton.cdiv(text_tokens, config.rows)
    Launch(attention_kernel, batch * heads * tiles, arguments, config).start()


def log_sum_exp(
    rows: Tensor, key: Tensor | None, text_key: Tensor, scale: float, lse: Tensor, lse_rest: Tensor | None
) -> None:
    """Fill ``lse`` [B, H, M] (last axis contiguous), and ``lse_rest`` like it, for the ``rows`` [B, M, H, D].

    The sum runs over all keys, or over the text keys alone when ``key`` is None.
    """
    batch, row_tokens, heads, head_dim = rows.shape
    width, rest = head_parts(head_dim, rows.dtype)
    factor = float32(
        max(abs(scale) * math.log2(math.e), 1e-30)
    )  # not 0: times a masked score, it would be NaN
    config = tuning_for(rows).scores
    image_key = text_key if key is None else key
    arguments: dict[str, Any] = {
        **strides("rows", rows),
        **strides("key", image_key),
        **strides("text_key", text_key),
        "lse": lse,
        "lse_rest": lse_rest,
        "lse_batch": lse.stride(0),
        "lse_head": lse.stride(1),
        "row_tokens": row_tokens,
        "tokens": image_key.shape[1],
        "text_tokens": text_key.shape[1],
        "heads": heads,
        "factor": factor,
        "residue": abs(float32(scale)) / factor - math.log(2),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "WIDTH": width,
        "REST": rest,
        "D": head_dim,
        "WITH_REST": lse_rest is not None,
        "NEGATED": scale < 0,
        "IMAGE_KEYS": key is not None,
    }
    Launch(
        log_sum_exp_kernel, batch * heads * triton.cdiv(row_tokens, config.rows), arguments, config
    ).start()
