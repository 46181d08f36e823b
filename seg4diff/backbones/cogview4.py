"""CogView4: joint blocks with one set of projections over [text; image] tokens.

Text tokens are those of a language model without a mask: padding on the left fills them to a multiple of
16, and is read. A prompt is encoded alone, so that its tokens do not depend on other prompts; prompts of
different lengths run in different forwards. The model's timestep is that before the shift of the noise
schedule. A mask of text tokens is added to scores; the pipeline gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seg4diff.backbones.base import PURE_NOISE, BlockList, EncodedText, Layout, Pipeline, TransformerCall
from seg4diff.backbones.single import SingleEncoder
from seg4diff.backbones.text import TextSpan

_MULTIPLE = 16  # of the number of text tokens
_PIXELS = 8  # of a latent along each axis


@dataclass(frozen=True)
class FilledSpan(TextSpan):
    """Text tokens that padding on the left fills to a multiple, whatever `length` is."""

    def _origin(self, tokens: Sequence[Any]) -> int:
        return self.first + -len(tokens) % _MULTIPLE


@dataclass(frozen=True)
class CogView4(SingleEncoder):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        height, width = (side // self.patch for side in latents.shape[-2:])
        tokens = height * width
        return TransformerCall(
            grid=(height, width),
            layout=Layout(True, tokens, text.shape[1], tokens, added=True),
            text=text,
            batch=len(latents),
            timestep=arguments.get("timestep"),
        )

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        shift = self.shift({}, (height // self.patch) * (width // self.patch), 0)
        size = latents.new_tensor([[_PIXELS * height, _PIXELS * width]]).expand(len(latents), -1)
        return {
            "hidden_states": latents,
            "timestep": PURE_NOISE / (1 + shift * (1 / sigma - 1)),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros_like(size),
            **text,
        }

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As `Backbone.encode_text`.

        Raises:
            ValueError: the prompts have different lengths.
        """
        alone = [super(CogView4, self).encode_text(pipe, [prompt]) for prompt in prompts]
        lengths = [found["encoder_hidden_states"].shape[1] for found in alone]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the prompts {list(prompts)} have {lengths} text tokens with their padding; CogView4 reads "
                "prompts of one length together"
            )
        return {name: torch.cat([found[name] for found in alone]) for name in alone[0]}

    def encode_each(self, pipe: Pipeline, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        alone = (self.encode_text(pipe, [prompt]) for prompt in prompts)
        return [{name: value[0] for name, value in found.items()} for found in alone]

    def encode_again(
        self, pipe: Pipeline, encoded: EncodedText, change: Callable[[str], str]
    ) -> dict[str, Tensor]:
        text = super().encode_again(pipe, encoded, change)
        own, found = encoded.embeddings.shape[1], text["encoder_hidden_states"].shape[1]
        if found != own:
            raise ValueError(
                f"the changed prompt has {found} text tokens with its padding and the prompt {own}; CogView4 "
                "reads prompts of one length together: make one longer or shorter"
            )
        return text

    def empty_text(self, transformer: nn.Module, batch: int, text_tokens: int) -> dict[str, Tensor]:
        config: Any = transformer.config
        return {"encoder_hidden_states": torch.zeros(batch, text_tokens, config.text_embed_dim)}

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        """As `Backbone.text_spans`.

        Raises:
            ValueError: the tokenizer pads on the right.
        """
        if pipe.tokenizer.padding_side != "left":
            raise ValueError(
                "the tokenizer pads on the right, which hides where a prompt of several begins; set "
                "pipe.tokenizer.padding_side = 'left', as the published model has it"
            )
        special = len(pipe.tokenizer("").input_ids)
        if text_tokens is None:
            return (FilledSpan(self.encoder, pipe.tokenizer, 0, self.text_tokens, special, ragged=True),)
        return (TextSpan(self.encoder, pipe.tokenizer, 0, text_tokens, special, ends=True),)

    def shift(self, scheduler_config: Mapping[str, Any], tokens: int, steps: int) -> float:
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

        return calculate_shift(
            tokens,
            scheduler_config.get("base_image_seq_len", 256),
            scheduler_config.get("base_shift", 0.25),
            scheduler_config.get("max_shift", 0.75),
        )

    def schedule(self, scheduler_config: Mapping[str, Any], steps: int) -> dict[str, Any]:
        pure = scheduler_config["num_train_timesteps"]
        return {"sigmas": np.linspace(pure, 1.0, steps).astype(np.int64).astype(np.float32) / pure}

    def native_size(self, pipe: Pipeline) -> int:
        return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


BACKBONE = CogView4(
    name="CogView4",
    transformer="CogView4Transformer2DModel",
    pipeline="CogView4Pipeline",
    lists=(
        BlockList(
            "transformer_blocks",
            returns=("hidden_states", "encoder_hidden_states"),
            unneeded=("ff", "attn1.to_out.0"),
            values=("attn1.to_v",),
            text_queries=(),
            attention="attn1",
        ),
    ),
    guidance="separate forwards",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    encoder="glm",
    negative=1,
    text_tokens=1024,
    name_tokens=1024,
)  # fmt: skip
