"""The Triton kernels as a backend: the launches a request needs, and the tensors the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import empty_outputs, register
from ..types import Inputs, Request
from .backward import backward
from .forward import attention, log_sum_exp
from .launching import readable_inputs
from .maps import budget, text_log_sum_exp, value_norm, write_maps
from .tuning import interpreting, target_of

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(query: Tensor) -> str | None:
    """Why the kernels cannot take tensors like ``query`` [B, N, H, D], or None if they can."""
    if query.dtype not in _DTYPES:
        return f"dtype {query.dtype} is not one of float16, bfloat16 and float32"
    head_dim = query.shape[-1]
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"head dim {head_dim} is not a multiple of 8 from 16 to 256"
    if interpreting():
        return (
            None
            if query.device.type == "cpu"
            else f"Triton's interpreter takes CPU tensors, not {query.device}"
        )
    if query.device.type != "cuda":
        return f"device {query.device} is not a GPU that Triton compiles for"
    if target_of(query.device) is None:
        name = torch.cuda.get_device_name(query.device)
        return f"{name} is not among the GPUs that the kernels are tuned for"
    return None


def forward(inputs: Inputs, request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image output, text output, log-sum-exp, maps; shapes as :func:`operators.empty_outputs`."""
    inputs = readable_inputs(inputs)
    image, text, lse, maps = empty_outputs(inputs, request)
    query, text_query, text_key = inputs.query, inputs.text_query, inputs.text_key
    rest = torch.empty_like(lse) if request.kind == "probability" else None
    if inputs.value is not None:
        attention(inputs, request.scale, image, text, lse, rest)
    elif lse.shape[-1] > 0:
        log_sum_exp(query, inputs.key, text_key, request.scale, lse, rest)
        if text_query is not None:
            log_sum_exp(text_query, inputs.key, text_key, request.scale, lse[:, :, query.shape[1] :], None)
    if request.kind is not None:
        norm = lse
        if request.kind == "text_probability":
            norm, rest = text_log_sum_exp(query, text_key, request.scale)
        write_maps(maps, query, text_key, norm, rest, request)
    return image, text, lse, maps


attend = register("triton", forward, backward, budget, value_norm)
