"""What all kernels are made of: strided tensors, and tiles of head vectors.

Tensor cores want a power of two on every axis of a tile, and a head dim of 96 padded to 128 would waste a
quarter of the work. So a tile of head vectors is a tuple of one or two parts, [tokens, width] each, whose
widths :func:`head_parts` gives (96 = 64 + 32).

Token indices within a tile are 32-bit; what is added to reach the tile is 64-bit, in the base pointer.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A tensor [B, tokens, H, ...] as an argument of a kernel: its data and its strides in elements."""

    data: Any
    batch: Any
    token: Any
    head: Any


def float32(number: float) -> float:
    """The float32 nearest to ``number``, which is what a kernel gets."""
    return struct.unpack("f", struct.pack("f", number))[0]


@triton.constexpr_function
def head_parts(head_dim: int, dtype: Any) -> tuple[int, ...]:
    """Widths of the parts of a head vector: powers of two of at least 16, the greater first.

    Parts that do not add up to ``head_dim`` are padded with zeros as they are loaded. A product in float32
    has no tensor cores and keeps both operands in registers, so there a wide head vector is halved.
    """
    width = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(16, 1 << (head_dim - width - 1).bit_length()) if head_dim > width else 0
    if rest == width:
        width, rest = 2 * width, 0
    if dtype == tl.float32 and width > 64 and rest == 0:
        return width // 2, width // 2
    return (width, rest) if rest else (width,)


@triton.jit
def at(tensor, batch, head, token):
    """Pointer to the first entry of a head vector, or of what the tensor has in its place."""
    return tensor.data + batch * tensor.batch + head * tensor.head + token * tensor.token


@triton.jit
def part_pointers(base, token_stride, TOKENS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Where entries FIRST to FIRST + WIDTH of the vectors at ``base`` are: [TOKENS, WIDTH]."""
    return base + tl.arange(0, TOKENS)[:, None] * token_stride + (tl.arange(0, WIDTH) + FIRST)[None, :]


@triton.jit
def tile_pointers(base, token_stride, TOKENS: tl.constexpr, D: tl.constexpr):
    """Where TOKENS head vectors are; a loop that moves these does less than one that moves `base`."""
    PARTS: tl.constexpr = head_parts(D, base.dtype.element_ty)
    part = part_pointers(base, token_stride, TOKENS, 0, PARTS[0])
    if len(PARTS) == 1:
        return (part,)
    else:
        return (part, part_pointers(base, token_stride, TOKENS, PARTS[0], PARTS[1]))


@triton.jit
def moved(pointers, offset):
    """The pointers of a tile ``offset`` elements further on."""
    if len(pointers) == 1:
        return (pointers[0] + offset,)
    else:
        return (pointers[0] + offset, pointers[1] + offset)


@triton.jit
def load_part(pointers, count, FIRST: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """The part that begins at entry FIRST; zeros beyond ``count`` tokens, if MASKED, and D entries."""
    tokens = tl.arange(0, pointers.shape[0])
    entries = tl.arange(0, pointers.shape[1]) + FIRST
    if MASKED:
        if FIRST + pointers.shape[1] > D:
            part = tl.load(pointers, mask=(tokens < count)[:, None] & (entries < D)[None, :], other=0.0)
        else:
            part = tl.load(pointers, mask=(tokens < count)[:, None], other=0.0)
    else:
        if FIRST + pointers.shape[1] > D:
            part = tl.load(pointers, mask=(entries < D)[None, :], other=0.0)
        else:
            part = tl.load(pointers)
    return part


@triton.jit
def load_at(pointers, count, D: tl.constexpr, MASKED: tl.constexpr):
    """The head vectors that a tile's pointers show; unless MASKED, all of them are within ``count``."""
    part = load_part(pointers[0], count, 0, D, MASKED)
    if len(pointers) == 1:
        return (part,)
    else:
        return (part, load_part(pointers[1], count, pointers[0].shape[1], D, MASKED))


@triton.jit
def load_tile(base, token_stride, count, TOKENS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """TOKENS head vectors; unless MASKED, all of them are within ``count``."""
    return load_at(tile_pointers(base, token_stride, TOKENS, D), count, D, MASKED)


@triton.jit
def store_part(base, token_stride, count, part, FIRST: tl.constexpr, D: tl.constexpr):
    """Write a part in the dtype of the destination, within ``count`` tokens and D entries."""
    tokens = tl.arange(0, part.shape[0])
    entries = tl.arange(0, part.shape[1]) + FIRST
    pointers = part_pointers(base, token_stride, part.shape[0], FIRST, part.shape[1])
    part = part.to(base.dtype.element_ty)
    if FIRST + part.shape[1] > D:
        tl.store(pointers, part, mask=(tokens < count)[:, None] & (entries < D)[None, :])
    else:
        tl.store(pointers, part, mask=(tokens < count)[:, None])


@triton.jit
def store_tile(base, token_stride, count, tile, D: tl.constexpr):
    """Write the first ``count`` head vectors of a tile."""
    store_part(base, token_stride, count, tile[0], 0, D)
    if len(tile) > 1:
        store_part(base, token_stride, count, tile[1], tile[0].shape[1], D)


@triton.jit
def zeros_like(tile, TOKENS: tl.constexpr):
    """A float32 accumulator for TOKENS head vectors, in parts as ``tile``."""
    part = tl.zeros([TOKENS, tile[0].shape[1]], dtype=tl.float32)
    if len(tile) == 1:
        return (part,)
    else:
        return (part, tl.zeros([TOKENS, tile[1].shape[1]], dtype=tl.float32))


@triton.jit
def scaled(tile, factor):
    """All vectors times ``factor``, a number or [TOKENS, 1]."""
    if len(tile) == 1:
        return (tile[0] * factor,)
    else:
        return (tile[0] * factor, tile[1] * factor)


@triton.jit
def load_bias(bias, batch, first, count, COLUMNS: tl.constexpr):
    """What is added to the scores of COLUMNS text columns from ``first`` on; zeros beyond ``count``."""
    here = tl.arange(0, COLUMNS)
    return tl.load(at(bias, batch, 0, first) + here, mask=here < count, other=0.0)


@triton.jit
def load_norm(lse, inside, BIAS: tl.constexpr):
    """Log-sum-exps of rows: infinite, so that no probability is left, outside and, if there is a BIAS, where
    all is masked.
    """
    norm = tl.load(lse, mask=inside, other=float("inf"))
    if BIAS:
        norm = tl.where(norm == float("-inf"), float("inf"), norm)
    return norm


@triton.jit
def row_products(a, b):
    """<a_i, b_i> in float32: [TOKENS]."""
    products = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) > 1:
        products += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return products


@triton.jit
def inner_products(a, b):
    """<a_i, b_j> of two tiles of head vectors, of A and of B tokens -> float32 [A, B]."""
    products = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) > 1:
        products = tl.dot(a[1], tl.trans(b[1]), products, input_precision="ieee")
    return products


@triton.jit
def weighted_sums(weights, b, total):
    """total_i + sum_j weights_ij b_j; the weights [A, B] are rounded to the dtype of the tile ``b``."""
    weights = weights.to(b[0].dtype)
    sums = tl.dot(weights, b[0], total[0], input_precision="ieee")
    if len(b) == 1:
        return (sums,)
    else:
        return (sums, tl.dot(weights, b[1], total[1], input_precision="ieee"))
