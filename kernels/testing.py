"""How exact a result must be: an error budget against float64, shared by tests and benchmarks.

A result may be at most twice as far from the float64 answer as PyTorch's own computation in the same
precision, plus one rounding of its dtype. An absolute tolerance has no place here: the entries of an
attention map are about 1 / (N + T), so all zeros would pass any that is usually picked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .api import attention_maps, backend, joint_attention
from .reference import attend
from .types import STREAMS, AttentionMaps, AttentionStatistics, Inputs, JointAttention, MapRequest


def error_ratio(actual: Tensor, exact: Tensor, baseline: Tensor) -> float:
    """Error of ``actual`` as a fraction of what it may be: above 1 is a failure, infinite for NaN.

    The larger of two fractions, one for the greatest error and one for the root mean square of the errors.

    Args:
        actual: the result to judge; one rounding of *its* dtype is granted.
        exact: the float64 answer, same shape, not all zeros.
        baseline: PyTorch's own computation in the same precision (for maps: a float32 softmax).

    Raises:
        ValueError: shapes differ, ``exact`` is not float64 or has nothing but zeros to compare with.
    """
    if actual.shape != exact.shape or baseline.shape != exact.shape:
        raise ValueError(f"shapes {[list(t.shape) for t in (actual, exact, baseline)]} are not equal")
    if exact.dtype != torch.float64:
        raise ValueError(f"exact has dtype {exact.dtype}; expected float64")
    exact = exact.detach()
    if not bool(exact.any()):
        raise ValueError("exact is all zeros: no error can be relative to it")
    error, baseline_error = actual.detach().double() - exact, baseline.detach().double() - exact
    if not bool(error.isfinite().all()):
        return float("inf")
    rounding = torch.finfo(actual.dtype).eps

    def ratio(size: Callable[[Tensor], Tensor]) -> float:
        return float(size(error) / (2 * size(baseline_error) + rounding * size(exact)))

    return max(ratio(lambda t: t.abs().max()), ratio(lambda t: t.square().mean().sqrt()))


def assert_accurate(actual: Tensor, exact: Tensor, baseline: Tensor, *, name: str = "") -> None:
    """Raise ``AssertionError`` when :func:`error_ratio` is above 1; the arguments are the same."""
    ratio = error_ratio(actual, exact, baseline)
    if ratio > 1:
        raise AssertionError(
            f"{name or 'result'} {list(actual.shape)} {actual.dtype}: error is {ratio:.3g} times its budget "
            "(twice PyTorch's own error plus one rounding)"
        )


def attention_inputs(
    batch: int,
    tokens: int,
    text_tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    edited: bool = False,
    sharpness: float = 2.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors under the argument names of :func:`joint_attention`, [B, tokens, H, D].

    ``sharpness`` is the standard deviation of the scaled scores: 1 is near uniform attention, trained models
    are at 2 to 4. ``edited`` adds ``text_value_for_image``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    inputs = {}
    for name in STREAMS if edited else STREAMS[:-1]:
        shape = (batch, text_tokens if name.startswith("text_") else tokens, heads, head_dim)
        tensor = torch.randn(shape, generator=generator, device=device)
        inputs[name] = (tensor * sharpness if name.endswith("query") else tensor).to(dtype)
    return inputs


def exact_attention(**arguments: Any) -> JointAttention:
    """:func:`joint_attention` in float64 by the reference backend.

    Differentiable: pass float64 leaves to read exact gradients from them.
    """
    with backend("reference"):
        return joint_attention(**_doubled(arguments))


def exact_maps(**arguments: Any) -> AttentionMaps:
    """:func:`attention_maps` in float64 by the reference backend; see :func:`exact_attention`."""
    with backend("reference"):
        return attention_maps(**_doubled(arguments))


def _doubled(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: a.double() if isinstance(a, Tensor) and name != "text_bias" else a
        for name, a in arguments.items()
    }


def pytorch_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    text_query: Tensor | None,
    text_key: Tensor,
    text_value: Tensor,
    *,
    text_value_for_image: Tensor | None = None,
    text_bias: Tensor | None = None,
    scale: float | None = None,
    maps: MapRequest | None = None,
    statistics: bool = False,
) -> JointAttention:
    """The baseline: outputs by ``scaled_dot_product_attention``, the rest by a float32 softmax of the inputs.

    Differentiable by PyTorch's autograd, in the precision of the inputs. Materialises the scores.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    text_rows = query[:, :0] if text_query is None else text_query
    keys = text_key if key is None else torch.cat([key, text_key], dim=1)
    read_by_image = text_value if text_value_for_image is None else text_value_for_image
    inputs = Inputs(query, key, value, text_query, text_key, text_value, text_value_for_image, text_bias)
    mask = None
    if text_bias is not None:
        of_image = keys.shape[1] - text_key.shape[1]
        mask = F.pad(text_bias.to(query.dtype), (of_image, 0))[:, None, None]  # [B, 1, 1, S]
    shown = attend(inputs, factor, maps, statistics)
    assert isinstance(shown, JointAttention)

    def joined(text: Tensor) -> Tensor:
        return text if value is None else torch.cat([value, text], dim=1)

    image = _flash(query, keys, joined(read_by_image), factor, mask)
    text = _flash(text_rows, keys, joined(text_value), factor, mask)
    return JointAttention(
        joint=torch.cat([image, text], dim=1),
        image=image,
        text=text,
        lse=shown.lse,
        maps=shown.maps,
        statistics=_with_usual_mass(shown.statistics, inputs, shown.lse, factor),
    )


