"""Joint attention backward from PyTorch's own operators.

PyTorch's operators do not differentiate the log-sum-exp, so a map composed from them would have silently
wrong gradients. What a map adds on its own columns is ours, a head at a time; the rest is attention over all
keys, by flash attention's backward on a CPU and in blocks of query rows elsewhere, given the sum that the
map adds to <dO, O>. Nothing of size S x S exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import empty_gradients
from ..types import STREAMS, Inputs, Request, wide_dtype
from .blocks import block_rows, products, softmax, text_mask
from .forward import by_head

_FREE_CHANNELS = 4  # of their own for what the map adds, see `with_row_sum`
_TINY = torch.finfo(torch.float32).tiny
_LEFT_OUT = 2.0**-16  # of <dO, O>, at most, where it is computed from another output

Differentiate = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""``(d_out, rows, key, value, out, lse, row_sum, scale, bias)`` -> gradients of rows, keys and values.

All are [B, tokens, H, D] but ``lse`` and ``row_sum`` [B, H, rows], the sum to be added to <dO, O>, and
``bias``, float32 [B, keys]. ``value``, ``d_out``, ``row_sum`` and ``bias`` may be None.
"""


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
    of_map = None if d_maps is None else map_gradient(d_maps, inputs, lse, request)
    by = _flash_gradients if inputs.query.device.type == "cpu" else _gradients_in_blocks
    return gradients_by(by, of_map, d_image, d_text, inputs, image, text, lse, request.scale, d_lse)


