"""What contexts ask of a layer's joint attention, and the attention that answers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seg4diff.attention.interception import Answer
from seg4diff.backbones import Layout
from seg4diff.kernels.api import attention_maps, joint_attention
from seg4diff.kernels.types import AttentionStatistics, MapRequest, Tokens


@dataclass(frozen=True, eq=False)
class Projections:
    """What one layer's joint attention is made of, after qk-norm and position embedding, for all rows.

    Attributes:
        query, key, value: of the tokens of the generated image, [B, N, H, D].
        text_query, text_key, text_value: of the text tokens, [B, T, H, D]; values are unedited.
        text_bias: what is added to the scores of the text tokens, float32 [B, T], -inf where one is hidden;
            None for nothing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text_query: Tensor
    text_key: Tensor
    text_value: Tensor
    text_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerRequest:
    """What one context asks of a layer's joint attention.

    Attributes:
        maps: the I2T map to return, if any.
        reduce: what is kept of that map, from the map; None keeps it.
        statistics: whether to return attention mass and value norms.
        output: whether to return the attention output of the image tokens.
        edit_text_value: text values that image rows read, from the text values [B, T, H, D]; None leaves
            them.
        edit_image: the image rows' output, from their output [B, N, H, D], the projections of all image
            tokens with the text values that image rows read, the log-sum-exp [B, H, N + T] and the scale;
            None leaves it.
        observe: called with the projections before the attention runs; what it returns is kept as it is. Not
            called where a forward stops early.
    """

    maps: MapRequest | None = None
    reduce: Callable[[Tensor], Tensor] | None = None
    statistics: bool = False
    output: bool = False
    edit_text_value: Callable[[Tensor], Tensor] | None = None
    edit_image: Callable[[Tensor, Projections, Tensor, float | None], Tensor] | None = None
    observe: Callable[[Projections], Any] | None = None

    @property
    def needs_text_rows(self) -> bool:
        """Whether the answer depends on the queries of text tokens."""
        return self.statistics or (self.maps is not None and self.maps.rows[0] == "text")

    def kept(self, maps: Tensor | None) -> Tensor | None:
        """What is kept of a map."""
        return maps if maps is None or self.reduce is None else self.reduce(maps)

    def check_cross_attention(self, family: str) -> None:
        """Refuse what has no meaning where image tokens read the text alone, and text tokens nothing.

        Raises:
            NotImplementedError: the message names what was asked.
        """
        refused = {
            "attention mass": self.statistics,
            "map of text rows or image columns": self.maps is not None and not self.maps.image_to_text,
            "image-to-image attention": self.edit_image is not None,
            "projections of one sequence": self.observe is not None,
        }
        for what, asked in refused.items():
            if asked:
                raise NotImplementedError(
                    f"{family} reads text by cross-attention, which has no {what}; it has maps of image rows "
                    "and text columns, so capture, segment and edits of words work"
                )


@dataclass(frozen=True)
class LayerResult:
    """What one layer returned to one `LayerRequest`, for all rows of the batch.

    Attributes:
        maps, statistics: as asked.
        observed: what `LayerRequest.observe` returned.
        output: attention output of the tokens of the generated image, heads concatenated, before the output
            projection: [B, N, H D], dtype of the model.
    """

    maps: Tensor | None
    statistics: AttentionStatistics | None
    observed: Any = None
    output: Tensor | None = None


class Place:
    """The layout of the forward that runs, set before each."""

    layout: Layout | None = None


