"""Joint attention from PyTorch's own operators: the CPU's fast path and any device's fall-back.

Forward: flash attention with its log-sum-exp over the image keys, then the few text columns, a head at a
time, by matrix products of our own, merged into output and log-sum-exp. The map falls out of that, and is as
exact as a softmax: a probability and the log-sum-exp that it is divided by hold the very same scores. Nothing
is concatenated. Backward: PyTorch's operators do not differentiate the log-sum-exp, so a map composed from
them would have silently wrong gradients. Here, too, the text columns are ours, a head at a time; the image
keys are flash attention's backward on a CPU, given what the map adds, and blocks of query rows elsewhere.
Nothing of size S x S exists in either direction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import empty_gradients, empty_outputs, register
from .reference import value_norm
from .types import STREAMS, Inputs, Request, wide_dtype

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
    shown = request.kind
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
    else:
        maps.add_(entries)
    if request.heads == "mean" and head == heads - 1:
        maps.div_(heads)


def _by_head(tensor: Tensor) -> Tensor:
    """[B, tokens, H, D] -> [B, H, tokens, D]."""
    tensor = tensor.transpose(1, 2)
    # The CPU operator reads keys and values again for every block of rows: copying costs less than strides.
    return tensor.contiguous() if tensor.device.type == "cpu" else tensor


def _dense_channels(tensor: Tensor) -> Tensor:
    """The tensor with its last axis dense, as PyTorch's flash operators want it: the CPU's does not check."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flash(query: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, M, H, D] and natural log-sum-exp [B, H, M] of the rows ``query`` [B, M, H, D] over the keys
    ``k`` and values ``v`` [B, H, N, D].
    """
    q, k, v = (_dense_channels(t) for t in (query.transpose(1, 2), k, v))
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
    """Gradients of the seven inputs, [B, tokens, H, D]; any upstream gradient may be None."""
    tokens = inputs.query.shape[1]
    gradients = dict(zip(STREAMS, empty_gradients(inputs), strict=True))
    edited = inputs.text_value_for_image is not None
    read = inputs.text_value_for_image if edited else inputs.text_value
    found = _stream_gradients(inputs.query, read, d_image, image, lse[:, :, :tokens], d_maps, inputs, request)
    names = ("query", "key", "value", "text_key", "text_value_for_image" if edited else "text_value")
    totals = dict(zip(names, found, strict=True))
    if inputs.text_query is not None and d_text is not None:
        rows = lse[:, :, tokens:]
        found = _stream_gradients(
            inputs.text_query, inputs.text_value, d_text, text, rows, None, inputs, request
        )
        for name, gradient in zip(
            ("text_query", "key", "value", "text_key", "text_value"), found, strict=True
        ):
            before = totals.get(name)
            if before is None:
                totals[name] = gradient
            elif gradient is not None:
                totals[name] = before.to(lse.dtype).add_(gradient)
    for name, destination in gradients.items():
        total = totals.get(name)
        destination.zero_() if total is None else destination.copy_(total)
    return tuple(gradients.values())


def _stream_gradients(
    rows: Tensor,
    text_value: Tensor | None,
    d_out: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_maps: Tensor | None,
    inputs: Inputs,
    request: Request,
) -> tuple[Tensor | None, ...]:
    """What the output and the map of one stream's ``rows`` [B, M, H, D] say of five tensors.

    They are the rows, the image keys and values, and the text keys and values that the rows read. Gradients
    are [B, tokens, H, D], or None where there is nothing to say.
    """
    if d_out is None and d_maps is None:
        return (None,) * 5
    d_rows, d_text_key, d_text_value, map_sum = _text_gradients(
        rows, inputs.text_key, text_value, d_out, out, lse, d_maps, request
    )
    if d_out is None and map_sum is None:  # logits and text probabilities know of the text columns alone
        return d_rows, None, None, d_text_key, d_text_value
    differentiate = _image_gradients if rows.device.type == "cpu" else _image_gradients_in_blocks
    of_image, d_key, d_value = differentiate(
        rows, inputs.key, inputs.value, d_out, out, lse, map_sum, request.scale
    )
    return d_rows.add_(of_image), d_key, d_value, d_text_key, d_text_value


def _text_gradients(
    rows: Tensor,
    text_key: Tensor,
    text_value: Tensor | None,
    d_out: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_maps: Tensor | None,
    request: Request,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by way of the text columns, a head at a time: of rows, text keys and text values, wide,
    [B, tokens, H, D], and the sum over a row of dM * P~ [B, H, M], where the map shows probabilities.
    """
    wide = wide_dtype(rows.dtype)
    batch, count, heads, _ = rows.shape
    start, stop, scale = request.start, request.stop, request.scale
    shown = None if d_maps is None else request.kind
    d_rows = torch.empty_like(rows, dtype=wide, memory_format=torch.contiguous_format)
    d_text_key = torch.empty_like(text_key, dtype=wide, memory_format=torch.contiguous_format)
    d_text_value = None if d_out is None else torch.empty_like(d_text_key)
    map_sum = rows.new_empty((batch, heads, count), dtype=wide) if shown == "probability" else None
    if d_maps is not None and request.heads == "mean":
        d_maps = (d_maps / heads)[:, None].expand(-1, heads, -1, -1)  # [B, H, M, T']
    for head in range(heads):
        scores = _products(rows[:, :, head], text_key[:, :, head]).mul_(scale)  # [B, M, T]
        d_scores = torch.zeros_like(scores)
        d_entries = scores.new_zeros(()) if d_maps is None else d_maps[:, head]
        if d_out is not None or shown == "probability":
            probability = (scores - lse[:, head, :, None]).exp_()
            delta = scores.new_zeros((batch, count))
            if d_out is not None and text_value is not None and d_text_value is not None:
                d_o = d_out[:, :, head].to(wide)
                torch.bmm(d_o, text_value[:, :, head].to(wide).transpose(1, 2), out=d_scores)
                delta = (d_o * out[:, :, head]).sum(dim=-1)
                d_text_value[:, :, head] = torch.bmm(probability.transpose(1, 2), d_o)
            if map_sum is not None:
                d_scores[..., start:stop] += d_entries
                map_sum[:, head] = (d_entries * probability[..., start:stop]).sum(dim=-1)
                delta = delta + map_sum[:, head]
            d_scores.sub_(delta[..., None]).mul_(probability)
        if shown == "logit":
            d_scores[..., start:stop] += d_entries
        elif shown == "text_probability":
            entries = scores.softmax(dim=-1)
            weighted = d_entries * entries[..., start:stop]
            d_scores -= entries * weighted.sum(dim=-1, keepdim=True)
            d_scores[..., start:stop] += weighted
        d_scores.mul_(scale)
        d_rows[:, :, head] = torch.bmm(d_scores, text_key[:, :, head].to(wide))
        d_text_key[:, :, head] = torch.bmm(d_scores.transpose(1, 2), rows[:, :, head].to(wide))
    return d_rows, d_text_key, d_text_value, map_sum


