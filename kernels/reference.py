"""The specification: joint attention with the whole matrix in memory, differentiated by autograd.

Half-precision inputs are widened to float32 and the outputs rounded once; float64 stays float64, so that
``torch.autograd.gradcheck`` applies. Every other backend is held to this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .api import AttentionStatistics, JointAttention, MapRequest


def attend(
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
) -> JointAttention:
    """See :func:`seg4diff.kernels.api.joint_attention`; ``value`` is None for maps alone."""
    tokens = query.shape[1]
    keys = torch.cat([_wide(key), _wide(text_key)], dim=1)  # [B, S, H, D]
    image_scores = scale * torch.einsum("bqhd,bkhd->bhqk", _wide(query), keys)  # [B, H, N, S]
    image_probability = image_scores.softmax(dim=-1)
    text_scores = text_probability = None
    if text_query is not None:
        text_scores = scale * torch.einsum("bqhd,bkhd->bhqk", _wide(text_query), keys)  # [B, H, T, S]
        text_probability = text_scores.softmax(dim=-1)

    image = text = None
    if value is not None and text_value is not None and text_probability is not None:
        read_by_image = text_value if text_value_for_image is None else text_value_for_image
        image_values = torch.cat([_wide(value), _wide(read_by_image)], dim=1)
        text_values = torch.cat([_wide(value), _wide(text_value)], dim=1)
        image = torch.einsum("bhqk,bkhd->bqhd", image_probability, image_values).to(query.dtype)
        text = torch.einsum("bhqk,bkhd->bqhd", text_probability, text_values).to(query.dtype)

    result_maps = None
    if maps is not None:
        if maps.scores == "probability":
            entries = image_probability[..., tokens:]
        elif maps.scores == "logit":
            entries = image_scores[..., tokens:]
        else:
            entries = image_scores[..., tokens:].softmax(dim=-1)
        start, stop = maps.columns(text_key.shape[1])
        entries = entries[..., start:stop]  # [B, H, N, T']
        if maps.heads == "mean":
            result_maps = entries.mean(dim=1)
        elif maps.heads == "max":
            result_maps = entries.max(dim=1).values
        else:
            result_maps = entries

    lse = None
    if text_scores is not None:
        lse = torch.cat([image_scores, text_scores], dim=2).detach().logsumexp(dim=-1)
    elif maps is not None and maps.scores == "probability":
        lse = image_scores.detach().logsumexp(dim=-1)

    result_statistics = None
    if statistics and text_probability is not None:
        result_statistics = AttentionStatistics(
            image_to_text=image_probability[..., tokens:].detach().sum(dim=-1),
            text_to_text=text_probability[..., tokens:].detach().sum(dim=-1),
            image_value_norm=None if value is None else value_norm(value),
            text_value_norm=None if text_value is None else value_norm(text_value),
        )
    return JointAttention(image=image, text=text, maps=result_maps, statistics=result_statistics, lse=lse)


def value_norm(value: Tensor) -> Tensor:
    """Euclidean norm of every value vector, [B, tokens, H, D] -> [B, H, tokens], in the wide dtype."""
    return torch.linalg.vector_norm(_wide(value.detach()), dim=-1).transpose(1, 2)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
