"""Joint attention of image and text tokens that also returns what the attention saw.

One softmax attention runs over the concatenation of N image tokens and T text tokens, as in MM-DiT
(Stable Diffusion 3, Flux). Besides the output, a caller can ask for the image-to-text (I2T) map, the part of
the attention in which image tokens read text tokens, and for statistics of the whole attention matrix.
Neither needs the (N + T) x (N + T) matrix: with the log-sum-exp of every row, any entry is ``exp(score -
lse)``.

Backends compute the same function:

* ``"reference"``: the specification. Materialises the matrix; any device and dtype; slow and large.
* ``"aten"``: PyTorch's flash attention and log-sum-exp, then a pass over the text columns; any device.
* ``"triton"``: our own kernels; NVIDIA and AMD GPUs (and Triton's interpreter).
* kernels of others for output and log-sum-exp, with our own map pass: see ``providers.py``.

Triton runs on a GPU that it supports, unless another was measured to be faster there, and ATen elsewhere;
:func:`backend` chooses another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast, get_args

import torch
from torch import Tensor

from . import fallback, measured, providers, reference
from .aten import affinity
from .aten import backend as aten
from .operators import Attend
from .types import (
    DTYPES,
    AttentionMaps,
    Backend,
    Inputs,
    JointAttention,
    MapRequest,
    readable,
    wide_dtype,
)

log = logging.getLogger(__name__)

_FLOAT32 = torch.finfo(torch.float32)

LARGEST_BIAS = 88
"""Largest value of a text bias: exp(88) is about the largest float32."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let one backend compute every joint attention inside the context; contexts nest.

    A backend that is forced is not replaced if its kernels cannot be built: the error is raised.

    The choice is the process's, not a thread's: contexts that several threads hold at once overwrite each
    other. It is made when an attention runs forward, and its gradient stays with it; a block under gradient
    checkpointing runs forward again in the backward, which then belongs inside the context too.

    Args:
        name: ``"reference"``, ``"aten"``, ``"triton"`` or a kernel of others, see
            :data:`seg4diff.kernels.providers.PROVIDERS`; ``"auto"`` chooses by device and table again.

    Raises:
        ValueError: no backend of that name. A backend that cannot take the tensors of a call raises there.
    """
    accepted = (*get_args(Backend), *providers.PROVIDERS)
    if name not in accepted:
        raise ValueError(f"backend={name!r} is unknown; accepted: {', '.join(accepted)}")
    before, fallback.chosen = fallback.chosen, name
    try:
        yield
    finally:
        fallback.chosen = before


def joint_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    text_query: Tensor | None,
    text_key: Tensor,
    text_value: Tensor,
    *,
    scale: float | None = None,
    maps: MapRequest | None = None,
    statistics: bool = False,
    text_value_for_image: Tensor | None = None,
    text_bias: Tensor | None = None,
    text_first: bool = False,
) -> JointAttention:
    """Softmax attention over image and text tokens together, with a map and statistics.

    Differentiable through ``image``, ``text`` and ``maps`` with respect to all seven tensors.

    Args:
        query: image tokens, [B, N, H, D], float16, bfloat16, float32 or float64; any strides.
        key, value: of the image tokens, same shape. Both None: every row reads the text alone
            (cross-attention).
        text_query: text tokens, [B, T, H, D], same dtype and device. None: only image rows are computed.
        text_key, text_value: of the text tokens, same shape.
        scale: factor of the scores, positive and finite; 1 / sqrt(D) when None.
        maps: the map to return; None for no map.
        statistics: also return attention mass and value norms, see
            :class:`seg4diff.kernels.types.AttentionStatistics`.
        text_value_for_image: text values that *image* rows read, [B, T, H, D]; text rows keep ``text_value``.
            A linear edit of the I2T probabilities along the text axis, P G, is exactly ``G @ text_value``
            here.
        text_bias: what is added to the scores of the text columns, float32 [B, T], at most 88; -inf masks a
            column, as of a padding token. A row of a masked token is a row like any other. Not
            differentiable. Values are checked on a CPU, outside of ``torch.compile``: elsewhere a NaN or
            +inf gives NaN.
        text_first: whether text rows come before image rows in ``joint``, the output of all rows. It changes
            nothing else.

    Entries of a map in masked columns are exactly 0, and a ``"logit"`` map does not contain the bias. Where
    all T columns are masked, ``"text_probability"`` is 0; without image keys, the output of such a row is 0
    and its log-sum-exp -inf.

    Under autocast, tensors are cast to the autocast dtype, as PyTorch's own attention does.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, ranges or values do not fit, or the tensors the chosen :func:`backend`;
            the message names the argument and its value.
    """
    if (key is None) != (value is None):
        missing, present = ("key", "value") if key is None else ("value", "key")
        raise ValueError(
            f"{missing} is None, but {present} is given; give both, or neither for rows that read text alone"
        )
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "text_query": text_query,
        "text_key": text_key,
        "text_value": text_value,
        "text_value_for_image": text_value_for_image,
    }
    optional = {"key", "value", "text_query", "text_value_for_image"}
    return cast(
        JointAttention, _attend(tensors, optional, text_bias, scale, maps, statistics, None, text_first)
    )


def attention_maps(
    query: Tensor,
    key: Tensor | None,
    text_query: Tensor | None,
    text_key: Tensor,
    *,
    scale: float | None = None,
    maps: MapRequest = MapRequest(),  # noqa: B008 (frozen)
    statistics: bool = False,
    text_bias: Tensor | None = None,
    lse: Tensor | None = None,
) -> AttentionMaps:
    """A map alone: no values, no attention output.

    Costs one pass over the scores of the chosen rows for ``"probability"`` and only the chosen columns for
    the other kinds, or with ``lse``. Differentiable through ``maps``. Arguments and errors are those of
    :func:`joint_attention`.

    Args:
        key: is read for ``"probability"`` without ``lse``, for the statistics and for image columns. None
            where it is not read, or in cross-attention.
        text_query: is read for text rows and for the statistics; None where it is not read.
        lse: natural log-sum-exp of the rows over all keys, bias included, from whoever computed it: float32
            (float64 for float64 tensors) [B, H, N] for image rows or [B, H, N + T], image rows first. It
            normalises a ``"probability"`` map; a row of -inf has read nothing, its entries are 0. The map is
            differentiable in it: one without a graph is a constant. Shards of keys merge exactly:
            ``torch.stack(parts).logsumexp(0)``.
    """
    tensors = {"query": query, "key": key, "text_query": text_query, "text_key": text_key}
    if text_query is None and statistics:
        raise ValueError("text_query=None, but statistics=True needs it: text rows count too")
    if not isinstance(maps, MapRequest):
        raise TypeError(f"maps={maps!r} must be a MapRequest")
    optional = {"key", "text_query"}
    return cast(AttentionMaps, _attend(tensors, optional, text_bias, scale, maps, statistics, lse))


def propagate(
    query: Tensor,
    key: Tensor,
    maps: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    hops: int = 1,
) -> Tensor:
    """Maps spread along the attention: mean over heads of softmax(scale * Q K^T), times the maps.

    No matrix of rows by keys exists. Differentiable in ``maps``; query, key and ``lse`` are constants.
    Under ``backend("reference")`` the reference computes it, otherwise ATen.

    Args:
        query: [B, N, H, D], float16, bfloat16, float32 or float64; any strides.
        key: [B, M, H, D], same dtype and device.
        maps: C numbers for each key, floating point [B, M, C].
        scale: factor of the scores, positive and finite; 1 / sqrt(D) when None.
        lse: natural log-sum-exp of the rows over more keys than these, float32 (float64 for float64
            queries) [B, H, N]: rows then sum to less than 1, and a row of -inf gives 0. None: over these
            keys alone.
        hops: how often, at least 1; above 1 needs M = N.

    Returns:
        float32 (float64 for float64 queries) [B, N, C].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and what does.
    """
    _check_tensors(_tensors_of({"query": query, "key": key}, set()), one_stream=False)
    wide = wide_dtype(query.dtype)
    _check_one("maps", maps, query, [query.shape[0], key.shape[1], None], DTYPES)
    if lse is not None:
        _check_one("lse", lse, query, [query.shape[0], query.shape[2], query.shape[1]], (wide,))
        _check_lse_values(lse)
    if isinstance(hops, bool) or not isinstance(hops, int) or hops < 1:
        raise ValueError(f"hops={hops!r} must be an integer of at least 1")
    if hops > 1 and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"hops={hops} needs as many keys as queries, got {key.shape[1]} and {query.shape[1]}; use hops=1"
        )
    run = reference.propagate if fallback.chosen == "reference" else affinity.propagate
    maps = maps.to(wide)
    for _ in range(hops):
        maps = run(
            query.detach(), key.detach(), maps, None if lse is None else lse.detach(), _factor(scale, query)
        )
    return maps


def key_average(query: Tensor, key: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The key that each row reads on average, softmax(scale * Q K^T) K, and the row's log-sum-exp.

    What :func:`row_divergence` and :func:`row_entropy` take. Not differentiable.

    Args:
        query: [B, N, H, D], float16, bfloat16, float32 or float64; any strides.
        key: [B, M, H, D], same dtype and device.
        scale: factor of the scores, positive and finite; 1 / sqrt(D) when None.

    Returns:
        The average [B, N, H, D] and the natural log-sum-exp [B, H, N], float32 (float64 for float64
        inputs), never rounded to the dtype of the inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and what does.
    """
    _check_tensors(_tensors_of({"query": query, "key": key}, set()), one_stream=False)
    run = reference.key_average if fallback.chosen == "reference" else affinity.key_average
    with torch.no_grad():
        average, lse = run(query, key, _factor(scale, query))
    return average, lse