_FREE_CHANNELS = 4


def _image_gradients(
    rows: Tensor,
    key: Tensor,
    value: Tensor | None,
    d_out: Tensor | None,
    out: Tensor,
    lse: Tensor,
    map_sum: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by way of the image keys: of rows, keys and values [B, tokens, H, D], by the CPU's operator.

    It takes output and log-sum-exp as they are given, those of all keys, and so its probabilities are the
    right ones. What it subtracts from the gradient of each row's probabilities, <dO, O>, lacks the map's
    ``map_sum`` [B, H, M]: channels that dO fills with ones and O with that sum bring it in. Queries, keys and
    values are zero there, so that nothing else changes.
    """
    with_values = value is not None and d_out is not None
    width = rows.shape[-1]
    if value is None or d_out is None:
        value, d_out, out = torch.zeros_like(key), torch.zeros_like(rows), torch.zeros_like(rows)
    if map_sum is not None:
        rows, key, value, out = (F.pad(tensor, (0, _FREE_CHANNELS)) for tensor in (rows, key, value, out))
        d_out = F.pad(d_out, (0, _FREE_CHANNELS), value=1.0)
        rest = map_sum.transpose(1, 2)  # [B, M, H]
        for channel in range(width, width + _FREE_CHANNELS):  # half precision holds it in three numbers
            out[..., channel] = rest
            rest = rest - out[..., channel]
    tensors = (d_out, rows, key, value, out)
    d_o, q, k, v, o = (_dense_channels(tensor).transpose(1, 2) for tensor in tensors)
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = differentiate(d_o, q, k, v, o, lse.contiguous(), 0.0, False, scale=scale)
    d_rows, d_key, d_value = (gradient.transpose(1, 2)[..., :width] for gradient in found)
    return d_rows, d_key, d_value if with_values else None


def _image_gradients_in_blocks(
    rows: Tensor,
    key: Tensor,
    value: Tensor | None,
    d_out: Tensor | None,
    out: Tensor,
    lse: Tensor,
    map_sum: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same for devices without that operator, in blocks of rows."""
    wide = wide_dtype(rows.dtype)
    k = key.transpose(1, 2).to(wide)  # [B, H, N, D]
    v = None if value is None or d_out is None else value.transpose(1, 2).to(wide)
    d_key, d_value = torch.zeros_like(k), None if v is None else torch.zeros_like(v)
    d_rows = []
    count = _block_rows(rows.transpose(1, 2), key.shape[1])
    for first in range(0, rows.shape[1], count):
        block = slice(first, first + count)
        q = rows[:, block].transpose(1, 2).to(wide)
        probability = (scale * (q @ k.transpose(-1, -2)) - lse[:, :, block, None]).exp_()  # [B, H, rows, N]
        delta = lse.new_zeros(()) if map_sum is None else map_sum[:, :, block, None]
        if v is not None and d_value is not None and d_out is not None:
            d_o = d_out[:, block].transpose(1, 2).to(wide)
            delta = delta + (d_o * out[:, block].transpose(1, 2)).sum(dim=-1, keepdim=True)
            d_value += probability.transpose(-1, -2) @ d_o
            d_scores = probability.mul_((d_o @ v.transpose(-1, -2)).sub_(delta)).mul_(scale)
        else:
            d_scores = probability.mul_(-delta).mul_(scale)
        d_rows.append(d_scores @ k)
        d_key += d_scores.transpose(-1, -2) @ q
    return (
        torch.cat(d_rows, dim=2).transpose(1, 2),
        d_key.transpose(1, 2),
        None if d_value is None else d_value.transpose(1, 2),
    )


attend = register("aten", forward, backward, budget, value_norm)
