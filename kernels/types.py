"""What a call of joint attention takes and gives: inputs, requests and results."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["probability", "logit", "text_probability"]
Heads = Literal["mean", "each"]
Backend = Literal["auto", "reference", "aten", "triton"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of maps, log-sum-exps and statistics for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class MapRequest:
    """Which I2T map to return: image rows, text columns, reduced over the H heads.

    Attributes:
        kind: what an entry is before the reduction. ``"probability"``: the softmax over all N + T keys;
            ``"logit"``: ``scale * <q_n, k_t>``; ``"text_probability"``: the softmax over the T text
            keys alone.
        heads: ``"mean"`` -> [B, N, T'], ``"each"`` -> [B, H, N, T'].
        text: the T' text columns to return, a contiguous range within [0, T). Columns are chosen after the
            softmax, so a slice of ``"text_probability"`` is still normalised over all T.

    Raises:
        ValueError: ``kind`` or ``heads`` is not one of the names above, or ``text`` has a step.
        TypeError: ``text`` is not a slice of integers.
    """

    kind: Kind = "probability"
    heads: Heads = "mean"
    text: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is unknown; accepted: {', '.join(get_args(Kind))}")
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
class Inputs:
    """The tensors of one call, [B, tokens, H, D].

    A map alone needs no values: then all three are None, and ``text_query`` is None unless the statistics
    are wanted. Otherwise ``text_value_for_image`` alone may be None.

    ``text_bias``, float32 [B, T] or None, is added to the scores of text columns; -inf masks a column. It has
    no gradient.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    text_query: Tensor | None
    text_key: Tensor
    text_value: Tensor | None
    text_value_for_image: Tensor | None
    text_bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The seven that have gradients, in the order of :data:`STREAMS`."""
        return tuple(getattr(self, name) for name in STREAMS)


STREAMS = tuple(stream.name for stream in fields(Inputs))[:7]


@dataclass(frozen=True)
class Request:
    """What a backend's operators compute: the scale of the scores and the map, if any.

    Attributes:
        scale: factor of the scores, positive.
        kind, heads: as in :class:`MapRequest`; ``kind`` is None without a map.
        start, stop: the text columns of the map.
    """

    scale: float
    kind: str | None
    heads: str
    start: int
    stop: int


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of the whole attention matrix, float32 (float64 for float64 inputs), not differentiable.

    Attributes:
        image_to_text: attention mass, the sum of the probabilities, that image rows give to text columns,
            [B, H, N]; the mass they give to image columns is one minus this.
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
    """Result of :func:`seg4diff.kernels.api.joint_attention`.

    Attributes:
        image: attention output of the image rows, [B, N, H, D], dtype of the inputs.
        text: attention output of the text rows, [B, T, H, D].
        lse: natural log-sum-exp of every row's scaled scores, [B, H, N + T], image rows first, float32
            (float64 for float64 inputs), not differentiable.
        maps: the requested I2T map, same dtype as ``lse``; None if none was requested.
        statistics: None unless they were requested.
    """

    image: Tensor
    text: Tensor
    lse: Tensor
    maps: Tensor | None
    statistics: AttentionStatistics | None


@dataclass(frozen=True)
class AttentionMaps:
    """Result of :func:`seg4diff.kernels.api.attention_maps`.

    Attributes:
        maps: the requested I2T map, float32 (float64 for float64 inputs).
        statistics: without value norms; None unless they were requested.
        lse: as in :class:`JointAttention`, of the rows that were needed: [B, H, N + T] with statistics,
            [B, H, N] for ``"probability"``, else None.
    """

    maps: Tensor
    statistics: AttentionStatistics | None
    lse: Tensor | None