def row_divergence(query: Tensor, kbar: Tensor, pairs: Tensor, *, scale: float | None = None) -> Tensor:
    """Symmetric Kullback-Leibler divergence, KL(a||b) + KL(b||a), of pairs of rows of the attention.

    It is ``scale * <q_a - q_b, kbar_a - kbar_b>``, a difference of differences, hence in float32 and at least
    0; its error is relative to ``scale |q_a - q_b| (|kbar_a| + |kbar_b|)``. Not differentiable.

    Args:
        query: [B, N, H, D], as given to :func:`key_average`.
        kbar: the average keys from there, [B, N, H, D].
        pairs: which rows, int64 [P, 2] on the same device, the same for all batch elements and heads.
        scale: as given to :func:`key_average`.

    Returns:
        In nats, [B, H, P], dtype of ``kbar``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and what does.
    """
    _check_tensors(_tensors_of({"query": query}, set()))
    _check_one("kbar", kbar, query, list(query.shape), (wide_dtype(query.dtype),))
    _check_one("pairs", pairs, query, [None, 2], (torch.int64,))
    if readable(pairs):
        outside = pairs[(pairs < 0) | (pairs >= query.shape[1])]
        if outside.numel():
            raise ValueError(
                f"pairs has the row {int(outside[0])} outside the {query.shape[1]} rows; "
                f"accepted: 0 to {query.shape[1] - 1}"
            )
    with torch.no_grad():
        first, second = pairs.unbind(1)
        wide = kbar.dtype
        d_query = query.index_select(1, first).to(wide) - query.index_select(1, second).to(wide)
        d_average = kbar.index_select(1, first) - kbar.index_select(1, second)
        products = (d_query * d_average).sum(dim=-1)  # [B, P, H]
        return products.mul(_factor(scale, query)).clamp_min(0.0).transpose(1, 2)


