"""Joint attention forward from PyTorch's own operators: the CPU's fast path and any device's fall-back.

Flash attention with its log-sum-exp over the image keys, then the few text columns, a head at a time, by
matrix products of our own, merged into output and log-sum-exp. The map falls out of that, and is as exact as
a softmax: a probability and the log-sum-exp that it is divided by hold the very same scores. Nothing is
concatenated, and nothing of size S x S exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import empty_outputs
from ..types import Inputs, Request, wide_dtype
from .blocks import block_rows, dense_channels, products, softmax, text_mask, without_text


def forward(inputs: Inputs, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Output of all rows, log-sum-exp, maps; shapes as :func:`operators.empty_outputs`."""
    query, key, text_query = inputs.query, inputs.key, inputs.text_query
    joint, lse, maps = empty_outputs(inputs, request)
    tokens = query.shape[1]
    image, text = request.split(joint, tokens)
    edited = inputs.text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
    keys = values = None
    if key is None:
        joint.zero_()
        lse.fill_(-torch.inf)
    elif inputs.value is not None:
        keys, values = by_head(key), by_head(inputs.value)
        lse[:, :, :tokens] = _flash_into(image, query, keys, values, request.scale)
    elif lse.shape[-1] > 0:
        lse[:, :, :tokens] = _log_sum_exp(query, key, request.scale)
    bias = inputs.text_bias
    shared = (inputs.text_key, bias, key is None)
    _attend_to_text(query, *shared, edited, image, lse[:, :, :tokens], maps, request)
    if text_query is not None:
        if keys is not None and values is not None:
            lse[:, :, tokens:] = _flash_into(text, text_query, keys, values, request.scale)
            del keys, values
        elif key is not None:
            lse[:, :, tokens:] = _log_sum_exp(text_query, key, request.scale)
        without_map = Request(request.scale, None, "mean", 0, 0)
        rows = lse[:, :, tokens:]
        _attend_to_text(text_query, *shared, inputs.text_value, text, rows, maps, without_map)
    return joint, lse, maps


def _attend_to_text(
    rows: Tensor,
    text_key: Tensor,
    text_bias: Tensor | None,
    text_alone: bool,
    text_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    maps: Tensor,
    request: Request,
) -> None:
    """Let ``rows`` [B, M, H, D], which have attended to the image keys, attend to the text keys as well.

    ``text_alone``: there are no image keys, the log-sum-exp so far is -inf.

    Updates ``out`` [B, M, H, D] (where there are values) and ``lse`` [B, H, M] (where it is not empty) in
    place, and fills the map that ``request`` names.
    """
    wide = wide_dtype(rows.dtype)
    heads, start, stop = rows.shape[2], request.start, request.stop
    normalised = lse.shape[-1] > 0
    shown = request.kind
    bias = None if text_bias is None else text_bias[:, None].to(wide)  # [B, 1, T]
    if shown == "logit" and request.heads == "mean":  # linear: one product of the un-split projections
        columns = text_key[:, start:stop].flatten(2).to(wide) * (request.scale / heads)
        torch.bmm(rows.flatten(2).to(wide), columns.transpose(1, 2), out=maps)
        shown = None
    text_tokens = text_key.shape[1]
    # The image keys take part in a softmax over the text keys as one more column, their log-sum-exp.
    buffer = rows.new_empty((*rows.shape[:2], text_tokens + 1), dtype=wide)
    scores, of_image = buffer[..., :text_tokens], buffer[..., text_tokens]  # [B, M, T], [B, M]
    for head in range(heads) if normalised or shown else ():
        torch.mul(products(rows[:, :, head], text_key[:, :, head]), request.scale, out=scores)
        if shown == "logit":
            _reduce(maps, head, heads, scores[..., start:stop], request)
        if bias is not None:
            scores.add_(bias)
        if shown == "text_probability":
            _reduce(maps, head, heads, softmax(scores, bias)[..., start:stop], request)
        if not normalised:
            continue
        of_image.copy_(lse[:, head])
        probability = softmax(buffer, bias if text_alone else None)
        torch.sub(buffer.amax(dim=-1), probability.amax(dim=-1).log_(), out=lse[:, head])
        if text_alone and bias is not None:
            lse[:, head].masked_fill_(without_text(bias)[..., 0], -torch.inf)
        if shown == "probability":
            _reduce(maps, head, heads, probability[..., start:stop], request)
        if text_value is not None:
            from_image = out[:, :, head] * probability[..., text_tokens:]
            values = text_value[:, :, head].to(wide)
            out[:, :, head] = torch.baddbmm(from_image, probability[..., :text_tokens], values)
    if request.kind == "logit" and text_bias is not None:
        masked = text_mask(text_bias[:, start:stop])
        maps.masked_fill_(masked if request.heads == "mean" else masked[:, None], 0.0)


