"""Joint attention of image and text tokens that also returns what the attention saw.

One softmax attention runs over the concatenation of N image tokens and T text tokens, as in MM-DiT
(Stable Diffusion 3, Flux). Besides the output, a caller can ask for the image-to-text (I2T) map, the part of
the attention in which image tokens read text tokens, and for statistics of the whole attention matrix.
Neither needs the (N + T) x (N + T) matrix: with the log-sum-exp of every row, any entry is ``exp(score -
lse)``.

Three backends compute the same function:

* ``"reference"``: the specification. Materialises the matrix; any device and dtype; slow and large.
* ``"aten"``: PyTorch's flash attention and log-sum-exp, then a pass over the text columns; any device.
* ``"triton"``: our own kernels; NVIDIA and AMD GPUs (and Triton's interpreter).

Triton runs on a GPU that it supports and ATen elsewhere; :func:`backend` chooses another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import reference
from .aten import backend as aten
from .operators import Attend
from .types import DTYPES, AttentionMaps, Backend, Inputs, JointAttention, MapRequest

_chosen: Backend = "auto"  # torch.compile guards on it: a graph is traced again under another choice

_FLOAT32 = torch.finfo(torch.float32)

LARGEST_BIAS = 88
"""Largest value of a text bias: exp(88) is about the largest float32."""


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Let one backend compute every joint attention inside the context; contexts nest.

    The choice is the process's, not a thread's: contexts that several threads hold at once overwrite each
    other. It is made when an attention runs forward, and its gradient stays with it; a block under gradient
    checkpointing runs forward again in the backward, which then belongs inside the context too.

    Args:
        name: ``"reference"``, ``"aten"`` or ``"triton"``; ``"auto"`` chooses by the device again.

    Raises:
        ValueError: no backend of that name. A backend that cannot take the tensors of a call raises there.
    """
    global _chosen
    if name not in get_args(Backend):
        raise ValueError(f"backend={name!r} is unknown; accepted: {', '.join(get_args(Backend))}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    *,
    scale: float | None = None,
    maps: MapRequest | None = None,
    statistics: bool = False,
    text_value_for_image: Tensor | None = None,
    text_bias: Tensor | None = None,
) -> JointAttention:
    """Softmax attention over image and text tokens together, with I2T maps and statistics.

    Differentiable through ``image``, ``text`` and ``maps`` with respect to all seven tensors.

    Args:
        query, key, value: image tokens, [B, N, H, D], float16, bfloat16, float32 or float64; any strides.
        text_query, text_key, text_value: text tokens, [B, T, H, D], same dtype and device.
        scale: factor of the scores, positive and finite; 1 / sqrt(D) when None.
        maps: the I2T map to return; None for no map.
        statistics: also return attention mass and value norms, see
            :class:`seg4diff.kernels.types.AttentionStatistics`.
        text_value_for_image: text values that *image* rows read, [B, T, H, D]; text rows keep ``text_value``.
            A linear edit of the I2T probabilities along the text axis, P G, is exactly ``G @ text_value``
            here.
        text_bias: what is added to the scores of the text columns, float32 [B, T], at most 88; -inf masks a
            column, as of a padding token. A row of a masked token is a row like any other. Not
            differentiable. Values are checked on a CPU, outside of ``torch.compile``: elsewhere a NaN or
            +inf gives NaN.

    Entries of a map in masked columns are exactly 0, and a ``"logit"`` map does not contain the bias. Where
    all T columns are masked, ``"text_probability"`` is 0.

    Under autocast, tensors are cast to the autocast dtype, as PyTorch's own attention does.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, ranges or the scale do not fit, or the tensors the chosen
            :func:`backend`; the message names the argument and its value.
    """
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "text_query": text_query,
        "text_key": text_key,
        "text_value": text_value,
    }
    if text_value_for_image is not None:
        tensors["text_value_for_image"] = text_value_for_image
    return cast(JointAttention, _attend(tensors, text_bias, scale, maps, statistics))


def attention_maps(
    query: Tensor,
    key: Tensor,
    text_query: Tensor | None,
    text_key: Tensor,
    *,
    scale: float | None = None,
    maps: MapRequest = MapRequest(),  # noqa: B008 (frozen)
    statistics: bool = False,
    text_bias: Tensor | None = None,
) -> AttentionMaps:
    """The I2T map alone: no values, no attention output.

    Costs one pass over the scores for ``"probability"`` and only the text columns for the other kinds.
    Differentiable through ``maps``. Arguments and errors are those of :func:`joint_attention`; ``text_query``
    is needed by the statistics only and may be None without them.
    """
    tensors = {"query": query, "key": key, "text_key": text_key}
    if text_query is not None:
        tensors["text_query"] = text_query
    elif statistics:
        raise ValueError("text_query=None, but statistics=True needs it: text rows count too")
    if not isinstance(maps, MapRequest):
        raise TypeError(f"maps={maps!r} must be a MapRequest")
    return cast(AttentionMaps, _attend(tensors, text_bias, scale, maps, statistics))