def row_entropy(query: Tensor, kbar: Tensor, lse: Tensor, *, scale: float | None = None) -> Tensor:
    """Entropy of every row of the attention, ``lse - scale * <q, kbar>``, at least 0. Not differentiable.

    Args:
        query: [B, N, H, D], as given to :func:`key_average`.
        kbar, lse: what it returned, [B, N, H, D] and [B, H, N].
        scale: as given to :func:`key_average`.

    Returns:
        In nats, [B, H, N], dtype of ``kbar``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and what does.
    """
    _check_tensors(_tensors_of({"query": query}, set()))
    wide = wide_dtype(query.dtype)
    _check_one("kbar", kbar, query, list(query.shape), (wide,))
    _check_one("lse", lse, query, [query.shape[0], query.shape[2], query.shape[1]], (wide,))
    with torch.no_grad():
        products = (query.to(wide) * kbar).sum(dim=-1).transpose(1, 2)
        return (lse - products * _factor(scale, query)).clamp_min(0.0)


def _attend(
    given: dict[str, Tensor | None],
    optional: set[str],
    text_bias: Tensor | None,
    scale: float | None,
    maps: MapRequest | None,
    statistics: bool,
    lse: Tensor | None,
    text_first: bool = False,
) -> JointAttention | AttentionMaps:
    for name, flag in (("statistics", statistics), ("text_first", text_first)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r} must be True or False")
    tensors = _autocast(_tensors_of(given, optional))
    _check_tensors(tensors)
    query, text_key = tensors["query"], tensors["text_key"]
    if maps is not None:
        if not isinstance(maps, MapRequest):
            raise TypeError(f"maps={maps!r} must be a MapRequest or None")
        maps.check({"image": query.shape[1], "text": text_key.shape[1]}, query.device)
        if maps.rows[0] == "text" and "text_query" not in tensors:
            raise ValueError(f"text_query is None, but maps.rows={maps.rows!r} needs it")
        if maps.columns[0] == "image" and "key" not in tensors:
            raise ValueError(f"key is None, but maps.columns={maps.columns!r} needs it")
    if text_bias is not None:
        _check_bias(text_bias, text_key)
    if lse is not None and maps is not None:
        _check_lse(lse, tensors, maps, statistics)
    text_rows = "text_value" in tensors or statistics or (maps is not None and maps.rows[0] == "text")
    inputs = Inputs(
        query=query,
        key=tensors.get("key"),
        value=tensors.get("value"),
        text_query=tensors.get("text_query") if text_rows else None,
        text_key=text_key,
        text_value=tensors.get("text_value"),
        text_value_for_image=tensors.get("text_value_for_image"),
        text_bias=text_bias,
    )
    factor = _factor(scale, query)
    # With a log-sum-exp, no attention is computed.
    name = fallback.chosen if lse is None or fallback.chosen == "reference" else "aten"
    return _attend_of(name, inputs)(inputs, factor, maps, statistics, lse, text_first)


