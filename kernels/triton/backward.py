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
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import empty_gradients
from ..types import Inputs, Request
from . import tuning
from .launch import Launch, readable, readable_inputs, strided, strided_bias, strided_by_head
from .maps import text_log_sum_exp
from .primitives import (
    LOG2_E,
    at,
    inner_products,
    load_at,
    load_bias,
    load_norm,
    load_tile,
    moved,
    row_products,
    scaled,
    store_tile,
    tile_pointers,
    weighted_sums,
    zeros_like,
)


@triton.jit
def _map_gradient(
    d_maps,
    d_maps_token,
    row_count,
    column,
    columns_given,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What the map's gradient says of one head's entries in a tile; zero where no entry was asked for.

    ``d_maps`` points at the tile's first row; ``column`` is the tile's first text column.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = (column + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < row_count) & (columns < columns_given)
    return tl.load(d_maps + rows * d_maps_token + columns, mask=inside, other=0.0)  # [ROWS, COLUMNS]


@triton.jit
def _map_term(scores, gradient, norm, row_sum, KIND: tl.constexpr):
    """X of a tile from its scaled scores and the gradient of its entries; norms and sums to broadcast."""
    if KIND == "probability":
        term = tl.exp2((scores - norm) * LOG2_E) * gradient
    elif KIND == "text_probability":
        term = tl.exp2((scores - norm) * LOG2_E) * (gradient - row_sum)
    else:
        term = gradient
    return term


@triton.jit(do_not_specialize=["tokens", "text_tokens", "heads"])
def delta_kernel(
    query,
    text_key,
    bias,
    out,
    d_out,
    lse,
    map_lse,
    d_maps,
    norms,
    delta,
    map_sum,
    tokens,
    text_tokens,
    columns_given,
    heads,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Row sums that the gradient of a softmax subtracts, for one tile of rows of one head.

    ``norms``, if SOFTMAX: the log-sum-exp to base 2, which the gradient kernels would otherwise compute once
    for every tile of keys. ``delta``: of dO * O if OUTPUT, plus dM * P~ if KIND is "probability".
    ``map_sum``: of dM * P_t if KIND is "text_probability". ``map_lse`` is the log-sum-exp that P~ or P_t is
    normalised by. KIND is "" without a gradient of the map.
    """
    tiles = tl.cdiv(tokens, ROWS)
    row = (tl.program_id(0) % tiles * ROWS).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    count = tokens - row
    here = tl.arange(0, ROWS)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if OUTPUT:
        o = load_tile(at(out, batch, head, row), out.token, count, ROWS, D, True)
        d_o = load_tile(at(d_out, batch, head, row), d_out.token, count, ROWS, D, True)
        total += row_products(o, d_o)
    if KIND != "":
        q = load_tile(at(query, batch, head, row), query.token, count, ROWS, D, True)
        norm = load_norm(at(map_lse, batch, head, row) + here, here < count, BIAS)
        gradients = at(d_maps, batch, head, row)
        keys = at(text_key, batch, head, 0)
        mass = tl.zeros([ROWS], dtype=tl.float32)
        total_shown = mass
        for column in range(0, text_tokens, COLUMNS):
            k = load_tile(keys, text_key.token, text_tokens - column, COLUMNS, D, True)
            if BIAS:
                added = load_bias(bias, batch, column, text_tokens - column, COLUMNS)
                scores = inner_products(q, k) * scale + (added[None, :] - norm[:, None])  # [ROWS, COLUMNS]
            else:
                scores = inner_products(q, k) * scale - norm[:, None]
            inside = (column + tl.arange(0, COLUMNS) < text_tokens)[None, :]
            shown = tl.where(inside, tl.exp2(scores * LOG2_E), 0.0)
            gradient = _map_gradient(gradients, d_maps.token, count, column, columns_given, ROWS, COLUMNS)
            mass += tl.sum(gradient * shown, 1)
            if KIND == "text_probability":
                total_shown += tl.sum(shown, 1)
            keys += COLUMNS * text_key.token
        if KIND == "text_probability":
            # Their sum is 1 but for the rounding of the log-sum-exp, which dM - r would magnify.
            mass = mass / tl.where(total_shown == 0.0, 1.0, total_shown)
            tl.store(at(map_sum, batch, head, row) + here, mass, mask=here < count)
        else:
            total += mass
    tl.store(at(delta, batch, head, row) + here, total, mask=here < count)
    if SOFTMAX:
        norm = load_norm(at(lse, batch, head, row) + here, here < count, BIAS)
        tl.store(at(norms, batch, head, row) + here, norm * LOG2_E, mask=here < count)


@triton.jit
def _query_gradient(
    sums,
    q,
    d_o,
    norm,
    row_sum,
    key,
    key_token,
    value,
    value_token,
    bias,
    batch,
    column,
    bias_count,
    count,
    factor,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Add dS K of one tile of keys, without terms of a map; BIAS: of keys of which the first ``bias_count``,
    text columns from ``column`` on, have a bias."""
    k = load_tile(key, key_token, count, COLUMNS, D, MASKED)
    if BIAS:
        added = load_bias(bias, batch, column, bias_count, COLUMNS) * LOG2_E
        scores = inner_products(q, k) * factor + (added[None, :] - norm[:, None])  # [ROWS, COLUMNS]
    else:
        scores = inner_products(q, k) * factor - norm[:, None]
    if MASKED:  # keys of zeros add nothing, unless their probability overflows
        scores = tl.where((tl.arange(0, COLUMNS) < count)[None, :], scores, float("-inf"))
    probability = tl.exp2(scores)
    if OUTPUT:
        v = load_tile(value, value_token, count, COLUMNS, D, MASKED)
        d_scores = probability * (inner_products(d_o, v) - row_sum[:, None])
    else:
        d_scores = -probability * row_sum[:, None]
    return weighted_sums(d_scores, k, sums)


@triton.jit(do_not_specialize=["image_tiles", "tiles", "tokens", "image_keys", "text_tokens", "heads"])
def query_gradient_kernel(
    query,
    key,
    value,
    text_query,
    text_key,
    text_value,
    edited,
    bias,
    d_image,
    d_text,
    norms,
    delta,
    map_lse,
    map_sum,
    d_maps,
    d_query,
    d_text_query,
    image_tiles,
    tiles,
    tokens,
    image_keys,
    text_tokens,
    columns_given,
    heads,
    scale,
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
):
    """dQ of one tile of image or text rows of one head.

    OUTPUT: a gradient reaches the output of these rows; SOFTMAX: the softmax over all keys takes part;
    KIND: the kind of map whose gradient is given, "" for none.
    """
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    from_text = tile >= image_tiles
    row = (tl.where(from_text, tile - image_tiles, tile) * ROWS).to(tl.int64)
    count = tl.where(from_text, text_tokens, tokens) - row
    here = tl.arange(0, ROWS)
    if from_text:
        rows = at(text_query, batch, head, row)
        out = at(d_text_query, batch, head, row)
    else:
        rows = at(query, batch, head, row)
        out = at(d_query, batch, head, row)
    q = load_tile(rows, tl.where(from_text, text_query.token, query.token), count, ROWS, D, True)
    # Never read without OUTPUT.
    d_o, values, text_values, text_values_token = q, key.data, text_key.data, text_key.token
    if OUTPUT:
        values = at(value, batch, head, 0)
        if from_text:
            d_rows = at(d_text, batch, head, row)
            text_values = at(text_value, batch, head, 0)
        else:
            d_rows = at(d_image, batch, head, row)
            text_values = at(edited, batch, head, 0)
        text_values_token = tl.where(from_text, text_value.token, edited.token)
        d_o = load_tile(d_rows, tl.where(from_text, d_text.token, d_image.token), count, ROWS, D, True)
    sums = zeros_like(q, ROWS)
    if SOFTMAX:
        stream_row = tl.where(from_text, tokens, 0) + row
        # Beyond the rows infinite, so that no probability is left there.
        norm = tl.load(at(norms, batch, head, stream_row) + here, mask=here < count, other=float("inf"))
        row_sum = tl.load(at(delta, batch, head, stream_row) + here, mask=here < count, other=0.0)
        keys = at(key, batch, head, 0)
        text_keys = at(text_key, batch, head, 0)
        whole = image_keys // COLUMNS
        for _ in range(whole):
            sums = _query_gradient(
                sums, q, d_o, norm, row_sum, keys, key.token, values, value.token, bias, batch, 0, 0,
                COLUMNS, factor, COLUMNS, D, OUTPUT, False, False,
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
            sums = _query_gradient(
                sums, q, d_o, norm, row_sum,
                tl.where(of_image, keys, text_keys + first * text_key.token),
                tl.where(of_image, key.token, text_key.token),
                tl.where(of_image, values, text_values + first * text_values_token),
                tl.where(of_image, value.token, text_values_token),
                bias, batch, column, tl.where(of_image, 0, text_tokens - column),
                tl.where(of_image, left, text_tokens - column), factor, COLUMNS, D, OUTPUT, True, BIAS,
            )  # fmt: skip
    if KIND != "":
        mapped = tl.where(from_text, 0, count)  # text rows have no map
        gradients = at(d_maps, batch, head, row)
        map_keys = at(text_key, batch, head, 0)
        map_norm = tl.zeros([ROWS], dtype=tl.float32)
        map_row_sum = map_norm
        if KIND != "logit":
            map_norms = at(map_lse, batch, head, row) + here
            map_norm = load_norm(map_norms, here < mapped, BIAS)
        if KIND == "text_probability":
            map_row_sum = tl.load(at(map_sum, batch, head, row) + here, mask=here < mapped, other=0.0)
        # Not pipelined: a staged tile of dM would be read with bank conflicts, eight rows to a bank.
        for column in tl.range(0, tl.where(from_text, 0, text_tokens), COLUMNS, num_stages=1):
            left = text_tokens - column
            k = load_tile(map_keys, text_key.token, left, COLUMNS, D, True)
            scores = inner_products(q, k) * scale  # [ROWS, COLUMNS]
            scores = tl.where((tl.arange(0, COLUMNS) < left)[None, :], scores, float("-inf"))
            gradient = _map_gradient(gradients, d_maps.token, mapped, column, columns_given, ROWS, COLUMNS)
            entry_norm = map_norm[:, None]
            if BIAS:
                added = load_bias(bias, batch, column, left, COLUMNS)[None, :]
                entry_norm -= added
                gradient = tl.where(added == float("-inf"), 0.0, gradient)
            term = _map_term(scores, gradient, entry_norm, map_row_sum[:, None], KIND)
            sums = weighted_sums(term, k, sums)
            map_keys += COLUMNS * text_key.token
    out_token = tl.where(from_text, d_text_query.token, d_query.token)
    store_tile(out, out_token, count, scaled(sums, scale), D)


@triton.jit
def _key_gradient(
    d_k,
    d_v,
    k,
    v,
    query,
    query_token,
    d_out,
    d_out_token,
    norms,
    delta,
    row_tokens,
    factor,
    added,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Add dS^T Q and P^T dO over all rows of a stream, without terms of a map; tiles are [COLUMNS, ROWS]."""
    here = tl.arange(0, ROWS)
    q_at = tile_pointers(query, query_token, ROWS, D)
    d_o_at = q_at
    if OUTPUT:
        d_o_at = tile_pointers(d_out, d_out_token, ROWS, D)
    norm_at, row_sum_at = norms + here, delta + here
    q_offset, d_o_offset = 0, 0  # of 32 bits, as in the forward
    for start in range(0, row_tokens, ROWS):
        count = row_tokens - start
        q = load_at(moved(q_at, q_offset), count, D, True)
        scores = inner_products(k, q)
        # Rows beyond the last add nothing whatever their probability: their query, dO and row sum are zero.
        norm = tl.load(norm_at + start, mask=here < count, other=0.0)
        if BIAS:
            probability = tl.exp2(scores * factor + (added[:, None] * LOG2_E - norm[None, :]))
        else:
            probability = tl.exp2(scores * factor - norm[None, :])
        row_sum = tl.load(row_sum_at + start, mask=here < count, other=0.0)
        if OUTPUT:
            d_o = load_at(moved(d_o_at, d_o_offset), count, D, True)
            d_v = weighted_sums(probability, d_o, d_v)
            d_scores = probability * (inner_products(v, d_o) - row_sum[None, :])
            d_o_offset += ROWS * d_out_token
        else:
            d_scores = -probability * row_sum[None, :]
        d_k = weighted_sums(d_scores, q, d_k)
        q_offset += ROWS * query_token
    return d_k, d_v


@triton.jit(do_not_specialize=["tiles", "tokens", "image_keys", "text_tokens", "heads"])
def key_gradient_kernel(
    query,
    key,
    value,
    text_query,
    text_key,
    text_value,
    edited,
    bias,
    d_image,
    d_text,
    norms,
    delta,
    map_lse,
    map_sum,
    d_maps,
    d_key,
    d_value,
    d_text_key,
    d_text_value,
    d_edited,
    tiles,
    tokens,
    image_keys,
    text_tokens,
    columns_given,
    heads,
    scale,
    factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    OUTPUT: tl.constexpr,
    TEXT_ROWS: tl.constexpr,
    EDITED: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
):
    """dK and dV of one tile of text or image keys of one head, over all image rows and then all text rows.

    OUTPUT: a gradient reaches the output, TEXT_ROWS: that of text rows, too; KIND: the kind of map whose
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
    count = tl.where(of_text, text_tokens, image_keys) - column
    if of_text:
        keys = at(text_key, batch, head, wide)
        d_keys = at(d_text_key, batch, head, wide)
    else:
        keys = at(key, batch, head, wide)
        d_keys = at(d_key, batch, head, wide)
    k = load_tile(keys, tl.where(of_text, text_key.token, key.token), count, COLUMNS, D, True)
    d_k = zeros_like(k, COLUMNS)
    d_v = zeros_like(k, COLUMNS)
    row_norms = at(norms, batch, head, 0)
    row_sums = at(delta, batch, head, 0)
    v = k  # never read without a gradient of an output
    added = factor  # never read without a bias
    if BIAS:  # of image keys zero
        added = load_bias(bias, batch, tl.where(of_text, column, 0), tl.where(of_text, count, 0), COLUMNS)
    rows = at(query, batch, head, 0)
    if OUTPUT or KIND == "probability":
        d_rows = rows
        if OUTPUT:
            d_rows = at(d_image, batch, head, 0)
            if of_text:
                values = at(edited, batch, head, wide)
            else:
                values = at(value, batch, head, wide)
            v = load_tile(values, tl.where(of_text, edited.token, value.token), count, COLUMNS, D, True)
        d_k, d_v = _key_gradient(
            d_k, d_v, k, v, rows, query.token, d_rows, d_image.token, row_norms, row_sums, tokens, factor,
            added, ROWS, D, OUTPUT, BIAS,
        )  # fmt: skip
    if KIND != "":
        here = tl.arange(0, ROWS)
        gradients = at(d_maps, batch, head, 0)
        map_norms, map_row_sums = row_norms, row_norms  # read only if this kind of map needs them
        if KIND != "logit":
            map_norms = at(map_lse, batch, head, 0)
        if KIND == "text_probability":
            map_row_sums = at(map_sum, batch, head, 0)
        # Not pipelined: a staged tile of dM costs the registers that the main loop needs.
        for start in tl.range(0, tl.where(of_text, tokens, 0), ROWS, num_stages=1):
            left = tokens - start
            q = load_tile(rows, query.token, left, ROWS, D, True)
            scores = inner_products(k, q) * scale  # [COLUMNS, ROWS]
            gradient = _map_gradient(gradients, d_maps.token, left, column, columns_given, ROWS, COLUMNS)
            map_norm = tl.zeros([ROWS], dtype=tl.float32)
            map_row_sum = map_norm
            if KIND != "logit":
                map_norm = load_norm(map_norms + here, here < left, BIAS)
                map_norms += ROWS
            if KIND == "text_probability":
                map_row_sum = tl.load(map_row_sums + here, mask=here < left, other=0.0)
                map_row_sums += ROWS
            gradient = tl.trans(gradient)
            entry_norm = map_norm[None, :]
            if BIAS:
                entry_norm -= added[:, None]
                gradient = tl.where(added[:, None] == float("-inf"), 0.0, gradient)
            term = _map_term(scores, gradient, entry_norm, map_row_sum[None, :], KIND)
            d_k = weighted_sums(term, q, d_k)
            rows += ROWS * query.token
            gradients += ROWS * d_maps.token

    # What image rows say of the text values goes to the edited ones.
    if EDITED and OUTPUT:  # noqa: SIM102
        if of_text:
            store_tile(at(d_edited, batch, head, wide), d_edited.token, count, d_v, D)
            d_v = zeros_like(k, COLUMNS)
    if TEXT_ROWS:
        if of_text:
            values = at(text_value, batch, head, wide)
        else:
            values = at(value, batch, head, wide)
        v = load_tile(values, tl.where(of_text, text_value.token, value.token), count, COLUMNS, D, True)
        d_k, d_v = _key_gradient(
            d_k, d_v, k, v, at(text_query, batch, head, 0), text_query.token, at(d_text, batch, head, 0),
            d_text.token, row_norms + tokens, row_sums + tokens, text_tokens, factor, added,
            ROWS, D, True, BIAS,
        )  # fmt: skip

    store_tile(d_keys, tl.where(of_text, d_text_key.token, d_key.token), count, scaled(d_k, scale), D)
    if OUTPUT:
        if of_text:
            d_values = at(d_text_value, batch, head, wide)
        else:
            d_values = at(d_value, batch, head, wide)
        store_tile(d_values, tl.where(of_text, d_text_value.token, d_value.token), count, d_v, D)


@dataclass(frozen=True)
class _Problem:
    """What the launches of a backward pass share.

    Attributes:
        inputs: in a layout that the kernels read.
        scale: factor of the scores.
        d_image, d_text: gradients of the outputs, likewise; None where there is none.
        kind: the kind of map whose gradient is given, "" for none.
        d_maps: what :func:`_over_all_columns` gives, [B, N, H or 1, columns]; None without a gradient.
        lse: log-sum-exp over all keys, [B, H, rows].
        map_lse: what the map's entries are normalised by, [B, H, at least N]; None for logits.
        map_sum: row sums of dM * P_t, [B, H, N], to be filled for ``"text_probability"``.
        delta: row sums, [B, H, N + T], to be filled.
        norms: log-sum-exp to base 2, likewise.
    """

    inputs: Inputs
    scale: float
    d_image: Tensor | None
    d_text: Tensor | None
    kind: str
    d_maps: Tensor | None
    lse: Tensor
    map_lse: Tensor | None
    map_sum: Tensor | None
    delta: Tensor
    norms: Tensor

    @property
    def softmax(self) -> bool:
        """Whether the softmax over all keys takes part."""
        return self.d_image is not None or self.kind == "probability"

    def map_arguments(self) -> dict[str, Any]:
        """The arguments that all three kernels have."""
        query, text_key = self.inputs.query, self.inputs.text_key
        return {
            "text_key": strided(text_key),
            "bias": strided_bias(self.inputs.text_bias),
            "map_lse": strided_by_head(self.map_lse),
            "d_maps": strided(self.d_maps),
            "map_sum": strided_by_head(self.map_sum),
            "text_tokens": text_key.shape[1],
            "columns_given": 0 if self.d_maps is None else self.d_maps.shape[-1],
            "heads": query.shape[2],
            "scale": self.scale,
            "D": query.shape[3],
            "BIAS": self.inputs.text_bias is not None,
        }

    def arguments(self) -> dict[str, Any]:
        """The arguments of both gradient kernels.

        Rows of a stream without gradient, and image keys that are missing, have no programs; a tensor that
        only they would read is stood in for.
        """
        inputs = self.inputs
        query, text_query, text_value = inputs.query, inputs.text_query, inputs.text_value
        edited = text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
        return {
            **self.map_arguments(),
            "query": strided(query),
            "key": strided(inputs.text_key if inputs.key is None else inputs.key),
            "value": strided(text_value if inputs.value is None else inputs.value),
            "text_query": strided(query if text_query is None else text_query),
            "text_value": strided(text_value),
            "edited": strided(edited),
            "d_image": strided(self.d_image),
            "d_text": strided(self.d_image if self.d_text is None else self.d_text),
            "norms": strided_by_head(self.norms),
            "delta": strided_by_head(self.delta),
            "tokens": query.shape[1],
            "image_keys": 0 if inputs.key is None else inputs.key.shape[1],
            "factor": self.scale * math.log2(math.e),
            "KIND": self.kind,
        }


def backward(
    d_image: Tensor | None,
    d_text: Tensor | None,
    d_maps: Tensor | None,
    inputs: Inputs,
    image: Tensor,
    text: Tensor,
    lse: Tensor,
    request: Request,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the seven inputs, [B, tokens, H, D]; any upstream gradient may be None.

    That of the log-sum-exp joins those of the outputs, which are zeros then where there is none.
    """
    given = inputs
    if d_lse is not None and d_lse.shape[-1] > 0:
        if inputs.text_value is None:
            value = None if inputs.key is None else torch.zeros_like(inputs.key)
            inputs = replace(inputs, value=value, text_value=torch.zeros_like(inputs.text_key))
            image = inputs.query.new_zeros(inputs.query.shape)
            text = inputs.text_key.new_zeros(inputs.text_key.shape)
        d_image = torch.zeros_like(inputs.query) if d_image is None else d_image
        if d_text is None and inputs.text_query is not None:
            d_text = torch.zeros_like(inputs.text_query)
    problem = _problem(d_image, d_text, d_maps, readable_inputs(inputs), lse, request)
    _fill_row_sums(problem, image, text)
    if d_lse is not None:
        problem.delta[:, :, : d_lse.shape[-1]].sub_(d_lse)
    gradients = empty_gradients(inputs)
    _fill_query_gradients(problem, gradients)
    _fill_key_gradients(problem, gradients)
    return tuple(
        gradient if tensor is not None else gradient.new_empty((0,))
        for gradient, tensor in zip(gradients, given.tensors(), strict=True)
    )


def map_gradient(
    d_maps: Tensor, inputs: Inputs, lse: Tensor, request: Request
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image queries and text keys by what a ``"probability"`` map adds to dS on its own columns,
    dM * P~; and the row sum of that, float32 [B, H, N], for whoever computes the other gradients.

    ``lse``: over all keys, [B, H, at least N], whoever computed it.
    """
    text_key = inputs.text_key
    # Nothing reads the image keys: the text keys stand in for them.
    alone = Inputs(inputs.query, text_key, None, None, text_key, None, None, inputs.text_bias)
    problem = _problem(None, None, d_maps, readable_inputs(alone), lse, request)
    _fill_row_sums(problem, alone.query, alone.query)
    row_sum = problem.delta[:, :, : inputs.query.shape[1]]
    # With zeros for the row sum of a softmax over the text alone, the term of its map is dM * P~.
    problem = replace(problem, kind="text_probability", map_sum=torch.zeros_like(row_sum))
    gradients = empty_gradients(alone)
    _fill_query_gradients(problem, gradients)
    _fill_key_gradients(problem, gradients)
    return gradients[0], gradients[4], row_sum


def _problem(
    d_image: Tensor | None,
    d_text: Tensor | None,
    d_maps: Tensor | None,
    inputs: Inputs,
    lse: Tensor,
    request: Request,
) -> _Problem:
    batch, tokens, heads, _ = inputs.query.shape
    text_tokens = inputs.text_key.shape[1]
    kind = "" if d_maps is None else str(request.kind)
    map_lse = map_sum = None
    if kind == "probability":
        map_lse = lse
    elif kind == "text_probability":
        map_lse = text_log_sum_exp(inputs, request.scale)
        map_sum = torch.empty_like(map_lse)
    delta_shape = (batch, heads, tokens + text_tokens)
    return _Problem(
        inputs=inputs,
        scale=request.scale,
        d_image=None if d_image is None else readable(d_image),
        d_text=None if d_text is None else readable(d_text),
        kind=kind,
        d_maps=None if d_maps is None else _over_all_columns(d_maps, text_tokens, heads, request),
        lse=lse,
        map_lse=map_lse,
        map_sum=map_sum,
        delta=torch.empty(delta_shape, dtype=torch.float32, device=lse.device),
        norms=torch.empty(delta_shape, dtype=torch.float32, device=lse.device),
    )


def _over_all_columns(d_maps: Tensor, text_tokens: int, heads: int, request: Request) -> Tensor:
    """What one head's entries receive from the gradient of their reduction, float32, for all text columns.

    [B, N, 1, T] or, for ``heads="each"``, [B, N, H, T], with T rounded up to whole 64-byte lines: kernels
    then read it in vectors. A copy of the size of the map.
    """
    padded = triton.cdiv(text_tokens, 16) * 16
    given = d_maps.new_zeros((*d_maps.shape[:-1], padded), dtype=torch.float32)
    given[..., request.start : request.stop].copy_(d_maps)
    return given.transpose(1, 2) if request.heads == "each" else given.div_(heads).unsqueeze(2)


def _fill_row_sums(problem: _Problem, image: Tensor, text: Tensor) -> None:
    """Delta of the rows that have a gradient, and the map's row sums."""
    tokens = problem.inputs.query.shape[1]
    kind = problem.kind if problem.map_lse is not None else ""
    _launch_row_sums(problem, problem.inputs.query, image, problem.d_image, slice(None, tokens), kind)
    if problem.d_text is not None and problem.inputs.text_query is not None:
        rows = slice(tokens, None)
        _launch_row_sums(problem, problem.inputs.text_query, text, problem.d_text, rows, "")


def _launch_row_sums(
    problem: _Problem, query: Tensor, out: Tensor, d_out: Tensor | None, rows: slice, kind: str
) -> None:
    batch, tokens, heads, _ = query.shape
    config = tuning.tuning_for(query).scores
    softmax = problem.softmax
    arguments = {
        **problem.map_arguments(),
        "query": strided(query),
        "out": strided(out),
        "d_out": strided(d_out),
        "lse": strided_by_head(problem.lse[:, :, rows] if softmax else None),
        "norms": strided_by_head(problem.norms[:, :, rows] if softmax else None),
        "delta": strided_by_head(problem.delta[:, :, rows]),
        "tokens": tokens,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "OUTPUT": d_out is not None,
        "SOFTMAX": softmax,
        "KIND": kind,
    }
    Launch(delta_kernel, batch * heads * triton.cdiv(tokens, config.rows), arguments, config).start()


def _fill_query_gradients(problem: _Problem, gradients: tuple[Tensor, ...]) -> None:
    """dQ of both streams; zeros for rows that no gradient reaches."""
    d_query, _, _, d_text_query, *_ = gradients
    batch, tokens, heads, _ = problem.inputs.query.shape
    config = tuning.tuning_for(problem.inputs.query).query_gradient
    of_text = problem.d_text is not None
    image_tiles = triton.cdiv(tokens, config.rows)
    text_tiles = triton.cdiv(problem.inputs.text_key.shape[1], config.rows) if of_text else 0
    arguments = {
        **problem.arguments(),
        "d_query": strided(d_query),
        "d_text_query": strided(d_text_query if of_text else d_query),
        "image_tiles": image_tiles,
        "tiles": image_tiles + text_tiles,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "OUTPUT": problem.d_image is not None,
        "SOFTMAX": problem.softmax,
    }
    programs = batch * heads * (image_tiles + text_tiles)
    Launch(query_gradient_kernel, programs, arguments, config).start()
    if not of_text:
        d_text_query.zero_()


def _fill_key_gradients(problem: _Problem, gradients: tuple[Tensor, ...]) -> None:
    """dK and dV of both streams; zeros for what no gradient reaches."""
    _, d_key, d_value, _, d_text_key, d_text_value, d_edited = gradients
    inputs = problem.inputs
    batch, _, heads, _ = inputs.query.shape
    config = tuning.tuning_for(inputs.query).key_gradient
    of_image, of_text = problem.d_image is not None, problem.d_text is not None
    edited = inputs.text_value_for_image is not None
    tiles = triton.cdiv(inputs.text_key.shape[1], config.columns)
    image_keys = inputs.key.shape[1] if problem.softmax and inputs.key is not None else 0
    tiles += triton.cdiv(image_keys, config.columns)
    arguments = {
        **problem.arguments(),
        "d_key": strided(d_text_key if inputs.key is None else d_key),
        "d_value": strided(d_value if inputs.value is not None else d_text_value if of_image else None),
        "d_text_key": strided(d_text_key),
        "d_text_value": strided(d_text_value if of_image else None),
        "d_edited": strided(d_edited if edited else None),
        "tiles": tiles,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "OUTPUT": of_image,
        "TEXT_ROWS": of_text,
        "EDITED": edited,
    }
    Launch(key_gradient_kernel, batch * heads * tiles, arguments, config).start()
    if image_keys == 0:
        d_key.zero_()
    if not of_image:
        for gradient in (d_value, d_text_value, d_edited):
            gradient.zero_()