class JointAnswer(Answer):
    """Joint attention that also answers requests.

    One object serves all layers with the same requests: `torch.compile` of single blocks then needs no graph
    per layer. For the `last` layer of a forward that stops early, only what the requests need is computed:
    what the block gets back has the right shape, and nothing reads it.
    """

    def __init__(self, requests: tuple[LayerRequest, ...], place: Place, *, last: bool = False) -> None:
        self.requests = requests
        self.place = place
        self.last = last

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> tuple[Tensor, tuple[LayerResult, ...]] | None:
        layout = self.place.layout
        if layout is None:
            raise RuntimeError("a block ran outside of a call of its transformer; call the transformer")
        if layout.cross:
            return self._cross(query.to(value.dtype), key.to(value.dtype), value, mask, layout, scale)
        if query.shape[1] != layout.tokens or key.shape[1] != layout.tokens:
            return None  # image tokens of an IP-Adapter
        if mask is not None and layout.added:
            channels = value.shape[-1]
            answered = self(*_with_mask(query, key, value, mask, scale))
            assert answered is not None
            joint, results = answered
            return joint[..., :channels], tuple(_without_mask(result, query.shape[2]) for result in results)
        # qk-norm may return float32; attention wants one dtype.
        image_query, text_query = layout.split(query.to(value.dtype))
        image_key, text_key = layout.split(key.to(value.dtype))
        image_value, text_value = layout.split(value)
        projections = Projections(
            image_query, image_key, image_value, text_query, text_key, text_value, _text_bias(mask, layout)
        )
        if self.last and not any(request.output for request in self.requests):
            return query, tuple(_answer(request, projections, layout, scale) for request in self.requests)
        joint, results = self._attend(projections, layout, scale)
        return query if self.last else joint, results

    def _cross(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: Layout,
        scale: float | None,
    ) -> tuple[Tensor, tuple[LayerResult, ...]] | None:
        """Image tokens that read the text alone; `Patch.asking` has refused all but maps and text edits."""
        if query.shape[1] != layout.image_tokens or key.shape[1] != layout.text_tokens:
            return None
        bias = _bias_of_keys(mask)
        first = next((request for request in self.requests if request.maps is not None), LayerRequest())
        image, of_first = query, None
        if not self.last or any(request.output for request in self.requests):
            read = value
            for request in self.requests:
                if request.edit_text_value is not None:
                    read = request.edit_text_value(read)
            attention = joint_attention(
                query, None, None, None, key, read, scale=scale, maps=first.maps, text_bias=bias
            )
            image, of_first = attention.image, attention.maps

        def maps(request: LayerRequest) -> Tensor | None:
            if request.maps is None or (request is first and of_first is not None):
                return of_first if request is first else None
            return attention_maps(query, None, None, key, scale=scale, maps=request.maps, text_bias=bias).maps

        results = tuple(
            LayerResult(
                request.kept(maps(request)), None, output=image.flatten(2) if request.output else None
            )
            for request in self.requests
        )
        return query if self.last else image, results

    def _attend(
        self, all_tokens: Projections, layout: Layout, scale: float | None
    ) -> tuple[Tensor, tuple[LayerResult, ...]]:
        edited = None
        for request in self.requests:
            if request.edit_text_value is not None:
                edited = request.edit_text_value(all_tokens.text_value if edited is None else edited)
        p = all_tokens
        generated = replace(
            p,
            query=p.query[:, : layout.generated],
            key=p.key[:, : layout.generated],
            value=p.value[:, : layout.generated],
        )
        observed = [None if r.observe is None or self.last else r.observe(generated) for r in self.requests]
        text_rows = not self.last or any(request.needs_text_rows for request in self.requests)
        first = next((request for request in self.requests if request.maps is not None), LayerRequest())
        attention = joint_attention(
            p.query,
            p.key,
            p.value,
            p.text_query if text_rows else None,
            p.text_key,
            p.text_value,
            scale=scale,
            maps=None if first.maps is None else _of_generated(first.maps, layout),
            statistics=any(request.statistics for request in self.requests),
            text_value_for_image=edited,
            text_bias=p.text_bias,
            text_first=layout.text_first,
        )
        image, read = attention.image, p if edited is None else replace(p, text_value=edited)
        for request in self.requests:
            if request.edit_image is not None:
                image = request.edit_image(image, read, attention.lse, scale)
        results = []
        for request, seen in zip(self.requests, observed, strict=True):
            maps = None
            if request is first:
                maps = attention.maps
            elif request.maps is not None:
                maps = _answer(LayerRequest(maps=request.maps), p, layout, scale).maps
            statistics = attention.statistics if request.statistics else None
            output = image[:, : layout.generated].flatten(2) if request.output else None
            maps = request.kept(maps)
            results.append(LayerResult(maps, _statistics_of_generated(statistics, layout), seen, output))
        if self.last:  # nothing reads it, and its text rows may be missing
            return attention.joint, tuple(results)
        # Nothing is concatenated unless an edit replaced the image rows.
        if image is attention.image:
            return layout.in_place(attention.joint), tuple(results)
        return layout.join(image, attention.text), tuple(results)


def _answer(request: LayerRequest, p: Projections, layout: Layout, scale: float | None) -> LayerResult:
    """Maps and statistics of one request, without the attention's output."""
    if request.maps is None:
        return LayerResult(None, None)
    attention = attention_maps(
        p.query,
        p.key,
        p.text_query if request.needs_text_rows else None,
        p.text_key,
        scale=scale,
        maps=_of_generated(request.maps, layout),
        statistics=request.statistics,
        text_bias=p.text_bias,
    )
    return LayerResult(request.kept(attention.maps), _statistics_of_generated(attention.statistics, layout))