def _tensors_of(given: dict[str, Tensor | None], optional: set[str]) -> dict[str, Tensor]:
    """Those that are given, of four axes."""
    tensors = {}
    for name, tensor in given.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected [batch, tokens, heads, head_dim]"
            )
        tensors[name] = tensor
    return tensors


def _autocast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    device = tensors["query"].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for name, tensor in tensors.items()
    }


def _check_tensors(tensors: dict[str, Tensor], one_stream: bool = True) -> None:
    query = tensors["query"]
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: float16, bfloat16, float32, float64")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, but query has {query.dtype}; cast them to one dtype"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but query is on {query.device}; move them together"
            )
        if tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: zero tokens")
        for axis, what in ((0, "batch size"), (2, "number of heads"), (3, "head dim")):
            if tensor.shape[axis] != query.shape[axis]:
                raise ValueError(
                    f"{name} has {what} {tensor.shape[axis]} (shape {list(tensor.shape)}), "
                    f"but query has {query.shape[axis]} (shape {list(query.shape)})"
                )
        if 0 in tensor.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: an axis of length zero")
        first = "text_key" if name.startswith("text_") else "query"
        if one_stream and tensor.shape[1] != tensors[first].shape[1]:
            raise ValueError(
                f"{name} has {tensor.shape[1]} tokens, but {first} has {tensors[first].shape[1]}; "
                "tensors of one stream have equal lengths"
            )


def _check_bias(text_bias: Tensor, text_key: Tensor) -> None:
    accepted = (
        f"accepted: float32 [B, T], here {list(text_key.shape[:2])}, values up to {LARGEST_BIAS} or -inf"
    )
    if not isinstance(text_bias, Tensor):
        raise TypeError(f"text_bias must be a tensor, got {type(text_bias).__name__}; {accepted}")
    if text_bias.dtype != torch.float32:
        remedy = (
            "; a mask becomes torch.where(mask, 0.0, -torch.inf)" if text_bias.dtype == torch.bool else ""
        )
        raise ValueError(f"text_bias has dtype {text_bias.dtype}; {accepted}{remedy}")
    if text_bias.shape != text_key.shape[:2]:
        raise ValueError(f"text_bias has shape {list(text_bias.shape)}; {accepted}")
    if text_bias.device != text_key.device:
        raise ValueError(f"text_bias is on {text_bias.device}, but text_key is on {text_key.device}")
    if text_bias.requires_grad:
        raise ValueError("text_bias requires grad, but it is not differentiable; detach it")
    if readable(text_bias):
        refused = text_bias[~(text_bias <= LARGEST_BIAS)]  # NaN, too
        if refused.numel():
            raise ValueError(f"text_bias has a value of {float(refused[0])}; {accepted}")


