"""Joint attention backward from PyTorch's own operators.

PyTorch's operators do not differentiate the log-sum-exp, so a map composed from them would have silently
wrong gradients. Here, too, the text columns are ours, a head at a time; the image keys are flash attention's
backward on a CPU, given what the map adds, and blocks of query rows elsewhere. Nothing of size S x S exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import empty_gradients
from ..types import STREAMS, Inputs, Request, wide_dtype
from .blocks import block_rows, dense_channels, products, softmax, text_mask

_FREE_CHANNELS = 4  # of their own for what the map adds, see `with_row_sum`
_TINY = torch.finfo(torch.float32).tiny
_LEFT_OUT = 2.0**-16  # of <dO, O>, at most, where it is computed from another output


def backward(
    d_image: Tensor | None,
    d_text: Tensor | None,
    d_maps: Tensor | None,
    inputs: Inputs,
    image: Tensor,
    text: Tensor,
    lse: Tensor,
    request: Request,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the seven inputs, [B, tokens, H, D]; any upstream gradient may be None."""
    tokens = inputs.query.shape[1]
    gradients = dict(zip(STREAMS, empty_gradients(inputs), strict=True))
    edited = inputs.text_value_for_image is not None
    read = inputs.text_value_for_image if edited else inputs.text_value
    of_image, of_text = (None, None) if d_lse is None else (d_lse[:, :, :tokens], d_lse[:, :, tokens:])
    rows = lse[:, :, :tokens]
    found = _stream_gradients(inputs.query, read, d_image, image, rows, d_maps, of_image, inputs, request)
    names = ("query", "key", "value", "text_key", "text_value_for_image" if edited else "text_value")
    totals = dict(zip(names, found, strict=True))
    if inputs.text_query is not None:
        rows = lse[:, :, tokens:]
        found = _stream_gradients(
            inputs.text_query, inputs.text_value, d_text, text, rows, None, of_text, inputs, request
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
    d_lse: Tensor | None,
    inputs: Inputs,
    request: Request,
) -> tuple[Tensor | None, ...]:
    """What the output, map and log-sum-exp of one stream's ``rows`` [B, M, H, D] say of five tensors.

    They are the rows, the image keys and values, and the text keys and values that the rows read. Gradients
    are [B, tokens, H, D], or None where there is nothing to say.
    """
    if d_out is None and d_maps is None and d_lse is None:
        return (None,) * 5
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # of a row that has read nothing
    d_rows, d_text_key, d_text_value, row_sum = _text_gradients(
        rows, inputs.text_key, inputs.text_bias, text_value, d_out, out, lse, d_maps, d_lse, request
    )
    # Logits and text probabilities know of the text columns alone.
    if inputs.key is None or (d_out is None and row_sum is None):
        return d_rows, None, None, d_text_key, d_text_value
    differentiate = _image_gradients if rows.device.type == "cpu" else _image_gradients_in_blocks
    of_image, d_key, d_value = differentiate(
        rows, inputs.key, inputs.value, d_out, out, lse, row_sum, request.scale
    )
    return d_rows.add_(of_image), d_key, d_value, d_text_key, d_text_value


