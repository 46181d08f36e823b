"""The specification: joint attention with the whole matrix in memory, differentiated by autograd.

Half-precision inputs are widened to float32 and the outputs rounded once; float64 stays float64, so that
``torch.autograd.gradcheck`` applies. Every other backend is held to this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import AttentionMaps, AttentionStatistics, Inputs, JointAttention, MapRequest, wide_dtype


def attend(
    inputs: Inputs, scale: float, maps: MapRequest | None, statistics: bool
) -> JointAttention | AttentionMaps:
    """See :func:`seg4diff.kernels.api.joint_attention`; without values, ``attention_maps`` there."""
    query, value, text_query, text_value = inputs.query, inputs.value, inputs.text_query, inputs.text_value
    tokens = query.shape[1]
    keys = torch.cat([_wide(inputs.key), _wide(inputs.text_key)], dim=1)  # [B, S, H, D]
    bias = None
    if inputs.text_bias is not None:
        bias = inputs.text_bias.to(keys.dtype)[:, None, None]  # [B, 1, 1, T]
    image_logits, image_scores = _scores(query, keys, scale, bias)  # [B, H, N, S]
    image_probability = _softmax(image_scores)
    text_scores = text_probability = None
    if text_query is not None:
        text_scores = _scores(text_query, keys, scale, bias)[1]  # [B, H, T, S]
        text_probability = _softmax(text_scores)

    entries = None
    if maps is not None:
        if maps.kind == "probability":
            entries = image_probability[..., tokens:]
        elif maps.kind == "logit":
            entries = image_logits[..., tokens:]
            if bias is not None:
                entries = entries.masked_fill(bias == -torch.inf, 0.0)
        else:
            entries = _softmax(image_scores[..., tokens:])
        start, stop = maps.columns(inputs.text_key.shape[1])
        entries = entries[..., start:stop]  # [B, H, N, T']
        if maps.heads == "mean":
            entries = entries.mean(dim=1)

    result_statistics = None
    if statistics and text_probability is not None:
        result_statistics = AttentionStatistics(
            image_to_text=image_probability[..., tokens:].detach().sum(dim=-1),
            text_to_text=text_probability[..., tokens:].detach().sum(dim=-1),
            image_value_norm=None if value is None else value_norm(value),
            text_value_norm=None if text_value is None else value_norm(text_value),
        )

    lse = None
    if text_scores is not None:
        lse = torch.cat([image_scores, text_scores], dim=2).detach().logsumexp(dim=-1)
    elif maps is not None and maps.kind == "probability":
        lse = image_scores.detach().logsumexp(dim=-1)
    if value is None or text_value is None or text_probability is None or lse is None:
        assert entries is not None
        return AttentionMaps(maps=entries, statistics=result_statistics, lse=lse)

    read_by_image = text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
    image_values = torch.cat([_wide(value), _wide(read_by_image)], dim=1)
    text_values = torch.cat([_wide(value), _wide(text_value)], dim=1)
    return JointAttention(
        image=torch.einsum("bhqk,bkhd->bqhd", image_probability, image_values).to(query.dtype),
        text=torch.einsum("bhqk,bkhd->bqhd", text_probability, text_values).to(query.dtype),
        lse=lse,
        maps=entries,
        statistics=result_statistics,
    )


def _scores(rows: Tensor, keys: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scaled products of ``rows`` [B, M, H, D] and wide ``keys`` [B, S, H, D], without and with the bias of
    the last T columns, [B, H, M, S].
    """
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", _wide(rows), keys)
    return logits, logits if bias is None else logits + F.pad(bias, (keys.shape[1] - bias.shape[-1], 0))


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis; zeros, with zero gradients, where every score is -inf."""
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)


def value_norm(value: Tensor) -> Tensor:
    """Euclidean norm of every value vector, [B, tokens, H, D] -> [B, H, tokens], in the wide dtype."""
    return torch.linalg.vector_norm(_wide(value.detach()), dim=-1).transpose(1, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))
