"""What a call of joint attention takes and gives: inputs, requests and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Kind = Literal["probability", "logit", "text_probability"]
Heads = Literal["mean", "each"]
Stream = Literal["image", "text"]
Tokens = tuple[Stream, slice | Tensor]
Backend = Literal["auto", "reference", "aten", "triton"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of maps, log-sum-exps and statistics for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class MapRequest:
    """Which map to return: who reads whom, what an entry is, reduced over the H heads.

    Attributes:
        kind: what an entry is before the reduction. ``"probability"``: the softmax over all keys;
            ``"logit"``: ``scale * <q, k>``; ``"text_probability"``: the softmax over the text keys alone.
        heads: ``"mean"`` -> [B, rows, columns], ``"each"`` -> [B, H, rows, columns].
        rows: the tokens that read: a stream and which of its tokens, a contiguous range or their indices
            (int64 [rows], on the device of the tensors, in any order). All image tokens by default.
        columns: the tokens that are read, likewise. All text tokens by default. They are chosen after the
            softmax: a part of ``"text_probability"`` is still normalised over all T.

    Raises:
        ValueError: a name is not one of those above, a range has a step, indices are not int64 of one axis,
            or ``"text_probability"`` of image columns.
        TypeError: rows or columns are not a stream and a slice of integers or a tensor.
    """

    kind: Kind = "probability"
    heads: Heads = "mean"
    rows: Tokens = ("image", slice(None))
    columns: Tokens = ("text", slice(None))

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} is unknown; accepted: {', '.join(get_args(Kind))}")
        if self.heads not in get_args(Heads):
            raise ValueError(f"heads={self.heads!r} is unknown; accepted: {', '.join(get_args(Heads))}")
        _check_tokens("rows", self.rows)
        _check_tokens("columns", self.columns)
        if self.kind == "text_probability" and self.columns[0] != "text":
            raise ValueError(
                f"kind='text_probability' is a softmax over text columns, but columns={self.columns!r}; "
                'use columns=("text", ...) or kind="probability"'
            )

    @property
    def image_to_text(self) -> bool:
        """Whether image rows read text columns."""
        return self.rows[0] == "image" and self.columns[0] == "text"

    def text_range(self, text_length: int) -> tuple[int, int]:
        """First and one-past-last text column for T = ``text_length``.

        Raises:
            ValueError: the columns are not a non-empty range of the text tokens.
        """
        stream, tokens = self.columns
        if stream != "text" or not isinstance(tokens, slice):
            raise ValueError(
                f'columns={self.columns!r} must be a range of text tokens: ("text", slice(a, b))'
            )
        return _bounds("columns", self.columns, tokens, text_length)

    def check(self, lengths: Mapping[str, int], device: torch.device) -> None:
        """Refuse ranges and indices that leave streams of these ``lengths``, by name of the stream.

        Raises:
            ValueError: rows or columns are outside the stream, or indices are on another device.
        """
        for name, (stream, tokens) in (("rows", self.rows), ("columns", self.columns)):
            length = lengths[stream]
            if isinstance(tokens, slice):
                _bounds(name, (stream, tokens), tokens, length)
                continue
            if tokens.device != device:
                raise ValueError(f"{name} has indices on {tokens.device}, but query is on {device}")
            if readable(tokens):
                outside = tokens[(tokens < 0) | (tokens >= length)]
                if outside.numel():
                    raise ValueError(
                        f"{name} has the index {int(outside[0])} outside the {length} {stream} tokens; "
                        f"accepted: 0 to {length - 1}"
                    )


def _check_tokens(name: str, given: Tokens) -> None:
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], (slice, Tensor)):
        raise TypeError(
            f"{name}={given!r} must be a stream and a slice of its tokens or a tensor of their indices, "
            f'such as {name}=("text", slice(0, 77))'
        )
    stream, tokens = given
    if stream not in get_args(Stream):
        raise ValueError(f"{name}={given!r} has an unknown stream; accepted: {', '.join(get_args(Stream))}")
    if isinstance(tokens, Tensor):
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or tokens.shape[0] == 0:
            raise ValueError(
                f"{name} has indices of dtype {tokens.dtype} and shape {list(tokens.shape)}; "
                "accepted: int64 of one axis, at least one"
            )
        return
    for bound in (tokens.start, tokens.stop):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
            raise TypeError(f"{name}={given!r} must have integer bounds")
    if tokens.step not in (None, 1):
        raise ValueError(f"{name}={given!r} has a step; give the indices as a tensor")


def _bounds(name: str, given: Tokens, tokens: slice, length: int) -> tuple[int, int]:
    start = 0 if tokens.start is None else tokens.start
    stop = length if tokens.stop is None else tokens.stop
    if not 0 <= start < stop <= length:
        raise ValueError(
            f"{name}={given!r} is not a non-empty range inside the {length} {given[0]} tokens; "
            f"use bounds with 0 <= start < stop <= {length}"
        )
    return start, stop


def readable(tensor: Tensor) -> bool:
    """Whether reading values costs no synchronisation and breaks no trace."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
    )


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, [B, tokens, H, D].

    A map alone needs no values: then all three are None, and ``text_query`` is None unless text rows are
    wanted. ``key`` and ``value`` are None where rows read the text alone (cross-attention), ``text_query``
    where no text rows are computed, ``text_value_for_image`` where image rows read ``text_value``.

    ``text_bias``, float32 [B, T] or None, is added to the scores of text columns; -inf masks a column. It has
    no gradient.
    """

    query: Tensor
    key: Tensor | None
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
    """What a backend's operators compute: the scale of the scores and the I2T map, if any.

    Attributes:
        scale: factor of the scores, positive.
        kind, heads: as in :class:`MapRequest`; ``kind`` is None without a map, and without values the
            log-sum-exp is then wanted.
        start, stop: the text columns of the map.
        text_first: whether text rows come before image rows in the output.
    """

    scale: float
    kind: str | None
    heads: str
    start: int
    stop: int
    text_first: bool = False

    def split(self, joint: Tensor, image_tokens: int) -> tuple[Tensor, Tensor]:
        """Image rows and text rows of an output [B, tokens, H, D], as views."""
        if self.text_first:
            text_tokens = joint.shape[1] - image_tokens
            return joint[:, text_tokens:], joint[:, :text_tokens]
        return joint[:, :image_tokens], joint[:, image_tokens:]


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
        joint: attention output of all rows, [B, N + T, H, D], dtype of the inputs; image rows first unless
            ``text_first``.
        image: its image rows, [B, N, H, D], a view.
        text: its text rows, [B, T, H, D], a view; [B, 0, H, D] without text queries, and then text rows are
            missing everywhere.
        lse: natural log-sum-exp of every row's scaled scores, [B, H, N + T], image rows first, float32
            (float64 for float64 inputs), not differentiable.
        maps: the requested map, same dtype as ``lse``; None if none was requested.
        statistics: None unless they were requested.
    """

    joint: Tensor
    image: Tensor
    text: Tensor
    lse: Tensor
    maps: Tensor | None
    statistics: AttentionStatistics | None


@dataclass(frozen=True)
class AttentionMaps:
    """Result of :func:`seg4diff.kernels.api.attention_maps`.

    Attributes:
        maps: the requested map, float32 (float64 for float64 inputs).
        statistics: without value norms; None unless they were requested.
        lse: as in :class:`JointAttention`, of the rows that were needed: [B, H, N + T] with statistics, of
            the chosen rows for ``"probability"``, else None; the log-sum-exp that was given, if one was.
    """

    maps: Tensor
    statistics: AttentionStatistics | None
    lse: Tensor | None
