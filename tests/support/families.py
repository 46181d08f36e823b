"""One tiny model of every supported family, and where its image and text tokens lie, written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import models, tiny

Positions = slice | tuple[Tensor, ...]


def take(tensor: Tensor, positions: Positions, dim: int) -> Tensor:
    """Positions along an axis of [B, ...], which may differ from row to row."""
    if isinstance(positions, slice):
        return tensor[(slice(None),) * dim + (positions,)]
    return torch.stack([row.index_select(dim - 1, own) for row, own in zip(tensor, positions, strict=True)])


@dataclass(frozen=True)
class Family:
    """A transformer, arguments of a call, and what an attention sees of them.

    Attributes:
        name: of the case.
        transformer: builds the model.
        inputs: arguments of a call of two rows on a 4 x 6 grid with 9 text tokens.
        image: positions of the 24 tokens of the generated image in the sequence, of every row where they
            differ.
        text: positions of the text tokens, likewise.
        tokens: length of the sequence.
        layers: number of layers.
        compiles: whether the stock model compiles into one graph.
        keys: tokens that are read, where they are not all (cross-attention).
    """

    name: str
    transformer: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    image: Positions
    text: Positions
    tokens: int
    layers: int
    compiles: bool = True
    keys: int | None = None

    def is_joint(self, query: Tensor, key: Tensor) -> bool:
        """Whether these [B, H, S, D] are of the attention that has the maps."""
        return query.shape[2] == self.tokens and key.shape[2] == (self.keys or self.tokens)


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
    Family("qwen", tiny.qwen_transformer, tiny.qwen_inputs, slice(9, 33), slice(0, 9), 33, 3),
    Family(
        "qwen edit",
        lambda: tiny.qwen_transformer(zero_cond_t=True),
        lambda: tiny.qwen_inputs(reference=10, masked=True),
        slice(9, 33),
        slice(0, 9),
        43,
        3,
    ),
    Family("z-image", tiny.z_image_transformer, tiny.z_image_inputs, slice(0, 24), slice(32, 96), 96, 3),
    Family("krea 2", tiny.krea2_transformer, tiny.krea2_inputs, slice(9, 33), slice(0, 9), 33, 3),
    Family(
        "lumina 2",
        tiny.lumina2_transformer,
        tiny.lumina2_inputs,
        (torch.arange(9, 33), torch.arange(5, 29)),
        (torch.arange(9), torch.tensor([*range(5), *range(29, 33)])),
        33,
        3,
        compiles=False,
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
    Family("flux.2", models.flux2_transformer, models.flux2_inputs, slice(9, 33), slice(0, 9), 33, 4),
    Family(
        "flux.2 reference",
        lambda: models.flux2_transformer(guidance=True),
        lambda: {**models.flux2_inputs(reference=10), "guidance": torch.full((2,), 4.0)},
        slice(9, 33),
        slice(0, 9),
        43,
        4,
    ),
    Family("longcat", models.longcat_transformer, models.longcat_inputs, slice(9, 33), slice(0, 9), 43, 4),
    Family("ovis", models.ovis_transformer, models.inputs, slice(9, 33), slice(0, 9), 33, 4),
    Family("bria", models.bria_transformer, models.bria_inputs, slice(9, 33), slice(0, 9), 33, 4),
    Family("auraflow", models.auraflow_transformer, models.latent_inputs, slice(17, 41), slice(0, 17), 41, 4),
    Family("chroma", models.chroma_transformer, models.chroma_inputs, slice(9, 33), slice(0, 9), 33, 4),
    Family(
        "chroma without a mask",
        models.chroma_transformer,
        lambda: models.chroma_inputs(masked=False),
        slice(9, 33),
        slice(0, 9),
        33,
        4,
    ),
    Family(
        "cogview4 with a mask",
        models.cogview4_transformer,
        lambda: models.cogview4_inputs(masked=True),
        slice(9, 33),
        slice(0, 9),
        33,
        4,
    ),
    Family("cogview4", models.cogview4_transformer, models.cogview4_inputs, slice(9, 33), slice(0, 9), 33, 4),
    Family("pixart", tiny.pixart_transformer, tiny.pixart_inputs, slice(0, 24), slice(0, 9), 24, 3, keys=9),
    Family("sana", tiny.sana_transformer, tiny.sana_inputs, slice(0, 24), slice(0, 9), 24, 3, keys=9),
)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call in another dtype, but for masks, shapes and positions."""

    def other(value: Any) -> Any:
        if isinstance(value, list):
            return [other(entry) for entry in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: other(value) for name, value in inputs.items()}


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


class Call(NamedTuple):
    """What a stock processor hands to PyTorch's attention: [B, H, S, D] each, and a mask or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    def probabilities(self) -> Tensor:
        """The whole matrix [B, H, S, S] in float64."""
        scores = self.query.double() @ self.key.double().mT / self.query.shape[-1] ** 0.5
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -torch.inf)
        elif self.mask is not None:
            scores = scores + self.mask.double()
        return scores.softmax(dim=-1)


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Every call of PyTorch's attention with its mask, in the order of the calls."""
    calls: list[Call] = []
    stock = F.scaled_dot_product_attention

    def spy(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        calls.append(Call(query, key, value, attn_mask))
        return stock(query, key, value, attn_mask, *args, **kwargs)

    F.scaled_dot_product_attention = spy
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = stock


def joint_calls(family: Family, transformer: Any, inputs: dict[str, Any]) -> list[Call]:
    """The joint attention of every layer of a stock forward; shares no code with the library."""
    with recorded_calls() as calls, torch.no_grad():
        transformer(**inputs)
    joint = [call for call in calls if family.is_joint(call.query, call.key)]
    assert len(joint) == family.layers
    return joint


def exact_maps(family: Family, transformer: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Image-to-text probabilities [B, H, N, T] of every layer of a stock forward, softmax in float64."""
    calls = joint_calls(family, transformer, inputs)
    return [take(take(call.probabilities(), family.image, 2), family.text, 3) for call in calls]


def exact_outputs(family: Family, transformer: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Attention outputs [B, N, H D] of the image tokens in every layer of a stock forward, in float64."""
    calls = joint_calls(family, transformer, inputs)
    outputs = [call.probabilities() @ call.value.double() for call in calls]
    return [take(output, family.image, 2).transpose(1, 2).flatten(2) for output in outputs]
