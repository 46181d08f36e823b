"""Flux.1 (dev, schnell, Krea, Kontext, Fill): double-stream, then single-stream blocks over [text; image].

Text tokens are those of T5, padding included, which the model reads; CLIP gives a pooled vector only. Latents
are packed two by two. Reference images (Kontext) follow the generated one in the image stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seg4diff.backbones.base import (
    Backbone,
    BlockList,
    EncodedText,
    Guidance,
    Layout,
    Pipeline,
    TransformerCall,
    as_texts,
    pack,
    unpack,
)
from seg4diff.backbones.text import TextSpan

_T5_TOKENS = 512
_GRID_ATTRIBUTE = "seg4diff_grid"  # on positions that are made here: their values need not be read again


@dataclass(frozen=True)
class Packed(Backbone):
    """Families of Flux's kind: latents packed two by two, tokens [text; image] with positions of their own.

    Attributes:
        distilled: scale that the pipeline gives guidance-distilled models by default.
    """

    shared_arguments: frozenset[str] = frozenset({"img_ids", "txt_ids"})
    timestep_unit: float = 1.0
    guidance: Guidance = "separate forwards"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    distilled: float = 3.5

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        hidden_states, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        timestep = arguments.get("timestep")
        ids = arguments["img_ids"]
        grid = getattr(ids, _GRID_ATTRIBUTE, None) or generated_grid(ids)
        return TransformerCall(
            grid=grid,
            layout=Layout(
                True,
                image_tokens=hidden_states.shape[1],
                text_tokens=text.shape[1],
                generated=grid[0] * grid[1],
            ),
            text=text,
            batch=len(hidden_states),
            timestep=None if timestep is None else timestep * (1000.0 / self.timestep_unit),
        )

    def arguments(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        height, width = (side // self.patch for side in latents.shape[-2:])
        # Positions in bfloat16 would be rounded.
        ids = self.image_ids(height, width).to(latents.device, torch.float32)
        setattr(ids, _GRID_ATTRIBUTE, (height, width))
        arguments = {
            "hidden_states": _with_conditions(pack(latents), transformer.config.in_channels),  # type: ignore[union-attr, arg-type]
            "timestep": sigma * self.timestep_unit,
            "img_ids": ids,
            "txt_ids": self.text_ids(text["encoder_hidden_states"].shape[1]).to(ids),
            **text,
        }
        if transformer.config.get("guidance_embeds"):  # type: ignore[union-attr, operator]
            arguments["guidance"] = torch.full((len(latents),), self.distilled, device=latents.device)
        return arguments

    def image_ids(self, height: int, width: int) -> Tensor:
        """Positions of the tokens of the generated image, [height * width, axes]."""
        return image_ids(height, width)

    def text_ids(self, tokens: int) -> Tensor:
        """Positions of the text tokens, [tokens, axes]."""
        return torch.zeros(tokens, 3)

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return unpack(output, latents)

    def latent_channels(self, transformer: nn.Module) -> int:
        config: Any = transformer.config
        return int(config.get("out_channels") or config.in_channels) // self.patch**2

    def schedule(self, scheduler_config: Mapping[str, Any], steps: int) -> dict[str, Any]:
        if scheduler_config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps}
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}


@dataclass(frozen=True)
class Flux(Packed):
    """See `Backbone`."""

    def encode_text(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        given = self.prompt_arguments(pipe, prompts)
        dtype = pipe.transformer.dtype
        return {
            "encoder_hidden_states": given["prompt_embeds"].to(dtype),
            "pooled_projections": given["pooled_prompt_embeds"].to(dtype),
        }

    def prompt_arguments(self, pipe: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
        embeddings, pooled, _ = pipe.encode_prompt(
            prompt=list(prompts), prompt_2=None, max_sequence_length=_T5_TOKENS
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        length = _T5_TOKENS if text_tokens is None else text_tokens
        return (TextSpan("t5", pipe.tokenizer_2, 0, length, special=1),)

    def read_encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedText:
        given = as_texts(arguments.get("prompt_2")) or as_texts(arguments.get("prompt"))
        return EncodedText(
            texts=() if arguments.get("prompt_embeds") is not None else tuple({"t5": t} for t in given),
            embeddings=output[0],
            guided=False,
            arguments=arguments,
        )

    def text_arguments(self, output: tuple[Any, ...]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": output[0], "pooled_projections": output[1]}


def _with_conditions(tokens: Tensor, channels: int) -> Tensor:
    """Tokens [B, N, C] in the number of channels that the model reads: nothing is known of the image.

    Control models read the latents of a control image, Fill those of the masked image and then its mask, in
    which 1 is what the model has to paint.
    """
    batch, count, own = tokens.shape
    known = min(channels - own, own)
    mask = max(channels - own - known, 0)
    return torch.cat([tokens, tokens.new_zeros(batch, count, known), tokens.new_ones(batch, count, mask)], -1)


def image_ids(height: int, width: int) -> Tensor:
    """Positions (image, row, column) of the tokens of an image, [height * width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def generated_grid(ids: Tensor) -> tuple[int, int]:
    """Height and width in tokens of the generated image, the first in `ids` [tokens, 3].

    Raises:
        ValueError: its tokens are not a whole grid.
    """
    own = ids[0] if ids.ndim == 3 else ids
    own = own[own[:, 0] == own[0, 0]].cpu()  # reads the positions once per forward
    height, width = (int(own[:, axis].max() - own[:, axis].min()) + 1 for axis in (1, 2))
    if height * width != len(own):
        raise ValueError(f"img_ids hold {len(own)} tokens of the first image, not a {height} x {width} grid")
    return height, width


# The last attention of a single-stream block comes before its output projection, which also takes the MLP.
DOUBLE = BlockList(
    "transformer_blocks",
    returns=("encoder_hidden_states", "hidden_states"),
    unneeded=("ff", "ff_context", "attn.to_out.0", "attn.to_add_out"),
)
SINGLE = BlockList(
    "single_transformer_blocks",
    returns=("encoder_hidden_states", "hidden_states"),
    unneeded=("proj_mlp", "act_mlp", "proj_out"),
)

_FLUX_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}

BACKBONE = Flux(
    name="Flux.1",
    transformer="FluxTransformer2DModel",
    pipeline="FluxPipeline",
    lists=(DOUBLE, SINGLE),
    # Provisional, from ConceptAttention (arXiv 2502.04320), which reads the last of the 19 double-stream
    # blocks; not measured by this project.
    experts={57: tuple(range(10, 19))},
    experts_source="provisional: [ConceptAttention](https://arxiv.org/abs/2502.04320) reads these layers",
    configurations={
        "black-forest-labs/FLUX.1-dev": _FLUX_DEV,
        "black-forest-labs/FLUX.1-schnell": {**_FLUX_DEV, "guidance_embeds": False},
    },
)  # fmt: skip
