"""Chroma: blocks of Flux's kind over [text; image] tokens, text of T5.

Every token has a number, 1 for the prompt with one token of padding and for the image, 0 for other padding;
the product of two tokens' numbers is added to their score. So padding is read, if less: a map has columns for
it, and special tokens may be asked for. Both branches of guidance are encoded in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seg4diff.backbones.base import BlockList, EncodedText, Pipeline, TransformerCall
from seg4diff.backbones.flux import DOUBLE, Packed
from seg4diff.backbones.single import SingleEncoder

_MASK = "attention_mask"


@dataclass(frozen=True)
class Chroma(Packed, SingleEncoder):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        call = super().read_call(transformer, arguments)
        return replace(call, layout=replace(call.layout, added=True))

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        arguments = super().arguments(transformer, latents, sigma, text)
        mask = text[_MASK]
        image = mask.new_ones(arguments["hidden_states"].shape[:2])
        return {**arguments, _MASK: torch.cat([mask, image], dim=1)}

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Any]:
        return {"encoder_hidden_states": output[0], _MASK: output[2]}

    def empty_text(self, transformer: nn.Module, batch: int, text_tokens: int) -> dict[str, Tensor]:
        text = super().empty_text(transformer, batch, text_tokens)
        return {**text, _MASK: torch.ones(batch, text_tokens)}

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        output = self._encoded(pipe, prompts, guided=True)
        names = {"prompt_embeds": 0, "prompt_attention_mask": 2}
        negative = {f"negative_{name}": place + 3 for name, place in names.items()}
        return {name: output[place] for name, place in {**names, **negative}.items()}

    def encode_again(
        self, pipe: Pipeline, encoded: EncodedText, change: Callable[[str], str]
    ) -> dict[str, Any]:
        text = super().encode_again(pipe, encoded, change)
        raise NotImplementedError(
            f"Chroma reads {text[_MASK].shape[1]} text tokens with a mask over text and image, to which no "
            "row of another prompt can be added; use drop=, swap= or weights= in place of replace="
        )


BACKBONE = Chroma(
    name="Chroma",
    transformer="ChromaTransformer2DModel",
    pipeline="ChromaPipeline",
    lists=(
        DOUBLE,
        BlockList(
            "single_transformer_blocks",
            returns=("hidden_states",),
            unneeded=("proj_mlp", "act_mlp", "proj_out"),
        ),
    ),
    encoder="t5",
    negative=3,
)  # fmt: skip
