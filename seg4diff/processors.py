"""Attention processors that take the place of diffusers' own on the layers a context asks for.

Called by the transformer blocks. They hide how a request becomes kernel calls; results are left on the
attention module, where :mod:`seg4diff.capturing` collects them when the forward has ended. One processor
object
serves all layers with the same request: ``torch.compile`` of single blocks then needs no graph per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seg4diff.kernels.api import attention_maps, joint_attention
from seg4diff.kernels.types import AttentionStatistics, MapRequest

RESULT_ATTRIBUTE = "seg4diff_attention"


@dataclass(frozen=True, eq=False)
class Projections:
    """What one layer's joint attention is made of, after qk-norm, for all rows of the batch.

    Attributes:
        query, key, value: of the image tokens, [B, N, H, D].
        text_query, text_key, text_value: of the text tokens, [B, T, H, D]; values are unedited.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text_query: Tensor
    text_key: Tensor
    text_value: Tensor


@dataclass(frozen=True, eq=False)
class LayerRequest:
    """What one context asks of a layer's joint attention.

    Attributes:
        maps: the I2T map to return, if any.
        statistics: whether to return the attention mass and value norms.
        edit_text_value: text values that image rows read, from the text values [B, T, H, D]; None leaves
            them.
        observe: called with the projections before the attention runs; what it returns is kept as it is. Not
            called where a forward stops early.
    """

    maps: MapRequest | None = None
    statistics: bool = False
    edit_text_value: Callable[[Tensor], Tensor] | None = None
    observe: Callable[[Projections], Any] | None = None


@dataclass(frozen=True)
class LayerResult:
    """What one layer returned to one :class:`LayerRequest`, for all rows of the batch."""

    maps: Tensor | None
    statistics: AttentionStatistics | None
    observed: Any = None


class JointAttentionProcessor:
    """Joint attention that also answers :class:`LayerRequest` s.

    Projections are called as modules and weights are never touched, which is what carries LoRA, quantised
    weights and offloading.
    """

    def __init__(self, requests: tuple[LayerRequest, ...] = ()) -> None:
        self.requests = requests

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse_mask(attention_mask)
        value = _split_heads(attn, attn.to_v(hidden_states))  # [B, N, H, D]
        text_value = _split_heads(attn, attn.add_v_proj(encoder_hidden_states))  # [B, T, H, D]
        query, key, text_query, text_key = (
            tensor.to(value.dtype) for tensor in _queries_and_keys(attn, hidden_states, encoder_hidden_states)
        )
        edited = None
        for request in self.requests:
            if request.edit_text_value is not None:
                edited = request.edit_text_value(text_value if edited is None else edited)
        projections = Projections(query, key, value, text_query, text_key, text_value)
        observed = [None if r.observe is None else r.observe(projections) for r in self.requests]

        first = next((r for r in self.requests if r.maps is not None), LayerRequest())
        attention = joint_attention(
            query,
            key,
            value,
            text_query,
            text_key,
            text_value,
            maps=first.maps,
            statistics=any(request.statistics for request in self.requests),
            text_value_for_image=edited,
        )
        results = []
        for request, seen in zip(self.requests, observed, strict=True):
            maps = attention.maps
            if request.maps is None:
                maps = None
            elif request is not first:
                maps = attention_maps(query, key, None, text_key, maps=request.maps).maps
            statistics = attention.statistics if request.statistics else None
            results.append(LayerResult(maps, statistics, seen))
        setattr(attn, RESULT_ATTRIBUTE, tuple(results))

        image = attention.image.flatten(2).to(query.dtype)
        text = attention.text.flatten(2).to(query.dtype)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


class MapsOnlyProcessor:
    """The last layer of a forward that stops early: queries, keys and the maps, nothing else.

    No value projection, attention output or output projection is computed; what the block gets back is its
    own normalised input, and what it makes of that is never looked at.
    """

    def __init__(self, requests: tuple[LayerRequest, ...] = ()) -> None:
        self.requests = requests

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse_mask(attention_mask)
        query, key, text_query, text_key = _queries_and_keys(
            attn,
            hidden_states,
            encoder_hidden_states,
            with_text_query=any(request.statistics for request in self.requests),
        )
        results = []
        for request in self.requests:
            if request.maps is None:
                results.append(LayerResult(None, None))
                continue
            attention = attention_maps(
                query,
                key,
                text_query,
                text_key,
                maps=request.maps,
                statistics=request.statistics,
            )
            results.append(LayerResult(attention.maps, attention.statistics))
        setattr(attn, RESULT_ATTRIBUTE, tuple(results))
        return hidden_states, encoder_hidden_states


class PassThrough(nn.Module):
    """Stands for a submodule whose output nobody reads: returns its first input and costs nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def _queries_and_keys(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, with_text_query: bool = True
) -> tuple[Any, ...]:
    """Normalised query, key [B, N, H, D], text query (None if not wanted) and text key [B, T, H, D]."""
    streams = [
        (attn.to_q, attn.norm_q, hidden_states),
        (attn.to_k, attn.norm_k, hidden_states),
        (attn.add_q_proj, attn.norm_added_q, encoder_hidden_states) if with_text_query else None,
        (attn.add_k_proj, attn.norm_added_k, encoder_hidden_states),
    ]
    projected: list[Tensor | None] = []
    for stream in streams:
        if stream is None:
            projected.append(None)
            continue
        projection, norm, states = stream
        tensor = _split_heads(attn, projection(states))
        # A float32 norm inside a half-precision model widens what it returns; attention wants one dtype.
        projected.append(tensor if norm is None else norm(tensor).to(tensor.dtype))
    return tuple(projected)


def _split_heads(attn: Any, tensor: Tensor) -> Tensor:
    return tensor.unflatten(-1, (attn.heads, -1))  # [B, tokens, H, D]


def _refuse_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("attention_mask is given, but joint attention with maps has no mask; leave it out")
