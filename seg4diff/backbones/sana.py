"""SANA: cross-attention of image tokens to Gemma's text, whose padding is masked; flow matching.

Its self-attention is linear and has no map. By default its pipeline puts an instruction before the prompt, of
which the transformer gets the last token alone; segmentation encodes prompts without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seg4diff.backbones.base import EncodedText, Pipeline
from seg4diff.backbones.pixart import BACKBONE as _PIXART
from seg4diff.backbones.pixart import CrossAttention
from seg4diff.backbones.text import LowerCaseSpan, TextSpan


class _Instructed(str):
    """A prompt, and the instruction that was put before it."""

    instruction = ""


@dataclass(frozen=True)
class _GemmaSpan(LowerCaseSpan):
    """Begin of text, then the last tokens of instruction and prompt together."""

    def offsets(self, prompt: str) -> list[tuple[int, int, int]]:
        instruction = getattr(prompt, "instruction", "").lower()
        if not instruction:
            return super().offsets(prompt)
        before = len(self.tokenizer(instruction).input_ids)
        found = self.tokenizer(
            instruction + prompt.lower(),
            max_length=before + self.length - 2,
            truncation=True,
            return_offsets_mapping=True,
        ).offset_mapping
        begin = len(instruction)
        return [
            (self.first + token - before + 2, start - begin, stop - begin)
            for token, (start, stop) in enumerate(found)
            if begin <= start < stop and prompt[start - begin : stop - begin].strip()
        ]


@dataclass(frozen=True)
class Sana(CrossAttention):
    """See `Backbone`."""

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        config: Any = transformer.config
        if config.guidance_embeds:
            raise NotImplementedError(
                "SANA-Sprint mixes images with noise by angles, which has no backbone yet; capture "
                "its pipeline while it generates, or segment with SANA"
            )
        timestep = sigma * self.timestep_unit * config.timestep_scale
        return {"hidden_states": latents, "timestep": timestep, **text}

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        encoded = super().read_encoded(arguments, output)
        for text in encoded.texts:
            prompt = _Instructed(text[self.encoder])
            prompt.instruction = "\n".join(arguments.get("complex_human_instruction") or ())
            text[self.encoder] = prompt  # type: ignore[index]
        return encoded

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        (span,) = super().text_spans(pipe, text_tokens)
        return (_GemmaSpan(span.encoder, span.tokenizer, span.first, span.length, span.special),)

    def call_defaults(self, pipe: Pipeline) -> dict[str, Any]:
        return {"complex_human_instruction": None}

    def levels(self, scheduler: Any) -> Tensor:
        sigmas: Tensor = scheduler.sigmas  # timesteps may be rounded
        return sigmas

    def latents(self, pipe: Pipeline, pixels: Tensor) -> Tensor:
        vae = pipe.vae
        encoded: Tensor = vae.encode(pixels.to(device=pipe._execution_device, dtype=vae.dtype)).latent
        return encoded * vae.config.scaling_factor


BACKBONE = Sana(
    name="SANA",
    transformer="SanaTransformer2DModel",
    pipeline="SanaPipeline",
    lists=_PIXART.lists,
    guidance="one forward",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    patch=1,
    text_tokens=300,
    name_tokens=300,
    cross_attention=True,
    encoder="gemma",
)