def _attend(
    tensors: dict[str, Tensor],
    text_bias: Tensor | None,
    scale: float | None,
    maps: MapRequest | None,
    statistics: bool,
) -> JointAttention | AttentionMaps:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected [batch, tokens, heads, head_dim]"
            )
    tensors = _autocast(tensors)
    _check_tensors(tensors)
    if maps is not None:
        if not isinstance(maps, MapRequest):
            raise TypeError(f"maps={maps!r} must be a MapRequest or None")
        maps.columns(tensors["text_key"].shape[1])
    if text_bias is not None:
        _check_bias(text_bias, tensors["text_key"])
    value = tensors.get("value")
    inputs = Inputs(
        query=tensors["query"],
        key=tensors["key"],
        value=value,
        text_query=tensors.get("text_query") if value is not None or statistics else None,
        text_key=tensors["text_key"],
        text_value=tensors.get("text_value"),
        text_value_for_image=tensors.get("text_value_for_image"),
        text_bias=text_bias,
    )
    factor = inputs.query.shape[-1] ** -0.5 if scale is None else _checked_scale(scale)
    return _attend_of(_chosen, inputs)(inputs, factor, maps, statistics)


def _autocast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    device = tensors["query"].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for name, tensor in tensors.items()
    }


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    query = tensors["query"]
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: float16, bfloat16, float32, float64")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, but query has {query.dtype}; cast them to one dtype"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but query is on {query.device}; move them together"
            )
        if tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: zero tokens")
        for axis, what in ((0, "batch size"), (2, "number of heads"), (3, "head dim")):
            if tensor.shape[axis] != query.shape[axis]:
                raise ValueError(
                    f"{name} has {what} {tensor.shape[axis]} (shape {list(tensor.shape)}), "
                    f"but query has {query.shape[axis]} (shape {list(query.shape)})"
                )
        if 0 in tensor.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: an axis of length zero")
        first = "text_key" if name.startswith("text_") else "query"
        if tensor.shape[1] != tensors[first].shape[1]:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens, but {first} has {tensors[first].shape[1]}; "
                "tensors of one stream have equal lengths"
            )


def _check_bias(text_bias: Tensor, text_key: Tensor) -> None:
    accepted = (
        f"accepted: float32 [B, T], here {list(text_key.shape[:2])}, values up to {LARGEST_BIAS} or -inf"
    )
    if not isinstance(text_bias, Tensor):
        raise TypeError(f"text_bias must be a tensor, got {type(text_bias).__name__}; {accepted}")
    if text_bias.dtype != torch.float32:
        remedy = (
            "; a mask becomes torch.where(mask, 0.0, -torch.inf)" if text_bias.dtype == torch.bool else ""
        )
        raise ValueError(f"text_bias has dtype {text_bias.dtype}; {accepted}{remedy}")
    if text_bias.shape != text_key.shape[:2]:
        raise ValueError(f"text_bias has shape {list(text_bias.shape)}; {accepted}")
    if text_bias.device != text_key.device:
        raise ValueError(f"text_bias is on {text_bias.device}, but text_key is on {text_key.device}")
    if text_bias.requires_grad:
        raise ValueError("text_bias requires grad, but it is not differentiable; detach it")
    if _readable(text_bias):
        refused = text_bias[~(text_bias <= LARGEST_BIAS)]  # NaN, too
        if refused.numel():
            raise ValueError(f"text_bias has a value of {float(refused[0])}; {accepted}")


def _readable(tensor: Tensor) -> bool:
    """Whether reading values costs no synchronisation and breaks no trace."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
    )


def _checked_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale={scale!r} must be a number or None")
    if not _FLOAT32.tiny <= scale <= _FLOAT32.max:
        raise ValueError(
            f"scale={scale!r} must be a positive finite float32; None is 1 / sqrt(head dim), the usual one"
        )
    return float(scale)


def _attend_of(name: Backend, inputs: Inputs) -> Attend:
    """The function of the backend ``name`` for ``inputs``."""
    if name == "auto":
        on_gpu = inputs.query.device.type == "cuda"
        name = "triton" if on_gpu and _triton_refusal(inputs) is None else "aten"
    if name == "triton":
        refusal = _triton_refusal(inputs)
        if refusal is not None:
            raise ValueError(f'backend("triton") cannot run this: {refusal}; backend("aten") can')
        from .triton import backend as triton

        return triton.attend
    return aten.attend if name == "aten" else reference.attend


def _triton_refusal(inputs: Inputs) -> str | None:
    """Why the Triton backend cannot take ``inputs``, or None if it can."""
    try:
        from .triton import backend as triton
    except ImportError as error:
        return f"Triton is not importable ({error})"
    return triton.refusal(inputs.query) or triton.call_refusal(inputs)