def map_gradient(
    d_maps: Tensor, inputs: Inputs, lse: Tensor, request: Request
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an I2T map adds to the gradients of image queries and text keys on its own columns, wide, and for
    probabilities the sum of dM * P over every row, [B, H, N], which attention subtracts along with <dO, O>.
    """
    query, text_key, bias = inputs.query, inputs.text_key, inputs.text_bias
    wide, heads, scale, kind = wide_dtype(query.dtype), query.shape[2], request.scale, request.kind
    chosen = slice(request.start, request.stop)
    read = slice(None) if kind == "text_probability" else chosen
    # By head in memory, as `joined`, whose gradients they are added to.
    d_query, d_text_key = (
        torch.zeros_like(t.transpose(1, 2), dtype=wide, memory_format=torch.contiguous_format)
        for t in (query, text_key)
    )
    row_sum = norm = None
    if kind == "probability":
        norm = _without_empty_rows(lse[:, :, : query.shape[1]])
        row_sum = torch.empty_like(norm)
    if request.heads == "mean":
        d_maps = (d_maps / heads)[:, None].expand(-1, heads, -1, -1)  # [B, H, N, T']
    if bias is not None:
        d_maps = d_maps.masked_fill(text_mask(bias[:, chosen])[:, None], 0.0)
        bias = bias[:, None, read].to(wide)
    for head in range(heads):
        rows, columns = query[:, :, head].to(wide), text_key[:, read, head].to(wide)
        d_scores = d_maps[:, head]
        if kind != "logit":
            scores = products(rows, columns).mul_(scale)
            if bias is not None:
                scores.add_(bias)
            if norm is not None and row_sum is not None:
                d_scores = scores.sub_(norm[:, head, :, None]).exp_().mul_(d_scores)
                torch.sum(d_scores, dim=-1, out=row_sum[:, head])
            else:
                entries = softmax(scores, bias)
                weighted = d_scores * entries[..., chosen]
                d_scores = entries.mul_(-weighted.sum(dim=-1, keepdim=True))
                d_scores[..., chosen] += weighted
        torch.baddbmm(d_query[:, head], d_scores, columns, beta=0, alpha=scale, out=d_query[:, head])
        into = d_text_key[:, head, read]
        torch.baddbmm(into, d_scores.transpose(1, 2), rows, beta=0, alpha=scale, out=into)
    return d_query.transpose(1, 2), d_text_key.transpose(1, 2), row_sum


def gradients_by(
    differentiate: Differentiate,
    of_map: tuple[Tensor, Tensor, Tensor | None] | None,
    d_image: Tensor | None,
    d_text: Tensor | None,
    inputs: Inputs,
    image: Tensor,
    text: Tensor,
    lse: Tensor,
    scale: float,
    d_lse: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of the seven inputs from those of attention over the keys of both streams together.

    Args:
        differentiate: the attention's backward.
        of_map: what :func:`map_gradient` returned, or None without a map.
        d_image, d_text, inputs, image, text, lse, scale, d_lse: as in :func:`backward`.
    """
    gradients = dict(zip(STREAMS, empty_gradients(inputs), strict=True))
    tokens, totals = inputs.query.shape[1], dict[str, Tensor]()
    row_sum = None if d_lse is None else -d_lse
    if of_map is not None:
        totals["query"], totals["text_key"], of_rows = of_map
        if of_rows is not None:
            row_sum = torch.zeros_like(lse) if row_sum is None else row_sum
            row_sum[:, :, :tokens] += of_rows
    if d_image is not None or d_text is not None or row_sum is not None:
        lse, bias = _without_empty_rows(lse), inputs.text_bias
        if bias is not None and inputs.key is not None:
            bias = F.pad(bias, (inputs.key.shape[1], 0))
        if d_text is None and d_lse is None:
            inputs = replace(inputs, text_query=None)
        streams = {"query": (d_image, image), "text_query": (d_text, text)}
        for names, read in parts(inputs):
            d_out = out = None
            if any(streams[name][0] is not None for name in names):
                given = [streams[name] for name in names]
                d_out = joined([torch.zeros_like(o) if d is None else d for d, o in given])
                out = joined([o for _, o in given])
            here = slice(0 if names[0] == "query" else tokens, None if names[-1] == "text_query" else tokens)
            groups = [names, _present(inputs, "key", "text_key"), _present(inputs, "value", read)]
            rows, key, value = (
                joined([getattr(inputs, n) for n in group]) if group else None for group in groups
            )
            found = differentiate(
                d_out, rows, key, value, out, lse[:, :, here].contiguous(),
                None if row_sum is None else row_sum[:, :, here].contiguous(), scale, bias,
            )  # fmt: skip
            for group, gradient in zip(groups, found, strict=True):
                if gradient is None:
                    continue
                lengths = [getattr(inputs, name).shape[1] for name in group]
                for name, part in zip(group, gradient.split(lengths, dim=1), strict=True):
                    before, wide = totals.get(name), lse.dtype
                    totals[name] = part if before is None else before.to(wide) + part.to(wide)
    for name, gradient in gradients.items():
        gradient.copy_(totals[name]) if name in totals else gradient.zero_()
    return tuple(gradients.values())


def parts(inputs: Inputs) -> Sequence[tuple[tuple[str, ...], str]]:
    """Attentions over all keys: which rows, and which text values they read. Edited values need two."""
    read = "text_value" if inputs.text_value_for_image is None else "text_value_for_image"
    if inputs.text_query is None:
        return [(("query",), read)]
    if read == "text_value":
        return [(("query", "text_query"), read)]
    return [(("query",), read), (("text_query",), "text_value")]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Streams one after another, [B, tokens, H, D]; on a CPU by head in memory, as its operator reads."""
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].device.type == "cpu":
        return torch.cat([tensor.transpose(1, 2) for tensor in tensors], dim=2).transpose(1, 2)
    return torch.cat(list(tensors), dim=1)


def _present(inputs: Inputs, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if getattr(inputs, name) is not None)


def _without_empty_rows(lse: Tensor) -> Tensor:
    """The log-sum-exp by which probabilities of a row that has read nothing are 0."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


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


def _flash_gradients(
    d_out: Tensor | None,
    rows: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    row_sum: Tensor | None,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:data:`Differentiate` by the CPU's operator.

    The output serves it for <dO, O> alone, which lacks ``row_sum``: it is given another output.
    """
    with_values = value is not None and d_out is not None
    width = rows.shape[-1]
    if value is None or d_out is None or out is None:
        value, d_out, out = torch.zeros_like(key), torch.ones_like(rows), torch.zeros_like(rows)
    if row_sum is not None:
        other = _along_gradient(d_out, out, row_sum)
        if other is None:
            d_out, rows, key, value, out = with_row_sum(
                d_out, rows, key, value, out, row_sum, channels=_FREE_CHANNELS
            )
        else:
            out = other
    d_o, q, k, v, o = (by_head(tensor) for tensor in (d_out, rows, key, value, out))
    mask = None if bias is None else bias[:, None, None].to(lse.dtype).expand(*q.shape[:3], -1)
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = differentiate(d_o, q, k, v, o, lse, 0.0, False, attn_mask=mask, scale=scale)
    d_rows, d_key, d_value = (gradient.transpose(1, 2)[..., :width] for gradient in found)
    return d_rows, d_key, d_value if with_values else None


def _along_gradient(d_out: Tensor, out: Tensor, row_sum: Tensor) -> Tensor | None:
    """An output along dO whose <dO, O> is that of ``out`` and ``row_sum`` [B, H, M]; [B, M, H, D].

    None where it cannot hold them, as in a row whose dO is 0, and in float16, which has too few exponents.
    """
    if d_out.dtype == torch.float16:
        return None
    wide = d_out.to(row_sum.dtype)
    wanted = (wide * out.to(wide.dtype)).sum(dim=-1) + row_sum.transpose(1, 2)  # [B, M, H]
    found, rest = torch.empty_like(d_out), wanted
    pieces = 1 if d_out.dtype == row_sum.dtype else 2  # bfloat16: the second holds the first's rounding
    for direction, piece in zip(wide.chunk(pieces, dim=-1), found.chunk(pieces, dim=-1), strict=True):
        square = direction.square().sum(dim=-1).clamp_min(_TINY)
        piece.copy_(direction * (rest / square)[..., None])
        rest = rest - (direction * piece.to(wide.dtype)).sum(dim=-1)
    exact = rest.abs() <= _LEFT_OUT * wanted.abs()  # false for NaN
    return None if bool((~exact).any()) else found


def _gradients_in_blocks(
    d_out: Tensor | None,
    rows: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    row_sum: Tensor | None,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:data:`Differentiate` for devices without that operator, in blocks of rows."""
    wide = wide_dtype(rows.dtype)
    k = key.transpose(1, 2).to(wide)  # [B, H, S, D]
    v = None if value is None or d_out is None else value.transpose(1, 2).to(wide)
    d_key, d_value = torch.zeros_like(k), None if v is None else torch.zeros_like(v)
    d_rows = []
    count = block_rows(rows.transpose(1, 2), key.shape[1])
    for first in range(0, rows.shape[1], count):
        block = slice(first, first + count)
        q = rows[:, block].transpose(1, 2).to(wide)
        scores = scale * (q @ k.transpose(-1, -2)) - lse[:, :, block, None]  # [B, H, rows, S]
        if bias is not None:
            scores.add_(bias[:, None, None])
        probability = scores.exp_()
        delta = lse.new_zeros(()) if row_sum is None else row_sum[:, :, block, None]
        if v is not None and d_value is not None and d_out is not None and out is not None:
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
