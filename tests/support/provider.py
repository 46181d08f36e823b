"""A kernel of others that runs on a CPU: PyTorch's flash attention over all keys, with a record of calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seg4diff.kernels.providers import Provider, by_free_channels
from seg4diff.kernels.types import wide_dtype

CALLS: list[str] = []


def cpu_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """In float32 at least: in half precision, the operator rounds exponentials and so the log-sum-exp."""
    CALLS.append("forward")
    wide = wide_dtype(query.dtype)
    q, k, v = (tensor.transpose(1, 2).to(wide).contiguous() for tensor in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out.transpose(1, 2).to(query.dtype), lse


def cpu_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    CALLS.append("backward")
    *tensors, lse, scale = given
    d_o, q, k, v, o = (tensor.transpose(1, 2).contiguous() for tensor in tensors)
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = differentiate(d_o, q, k, v, o, lse, 0.0, False, scale=scale)
    d_query, d_key, d_value = (gradient.transpose(1, 2) for gradient in found)
    return d_query, d_key, d_value


def refusal(query: Tensor) -> str | None:
    return "head dim 12 is refused" if query.shape[-1] == 12 else None


OWN = Provider("own", refusal, cpu_forward, by_free_channels(cpu_backward), map_head_dim=64)
