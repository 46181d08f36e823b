"""The specification: joint attention with the whole matrix in memory, differentiated by autograd.

Half-precision inputs are widened to float32 and the outputs rounded once; float64 stays float64, so that
``torch.autograd.gradcheck`` applies. Every other backend is held to this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import AttentionMaps, AttentionStatistics, Inputs, JointAttention, MapRequest, wide_dtype


def attend(
    inputs: Inputs, scale: float, maps: MapRequest | None, statistics: bool
) -> JointAttention | AttentionMaps:
    """See :func:`seg4diff.kernels.api.joint_attention`; without values, ``attention_maps`` there."""
    query, value, text_query, text_value = inputs.query, inputs.value, inputs.text_query, inputs.text_value
    tokens = query.shape[1]
    keys = torch.cat([_wide(inputs.key), _wide(inputs.text_key)], dim=1)  # [B, S, H, D]
    image_scores = scale * torch.einsum("bqhd,bkhd->bhqk", _wide(query), keys)  # [B, H, N, S]
    image_probability = image_scores.softmax(dim=-1)
    text_scores = text_probability = None
    if text_query is not None:
        text_scores = scale * torch.einsum("bqhd,bkhd->bhqk", _wide(text_query), keys)  # [B, H, T, S]
        text_probability = text_scores.softmax(dim=-1)

    entries = None
    if maps is not None:
        if maps.kind == "probability":
            entries = image_probability[..., tokens:]
        elif maps.kind == "logit":
            entries = image_scores[..., tokens:]
        else:
            entries = image_scores[..., tokens:].softmax(dim=-1)
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


def value_norm(value: Tensor) -> Tensor:
    """Euclidean norm of every value vector, [B, tokens, H, D] -> [B, H, tokens], in the wide dtype."""
    return torch.linalg.vector_norm(_wide(value.detach()), dim=-1).transpose(1, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))
