"""Stable Diffusion 3 and 3.5: joint blocks over [image; text] tokens, two CLIP encoders and an optional T5.

Text tokens are the 77 of CLIP followed by those of T5 (zeros where T5 was left out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seg4diff.backbones.base import (
    Backbone,
    BlockList,
    EncodedText,
    Layout,
    Pipeline,
    TransformerCall,
    as_texts,
)
from seg4diff.backbones.text import TextSpan

_CLIP_TOKENS = 77
_T5_TOKENS = 256


@dataclass(frozen=True)
class StableDiffusion3(Backbone):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        batch, _, height, width = arguments["hidden_states"].shape
        patch = transformer.config.patch_size  # type: ignore[union-attr]
        grid = (height // patch, width // patch)
        tokens = grid[0] * grid[1]
        text = arguments["encoder_hidden_states"]
        return TransformerCall(
            grid=grid,
            layout=Layout(False, image_tokens=tokens, text_tokens=text.shape[1], generated=tokens),
            text=text,
            batch=batch,
            timestep=arguments.get("timestep"),
            skipped_layers=frozenset(arguments.get("skip_layers") or ()),
        )

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        return {"hidden_states": latents, "timestep": sigma * self.timestep_unit, **text}

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoded = pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens(pipe),
        )
        dtype = pipe.transformer.dtype
        return {name: value.to(dtype) for name, value in self.text_arguments(encoded).items()}

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": output[0], "pooled_projections": output[2]}

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        encoded = pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=True,
            max_sequence_length=self._t5_tokens(pipe),
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")
        return dict(zip((*names, "negative_pooled_prompt_embeds"), encoded, strict=True))

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        clip = pipe.tokenizer_max_length
        total = clip + self._t5_tokens(pipe) if text_tokens is None else text_tokens
        spans = [TextSpan("clip", pipe.tokenizer, 0, clip, special=2)]
        if pipe.text_encoder_3 is not None:
            spans.append(TextSpan("t5", pipe.tokenizer_3, clip, total - clip, special=1))
        return tuple(spans)

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        clip = as_texts(arguments.get("prompt"))
        t5 = as_texts(arguments.get("prompt_3")) or clip
        return EncodedText(
            texts=tuple({"clip": c, "t5": t} for c, t in zip(clip, t5, strict=False)),
            embeddings=output[0],
            guided=bool(arguments.get("do_classifier_free_guidance")) and output[1] is not None,
            arguments=arguments,
        )

    def call_defaults(self, pipe: Pipeline) -> dict[str, Any]:
        return {"max_sequence_length": self._t5_tokens(pipe)}

    def largest_size(self, pipe: Pipeline) -> int:
        return int(pipe.transformer.config.pos_embed_max_size * self.pixel_multiple(pipe))

    def _t5_tokens(self, pipe: Pipeline) -> int:
        # Without T5 its slot is filled with zeros: 77 of them, as the public code of the paper has it.
        return _CLIP_TOKENS if pipe.text_encoder_3 is None else _T5_TOKENS


_SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

BACKBONE = StableDiffusion3(
    name="Stable Diffusion 3",
    transformer="SD3Transformer2DModel",
    pipeline="StableDiffusion3Pipeline",
    lists=(
        BlockList(
            "transformer_blocks",
            returns=("encoder_hidden_states", "hidden_states"),
            unneeded=("attn2", "ff", "ff_context", "attn.to_out.0", "attn.to_add_out"),
        ),
    ),
    guidance="one forward",
    # Layer 9 of 24 is the semantic expert of SD3-medium, and the best one of SD3.5 (Seg4Diff, figure 8 and
    # appendix C).
    experts={24: (9,)},
    experts_source="[Seg4Diff](https://arxiv.org/abs/2509.18096), figure 8",
    optional=("text_encoder_3", "tokenizer_3"),
    text_tokens=2 * _CLIP_TOKENS,
    name_tokens=_CLIP_TOKENS,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    configurations={"stabilityai/stable-diffusion-3-medium-diffusers": _SD3_MEDIUM},
)  # fmt: skip
