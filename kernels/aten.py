"""Joint attention from PyTorch's own operators: the CPU's fast path and any device's fall-back.

Forward: flash attention with its log-sum-exp over the image keys, then the few text columns, a head at a
time, by matrix products of our own, merged into output and log-sum-exp. The map falls out of that, and is as
exact as a softmax: a probability and the log-sum-exp that it is divided by hold the very same scores. Nothing
is concatenated. Backward: our own, in blocks of query rows. PyTorch's operators do not differentiate the
log-sum-exp, so a map composed from them would have silently wrong gradients. Nothing of size S x S exists in
either direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Inputs, Request, empty_gradients, empty_outputs, register, wide_dtype
from .reference import value_norm

_BLOCK_ELEMENTS = 8 * 2**20  # entries of one block of scores, all batch rows and heads together


def forward(inputs: Inputs, request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image output, text output, log-sum-exp, maps; shapes as :func:`operators.empty_outputs`."""
    query, key, text_query = inputs.query, inputs.key, inputs.text_query
    image, text, lse, maps = empty_outputs(inputs, request)
    tokens = query.shape[1]
    edited = inputs.text_value if inputs.text_value_for_image is None else inputs.text_value_for_image
    keys = values = None
    if inputs.value is not None:
        keys, values = _by_head(key), _by_head(inputs.value)
        image, lse[:, :, :tokens] = _flash(query, keys, values, request.scale)
    elif lse.shape[-1] > 0:
        lse[:, :, :tokens] = _log_sum_exp(query, key, request.scale)
    _attend_to_text(query, inputs.text_key, edited, image, lse[:, :, :tokens], maps, request)
    if text_query is not None:
        if keys is not None and values is not None:
            text, lse[:, :, tokens:] = _flash(text_query, keys, values, request.scale)
            del keys, values
        else:
            lse[:, :, tokens:] = _log_sum_exp(text_query, key, request.scale)
        without_map = Request(request.scale, None, "mean", 0, 0)
        rows = lse[:, :, tokens:]
        _attend_to_text(text_query, inputs.text_key, inputs.text_value, text, rows, maps, without_map)
    return image, text, lse, maps


def _attend_to_text(
    rows: Tensor,
    text_key: Tensor,
    text_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    maps: Tensor,
    request: Request,
) -> None:
    """Let ``rows`` [B, M, H, D], which have attended to the image keys, attend to the text keys as well.

    Updates ``out`` [B, M, H, D] (where there are values) and ``lse`` [B, H, M] (where it is not empty) in
    place, and fills the map that ``request`` names.
    """
    wide = wide_dtype(rows.dtype)
    heads, start, stop = rows.shape[2], request.start, request.stop
    normalised = lse.shape[-1] > 0
    shown = request.scores
    if shown == "logit" and request.heads == "mean":  # linear: one product of the un-split projections
        columns = text_key[:, start:stop].flatten(2).to(wide) * (request.scale / heads)
        torch.bmm(rows.flatten(2).to(wide), columns.transpose(1, 2), out=maps)
        shown = None
    text_tokens = text_key.shape[1]
    # The image keys take part in a softmax over the text keys as one more column, their log-sum-exp.
    buffer = rows.new_empty((*rows.shape[:2], text_tokens + 1), dtype=wide)
    scores, of_image = buffer[..., :text_tokens], buffer[..., text_tokens]  # [B, M, T], [B, M]
    for head in range(heads) if normalised or shown else ():
        torch.mul(_products(rows[:, :, head], text_key[:, :, head]), request.scale, out=scores)
        if shown == "logit":
            _reduce(maps, head, heads, scores[..., start:stop], request)
        elif shown == "text_probability":
            _reduce(maps, head, heads, scores.softmax(dim=-1)[..., start:stop], request)
        if not normalised:
            continue
        of_image.copy_(lse[:, head])
        probability = buffer.softmax(dim=-1)
        torch.sub(buffer.amax(dim=-1), probability.amax(dim=-1).log_(), out=lse[:, head])
        if shown == "probability":
            _reduce(maps, head, heads, probability[..., start:stop], request)
        if text_value is not None:
            from_image = out[:, :, head] * probability[..., text_tokens:]
            values = text_value[:, :, head].to(wide)
            out[:, :, head] = torch.baddbmm(from_image, probability[..., :text_tokens], values)


def _reduce(maps: Tensor, head: int, heads: int, entries: Tensor, request: Request) -> None:
    """Put one head's entries [B, N, T'] into the map."""
    if request.heads == "each":
        maps[:, head] = entries
    elif head == 0:
        maps.copy_(entries)
    elif request.heads == "mean":
        maps.add_(entries)
    else:
        torch.maximum(maps, entries, out=maps)
    if request.heads == "mean" and head == heads - 1:
        maps.div_(heads)


