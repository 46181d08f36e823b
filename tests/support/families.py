"""One tiny model of every supported family, and where its image and text tokens lie, written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import tiny


@dataclass(frozen=True)
class Family:
    """A transformer, arguments of a call, and what an attention sees of them.

    Attributes:
        name: of the case.
        transformer: builds the model.
        inputs: arguments of a call of two rows on a 4 x 6 grid with 9 text tokens.
        image: positions of the 24 tokens of the generated image in the sequence.
        text: positions of the 9 text tokens.
        tokens: length of the sequence.
        layers: number of layers.
    """

    name: str
    transformer: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    image: slice
    text: slice
    tokens: int
    layers: int


FAMILIES = (
    Family("sd3", tiny.transformer, tiny.transformer_inputs, slice(0, 24), slice(24, 33), 33, 3),
    Family(
        "sd3.5",
        lambda: tiny.transformer(dual=(0, 1), qk_norm="rms_norm"),
        tiny.transformer_inputs,
        slice(0, 24),
        slice(24, 33),
        33,
        3,
    ),
    Family("flux", tiny.flux_transformer, tiny.flux_inputs, slice(9, 33), slice(0, 9), 33, 4),
    Family(
        "flux kontext",
        lambda: tiny.flux_transformer(guidance=True),
        lambda: {**tiny.flux_inputs(reference=10), "guidance": torch.full((2,), 3.5)},
        slice(9, 33),
        slice(0, 9),
        43,
        4,
    ),
)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@contextmanager
def attention_calls() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Queries and keys [B, H, S, D] of every call of PyTorch's attention, in the order of the calls."""
    found: list[tuple[Tensor, Tensor]] = []
    stock = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append((query.detach(), key.detach()))
        return stock(query, key, *args, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = stock


def exact_maps(family: Family, transformer: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Image-to-text probabilities [B, H, 24, 9] of every layer of a stock forward, softmax in float64.

    From what the stock processors hand to PyTorch's attention; shares no code with the library.
    """
    with attention_calls() as calls, torch.no_grad():
        transformer(**inputs)
    joint = [(q, k) for q, k in calls if q.shape[2] == k.shape[2] == family.tokens]
    assert len(joint) == family.layers
    maps = []
    for query, key in joint:
        scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
        maps.append(scores.softmax(dim=-1)[:, :, family.image, family.text])
    return maps


def exact_outputs(family: Family, transformer: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Attention outputs [B, 24, H D] of the image tokens in every layer of a stock forward, in float64."""
    outputs = []
    stock = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == family.tokens:
            q, k, v = query.double(), key.double(), value.double()
            exact = (q @ k.mT / query.shape[-1] ** 0.5).softmax(dim=-1) @ v
            outputs.append(exact[:, :, family.image].transpose(1, 2).flatten(2))
        return stock(query, key, value, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        with torch.no_grad():
            transformer(**inputs)
    finally:
        F.scaled_dot_product_attention = stock
    assert len(outputs) == family.layers
    return outputs
