"""The specification: against a plain softmax written down independently, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.testing import attention_inputs
from seg4diff.kernels.types import AttentionMaps, MapRequest

KINDS = ["probability", "logit", "text_probability"]
HEADS = ["mean", "each"]


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    with backend("reference"):
        yield


def by_hand(inputs: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Every quantity of `design` as loops over batch, heads and rows: one softmax at a time."""
    q, k, v = inputs["query"], inputs["key"], inputs["value"]
    tq, tk, tv = inputs["text_query"], inputs["text_key"], inputs["text_value"]
    edited = inputs.get("text_value_for_image", tv)
    batch, tokens, heads, _ = q.shape
    text = tk.shape[1]
    found = {
        "image": torch.zeros_like(q),
        "text": torch.zeros_like(tq),
        "probability": q.new_zeros(batch, heads, tokens, text),
        "logit": q.new_zeros(batch, heads, tokens, text),
        "text_probability": q.new_zeros(batch, heads, tokens, text),
        "image_to_text": q.new_zeros(batch, heads, tokens),
        "text_to_text": q.new_zeros(batch, heads, text),
        "lse": q.new_zeros(batch, heads, tokens + text),
    }
    for b in range(batch):
        for h in range(heads):
            for n in range(tokens):
                to_image = torch.stack([scale * q[b, n, h].dot(k[b, m, h]) for m in range(tokens)])
                to_text = torch.stack([scale * q[b, n, h].dot(tk[b, t, h]) for t in range(text)])
                weights, text_weights = to_image.exp(), to_text.exp()
                total = weights.sum() + text_weights.sum()
                found["image"][b, n, h] = (weights @ v[b, :, h] + text_weights @ edited[b, :, h]) / total
                found["probability"][b, h, n] = text_weights / total
                found["logit"][b, h, n] = to_text
                found["text_probability"][b, h, n] = text_weights / text_weights.sum()
                found["image_to_text"][b, h, n] = text_weights.sum() / total
                found["lse"][b, h, n] = total.log()
            for t in range(text):
                weights = torch.stack([(scale * tq[b, t, h].dot(k[b, m, h])).exp() for m in range(tokens)])
                text_weights = torch.stack(
                    [(scale * tq[b, t, h].dot(tk[b, s, h])).exp() for s in range(text)]
                )
                total = weights.sum() + text_weights.sum()
                found["text"][b, t, h] = (weights @ v[b, :, h] + text_weights @ tv[b, :, h]) / total
                found["text_to_text"][b, h, t] = text_weights.sum() / total
                found["lse"][b, h, tokens + t] = total.log()
    found["image_value_norm"] = v.square().sum(dim=-1).sqrt().transpose(1, 2)
    found["text_value_norm"] = tv.square().sum(dim=-1).sqrt().transpose(1, 2)
    return found


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda each: each.mean(dim=1),
    "each": lambda each: each,
}


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_against_loops(edited: bool, scale: float | None) -> None:
    inputs = attention_inputs(2, 5, 4, 3, 8, torch.float64, edited=edited)
    expected = by_hand(inputs, 8**-0.5 if scale is None else scale)
    for kind in KINDS:
        for heads in HEADS:
            request = MapRequest(kind, heads, columns=("text", slice(1, 3)))  # type: ignore[arg-type]
            result = joint_attention(**inputs, scale=scale, maps=request, statistics=True)
            torch.testing.assert_close(result.maps, REDUCTIONS[heads](expected[kind])[..., 1:3])
    for name in ("image", "text", "lse"):
        torch.testing.assert_close(getattr(result, name), expected[name])
    for name in ("image_to_text", "text_to_text", "image_value_norm", "text_value_norm"):
        torch.testing.assert_close(getattr(result.statistics, name), expected[name])


def test_attention_masses_of_a_row_sum_to_one() -> None:
    """The mass on image columns, counted by values of one there and zero on the text."""
    inputs = attention_inputs(1, 7, 5, 2, 8, torch.float64)
    counting = {**inputs, "value": torch.ones_like(inputs["value"]), "text_value": 0 * inputs["text_value"]}
    result = joint_attention(**counting, statistics=True)
    on_image = result.image[..., 0].transpose(1, 2), result.text[..., 0].transpose(1, 2)
    for mass, on_text in zip(
        on_image, (result.statistics.image_to_text, result.statistics.text_to_text), strict=True
    ):
        torch.testing.assert_close(mass + on_text, torch.ones_like(mass))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Any, heads: Any) -> None:
    """Outputs and map together, by finite differences, for all seven inputs."""
    inputs = attention_inputs(1, 5, 3, 2, 4, torch.float64, edited=True)

    def outputs(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        result = joint_attention(
            *tensors[:6],
            text_value_for_image=tensors[6],
            maps=MapRequest(kind, heads, columns=("text", slice(0, 2))),
        )
        return result.image, result.text, result.maps

    assert torch.autograd.gradcheck(outputs, tuple(t.requires_grad_() for t in inputs.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_maps_alone_are_the_maps(kind: Any) -> None:
    inputs = attention_inputs(1, 5, 3, 2, 8, torch.float64)
    streams = [inputs[name] for name in ("query", "key", "text_query", "text_key")]
    request = MapRequest(kind)
    alone = attention_maps(*streams, maps=request)
    assert isinstance(alone, AttentionMaps)
    assert torch.equal(alone.maps, joint_attention(**inputs, maps=request).maps)


def test_half_precision_is_rounded_once() -> None:
    inputs = attention_inputs(1, 9, 4, 2, 16, torch.bfloat16)
    exact = joint_attention(**{n: t.double() for n, t in inputs.items()})
    result = joint_attention(**inputs)
    assert torch.equal(result.image, exact.image.bfloat16())
