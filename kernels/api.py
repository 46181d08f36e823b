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
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

Scores = Literal["probability", "logit", "text_probability"]
Heads = Literal["mean", "each", "max"]
Backend = Literal["auto", "reference", "aten", "triton"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class MapRequest:
    """Which I2T map to return: image rows, text columns, reduced over the H heads.

    Attributes:
        scores: what an entry is before the reduction. ``"probability"``: the softmax over all N + T keys;
            ``"logit"``: ``scale * <q_n, k_t>``; ``"text_probability"``: the softmax over the T text
            keys alone.
        heads: ``"mean"`` -> [B, N, T'], ``"each"`` -> [B, H, N, T'], ``"max"`` -> [B, N, T'].
        text: the T' text columns to return, a contiguous range within [0, T). Columns are chosen after the
            softmax, so a slice of ``"text_probability"`` is still normalised over all T.

    Raises:
        ValueError: ``scores`` or ``heads`` is not one of the names above, or ``text`` has a step.
        TypeError: ``text`` is not a slice of integers.
    """

    scores: Scores = "probability"
    heads: Heads = "mean"
    text: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        if self.scores not in get_args(Scores):
            raise ValueError(f"scores={self.scores!r} is unknown; accepted: {', '.join(get_args(Scores))}")
        if self.heads not in get_args(Heads):
            raise ValueError(f"heads={self.heads!r} is unknown; accepted: {', '.join(get_args(Heads))}")
        if not isinstance(self.text, slice):
            raise TypeError(f"text={self.text!r} must be a slice of text columns, such as slice(0, 77)")
        for bound in (self.text.start, self.text.stop):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise TypeError(f"text={self.text!r} must have integer bounds")
        if self.text.step not in (None, 1):
            raise ValueError(f"text={self.text!r} has a step; text columns are a contiguous range")

    def columns(self, text_length: int) -> tuple[int, int]:
        """First and one-past-last text column for T = ``text_length``.

        Raises:
            ValueError: the range is empty or leaves [0, ``text_length``).
        """
        start = 0 if self.text.start is None else self.text.start
        stop = text_length if self.text.stop is None else self.text.stop
        if not 0 <= start < stop <= text_length:
            raise ValueError(
                f"text={self.text!r} is not a non-empty range inside the {text_length} text tokens; "
                f"use bounds with 0 <= start < stop <= {text_length}"
            )
        return start, stop


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of the whole attention matrix, float32 (float64 for float64 inputs), not differentiable.

    Attributes:
        image_to_text: probability mass that image rows give to text columns, [B, H, N]; the mass they give to
            image columns is one minus this.
        text_to_text: mass that text rows give to text columns, [B, H, T]; text-to-image is one minus this.
        image_value_norm: Euclidean norm of every image value vector, [B, H, N]; None without values.
        text_value_norm: the same for the (unedited) text values, [B, H, T]; None without values.
    """

    image_to_text: Tensor
    text_to_text: Tensor
    image_value_norm: Tensor | None
    text_value_norm: Tensor | None


@dataclass(frozen=True)
class JointAttention:
    """Result of :func:`joint_attention` and :func:`attention_maps`.

    Attributes:
        image: attention output of the image rows, [B, N, H, D], dtype of the inputs; None without values.
        text: attention output of the text rows, [B, T, H, D]; None without values.
        maps: the requested I2T map, float32 (float64 for float64 inputs), or None.
        statistics: the requested statistics, or None.
        lse: natural log-sum-exp of every row's scaled scores, [B, H, N + T], image rows first, not
            differentiable. :func:`attention_maps` leaves out what it did not need: see there.
    """

    image: Tensor | None
    text: Tensor | None
    maps: Tensor | None
    statistics: AttentionStatistics | None
    lse: Tensor | None


class BackendModule(Protocol):
    """What a file of this folder offers to be a backend; the arguments arrive validated."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        text_query: Tensor | None,
        text_key: Tensor,
        text_value: Tensor | None,
        text_value_for_image: Tensor | None,
        scale: float,
        maps: MapRequest | None,
        statistics: bool,
    ) -> JointAttention: ...


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
    backend: Backend = "auto",
) -> JointAttention:
    """Softmax attention over image and text tokens together, with I2T maps and statistics.

    Differentiable through ``image``, ``text`` and ``maps`` with respect to all seven tensors.

    Args:
        query, key, value: image tokens, [B, N, H, D], float16, bfloat16, float32 or float64; any strides.
        text_query, text_key, text_value: text tokens, [B, T, H, D], same dtype and device.
        scale: factor of the scores; 1 / sqrt(D) when None.
        maps: the I2T map to return; None for no map.
        statistics: also return the attention budget and the value norms.
        text_value_for_image: text values that *image* rows read, [B, T, H, D]; text rows keep ``text_value``.
            A linear edit of the I2T probabilities along the text axis, P G, is exactly ``G @ text_value``
            here.
        backend: ``"auto"`` takes Triton on a GPU it supports and ATen elsewhere.

    Under autocast, tensors are cast to the autocast dtype, as PyTorch's own attention does.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, names or ranges do not fit; the message names the argument and its value.
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
    tensors = _autocast(tensors)
    _validate(tensors, maps, scale)
    return _backend(backend, tensors["query"]).attend(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        tensors["text_query"],
        tensors["text_key"],
        tensors["text_value"],
        tensors.get("text_value_for_image"),
        _scale(scale, query),
        maps,
        statistics,
    )


def attention_maps(
    query: Tensor,
    key: Tensor,
    text_query: Tensor | None,
    text_key: Tensor,
    *,
    scale: float | None = None,
    maps: MapRequest = MapRequest(),
    statistics: bool = False,
    backend: Backend = "auto",
) -> JointAttention:
    """The I2T map alone: no values, no attention output.

    Costs one pass over the scores for ``"probability"`` and only the text columns for the other scores.
    Differentiable through ``maps``. Arguments and errors are those of :func:`joint_attention`; ``text_query``
    is needed by the attention budget only and may be None without ``statistics``.

    Returns:
        A result whose ``image`` and ``text`` are None. ``lse`` holds the rows that were needed: [B, H, N + T]
        with ``statistics``, [B, H, N] for ``"probability"``, else None. ``statistics`` has no value norms.
    """
    tensors = {"query": query, "key": key, "text_key": text_key}
    if text_query is not None:
        tensors["text_query"] = text_query
    elif statistics:
        raise ValueError("text_query=None, but statistics=True needs it: the budget counts text rows too")
    if not isinstance(maps, MapRequest):
        raise TypeError(f"maps={maps!r} must be a MapRequest")
    tensors = _autocast(tensors)
    _validate(tensors, maps, scale)
    return _backend(backend, tensors["query"]).attend(
        tensors["query"],
        tensors["key"],
        None,
        tensors["text_query"] if statistics else None,
        tensors["text_key"],
        None,
        None,
        _scale(scale, query),
        maps,
        statistics,
    )


def _scale(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _autocast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    query = tensors["query"]
    if not isinstance(query, Tensor) or not torch.is_autocast_enabled(query.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(query.device.type)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for name, tensor in tensors.items()
    }


def _validate(tensors: dict[str, Tensor], maps: MapRequest | None, scale: float | None) -> None:
    query = tensors["query"]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected [batch, tokens, heads, head_dim]"
            )
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
    if maps is not None:
        if not isinstance(maps, MapRequest):
            raise TypeError(f"maps={maps!r} must be a MapRequest or None")
        maps.columns(tensors["text_key"].shape[1])
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale={scale!r} must be a number or None")


def _backend(name: str, query: Tensor) -> BackendModule:
    if name not in get_args(Backend):
        raise ValueError(f"backend={name!r} is unknown; accepted: {', '.join(get_args(Backend))}")
    if name == "auto":
        name = "triton" if query.device.type == "cuda" and _triton_refusal(query) is None else "aten"
    if name == "triton":
        refusal = _triton_refusal(query)
        if refusal is not None:
            raise ValueError(f"backend='triton' cannot run this: {refusal}; backend='aten' can")
        from .triton import registration

        return cast(BackendModule, registration)
    if name == "aten":
        from . import aten

        return cast(BackendModule, aten)
    from . import reference

    return cast(BackendModule, reference)


def _triton_refusal(query: Tensor) -> str | None:
    """Why the Triton backend cannot take tensors like ``query``, or None if it can."""
    try:
        from .triton import registration
    except ImportError as error:
        return f"Triton is not importable ({error})"
    return registration.refusal(query)