def pytorch_maps(
    query: Tensor,
    key: Tensor | None,
    text_query: Tensor | None,
    text_key: Tensor,
    *,
    text_bias: Tensor | None = None,
    scale: float | None = None,
    maps: MapRequest = MapRequest(),  # noqa: B008 (frozen)
    statistics: bool = False,
) -> AttentionMaps:
    """The baseline of maps alone, see :func:`pytorch_attention`."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    rows = text_query if statistics or maps.rows[0] == "text" else None
    inputs = Inputs(query, key, None, rows, text_key, None, None, text_bias)
    shown = attend(inputs, factor, maps, statistics)
    assert isinstance(shown, AttentionMaps)
    return replace(shown, statistics=_with_usual_mass(shown.statistics, inputs, shown.lse, factor))


def _with_usual_mass(
    statistics: AttentionStatistics | None, inputs: Inputs, lse: Tensor | None, scale: float
) -> AttentionStatistics | None:
    """The statistics with attention mass as PyTorch computes it from a log-sum-exp, all that flash keeps."""
    query, text_query, text_key = inputs.query, inputs.text_query, inputs.text_key
    if statistics is None or text_query is None or lse is None:
        return None
    bias = 0.0 if inputs.text_bias is None else inputs.text_bias[:, None, None]
    masses = []
    for rows, norm in zip(
        (query, text_query), lse.split([query.shape[1], text_query.shape[1]], dim=2), strict=True
    ):
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", rows.float(), text_key.float())
        masses.append((scores + bias - norm[..., None]).exp().sum(dim=-1))
    return replace(statistics, image_to_text=masses[0], text_to_text=masses[1])


def attention_rows(inputs: Mapping[str, Tensor], rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output [B, R, H, D] and head-mean probability map [B, R, T] of the image rows ``rows``, in ``dtype``.

    What a long sequence is judged by: the whole matrix in float64 would not fit.
    """
    text_value = inputs.get("text_value_for_image", inputs["text_value"])
    keys = torch.cat([inputs["key"], inputs["text_key"]], dim=1).to(dtype)  # [B, S, H, D]
    values = torch.cat([inputs["value"], text_value], dim=1).to(dtype)
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs["query"][:, rows].to(dtype), keys)
    probability = (scores * keys.shape[-1] ** -0.5).softmax(dim=-1)  # [B, H, R, S]
    outputs = torch.einsum("bhqk,bkhd->bqhd", probability, values)
    return outputs, probability[..., inputs["key"].shape[1] :].mean(dim=1)


def _flash(rows: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (rows, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
