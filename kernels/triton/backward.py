"""Gradients of the output and of the map together, with respect to all seven inputs.

FlashAttention-2's backward: the probabilities are recomputed tile by tile from the log-sum-exp. The gradient
of the map adds a term X to dS on the text columns of the image rows, and nothing elsewhere. With dM the
gradient of one head's entries, P~ their probabilities and P_t the softmax over the text alone:

* ``probability``: X = P~ * dM, and the row sum of dM * P~ joins delta, which every key sees;
* ``text_probability``: X = P_t * (dM - r), with r the row sum of dM * P_t;
* ``logit``: X = dM.

X has loops of its own, after those over all keys: they recompute the scores of the text columns, 2 to 8 % of
all, and in return the main loops know nothing of maps and keep their registers.

Three launches, each deterministic and free of atomics: delta and r by rows, dQ by rows, dK and dV by keys.
The last two recompute the same scores, 7 matrix products where a single launch needs 5; but a single launch
has to add up dQ across programs with float32 atomics, whose order, and so the result, changes from run to
run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import empty_gradients
from ..types import Inputs, Request
from .launching import Launch, readable, readable_inputs, strides
from .maps import text_log_sum_exp, winning_head
from .tiles import (
    LOG2_E,
    float32,
    head_parts,
    inner_products,
    load_tile,
    store_tile,
    weighted_sums,
    zero_tile,
)
from .tuning import tuning_for


@triton.jit
def _map_gradient(
    d_maps,
    d_maps_token,
    winner,
    winner_token,
    head,
    row_count,
    column,
    columns_given,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """What the map's gradient says of one head's entries in a tile; zero where no entry was asked for.

    ``d_maps`` and ``winner`` point at the tile's first row; ``column`` is the tile's first text column.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = (column + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < row_count) & (columns < columns_given)
    gradient = tl.load(d_maps + rows * d_maps_token + columns, mask=inside, other=0.0)  # [ROWS, COLUMNS]
    if HEADS == "max":
        held_by = tl.load(winner + rows * winner_token + columns, mask=inside, other=-1)
        gradient = tl.where(held_by == head, gradient, 0.0)
    return gradient


@triton.jit
def _map_term(
    scores,
    gradient,
    norm,
    row_sum,
    SCORES: tl.constexpr,
):
    """X of a tile from its scaled scores and the gradient of its entries; norms and sums to broadcast."""
    if SCORES == "probability":
        term = tl.exp2((scores - norm) * LOG2_E) * gradient
    elif SCORES == "text_probability":
        term = tl.exp2((scores - norm) * LOG2_E) * (gradient - row_sum)
    else:
        term = gradient
    return term


