"""PixArt alpha and sigma: cross-attention of image tokens to T5's text, whose padding is masked.

Diffusion with a variance-preserving noise schedule, not flow matching: the noise level is the share of the
schedule that the timestep has reached.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seg4diff.backbones.base import (
    PURE_NOISE,
    Backbone,
    BlockList,
    EncodedText,
    Layout,
    Pipeline,
    TransformerCall,
    as_texts,
)
from seg4diff.backbones.text import LowerCaseSpan, TextSpan


@dataclass(frozen=True)
class CrossAttention(Backbone):
    """What PixArt and SANA share; see `Backbone`. Text is lower-cased before it is encoded.

    Attributes:
        encoder: name of the text encoder.
    """

    encoder: str = "t5"

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        batch, _, height, width = arguments["hidden_states"].shape
        config: Any = transformer.config
        grid = (height // config.patch_size, width // config.patch_size)
        text, timestep = arguments["encoder_hidden_states"], arguments.get("timestep")
        tokens = grid[0] * grid[1]
        return TransformerCall(
            grid=grid,
            layout=Layout(False, tokens, text_tokens=text.shape[1], generated=tokens, cross=True),
            text=text,
            batch=batch,
            timestep=None if timestep is None else timestep / config.get("timestep_scale", 1.0),
        )

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoded = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        text = self.text_arguments(encoded)
        return {**text, "encoder_hidden_states": text["encoder_hidden_states"].to(pipe.transformer.dtype)}

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": output[0], "encoder_attention_mask": output[1]}

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        # 120 in PixArt alpha, 300 in sigma and SANA.
        own = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
        length = int(own) if text_tokens is None else text_tokens
        return (LowerCaseSpan(self.encoder, pipe.tokenizer, 0, length, special=1),)

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        given = as_texts(arguments.get("prompt"))
        return EncodedText(
            texts=()
            if arguments.get("prompt_embeds") is not None
            else tuple({self.encoder: t} for t in given),
            embeddings=output[0],
            guided=output[2] is not None,
            arguments=arguments,
        )

    def sigma(self, pipe: Pipeline, latents: Tensor, steps: int, index: int) -> Tensor:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        if not -len(scheduler.timesteps) <= index < len(scheduler.timesteps):
            raise ValueError(f"timestep index {index} is outside a schedule of {steps} steps")
        return self.levels(scheduler)[index % steps].to(latents.device, torch.float32).reshape(1)

    def levels(self, scheduler: Any) -> Tensor:
        """Noise levels in [0, 1] of a scheduler's timesteps."""
        levels: Tensor = scheduler.timesteps / PURE_NOISE
        return levels

    def native_size(self, pipe: Pipeline) -> int:
        return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


@dataclass(frozen=True)
class PixArt(CrossAttention):
    """See `Backbone`."""

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            height, width = (_PIXELS * side for side in latents.shape[-2:])
            rows = latents.new_ones(len(latents), 1)
            conditions["resolution"] = torch.cat([rows * height, rows * width], dim=1)
            conditions["aspect_ratio"] = rows * (height / width)
        return {
            "hidden_states": latents,
            "timestep": (sigma * self.timestep_unit).round().long(),
            "added_cond_kwargs": conditions,
            **text,
        }

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return output[:, : latents.shape[1]]  # the other half is the variance that the model has learned

    def noisy(self, pipe: Pipeline, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        kept = pipe.scheduler.alphas_cumprod[int((sigma * self.timestep_unit).round())].to(latents)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise


_PIXELS = 8  # along each side of a latent pixel

BACKBONE = PixArt(
    name="PixArt",
    transformer="PixArtTransformer2DModel",
    pipeline="PixArtSigmaPipeline",
    lists=(
        BlockList(
            "transformer_blocks",
            returns=("hidden_states",),
            unneeded=("ff", "attn2.to_out.0"),
            values=("attn2.to_v",),
            text_queries=(),
            attention="attn2",
        ),
    ),
    guidance="one forward",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    text_tokens=300,
    name_tokens=300,
    cross_attention=True,
)