def _reduce(maps: Tensor, head: int, heads: int, entries: Tensor, request: Request) -> None:
    """Put one head's entries [B, N, T'] into the map."""
    if request.heads == "each":
        maps[:, head] = entries
    elif head == 0:
        maps.copy_(entries)
    else:
        maps.add_(entries)
    if request.heads == "mean" and head == heads - 1:
        maps.div_(heads)


def by_head(tensor: Tensor) -> Tensor:
    """[B, tokens, H, D] -> [B, H, tokens, D]."""
    tensor = tensor.transpose(1, 2)
    # The CPU operator reads keys and values again for every block of rows: copying costs less than strides.
    return tensor.contiguous() if tensor.device.type == "cpu" else tensor


def flash(query: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, M, H, D] and natural log-sum-exp [B, H, M] of the rows ``query`` [B, M, H, D] over the keys
    ``k`` and values ``v`` [B, H, N, D].
    """
    q, k, v = (dense_channels(t) for t in (query.transpose(1, 2), k, v))
    width = q.shape[-1]
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and width <= 256:
        if width % 8:
            q, k, v = (F.pad(t, (0, 8 - width % 8)) for t in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
        out = out[..., :width]
    elif q.device.type == "cuda" and q.dtype == torch.float32 and width % 4 == 0:
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = attend(q, k, v, None, True, scale=scale)[:2]
        lse = lse[..., : q.shape[2]]  # padded to a multiple of 32
    else:
        out, lse = _attention_in_blocks(q, k, v, scale)
    return out.transpose(1, 2), lse


def _flash_into(destination: Tensor, query: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """:func:`flash` with its output put into ``destination``: the log-sum-exp."""
    out, lse = flash(query, k, v, scale)
    destination.copy_(out)
    return lse


def _attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, tokens, D] tensors for devices and dtypes without a flash operator."""
    wide = wide_dtype(q.dtype)
    k_wide, v_wide = k.to(wide), v.to(wide)
    outs, lses = [], []
    for rows in q.split(block_rows(q, k.shape[2]), dim=2):
        scores = scale * (rows.to(wide) @ k_wide.transpose(-1, -2))
        lses.append(scores.logsumexp(dim=-1))
        outs.append((scores.softmax(dim=-1) @ v_wide).to(q.dtype))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _log_sum_exp(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Natural log-sum-exp [B, H, M] of the rows ``query`` [B, M, H, D] over ``keys`` [B, S, H, D]."""
    wide = wide_dtype(query.dtype)
    if query.device.type == "cpu" and query.dtype == wide:
        # Flash attention, output and all, takes half to two thirds of the time of scores in memory. Not in
        # half precision, where its exponentials are rounded.
        k = by_head(keys)
        return flash(query, k, k, scale)[1]
    q = query.transpose(1, 2)
    k = keys.transpose(1, 2).to(wide).transpose(-1, -2)  # [B, H, D, S]
    blocks = q.split(block_rows(q, keys.shape[1]), dim=2)
    return torch.cat([(rows.to(wide) @ k).mul_(scale).logsumexp(dim=-1) for rows in blocks], dim=2)


def attention_mass(
    query: Tensor,
    text_query: Tensor,
    text_key: Tensor,
    lse: Tensor,
    scale: float,
    text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mass that image rows [B, H, N] and text rows [B, H, T] give to the text columns."""
    tokens, heads = query.shape[1:3]
    masses = torch.empty_like(lse)
    for rows, first in ((query, 0), (text_query, tokens)):
        last = first + rows.shape[1]
        for head in range(heads):
            entries = products(rows[:, :, head], text_key[:, :, head]).mul_(scale)
            if text_bias is not None:
                entries.add_(text_bias[:, None])
            norm = lse[:, head, first:last, None]
            norm = norm.masked_fill(norm == -torch.inf, torch.inf)  # of a row that has read nothing
            masses[:, head, first:last] = entries.sub_(norm).exp_().sum(dim=-1)
    return masses[:, :, :tokens].clone(), masses[:, :, tokens:].clone()
