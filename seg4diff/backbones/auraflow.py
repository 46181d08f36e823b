"""AuraFlow: joint, then single-stream blocks over [registers; text; image] tokens.

The text stream begins with register tokens, which the model learned and which stand for no word: words are
found behind them, and statistics count them as text. Text is that of T5, its padding zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seg4diff.backbones.base import BlockList, EncodedText, Layout, Pipeline, TransformerCall
from seg4diff.backbones.single import SingleEncoder
from seg4diff.backbones.text import TextSpan

_REGISTERS = 8
_NATIVE = 1024  # pixels; the pipeline's default, which the configuration does not tell


@dataclass(frozen=True)
class AuraFlow(SingleEncoder):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        latents, text, timestep = (
            arguments.get(name) for name in ("hidden_states", "encoder_hidden_states", "timestep")
        )
        assert latents is not None
        assert text is not None
        height, width = (side // self.patch for side in latents.shape[-2:])
        tokens = height * width
        return TransformerCall(
            grid=(height, width),
            layout=Layout(True, tokens, _REGISTERS + text.shape[1], tokens),
            text=text,
            batch=len(latents),
            timestep=None if timestep is None else timestep * (1000.0 / self.timestep_unit),
        )

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        return {"hidden_states": latents, "timestep": sigma * self.timestep_unit, **text}

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        output = self._encoded(pipe, prompts, guided=True)
        names = ("prompt_embeds", "prompt_attention_mask")
        return dict(zip((*names, *(f"negative_{name}" for name in names)), output, strict=True))

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        encoded = super().read_encoded(arguments, output)
        stream = torch.nn.functional.pad(encoded.embeddings, (0, 0, _REGISTERS, 0))
        return replace(encoded, embeddings=stream)

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        length = self.text_tokens if text_tokens is None else text_tokens - _REGISTERS
        return (TextSpan(self.encoder, pipe.tokenizer, _REGISTERS, length, special=1),)

    def native_size(self, pipe: Pipeline) -> int:
        return min(_NATIVE, self.largest_size(pipe))

    def largest_size(self, pipe: Pipeline) -> int:
        return math.isqrt(pipe.transformer.config.pos_embed_max_size) * self.pixel_multiple(pipe)


BACKBONE = AuraFlow(
    name="AuraFlow",
    transformer="AuraFlowTransformer2DModel",
    pipeline="AuraFlowPipeline",
    lists=(
        BlockList(
            "joint_transformer_blocks",
            returns=("encoder_hidden_states", "hidden_states"),
            unneeded=("ff", "ff_context", "attn.to_out.0", "attn.to_add_out"),
        ),
        BlockList(
            "single_transformer_blocks", returns=("hidden_states",), unneeded=("ff", "attn.to_out.0")
        ),
    ),
    guidance="one forward",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    timestep_unit=1.0,
    encoder="t5",
    negative=2,
    text_tokens=256,
    name_tokens=256,
)  # fmt: skip
