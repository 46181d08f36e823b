"""What both directions share: products of one head, blocks of rows, dense channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import wide_dtype

BLOCK_ELEMENTS = 8 * 2**20  # entries of one block of scores, all batch rows and heads together


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns^T of one head: [B, M, D] and [B, T, D] -> [B, M, T], wide."""
    wide = wide_dtype(rows.dtype)
    return torch.bmm(rows.to(wide), columns.to(wide).transpose(1, 2))


def softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax over the last axis of ``scores`` [B, M, T], which contain ``bias`` [B, 1, T]; zeros where the
    bias masks all columns.
    """
    entries = scores.softmax(dim=-1)
    if bias is not None:
        entries.masked_fill_(without_text(bias), 0.0)
    return entries


def without_text(bias: Tensor) -> Tensor:
    """Where the bias [B, 1, T] masks all columns, [B, 1, 1]."""
    return (bias == -torch.inf).all(dim=-1, keepdim=True)


def text_mask(bias: Tensor) -> Tensor:
    """The columns that a bias [B, T] masks, [B, 1, T]."""
    return (bias == -torch.inf)[:, None]


def block_rows(q: Tensor, columns: int) -> int:
    """How many rows of ``q`` [B, H, M, D] make a block of scores with ``columns`` keys."""
    return max(1, BLOCK_ELEMENTS // (q.shape[0] * q.shape[1] * columns))


def dense_channels(tensor: Tensor) -> Tensor:
    """The tensor with its last axis dense, as PyTorch's flash operators want it: the CPU's does not check."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