def _check_lse(lse: Tensor, tensors: dict[str, Tensor], maps: MapRequest, statistics: bool) -> None:
    if maps.kind != "probability":
        raise ValueError(f"lse is given, but a map of kind={maps.kind!r} does not use it; omit it")
    if statistics:
        raise ValueError("lse is given, but statistics=True computes the attention anew; omit one of them")
    query = tensors["query"]
    batch, image_rows, heads, _ = query.shape
    both = [batch, heads, image_rows + tensors["text_key"].shape[1]]
    shapes = [both] if maps.rows[0] == "text" else [[batch, heads, image_rows], both]
    dtype = wide_dtype(query.dtype)
    accepted = f"accepted: {dtype} {' or '.join(map(str, shapes))} on {query.device}"
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a tensor, got {type(lse).__name__}; {accepted}")
    if list(lse.shape) not in shapes or lse.dtype != dtype or lse.device != query.device:
        raise ValueError(f"lse is {lse.dtype} {list(lse.shape)} on {lse.device}; {accepted}")
    _check_lse_values(lse)


def _check_lse_values(lse: Tensor) -> None:
    if readable(lse):
        refused = lse.detach()[~(lse < torch.inf)]  # NaN, too
        if refused.numel():
            raise ValueError(f"lse has a value of {float(refused[0])}; accepted: finite numbers and -inf")


def _check_one(
    name: str, tensor: Tensor, query: Tensor, shape: list[int | None], dtypes: tuple[torch.dtype, ...]
) -> None:
    """One tensor beside the queries; an axis of None is at least 1."""
    shown = f"[{', '.join('any' if length is None else str(length) for length in shape)}]"
    kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    accepted = f"accepted: {kinds} {shown} on {query.device}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}; {accepted}")
    fits = len(shape) == tensor.dim() and all(
        actual == wanted or (wanted is None and actual > 0)
        for actual, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes or tensor.device != query.device:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; {accepted}")


def _factor(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale={scale!r} must be a number or None")
    if not _FLOAT32.tiny <= scale <= _FLOAT32.max:
        raise ValueError(
            f"scale={scale!r} must be a positive finite float32; None is 1 / sqrt(head dim), the usual one"
        )
    return float(scale)


def provider_identity(device: torch.device | str) -> str | None:
    """Who computes attention on a device where it is not the usual choice, for the settings of a resumed run.

    Providers differ in the last digits. A fall-back after a failed compilation is not part of it.
    """
    return measured.summary(torch.device(device)) if fallback.chosen == "auto" else fallback.chosen


def _attend_of(name: str, inputs: Inputs) -> Attend:
    """The function of the backend ``name`` for a call."""
    if name == "auto":
        name = _automatic(inputs)
    elif (reason := refusal(name, inputs)) is not None:
        raise ValueError(f'backend("{name}") cannot run this: {reason}; backend("aten") can')
    if name == "triton":
        from .triton import backend as triton

        return triton.attend
    if name in providers.ATTEND:
        return providers.ATTEND[name]
    return aten.attend if name == "aten" else reference.attend


def _automatic(inputs: Inputs) -> str:
    """The provider measured fastest, else Triton on a GPU that it supports, else ATen."""
    query = inputs.query
    if inputs.text_value is not None:
        tokens = query.shape[1] + inputs.text_key.shape[1]
        training = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in inputs.tensors()
        )
        name = measured.fastest(query.device, query.shape[-1], tokens, training)
        if name == "aten" or (name in providers.PROVIDERS and refusal(name, inputs) is None):
            return name
    if query.device.type != "cuda":
        return "aten"
    reason = refusal("triton", inputs)
    if reason is not None and not torch.compiler.is_compiling():
        _log_refusal(reason)
    return "triton" if reason is None else "aten"


@cache
def _log_refusal(reason: str) -> None:
    """Once for each reason."""
    log.debug("ATen computes what Triton cannot: %s", reason)


def refusal(name: str, inputs: Inputs) -> str | None:
    """Why the backend ``name`` cannot take a call, or None if it can."""
    if name in providers.PROVIDERS:
        return providers.refusal(name, inputs)
    if name != "triton":
        return None
    try:
        from .triton import backend as triton
    except ImportError as error:
        return f"{error}; torch for CUDA or ROCm installs Triton, elsewhere `pip install triton` does"
    return triton.refusal(inputs.query)
