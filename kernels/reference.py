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
    inputs: Inputs,
    scale: float,
    maps: MapRequest | None,
    statistics: bool,
    lse: Tensor | None = None,
    text_first: bool = False,
) -> JointAttention | AttentionMaps:
    """See :func:`seg4diff.kernels.api.joint_attention`; without values, ``attention_maps`` there."""
    query, value, text_query, text_value = inputs.query, inputs.value, inputs.text_query, inputs.text_value
    keys = _joined(inputs.key, inputs.text_key)  # [B, S, H, D]
    of_image = keys.shape[1] - inputs.text_key.shape[1]
    bias = None
    if inputs.text_bias is not None:
        bias = inputs.text_bias.to(keys.dtype)[:, None, None]  # [B, 1, 1, T]
    image_logits, image_scores = _scores(query, keys, scale, bias)  # [B, H, N, S]
    image_probability = _softmax(image_scores)
    text_rows = query.new_empty((query.shape[0], 0, *query.shape[2:])) if text_query is None else text_query
    text_logits, text_scores = _scores(text_rows, keys, scale, bias)  # [B, H, T, S]
    text_probability = _softmax(text_scores)

    entries = None
    if maps is not None:
        of_text_rows = maps.rows[0] == "text"
        scores = text_scores if of_text_rows else image_scores
        if maps.kind == "probability" and lse is not None:
            norm = lse[:, :, query.shape[1] :] if of_text_rows else lse[:, :, : query.shape[1]]
            entries = (scores - norm.masked_fill(norm == -torch.inf, torch.inf)[..., None]).exp()
        elif maps.kind == "probability":
            entries = text_probability if of_text_rows else image_probability
        elif maps.kind == "logit":
            entries = text_logits if of_text_rows else image_logits
            if bias is not None:
                entries = entries.masked_fill(F.pad(bias, (of_image, 0)) == -torch.inf, 0.0)
        else:
            entries = F.pad(_softmax(scores[..., of_image:]), (of_image, 0))
        first = of_image if maps.columns[0] == "text" else 0
        last = keys.shape[1] if maps.columns[0] == "text" else of_image
        entries = entries[:, :, maps.rows[1]][..., first:last][..., maps.columns[1]]
        if maps.heads == "mean":
            entries = entries.mean(dim=1)

    result_statistics = None
    if statistics:
        result_statistics = AttentionStatistics(
            image_to_text=image_probability[..., of_image:].detach().sum(dim=-1),
            text_to_text=text_probability[..., of_image:].detach().sum(dim=-1),
            image_value_norm=None if value is None else value_norm(value),
            text_value_norm=None if text_value is None else value_norm(text_value),
        )

    image_lse, text_lse = (scores.detach().logsumexp(dim=-1) for scores in (image_scores, text_scores))
    every_lse = torch.cat([image_lse, text_lse], dim=2)
    if text_value is None:
        assert maps is not None
        assert entries is not None
        if lse is None and statistics:
            lse = every_lse
        elif lse is None and maps.kind == "probability":
            lse = (text_lse if maps.rows[0] == "text" else image_lse)[:, :, maps.rows[1]]
        return AttentionMaps(maps=entries, statistics=result_statistics, lse=lse)

    read_by_image = text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
    image = torch.einsum("bhqk,bkhd->bqhd", image_probability, _joined(value, read_by_image)).to(query.dtype)
    text = torch.einsum("bhqk,bkhd->bqhd", text_probability, _joined(value, text_value)).to(query.dtype)
    return JointAttention(
        joint=torch.cat([text, image] if text_first else [image, text], dim=1),
        image=image,
        text=text,
        lse=every_lse,
        maps=entries,
        statistics=result_statistics,
    )


def propagate(query: Tensor, key: Tensor, maps: Tensor, lse: Tensor | None, scale: float) -> Tensor:
    """See :func:`seg4diff.kernels.api.propagate`, one hop; ``maps`` wide."""
    scores = _scores(query, _wide(key), scale, None)[0]  # [B, H, N, M]
    if lse is None:
        probability = scores.softmax(dim=-1)
    else:
        probability = (scores - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp()
    return probability.mean(dim=1) @ maps


def key_average(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`seg4diff.kernels.api.key_average`."""
    scores = _scores(query, _wide(key), scale, None)[0]  # [B, H, N, M]
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), _wide(key)), scores.logsumexp(dim=-1)


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


def _joined(image: Tensor | None, text: Tensor) -> Tensor:
    """Both streams along the token axis, wide; the text alone where there is no image stream."""
    return _wide(text) if image is None else torch.cat([_wide(image), _wide(text)], dim=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))