def _by_head(tensor: Tensor) -> Tensor:
    """[B, tokens, H, D] -> [B, H, tokens, D]."""
    tensor = tensor.transpose(1, 2)
    # The CPU operator reads keys and values again for every block of rows: copying costs less than strides.
    return tensor.contiguous() if tensor.device.type == "cpu" else tensor


def _flash(query: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, M, H, D] and natural log-sum-exp [B, H, M] of the rows ``query`` [B, M, H, D] over the keys
    ``k`` and values ``v`` [B, H, N, D].
    """
    q = query.transpose(1, 2)
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
    return out.transpose(1, 2).contiguous(), lse


def _attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, tokens, D] tensors for devices and dtypes without a flash operator."""
    wide = wide_dtype(q.dtype)
    k_wide, v_wide = k.to(wide), v.to(wide)
    outs, lses = [], []
    for rows in q.split(_block_rows(q, k.shape[2]), dim=2):
        scores = scale * (rows.to(wide) @ k_wide.transpose(-1, -2))
        lses.append(scores.logsumexp(dim=-1))
        outs.append((scores.softmax(dim=-1) @ v_wide).to(q.dtype))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _log_sum_exp(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Natural log-sum-exp [B, H, M] of the rows ``query`` [B, M, H, D] over ``keys`` [B, S, H, D]."""
    wide = wide_dtype(query.dtype)
    q = query.transpose(1, 2)
    k = keys.transpose(1, 2).to(wide).transpose(-1, -2)  # [B, H, D, S]
    blocks = q.split(_block_rows(q, keys.shape[1]), dim=2)
    return torch.cat([(rows.to(wide) @ k).mul_(scale).logsumexp(dim=-1) for rows in blocks], dim=2)


def _block_rows(q: Tensor, columns: int) -> int:
    return max(1, _BLOCK_ELEMENTS // (q.shape[0] * q.shape[1] * columns))


def budget(
    query: Tensor, text_query: Tensor, text_key: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Mass that image rows [B, H, N] and text rows [B, H, T] give to the text columns."""
    tokens, heads = query.shape[1:3]
    masses = torch.empty_like(lse)
    for rows, first in ((query, 0), (text_query, tokens)):
        last = first + rows.shape[1]
        for head in range(heads):
            entries = _products(rows[:, :, head], text_key[:, :, head]).mul_(scale)
            masses[:, head, first:last] = entries.sub_(lse[:, head, first:last, None]).exp_().sum(dim=-1)
    return masses[:, :, :tokens].clone(), masses[:, :, tokens:].clone()


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns^T of one head: [B, M, D] and [B, T, D] -> [B, M, T], wide."""
    wide = wide_dtype(rows.dtype)
    return torch.bmm(rows.to(wide), columns.to(wide).transpose(1, 2))


def backward(
    d_image: Tensor | None,
    d_text: Tensor | None,
    d_maps: Tensor | None,
    inputs: Inputs,
    image: Tensor,
    text: Tensor,
    lse: Tensor,
    request: Request,
) -> tuple[Tensor, ...]:
    """Gradients of the seven inputs, in blocks of query rows; any upstream gradient may be None."""
    wide = wide_dtype(inputs.query.dtype)
    tokens, text_tokens = inputs.query.shape[1], inputs.text_key.shape[1]
    gradients = empty_gradients(inputs)
    d_query, d_key, d_value, d_text_query, d_text_key, d_text_value, d_text_value_for_image = gradients

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).to(wide)  # [B, H, tokens, D]

    # Without output gradients, logits and text probabilities depend on the text columns alone.
    text_columns_only = d_image is None and d_text is None and request.scores != "probability"
    text_keys = by_head(inputs.text_key)
    keys = text_keys if text_columns_only else torch.cat([by_head(inputs.key), text_keys], dim=2)
    d_keys = torch.zeros_like(keys)
    with_values = inputs.value is not None and inputs.text_value is not None
    d_values: dict[str, Tensor] = {}

    streams = [("image", inputs.query, d_query, d_image, image, lse[:, :, :tokens])]
    if inputs.text_query is not None:
        if d_text is None:
            d_text_query.zero_()
        else:
            streams.append(("text", inputs.text_query, d_text_query, d_text, text, lse[:, :, tokens:]))

    for stream, query, d_rows, d_out, out, stream_lse in streams:
        stream_maps = d_maps if stream == "image" else None
        if d_out is None and stream_maps is None:
            d_rows.zero_()
            continue
        values = None
        if d_out is not None and inputs.value is not None and inputs.text_value is not None:
            edited = inputs.text_value_for_image
            read = edited if stream == "image" and edited is not None else inputs.text_value
            values = torch.cat([by_head(inputs.value), by_head(read)], dim=2)
            d_values[stream] = torch.zeros_like(values)
        rows_per_block = _block_rows(query.transpose(1, 2), keys.shape[2])
        for first in range(0, query.shape[1], rows_per_block):
            block = slice(first, first + rows_per_block)
            q = by_head(query[:, block])  # [B, H, rows, D]
            scores = request.scale * (q @ keys.transpose(-1, -2))
            if text_columns_only:
                d_scores = torch.zeros_like(scores)
            else:
                probability = (scores - stream_lse[:, :, block, None]).exp_()
                d_scores = torch.zeros_like(scores)  # first the gradient of the probabilities
                delta: Tensor | float = 0.0
                if d_out is not None and values is not None:
                    d_o = by_head(d_out[:, block])
                    torch.matmul(d_o, values.transpose(-1, -2), out=d_scores)
                    delta = (d_o * by_head(out[:, block])).sum(dim=-1, keepdim=True)
                    d_values[stream] += probability.transpose(-1, -2) @ d_o
                if stream_maps is not None and request.scores == "probability":
                    shown = probability[..., tokens + request.start : tokens + request.stop]
                    d_entries = _per_head(_map_rows(stream_maps, block, request), shown, request)
                    d_scores[..., tokens + request.start : tokens + request.stop] += d_entries
                    delta = delta + (d_entries * shown).sum(dim=-1, keepdim=True)
                d_scores = d_scores.sub_(delta).mul_(probability)
            if stream_maps is not None and request.scores in ("logit", "text_probability"):
                text_scores = scores[..., scores.shape[-1] - text_tokens :]
                d_text_scores = d_scores[..., scores.shape[-1] - text_tokens :]
                entries = text_scores if request.scores == "logit" else text_scores.softmax(dim=-1)
                shown = entries[..., request.start : request.stop]
                d_entries = _per_head(_map_rows(stream_maps, block, request), shown, request)
                if request.scores == "logit":
                    d_text_scores[..., request.start : request.stop] += d_entries
                else:
                    d_text_scores -= entries * (d_entries * shown).sum(dim=-1, keepdim=True)
                    d_text_scores[..., request.start : request.stop] += d_entries * shown
            d_rows[:, block] = (request.scale * (d_scores @ keys)).transpose(1, 2).to(d_rows.dtype)
            d_keys += request.scale * (d_scores.transpose(-1, -2) @ q)

    d_key.copy_(d_keys[:, :, :tokens].transpose(1, 2)) if not text_columns_only else d_key.zero_()
    d_text_key.copy_(d_keys[:, :, d_keys.shape[2] - text_tokens :].transpose(1, 2))
    if with_values:
        _write_value_gradients(d_values, tokens, d_value, d_text_value, d_text_value_for_image, inputs)
    return gradients


def _map_rows(d_maps: Tensor, block: slice, request: Request) -> Tensor:
    """Rows ``block`` of a map gradient, [B, H or 1, rows, T']."""
    return d_maps[:, :, block] if request.heads == "each" else d_maps[:, None, block]


def _per_head(d_maps: Tensor, entries: Tensor, request: Request) -> Tensor:
    """Gradient of the entries [B, H, rows, T'], from that of their reduction, [B, H or 1, rows, T']."""
    if request.heads == "mean":
        return (d_maps / entries.shape[1]).expand_as(entries)
    if request.heads == "max":
        winner = entries.argmax(dim=1, keepdim=True)
        return torch.zeros_like(entries).scatter_(1, winner, d_maps)
    return d_maps


def _write_value_gradients(
    d_values: dict[str, Tensor],
    tokens: int,
    d_value: Tensor,
    d_text_value: Tensor,
    d_text_value_for_image: Tensor,
    inputs: Inputs,
) -> None:
    """Sum what image rows and text rows, [B, H, S, D] each, say of the values they read."""
    totals = {"value": 0.0, "text_value": 0.0, "text_value_for_image": 0.0}  # type: dict[str, Tensor | float]
    edited = inputs.text_value_for_image is not None
    for stream, gradient in d_values.items():
        by_token = gradient.transpose(1, 2)  # [B, S, H, D]
        totals["value"] = totals["value"] + by_token[:, :tokens]
        read = "text_value_for_image" if stream == "image" and edited else "text_value"
        totals[read] = totals[read] + by_token[:, tokens:]
    for destination, total in zip(
        (d_value, d_text_value, d_text_value_for_image), totals.values(), strict=True
    ):
        if destination.dim() == 4:
            destination.copy_(total) if isinstance(total, Tensor) else destination.zero_()


attend = register("aten", forward, backward, budget, value_norm)
