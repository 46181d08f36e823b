"""Tiles of head vectors: loading, storing and multiplying them.

Tensor cores want a power of two on every axis of a tile, and a head dim of 96 padded to 128 would waste a
quarter of the work. So a head vector is held in two parts, ``WIDTH`` and ``REST`` entries wide (96 = 64 +
32); ``REST`` is 0 where one part is enough, and whatever concerns it is then compiled away. A second part
that is not there is a copy of the first, never read.

Token indices within a tile are 32-bit; what is added to reach the tile is 64-bit, in the base pointer.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


def head_parts(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Widths of the two parts of a head vector: powers of two of at least 16, the second possibly 0.

    Parts that do not add up to ``head_dim`` are padded with zeros as they are loaded. A product in float32
    has no tensor cores and keeps both operands in registers, so there a wide head vector is halved.
    """
    width = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(head_dim - width)) if head_dim > width else 0
    if rest == width:
        width, rest = 2 * width, 0
    if dtype == torch.float32 and width > 64 and rest == 0:
        return width // 2, width // 2
    return width, rest


def float32(number: float) -> float:
    """The float32 nearest to ``number``, which is what a kernel gets."""
    return struct.unpack("f", struct.pack("f", number))[0]


@triton.jit
def load_part(
    base,
    token_stride,
    count,
    TOKENS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Entries FIRST to FIRST + WIDTH of the vectors at ``base``; zeros beyond ``count`` and D."""
    tokens = tl.arange(0, TOKENS)
    entries = FIRST + tl.arange(0, WIDTH)
    pointers = base + tokens[:, None] * token_stride + entries[None, :]  # [TOKENS, WIDTH]
    if MASKED:
        if FIRST + WIDTH > D:
            tile = tl.load(pointers, mask=(tokens < count)[:, None] & (entries < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(tokens < count)[:, None], other=0.0)
    else:
        if FIRST + WIDTH > D:
            tile = tl.load(pointers, mask=(entries < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_tile(
    base,
    token_stride,
    count,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both parts of TOKENS vectors: [TOKENS, WIDTH] and [TOKENS, REST]."""
    tile = load_part(base, token_stride, count, TOKENS, 0, WIDTH, D, MASKED)
    rest = tile
    if REST > 0:
        rest = load_part(base, token_stride, count, TOKENS, WIDTH, REST, D, MASKED)
    return tile, rest


@triton.jit
def store_part(
    base,
    token_stride,
    count,
    tile,
    TOKENS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Write a part back in the dtype of the destination, within ``count`` tokens and D entries."""
    tokens = tl.arange(0, TOKENS)
    entries = FIRST + tl.arange(0, WIDTH)
    pointers = base + tokens[:, None] * token_stride + entries[None, :]
    tile = tile.to(base.dtype.element_ty)
    if FIRST + WIDTH > D:
        tl.store(pointers, tile, mask=(tokens < count)[:, None] & (entries < D)[None, :])
    else:
        tl.store(pointers, tile, mask=(tokens < count)[:, None])


@triton.jit
def store_tile(
    base,
    token_stride,
    count,
    tile,
    rest,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
):
    """Write both parts of TOKENS vectors."""
    store_part(base, token_stride, count, tile, TOKENS, 0, WIDTH, D)
    if REST > 0:
        store_part(base, token_stride, count, rest, TOKENS, WIDTH, REST, D)


@triton.jit
def inner_products(a, a_rest, b, b_rest, REST: tl.constexpr):
    """<a_i, b_j> of two tiles of head vectors, [A, D] and [B, D] -> float32 [A, B]."""
    products = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST > 0:
        products = tl.dot(a_rest, tl.trans(b_rest), products, input_precision="ieee")
    return products


@triton.jit
def weighted_sums(weights, b, b_rest, total, total_rest, REST: tl.constexpr):
    """total_i + sum_j weights_ij b_j: weights [A, B], rounded to the tile's dtype, and vectors [B, D]."""
    weights = weights.to(b.dtype)
    total = tl.dot(weights, b, total, input_precision="ieee")
    if REST > 0:
        total_rest = tl.dot(weights, b_rest, total_rest, input_precision="ieee")
    return total, total_rest


@triton.jit
def negated(tile):
    """Minus the tile, exactly. Through float32, in which every architecture and the interpreter calculate."""
    return (-tile.to(tl.float32)).to(tile.dtype)


@triton.jit
def zero_tile(TOKENS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """A float32 accumulator for TOKENS vectors."""
    tile = tl.zeros([TOKENS, WIDTH], dtype=tl.float32)
    rest = tile
    if REST > 0:
        rest = tl.zeros([TOKENS, REST], dtype=tl.float32)
    return tile, rest
