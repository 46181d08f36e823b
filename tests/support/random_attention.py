"""Random calls of the ATen backend against float64: ``python -m tests.support.random_attention 3000``.

A case draws its shape, dtype, layout, scale, bias, streams, relation and entry point from its number alone.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.testing import attention_inputs, exact_attention, exact_maps
from seg4diff.kernels.types import MapRequest

DTYPES = [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]


def call_of(number: int) -> tuple[bool, dict[str, Any]]:
    """Whether the call has values, and its arguments."""
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    batch, tokens, text = draw.randint(1, 3), draw.randint(1, 40), draw.randint(1, 20)
    heads, width = draw.randint(1, 4), draw.choice([8, 16, 24, 40, 64])
    with_values = draw.random() < 0.6
    inputs = attention_inputs(
        batch, tokens, text, heads, width, draw.choice(DTYPES),
        edited=draw.random() < 0.5, sharpness=draw.choice([0.3, 1.0, 2.0, 4.0]), seed=number,
    )  # fmt: skip
    if draw.random() < 0.5:  # a tensor of another layout, the rest of its storage NaN
        name = draw.choice(list(inputs))
        wide = torch.full((*inputs[name].shape[:3], 2 * width), torch.nan, dtype=inputs[name].dtype)
        wide[..., ::2] = inputs[name]
        inputs[name] = wide[..., ::2]
    call: dict[str, Any] = dict(inputs)
    if draw.random() < 0.3:
        call["key"] = call["value"] = None
    if draw.random() < 0.3:
        call["text_query"] = None
    if draw.random() < 0.6:
        bias = torch.randn(batch, text, generator=generator) * draw.choice([0.1, 3.0])
        hidden = torch.rand(batch, text, generator=generator) < draw.choice([0.0, 0.3, 0.9, 1.0])
        call["text_bias"] = bias.masked_fill(hidden, -torch.inf)
    if draw.random() < 0.4:
        call["scale"] = draw.uniform(0.05, 1.5) * width**-0.5
    call["maps"] = request_of(draw, call, tokens, text)
    if with_values and draw.random() < 0.2:
        call["maps"] = None
    call["statistics"] = draw.random() < 0.4 and (with_values or call["text_query"] is not None)
    if not with_values:
        for name in ("value", "text_value", "text_value_for_image"):
            call.pop(name, None)
    return with_values, call


def request_of(draw: random.Random, call: dict[str, Any], tokens: int, text: int) -> MapRequest:
    lengths = {"image": tokens, "text": text}

    def some(stream: str) -> tuple[Any, slice | Tensor]:
        length = lengths[stream]
        if draw.random() < 0.3:
            return stream, torch.tensor([draw.randrange(length) for _ in range(draw.randint(1, 5))])
        start = draw.randrange(length)
        return stream, draw.choice([slice(None), slice(start, draw.randint(start + 1, length))])

    rows = "text" if call["text_query"] is not None and draw.random() < 0.4 else "image"
    columns = "image" if call["key"] is not None and draw.random() < 0.4 else "text"
    kind: Any = draw.choice(["probability", "probability", "logit", "text_probability"])
    if columns == "image" and kind == "text_probability":
        kind = "probability"
    return MapRequest(kind, draw.choice(["mean", "each"]), some(rows), some(columns))


def results(attend: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, map, log-sum-exp, masses and gradients."""
    given = {n: a.detach().requires_grad_() if is_stream(n, a) else a for n, a in call.items()}
    result = attend(**given)
    found = {part: getattr(result, part, None) for part in ("image", "text", "maps", "lse")}
    if result.statistics is not None:
        found["image_to_text"] = result.statistics.image_to_text
        found["text_to_text"] = result.statistics.text_to_text
    found = {part: output for part, output in found.items() if output is not None}
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for part in ("image", "text", "maps"):
        if part in found:
            upstream = torch.randn(found[part].shape, generator=generator)
            loss = loss + (found[part].double() * upstream).sum()
    leaves = {n: a for n, a in given.items() if is_stream(n, a)}
    if loss.requires_grad:
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        found.update({f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return {part: output.detach() for part, output in found.items()}


def is_stream(name: str, argument: Any) -> bool:
    return isinstance(argument, Tensor) and name != "text_bias"


def check(number: int) -> None:
    """Raise ``AssertionError`` where the backend leaves the error that its dtype allows."""
    with_values, call = call_of(number)
    query, bias = call["query"], call.get("text_bias")
    with backend("aten"):
        found = results(joint_attention if with_values else attention_maps, call)
    doubled = {n: a.double() if is_stream(n, a) else a for n, a in call.items()}
    exact = results(exact_attention if with_values else exact_maps, doubled)
    assert found.keys() == exact.keys(), (number, found.keys(), exact.keys())

    # Scores are sums of products: their error, and so that of an exponential, grows with their terms.
    factor = call.get("scale") or query.shape[-1] ** -0.5
    rows = [r for r in (query, call["text_query"]) if r is not None]
    keys = [k for k in (call["key"], call["text_key"]) if k is not None]
    largest = factor * max(float(r.double().norm(dim=-1).max()) for r in rows)
    largest *= max(float(k.double().norm(dim=-1).max()) for k in keys)
    shift = 0.0 if bias is None else float(bias.nan_to_num(neginf=0.0).abs().max())
    wide = torch.finfo(found["maps" if "maps" in found else "lse"].dtype).eps
    exponentials = (8 + 4 * (largest + shift)) * wide
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half:  # PyTorch's flash attention on a CPU has exponentials of 20 bits there
        exponentials = max(exponentials, 2e-4)
    for part, output in found.items():
        true = exact[part]
        assert output.shape == true.shape, (number, part)
        empty = true == -torch.inf
        assert torch.equal(empty, output == -torch.inf), (number, part)
        error = (output.double() - true).masked_fill(empty, 0.0).abs()
        assert error.isfinite().all(), (number, part)
        zero = true == 0
        if part in ("maps", "image", "text"):
            assert not output[zero].any(), (number, part, "an entry must be exactly 0")
        size = true.masked_fill(empty, 0.0).abs()
        top = float(size.max()) if size.numel() else 0.0
        if part == "maps" and call["maps"].kind == "logit":
            allowed = 8 * wide * largest * torch.ones_like(size)
        elif part in ("maps", "image_to_text", "text_to_text"):
            allowed = exponentials * size + 1e-37
        elif part == "lse":
            allowed = exponentials * torch.ones_like(size) + 4 * wide * size
        else:
            values = max(
                [float(call[n].abs().max()) for n in ("value", "text_value", "text_value_for_image")
                 if call.get(n) is not None] or [1.0]
            )  # fmt: skip
            rounding = torch.finfo(output.dtype).eps
            bound = 4 * max(rounding, exponentials) * max(top, values)
            if part.startswith("d_"):  # sums over all rows, of terms that cancel
                bound *= 4 * max(1.0, largest) * sum(r.shape[1] for r in rows) ** 0.5
            allowed = bound * torch.ones_like(size)
        worst = float((error / allowed).max()) if error.numel() else 0.0
        assert worst <= 1, f"case {number}: {part} has {worst:.2g} times the error allowed; {describe(call)}"


def describe(call: dict[str, Any]) -> str:
    return ", ".join(
        f"{n}={list(a.shape)} {a.dtype}" if isinstance(a, Tensor) else f"{n}={a}" for n, a in call.items()
    )


if __name__ == "__main__":
    first, count = (int(sys.argv[2]) if len(sys.argv) > 2 else 0), int(sys.argv[1])
    failures = 0
    for number in range(first, first + count):
        try:
            check(number)
        except AssertionError as failure:
            failures += 1
            print(failure)
    print(f"{count} cases, {failures} failures")
    sys.exit(failures > 0)
