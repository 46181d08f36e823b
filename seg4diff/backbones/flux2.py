"""Flux.2 (dev, klein): double-stream, then single-stream blocks over [text; image] tokens.

Text tokens are those of a language model that reads the prompt inside of a chat template: all of them, the
template and padding included, are in the text stream. Its features are three of the model's layers side by
side. Latents are normalised by channel and place in their two by two patch. Reference images follow the
generated one. Pipelines that keep keys and values of reference images (klein KV) make attention calls of
another kind: there a layer says that it made no joint attention call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from seg4diff.backbones.base import BlockList, Pipeline
from seg4diff.backbones.flux import DOUBLE, Packed, image_ids
from seg4diff.backbones.single import SingleEncoder
from seg4diff.backbones.text import TextSpan, templated_span


@dataclass(frozen=True)
class Flux2(Packed, SingleEncoder):
    """See `Backbone`."""

    def image_ids(self, height: int, width: int) -> Tensor:
        ids = image_ids(height, width)
        return torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=-1)

    def text_ids(self, tokens: int) -> Tensor:
        return torch.nn.functional.pad(torch.arange(tokens)[:, None], (3, 0))

    def latents(self, pipe: Pipeline, pixels: Tensor) -> Tensor:
        vae = pipe.vae
        encoded = vae.encode(pixels.to(device=pipe._execution_device, dtype=vae.dtype)).latent_dist.mode()
        patches = rearrange(encoded, "b c (h p) (w q) -> b (c p q) h w", p=self.patch, q=self.patch)
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(patches)
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1).to(patches)
        normal = (patches - mean) / deviation
        return rearrange(normal, "b (c p q) h w -> b c (h p) (w q)", p=self.patch, q=self.patch)

    def shift(self, scheduler_config: Mapping[str, Any], tokens: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def text_spans(self, pipe: Pipeline, text_tokens: int | None = None) -> tuple[TextSpan, ...]:
        length = self.text_tokens if text_tokens is None else text_tokens
        system = getattr(pipe, "system_message", None)
        if system is None:  # klein
            messages: list[dict[str, Any]] = [{"role": "user", "content": "{}"}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in (("system", system), ("user", "{}"))
            ]
            options = {"add_generation_prompt": False}
        template = pipe.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # dev has a processor
        begin = tokenizer.bos_token
        # The processor adds no begin of text to a template that has one.
        adds = tokenizer is pipe.tokenizer or begin is None or not template.startswith(begin)
        return (templated_span(self.encoder, tokenizer, template, length, adds_special=adds),)


BACKBONE = Flux2(
    name="Flux.2",
    transformer="Flux2Transformer2DModel",
    pipeline="Flux2Pipeline",
    lists=(
        DOUBLE,
        # One projection makes queries, keys, values and the MLP's input; one takes both outputs.
        BlockList(
            "single_transformer_blocks",
            returns=("hidden_states",),
            unneeded=("attn.mlp_act_fn", "attn.to_out"),
            values=(),
            text_queries=(),
        ),
    ),
    encoder="llm",
    distilled=4.0,
    configurations={
        "black-forest-labs/FLUX.2-dev": {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": 128,
            "num_layers": 8,
            "num_single_layers": 48,
            "attention_head_dim": 128,
            "num_attention_heads": 48,
            "joint_attention_dim": 15360,
            "guidance_embeds": True,
        }
    },
)  # fmt: skip