@triton.jit
def delta_kernel(
    query,
    query_batch,
    query_token,
    query_head,
    text_key,
    text_key_batch,
    text_key_token,
    text_key_head,
    out,
    out_batch,
    out_token,
    out_head,
    d_out,
    d_out_batch,
    d_out_token,
    d_out_head,
    norm,
    norm_batch,
    norm_head,
    d_maps,
    d_maps_batch,
    d_maps_token,
    d_maps_head,
    winner,
    winner_batch,
    winner_token,
    delta,
    delta_batch,
    delta_head,
    map_sum,
    tokens,
    text_tokens,
    columns_given,
    heads,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    SCORES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Row sums that the gradient of a softmax subtracts, for one tile of rows of one head.

    ``delta``: of dO * O if OUTPUT, plus dM * P~ if SCORES is "probability". ``map_sum`` [B, H, tokens]: of
    dM * P_t if SCORES is "text_probability". ``norm`` is the log-sum-exp that P~ or P_t is normalised by.
    SCORES is "" without a gradient of the map.
    """
    tiles = tl.cdiv(tokens, ROWS)
    row = (tl.program_id(0) % tiles * ROWS).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    count = tokens - row
    here = tl.arange(0, ROWS)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if OUTPUT:
        o = out + batch * out_batch + head * out_head + row * out_token
        d_o = d_out + batch * d_out_batch + head * d_out_head + row * d_out_token
        a, a_rest = load_tile(o, out_token, count, ROWS, WIDTH, REST, D, True)
        b, b_rest = load_tile(d_o, d_out_token, count, ROWS, WIDTH, REST, D, True)
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
        if REST > 0:
            total += tl.sum(a_rest.to(tl.float32) * b_rest.to(tl.float32), 1)
    if SCORES != "":
        rows = query + batch * query_batch + head * query_head + row * query_token
        q, q_rest = load_tile(rows, query_token, count, ROWS, WIDTH, REST, D, True)
        norms = norm + batch * norm_batch + head * norm_head + row
        lse = tl.load(norms + here, mask=here < count, other=float("inf"))
        gradients = d_maps + batch * d_maps_batch + head * d_maps_head + row * d_maps_token
        held_by = winner
        if HEADS == "max":
            held_by = winner + batch * winner_batch + row * winner_token
        keys = text_key + batch * text_key_batch + head * text_key_head
        mass = tl.zeros([ROWS], dtype=tl.float32)
        for column in range(0, text_tokens, COLUMNS):
            k, k_rest = load_tile(keys, text_key_token, text_tokens - column, COLUMNS, WIDTH, REST, D, True)
            scores = inner_products(q, q_rest, k, k_rest, REST) * scale - lse[:, None]  # [ROWS, COLUMNS]
            inside = (column + tl.arange(0, COLUMNS) < text_tokens)[None, :]
            shown = tl.where(inside, tl.exp2(scores * LOG2_E), 0.0)
            gradient = _map_gradient(
                gradients, d_maps_token, held_by, winner_token, head, count, column, columns_given,
                ROWS, COLUMNS, HEADS,
            )  # fmt: skip
            mass += tl.sum(gradient * shown, 1)
            keys += COLUMNS * text_key_token
        if SCORES == "text_probability":
            tl.store(map_sum + (batch * heads + head) * tokens + row + here, mass, mask=here < count)
        else:
            total += mass
    tl.store(delta + batch * delta_batch + head * delta_head + row + here, total, mask=here < count)


@triton.jit
def _base_two(lse, residue, inside):
    """Natural log-sum-exp of rows in units of log 2; infinite, so that no probability is left, outside.

    ``residue`` makes up for the rounding of the factor that the scores are multiplied by.
    """
    return tl.where(inside, lse * LOG2_E + lse * residue, float("inf"))


@triton.jit
def _query_gradient(
    sums,
    sums_rest,
    q,
    q_rest,
    d_o,
    d_o_rest,
    norm,
    row_sum,
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
    OUTPUT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add dS K of one tile of keys, without terms of a map."""
    k, k_rest = load_tile(key, key_token, count, COLUMNS, WIDTH, REST, D, MASKED)
    scores = inner_products(q, q_rest, k, k_rest, REST) * factor - norm[:, None]  # [ROWS, COLUMNS]
    if MASKED:  # keys of zeros add nothing, unless their probability overflows
        scores = tl.where((tl.arange(0, COLUMNS) < count)[None, :], scores, float("-inf"))
    probability = tl.exp2(scores)
    if OUTPUT:
        v, v_rest = load_tile(value, value_token, count, COLUMNS, WIDTH, REST, D, MASKED)
        d_scores = probability * (inner_products(d_o, d_o_rest, v, v_rest, REST) - row_sum[:, None])
    else:
        d_scores = -probability * row_sum[:, None]
    return weighted_sums(d_scores, k, k_rest, sums, sums_rest, REST)


@triton.jit
def query_gradient_kernel(
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
    d_image,
    d_image_batch,
    d_image_token,
    d_image_head,
    d_text,
    d_text_batch,
    d_text_token,
    d_text_head,
    lse,
    lse_batch,
    lse_head,
    delta,
    delta_batch,
    delta_head,
    map_lse,
    map_lse_batch,
    map_lse_head,
    map_sum,
    d_maps,
    d_maps_batch,
    d_maps_token,
    d_maps_head,
    winner,
    winner_batch,
    winner_token,
    d_query,
    d_text_query,
    image_tiles,
    tiles,
    tokens,
    text_tokens,
    columns_given,
    heads,
    scale,
    factor,
    residue,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SCORES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """dQ of one tile of image or text rows of one head.

    OUTPUT: a gradient reaches the output of these rows; SOFTMAX: the softmax over all keys takes part;
    SCORES: the kind of map whose gradient is given, "" for none.
    """
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    from_text = tile >= image_tiles
    row = (tl.where(from_text, tile - image_tiles, tile) * ROWS).to(tl.int64)
    count = tl.where(from_text, text_tokens, tokens) - row
    here = tl.arange(0, ROWS)
    if from_text:
        rows = text_query + batch * text_query_batch + head * text_query_head + row * text_query_token
        out = d_text_query + ((batch * text_tokens + row) * heads + head) * D
    else:
        rows = query + batch * query_batch + head * query_head + row * query_token
        out = d_query + ((batch * tokens + row) * heads + head) * D
    q, q_rest = load_tile(
        rows, tl.where(from_text, text_query_token, query_token), count, ROWS, WIDTH, REST, D, True
    )
    d_o, d_o_rest = q, q_rest
    values, text_values, text_values_token = key, text_key, text_key_token  # never read without OUTPUT
    if OUTPUT:
        values = value + batch * value_batch + head * value_head
        if from_text:
            d_rows = d_text + batch * d_text_batch + head * d_text_head + row * d_text_token
            text_values = text_value + batch * text_value_batch + head * text_value_head
        else:
            d_rows = d_image + batch * d_image_batch + head * d_image_head + row * d_image_token
            text_values = edited + batch * edited_batch + head * edited_head
        text_values_token = tl.where(from_text, text_value_token, edited_token)
        d_o, d_o_rest = load_tile(
            d_rows, tl.where(from_text, d_text_token, d_image_token), count, ROWS, WIDTH, REST, D, True
        )
    sums, sums_rest = zero_tile(ROWS, WIDTH, REST)
    text_keys = text_key + batch * text_key_batch + head * text_key_head
    if SOFTMAX:
        stream_row = tl.where(from_text, tokens, 0) + row + here
        norms = lse + batch * lse_batch + head * lse_head + stream_row
        norm = _base_two(tl.load(norms, mask=here < count, other=0.0), residue, here < count)
        row_sums = delta + batch * delta_batch + head * delta_head + stream_row
        row_sum = tl.load(row_sums, mask=here < count, other=0.0)
        keys = key + batch * key_batch + head * key_head
        whole = tokens // COLUMNS
        for _ in range(whole):
            sums, sums_rest = _query_gradient(
                sums, sums_rest, q, q_rest, d_o, d_o_rest, norm, row_sum, keys, key_token, values,
                value_token, COLUMNS, factor, COLUMNS, WIDTH, REST, D, OUTPUT, False,
            )  # fmt: skip
            keys += COLUMNS * key_token
            values += COLUMNS * value_token
        # What does not fill a tile: the last image keys, if any are left, and the text keys.
        left = tokens - whole * COLUMNS
        tail = tl.where(left > 0, 1, 0)
        for tile in range(tail + tl.cdiv(text_tokens, COLUMNS)):
            of_image = tile < tail
            column = (tile - tail) * COLUMNS
            first = tl.cast(column, tl.int64)
            sums, sums_rest = _query_gradient(
                sums, sums_rest, q, q_rest, d_o, d_o_rest, norm, row_sum,
                tl.where(of_image, keys, text_keys + first * text_key_token),
                tl.where(of_image, key_token, text_key_token),
                tl.where(of_image, values, text_values + first * text_values_token),
                tl.where(of_image, value_token, text_values_token),
                tl.where(of_image, left, text_tokens - column), factor, COLUMNS, WIDTH, REST, D, OUTPUT, True,
            )  # fmt: skip
    if SCORES != "":
        mapped = tl.where(from_text, 0, count)  # text rows have no map
        gradients = d_maps + batch * d_maps_batch + head * d_maps_head + row * d_maps_token
        held_by = winner
        if HEADS == "max":
            held_by = winner + batch * winner_batch + row * winner_token
        map_norm = tl.zeros([ROWS], dtype=tl.float32)
        map_row_sum = map_norm
        if SCORES != "logit":
            map_norms = map_lse + batch * map_lse_batch + head * map_lse_head + row + here
            map_norm = tl.load(map_norms, mask=here < mapped, other=float("inf"))
        if SCORES == "text_probability":
            by_head = map_sum + (batch * heads + head) * tokens + row + here
            map_row_sum = tl.load(by_head, mask=here < mapped, other=0.0)
        for column in range(0, tl.where(from_text, 0, text_tokens), COLUMNS):
            left = text_tokens - column
            k, k_rest = load_tile(text_keys, text_key_token, left, COLUMNS, WIDTH, REST, D, True)
            scores = inner_products(q, q_rest, k, k_rest, REST) * scale  # [ROWS, COLUMNS]
            scores = tl.where((tl.arange(0, COLUMNS) < left)[None, :], scores, float("-inf"))
            gradient = _map_gradient(
                gradients, d_maps_token, held_by, winner_token, head, mapped, column, columns_given,
                ROWS, COLUMNS, HEADS,
            )  # fmt: skip
            term = _map_term(scores, gradient, map_norm[:, None], map_row_sum[:, None], SCORES)
            sums, sums_rest = weighted_sums(term, k, k_rest, sums, sums_rest, REST)
            text_keys += COLUMNS * text_key_token
    sums = sums * scale
    if REST > 0:
        sums_rest = sums_rest * scale
    store_tile(out, heads * D, count, sums, sums_rest, ROWS, WIDTH, REST, D)


@triton.jit
def _key_gradient(
    d_k,
    d_k_rest,
    d_v,
    d_v_rest,
    k,
    k_rest,
    v,
    v_rest,
    query,
    query_token,
    d_out,
    d_out_token,
    lse,
    delta,
    row_tokens,
    factor,
    residue,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """Add dS^T Q and P^T dO over all rows of a stream, without terms of a map; tiles are [COLUMNS, ROWS]."""
    here = tl.arange(0, ROWS)
    for start in range(0, row_tokens, ROWS):
        count = row_tokens - start
        q, q_rest = load_tile(query, query_token, count, ROWS, WIDTH, REST, D, True)
        scores = inner_products(k, k_rest, q, q_rest, REST)
        norm = _base_two(tl.load(lse + here, mask=here < count, other=0.0), residue, here < count)
        probability = tl.exp2(scores * factor - norm[None, :])
        row_sum = tl.load(delta + here, mask=here < count, other=0.0)
        if OUTPUT:
            d_o, d_o_rest = load_tile(d_out, d_out_token, count, ROWS, WIDTH, REST, D, True)
            d_v, d_v_rest = weighted_sums(probability, d_o, d_o_rest, d_v, d_v_rest, REST)
            d_scores = probability * (inner_products(v, v_rest, d_o, d_o_rest, REST) - row_sum[None, :])
            d_out += ROWS * d_out_token
        else:
            d_scores = -probability * row_sum[None, :]
        d_k, d_k_rest = weighted_sums(d_scores, q, q_rest, d_k, d_k_rest, REST)
        query += ROWS * query_token
        lse += ROWS
        delta += ROWS
    return d_k, d_k_rest, d_v, d_v_rest


@triton.jit
def key_gradient_kernel(
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
    d_image,
    d_image_batch,
    d_image_token,
    d_image_head,
    d_text,
    d_text_batch,
    d_text_token,
    d_text_head,
    lse,
    lse_batch,
    lse_head,
    delta,
    delta_batch,
    delta_head,
    map_lse,
    map_lse_batch,
    map_lse_head,
    map_sum,
    d_maps,
    d_maps_batch,
    d_maps_token,
    d_maps_head,
    winner,
    winner_batch,
    winner_token,
    d_key,
    d_value,
    d_text_key,
    d_text_value,
    d_edited,
    tiles,
    tokens,
    text_tokens,
    columns_given,
    heads,
    scale,
    factor,
    residue,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    IMAGE_OUTPUT: tl.constexpr,
    TEXT_OUTPUT: tl.constexpr,
    EDITED: tl.constexpr,
    SCORES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """dK and dV of one tile of text or image keys of one head, over all image rows and then all text rows.

    IMAGE_OUTPUT, TEXT_OUTPUT: a gradient reaches the output of those rows; SCORES: the kind of map whose
    gradient is given, "" for none; EDITED: image rows read other text values. Text tiles come first: theirs
    is more work.
    """
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    text_tiles = tl.cdiv(text_tokens, COLUMNS)
    of_text = tile < text_tiles
    column = tl.where(of_text, tile, tile - text_tiles) * COLUMNS
    wide = column.to(tl.int64)
    count = tl.where(of_text, text_tokens, tokens) - column
    if of_text:
        keys = text_key + batch * text_key_batch + head * text_key_head + wide * text_key_token
        d_keys = d_text_key + ((batch * text_tokens + wide) * heads + head) * D
    else:
        keys = key + batch * key_batch + head * key_head + wide * key_token
        d_keys = d_key + ((batch * tokens + wide) * heads + head) * D
    k, k_rest = load_tile(
        keys, tl.where(of_text, text_key_token, key_token), count, COLUMNS, WIDTH, REST, D, True
    )
    d_k, d_k_rest = zero_tile(COLUMNS, WIDTH, REST)
    d_v, d_v_rest = zero_tile(COLUMNS, WIDTH, REST)
    norms, row_sums = lse, delta
    if IMAGE_OUTPUT or TEXT_OUTPUT or SCORES == "probability":
        norms = lse + batch * lse_batch + head * lse_head
        row_sums = delta + batch * delta_batch + head * delta_head

    v, v_rest = k, k_rest  # never read without a gradient of an output
    rows = query + batch * query_batch + head * query_head
    if IMAGE_OUTPUT or SCORES == "probability":
        d_rows = query
        if IMAGE_OUTPUT:
            d_rows = d_image + batch * d_image_batch + head * d_image_head
            if of_text:
                values = edited + batch * edited_batch + head * edited_head + wide * edited_token
            else:
                values = value + batch * value_batch + head * value_head + wide * value_token
            v, v_rest = load_tile(
                values, tl.where(of_text, edited_token, value_token), count, COLUMNS, WIDTH, REST, D, True
            )
        d_k, d_k_rest, d_v, d_v_rest = _key_gradient(
            d_k, d_k_rest, d_v, d_v_rest, k, k_rest, v, v_rest, rows, query_token, d_rows, d_image_token,
            norms, row_sums, tokens, factor, residue, ROWS, COLUMNS, WIDTH, REST, D, IMAGE_OUTPUT,
        )  # fmt: skip
    if SCORES != "":
        here = tl.arange(0, ROWS)
        gradients = d_maps + batch * d_maps_batch + head * d_maps_head
        held_by, map_norms, by_head = winner, map_lse, map_sum
        if HEADS == "max":
            held_by = winner + batch * winner_batch
        if SCORES != "logit":
            map_norms = map_lse + batch * map_lse_batch + head * map_lse_head
        if SCORES == "text_probability":
            by_head = map_sum + (batch * heads + head) * tokens
        # Not pipelined: a staged tile of dM costs the registers that the main loop needs.
        for start in tl.range(0, tl.where(of_text, tokens, 0), ROWS, num_stages=1):
            left = tokens - start
            q, q_rest = load_tile(rows, query_token, left, ROWS, WIDTH, REST, D, True)
            scores = inner_products(k, k_rest, q, q_rest, REST) * scale  # [COLUMNS, ROWS]
            gradient = _map_gradient(
                gradients, d_maps_token, held_by, winner_token, head, left, column, columns_given,
                ROWS, COLUMNS, HEADS,
            )  # fmt: skip
            map_norm = tl.zeros([ROWS], dtype=tl.float32)
            map_row_sum = map_norm
            if SCORES != "logit":
                map_norm = tl.load(map_norms + here, mask=here < left, other=float("inf"))
                map_norms += ROWS
            if SCORES == "text_probability":
                map_row_sum = tl.load(by_head + here, mask=here < left, other=0.0)
                by_head += ROWS
            term = _map_term(scores, tl.trans(gradient), map_norm[None, :], map_row_sum[None, :], SCORES)
            d_k, d_k_rest = weighted_sums(term, q, q_rest, d_k, d_k_rest, REST)
            rows += ROWS * query_token
            gradients += ROWS * d_maps_token
            if HEADS == "max":
                held_by += ROWS * winner_token

    # What image rows say of the text values goes to the edited ones.
    if EDITED and IMAGE_OUTPUT:  # noqa: SIM102
        if of_text:
            out = d_edited + ((batch * text_tokens + wide) * heads + head) * D
            store_tile(out, heads * D, count, d_v, d_v_rest, COLUMNS, WIDTH, REST, D)
            d_v, d_v_rest = zero_tile(COLUMNS, WIDTH, REST)
    if TEXT_OUTPUT:
        if of_text:
            values = text_value + batch * text_value_batch + head * text_value_head + wide * text_value_token
        else:
            values = value + batch * value_batch + head * value_head + wide * value_token
        v, v_rest = load_tile(
            values, tl.where(of_text, text_value_token, value_token), count, COLUMNS, WIDTH, REST, D, True
        )
        rows = text_query + batch * text_query_batch + head * text_query_head
        d_rows = d_text + batch * d_text_batch + head * d_text_head
        d_k, d_k_rest, d_v, d_v_rest = _key_gradient(
            d_k, d_k_rest, d_v, d_v_rest, k, k_rest, v, v_rest, rows, text_query_token, d_rows, d_text_token,
            norms + tokens, row_sums + tokens, text_tokens, factor, residue,
            ROWS, COLUMNS, WIDTH, REST, D, True,
        )  # fmt: skip

    d_k = d_k * scale
    if REST > 0:
        d_k_rest = d_k_rest * scale
    store_tile(d_keys, heads * D, count, d_k, d_k_rest, COLUMNS, WIDTH, REST, D)
    if IMAGE_OUTPUT or TEXT_OUTPUT:
        if of_text:
            d_values = d_text_value + ((batch * text_tokens + wide) * heads + head) * D
        else:
            d_values = d_value + ((batch * tokens + wide) * heads + head) * D
        store_tile(d_values, heads * D, count, d_v, d_v_rest, COLUMNS, WIDTH, REST, D)


def backward(
    d_image: Tensor | None,
    d_text: Tensor | None,
    d_maps: Tensor | None,
    inputs: Inputs,
    image: Tensor,
    text: Tensor,
    lse: Tensor,
    request: Request,
) -> tuple[Tensor, ...]:
    """Gradients of the seven inputs, [B, tokens, H, D]; any upstream gradient may be None."""
    inputs = readable_inputs(inputs)
    query, text_query, text_key = inputs.query, inputs.text_query, inputs.text_key
    batch, tokens, heads, head_dim = query.shape
    text_tokens = text_key.shape[1]
    gradients = empty_gradients(inputs)
    d_query, d_key, d_value, d_text_query, d_text_key, d_text_value, d_edited = gradients
    scores = "" if d_maps is None else str(request.kind)
    if d_image is None and d_text is not None and scores:
        d_image = torch.zeros_like(image)  # rows of both streams share a launch: both have an output gradient
    softmax = d_image is not None or d_text is not None or scores == "probability"
    d_image = None if d_image is None else readable(d_image)
    d_text = None if d_text is None else readable(d_text)

    norm = None  # what the map's entries are normalised by
    map_sum = winner = None
    if scores == "probability":
        norm = lse
    elif scores == "text_probability":
        norm, _ = text_log_sum_exp(query, text_key, request.scale)
        map_sum = torch.empty_like(norm)
    if d_maps is not None:
        d_maps = _over_all_columns(d_maps, text_tokens, heads, request)
        if request.heads == "max":
            winner = winning_head(query, text_key, norm, request, d_maps.shape[-1])

    width, rest = head_parts(head_dim, query.dtype)
    factor = float32(request.scale * math.log2(math.e))
    tuning = tuning_for(query)
    delta = torch.empty((batch, heads, tokens + text_tokens), dtype=torch.float32, device=query.device)
    widths = {"WIDTH": width, "REST": rest, "D": head_dim}
    map_arguments: dict[str, Any] = {
        "d_maps": d_maps,
        "d_maps_batch": 0 if d_maps is None else d_maps.stride(0),
        "d_maps_token": 0 if d_maps is None else d_maps.stride(-2),
        "d_maps_head": 0 if d_maps is None or request.heads != "each" else d_maps.stride(1),
        "winner": winner,
        "winner_batch": 0 if winner is None else winner.stride(0),
        "winner_token": 0 if winner is None else winner.stride(1),
        "columns_given": 0 if d_maps is None else d_maps.shape[-1],
        "heads": heads,
        "scale": request.scale,
    }

    def row_sums(rows: Tensor, out: Tensor, d_out: Tensor | None, sums: Tensor, kind: str) -> None:
        config = tuning.scores
        arguments = {
            **strides("query", rows),
            **strides("text_key", text_key),
            **strides("out", out),
            **strides("d_out", out if d_out is None else d_out),
            "norm": norm,
            "norm_batch": 0 if norm is None else norm.stride(0),
            "norm_head": 0 if norm is None else norm.stride(1),
            **map_arguments,
            "delta": sums,
            "delta_batch": sums.stride(0),
            "delta_head": sums.stride(1),
            "map_sum": map_sum,
            "tokens": rows.shape[1],
            "text_tokens": text_tokens,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            **widths,
            "OUTPUT": d_out is not None,
            "SCORES": kind,
            "HEADS": request.heads,
        }
        programs = batch * heads * triton.cdiv(rows.shape[1], config.rows)
        Launch(delta_kernel, programs, arguments, config).start()

    if d_image is not None or norm is not None:
        row_sums(query, image, d_image, delta[:, :, :tokens], "" if scores == "logit" else scores)
    if d_text is not None and text_query is not None:
        row_sums(text_query, text, d_text, delta[:, :, tokens:], "")

    # Rows of a stream without gradient have no programs; a tensor that only they would read is stood in for.
    d_out = d_image if d_image is not None else d_text
    text_value = inputs.text_value
    edited = inputs.text_value_for_image if inputs.text_value_for_image is not None else text_value
    shared: dict[str, Any] = {
        **strides("query", query),
        **strides("key", inputs.key),
        **strides("value", inputs.key if inputs.value is None else inputs.value),
        **strides("text_query", query if text_query is None else text_query),
        **strides("text_key", text_key),
        **strides("text_value", text_key if text_value is None else text_value),
        **strides("edited", text_key if edited is None else edited),
        **strides("d_image", query if d_out is None else d_image if d_image is not None else d_out),
        **strides("d_text", query if d_out is None else d_text if d_text is not None else d_out),
        "lse": lse,
        "lse_batch": lse.stride(0),
        "lse_head": lse.stride(1),
        "delta": delta,
        "delta_batch": delta.stride(0),
        "delta_head": delta.stride(1),
        "factor": factor,
        "residue": factor / float32(request.scale) - float32(math.log2(math.e)) if request.scale else 0.0,
        "map_lse": norm,
        "map_lse_batch": 0 if norm is None else norm.stride(0),
        "map_lse_head": 0 if norm is None else norm.stride(1),
        "map_sum": map_sum,
        **map_arguments,
        "tokens": tokens,
        "text_tokens": text_tokens,
        **widths,
        "SCORES": scores,
        "HEADS": request.heads,
    }

    config = tuning.query_gradient
    image_tiles = triton.cdiv(tokens, config.rows) if d_image is not None or scores else 0
    text_tiles = triton.cdiv(text_tokens, config.rows) if d_text is not None else 0
    arguments = {
        **shared,
        "d_query": d_query,
        "d_text_query": d_query if text_query is None else d_text_query,
        "image_tiles": image_tiles,
        "tiles": image_tiles + text_tiles,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "OUTPUT": d_out is not None,
        "SOFTMAX": softmax,
    }
    Launch(query_gradient_kernel, batch * heads * (image_tiles + text_tiles), arguments, config).start()

    config = tuning.key_gradient
    tiles = triton.cdiv(text_tokens, config.columns) + (triton.cdiv(tokens, config.columns) if softmax else 0)
    arguments = {
        **shared,
        "d_key": d_key,
        "d_value": d_value,
        "d_text_key": d_text_key,
        "d_text_value": d_text_value,
        "d_edited": d_edited,
        "tiles": tiles,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "IMAGE_OUTPUT": d_image is not None,
        "TEXT_OUTPUT": d_text is not None,
        "EDITED": inputs.text_value_for_image is not None,
    }
    Launch(key_gradient_kernel, batch * heads * tiles, arguments, config).start()

    untouched = {
        d_query: image_tiles == 0,
        d_text_query: text_tiles == 0,
        d_key: not softmax,
        d_value: d_out is None,
        d_text_value: d_out is None or (d_text is None and inputs.text_value_for_image is not None),
        d_edited: d_image is None,
    }
    for gradient, left in untouched.items():
        if left:
            gradient.zero_()
    return gradients


def _over_all_columns(d_maps: Tensor, text_tokens: int, heads: int, request: Request) -> Tensor:
    """What one head's entries receive from the gradient of their reduction, float32, for all text columns.

    [B, N, T] or, for ``heads="each"``, [B, H, N, T], with T rounded up to whole 64-byte lines: kernels then
    read it in vectors. A copy of the size of the map.
    """
    padded = triton.cdiv(text_tokens, 16) * 16
    given = d_maps.new_zeros((*d_maps.shape[:-1], padded), dtype=torch.float32)
    shown = given[..., request.start : request.stop]
    shown.copy_(d_maps)
    return given.div_(heads) if request.heads == "mean" else given