def _text_gradients(
    rows: Tensor,
    text_key: Tensor,
    text_bias: Tensor | None,
    text_value: Tensor | None,
    d_out: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_maps: Tensor | None,
    d_lse: Tensor | None,
    request: Request,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients by way of the text columns, a head at a time: of rows, text keys and text values, wide,
    [B, tokens, H, D], and what is subtracted from the gradient of each row's probabilities beside <dO, O>,
    [B, H, M]: the sum over the row of dM * P~, where the map shows probabilities, less the gradient of the
    log-sum-exp. None if neither is there.
    """
    wide = wide_dtype(rows.dtype)
    batch, count, heads, _ = rows.shape
    start, stop, scale = request.start, request.stop, request.scale
    shown = None if d_maps is None else request.kind
    d_rows = torch.empty_like(rows, dtype=wide, memory_format=torch.contiguous_format)
    d_text_key = torch.empty_like(text_key, dtype=wide, memory_format=torch.contiguous_format)
    d_text_value = None if d_out is None else torch.empty_like(d_text_key)
    row_sum = None if d_lse is None else -d_lse
    if shown == "probability" and row_sum is None:
        row_sum = rows.new_zeros((batch, heads, count), dtype=wide)
    bias = None if text_bias is None else text_bias[:, None].to(wide)  # [B, 1, T]
    if d_maps is not None and request.heads == "mean":
        d_maps = (d_maps / heads)[:, None].expand(-1, heads, -1, -1)  # [B, H, M, T']
    if d_maps is not None and text_bias is not None:
        d_maps = d_maps.masked_fill(text_mask(text_bias[:, start:stop])[:, None], 0.0)
    for head in range(heads):
        scores = products(rows[:, :, head], text_key[:, :, head]).mul_(scale)  # [B, M, T]
        if bias is not None:
            scores.add_(bias)
        d_scores = torch.zeros_like(scores)
        d_entries = scores.new_zeros(()) if d_maps is None else d_maps[:, head]
        if d_out is not None or row_sum is not None:
            probability = (scores - lse[:, head, :, None]).exp_()
            delta = scores.new_zeros((batch, count))
            if d_out is not None and text_value is not None and d_text_value is not None:
                d_o = d_out[:, :, head].to(wide)
                torch.bmm(d_o, text_value[:, :, head].to(wide).transpose(1, 2), out=d_scores)
                delta = (d_o * out[:, :, head]).sum(dim=-1)
                d_text_value[:, :, head] = torch.bmm(probability.transpose(1, 2), d_o)
            if row_sum is not None:
                if shown == "probability":
                    d_scores[..., start:stop] += d_entries
                    row_sum[:, head] += (d_entries * probability[..., start:stop]).sum(dim=-1)
                delta = delta + row_sum[:, head]
            d_scores.sub_(delta[..., None]).mul_(probability)
        if shown == "logit":
            d_scores[..., start:stop] += d_entries
        elif shown == "text_probability":
            entries = softmax(scores, bias)
            weighted = d_entries * entries[..., start:stop]
            d_scores -= entries * weighted.sum(dim=-1, keepdim=True)
            d_scores[..., start:stop] += weighted
        d_scores.mul_(scale)
        d_rows[:, :, head] = torch.bmm(d_scores, text_key[:, :, head].to(wide))
        d_text_key[:, :, head] = torch.bmm(d_scores.transpose(1, 2), rows[:, :, head].to(wide))
    return d_rows, d_text_key, d_text_value, row_sum


def with_row_sum(
    d_out: Tensor, rows: Tensor, key: Tensor, value: Tensor, out: Tensor, row_sum: Tensor, *, channels: int
) -> tuple[Tensor, ...]:
    """The five tensors [B, tokens, H, D] with further channels, by which <dO, O> gains ``row_sum`` [B, H, M].

    dO fills at least four ``channels`` with ones and O with that sum. Queries, keys and values are zero
    there, so that nothing else changes.
    """
    width = rows.shape[-1]
    rows, key, value, out = (F.pad(tensor, (0, channels)) for tensor in (rows, key, value, out))
    d_out = F.pad(d_out, (0, channels), value=1.0)
    rest = row_sum.transpose(1, 2)  # [B, M, H]
    for channel in range(width, width + channels):  # half precision holds it in three numbers
        out[..., channel] = rest
        rest = rest - out[..., channel]
    return d_out, rows, key, value, out


def _image_gradients(
    rows: Tensor,
    key: Tensor,
    value: Tensor | None,
    d_out: Tensor | None,
    out: Tensor,
    lse: Tensor,
    row_sum: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by way of the image keys: of rows, keys and values [B, tokens, H, D], by the CPU's operator.

    It takes output and log-sum-exp as they are given, those of all keys, and so its probabilities are the
    right ones. The output serves it for <dO, O> alone, which lacks ``row_sum`` [B, H, M]: it is given another.
    """
    with_values = value is not None and d_out is not None
    width = rows.shape[-1]
    if value is None or d_out is None:
        value, d_out, out = torch.zeros_like(key), torch.ones_like(rows), torch.zeros_like(rows)
    if row_sum is not None:
        other = _along_gradient(d_out, out, row_sum)
        if other is None:
            d_out, rows, key, value, out = with_row_sum(
                d_out, rows, key, value, out, row_sum, channels=_FREE_CHANNELS
            )
        else:
            out = other
    tensors = (d_out, rows, key, value, out)
    d_o, q, k, v, o = (dense_channels(tensor).transpose(1, 2) for tensor in tensors)
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = differentiate(d_o, q, k, v, o, lse.contiguous(), 0.0, False, scale=scale)
    d_rows, d_key, d_value = (gradient.transpose(1, 2)[..., :width] for gradient in found)
    return d_rows, d_key, d_value if with_values else None


def _along_gradient(d_out: Tensor, out: Tensor, row_sum: Tensor) -> Tensor | None:
    """An output along dO whose <dO, O> is that of ``out`` and ``row_sum`` [B, H, M]; [B, M, H, D].

    None where it cannot hold them, as in a row whose dO is 0, and in float16, which has too few exponents.
    """
    if d_out.dtype == torch.float16:
        return None
    wide = d_out.to(row_sum.dtype)
    wanted = (wide * out).sum(dim=-1) + row_sum.transpose(1, 2)  # [B, M, H]
    found, rest = torch.empty_like(d_out), wanted
    pieces = 1 if d_out.dtype == row_sum.dtype else 2  # bfloat16: the second holds the first's rounding
    for direction, piece in zip(wide.chunk(pieces, dim=-1), found.chunk(pieces, dim=-1), strict=True):
        square = direction.square().sum(dim=-1).clamp_min(_TINY)
        piece.copy_(direction * (rest / square)[..., None])
        rest = rest - (direction * piece).sum(dim=-1)
    exact = rest.abs() <= _LEFT_OUT * wanted.abs()
    return found if bool(exact.all()) else None


def _image_gradients_in_blocks(
    rows: Tensor,
    key: Tensor,
    value: Tensor | None,
    d_out: Tensor | None,
    out: Tensor,
    lse: Tensor,
    row_sum: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same for devices without that operator, in blocks of rows."""
    wide = wide_dtype(rows.dtype)
    k = key.transpose(1, 2).to(wide)  # [B, H, N, D]
    v = None if value is None or d_out is None else value.transpose(1, 2).to(wide)
    d_key, d_value = torch.zeros_like(k), None if v is None else torch.zeros_like(v)
    d_rows = []
    count = block_rows(rows.transpose(1, 2), key.shape[1])
    for first in range(0, rows.shape[1], count):
        block = slice(first, first + count)
        q = rows[:, block].transpose(1, 2).to(wide)
        probability = (scale * (q @ k.transpose(-1, -2)) - lse[:, :, block, None]).exp_()  # [B, H, rows, N]
        delta = lse.new_zeros(()) if row_sum is None else row_sum[:, :, block, None]
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
