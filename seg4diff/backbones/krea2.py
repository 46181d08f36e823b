"""Krea 2: single-stream blocks over [text; image], grouped key heads. Maps of the transformer alone.

Its pipeline is not supported: it pads prompts in the middle, between the words and the end of a template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from seg4diff.backbones.base import Backbone, BlockList, Layout, TransformerCall
from seg4diff.backbones.flux import generated_grid


@dataclass(frozen=True)
class Krea2(Backbone):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        hidden_states, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        height, width = generated_grid(arguments["position_ids"][text.shape[1] :])
        return TransformerCall(
            grid=(height, width),
            layout=Layout(
                True,
                image_tokens=hidden_states.shape[1],
                text_tokens=text.shape[1],
                generated=height * width,
                masked=True,
            ),
            text=text,
            batch=len(hidden_states),
            timestep=arguments["timestep"] * (1000.0 / self.timestep_unit),
        )


BACKBONE = Krea2(
    name="Krea 2",
    transformer="Krea2Transformer2DModel",
    pipeline="Krea2Pipeline",
    lists=(
        BlockList(
            "transformer_blocks",
            returns=("hidden_states",),
            unneeded=("ff", "attn.to_out.0", "attn.to_gate"),  # the gate comes after the attention
            values=("attn.to_v",),
            text_queries=(),
        ),
    ),
    guidance="separate forwards",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    shared_arguments=frozenset({"position_ids"}),
    timestep_unit=1.0,
)
