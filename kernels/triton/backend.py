"""The Triton kernels as a backend: the launches a request needs, and the tensors the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from ..aten import backend as aten
from ..fallback import falling_back
from ..operators import empty_outputs, register
from ..types import Inputs, Request
from .backward import backward, map_gradient
from .forward import attention
from .launch import readable_inputs
from .maps import text_log_sum_exp, write_maps, write_normalised_maps
from .statistics import attention_mass, value_norm
from .tuning import interpreting, target_of

__all__ = [
    "attend", "attention_mass", "backward", "forward", "map_gradient", "refusal",
    "value_norm", "write_normalised_maps",
]  # fmt: skip

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


def forward(inputs: Inputs, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Output of all rows, log-sum-exp, maps; shapes as :func:`operators.empty_outputs`."""
    inputs = readable_inputs(inputs)
    joint, lse, maps = empty_outputs(inputs, request)
    query = inputs.query
    image, text = request.split(joint, query.shape[1])
    softmax = None
    if request.kind == "probability":
        softmax = torch.empty_like(lse), torch.empty_like(lse)
    if lse.shape[-1] > 0:
        attention(inputs, request.scale, lse, image, text, for_map=softmax)
    if request.kind == "text_probability":
        shape = (query.shape[0], query.shape[2], query.shape[1])
        softmax = lse.new_empty(shape), lse.new_empty(shape)
        text_log_sum_exp(inputs, request.scale, for_map=softmax)
    if request.kind is not None:
        write_maps(maps, inputs, softmax, request)
    return joint, lse, maps


attend = register(
    "triton",
    falling_back("triton", "forward", forward, aten.forward),
    falling_back("triton", "backward", backward, aten.backward),
    falling_back("triton", "attention_mass", attention_mass, aten.attention_mass),
    falling_back("triton", "value_norm", value_norm, aten.value_norm),
)