_MORE_CHANNELS = 8  # kernels take multiples of it


def _with_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, None, float]:
    """An attention without a mask whose scores are those with one, the product of two tokens' numbers.

    The number of each token becomes one more channel of its query and key.

    Args:
        query, key, value: [B, S, H, D].
        mask: [B, 1, S, S], added to scores, the outer product of a vector that is not negative.
        scale: of the scores; 1 / sqrt(D) when None.
    """
    own = query.shape[-1] ** -0.5 if scale is None else scale
    numbers = mask[:, 0].diagonal(dim1=-2, dim2=-1).sqrt()[:, :, None, None].to(value.dtype)
    numbers = numbers.expand(-1, -1, query.shape[2], -1)
    zeros = numbers.new_zeros(()).expand(*numbers.shape[:3], _MORE_CHANNELS - 1)
    return (
        torch.cat([query.to(value.dtype), numbers / own, zeros], dim=-1),
        torch.cat([key.to(value.dtype), numbers, zeros], dim=-1),
        torch.nn.functional.pad(value, (0, _MORE_CHANNELS)),
        None,
        own,
    )


def _without_mask(result: LayerResult, heads: int) -> LayerResult:
    """A result without the channels that `_with_mask` adds."""
    if result.output is None:
        return result
    own = result.output.unflatten(2, (heads, -1))[..., :-_MORE_CHANNELS]
    return replace(result, output=own.flatten(2))


def _text_bias(mask: Tensor | None, layout: Layout) -> Tensor | None:
    """What a mask of keys, [B, S] or [B, 1, 1, S], boolean or added to scores, adds to those of text tokens.

    Raises:
        ValueError: the model has no mask of that kind.
    """
    if mask is None:
        return None
    if not layout.masked:
        raise ValueError("attention_mask is given, but the joint attention of this model has none; omit it")
    keys = mask[:, 0, 0] if mask.ndim == 4 and mask.shape[1:3] == (1, 1) else mask
    if keys.ndim != 2 or keys.shape[1] != layout.tokens:
        raise ValueError(
            f"an attention mask of shape {list(mask.shape)} differs between queries or heads, or is not over "
            f"the {layout.tokens} tokens of image and text; only a mask of keys can be captured"
        )
    return _as_bias(layout.split(keys)[1])


def _bias_of_keys(mask: Tensor | None) -> Tensor | None:
    """Float32 [B, T] of a mask [B, H, 1, T] over text tokens, which every head and image token shares.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[2] != 1:
        raise ValueError(f"an attention mask of shape {list(mask.shape)} is given; expected [B, heads, 1, T]")
    return _as_bias(mask[:, 0, 0])


def _as_bias(keys: Tensor) -> Tensor:
    """Float32 of the same shape: a mask that is added as it is, a boolean one as 0 and minus infinity."""
    if keys.dtype != torch.bool:
        return keys.float()
    return torch.zeros_like(keys, dtype=torch.float32).masked_fill(~keys, -torch.inf)


def _of_generated(request: MapRequest, layout: Layout) -> MapRequest:
    """The request without the tokens of reference images, which follow those of the generated one.

    Raises:
        ValueError: a range of image tokens that leaves the generated image.
    """
    if layout.generated == layout.image_tokens:
        return request

    def within(tokens: Tokens) -> Tokens:
        stream, chosen = tokens
        if stream != "image" or not isinstance(chosen, slice):
            return tokens
        if chosen.stop is not None and chosen.stop > layout.generated:
            raise ValueError(
                f"{tokens!r} leaves the generated image, which has {layout.generated} image tokens"
            )
        return stream, slice(chosen.start, layout.generated if chosen.stop is None else chosen.stop)

    return replace(request, rows=within(request.rows), columns=within(request.columns))


def _statistics_of_generated(
    statistics: AttentionStatistics | None, layout: Layout
) -> AttentionStatistics | None:
    """Statistics without the tokens of reference images."""
    if statistics is None or layout.generated == layout.image_tokens:
        return statistics
    norm = statistics.image_value_norm
    return replace(
        statistics,
        image_to_text=statistics.image_to_text[..., : layout.generated],
        image_value_norm=None if norm is None else norm[..., : layout.generated],
    )
