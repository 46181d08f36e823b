"""Lumina Image 2: blocks over [text; image; padding], grouped key heads. Maps of the transformer alone.

The text of a row is as long as its prompt, so the image starts at another place in every row. What a batch
adds to shorter rows is hidden by a mask; here it counts as the end of their text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seg4diff.backbones.base import PURE_NOISE, Backbone, BlockList, Layout, TransformerCall


@dataclass(frozen=True)
class Lumina2(Backbone):
    """See `Backbone`."""

    def read_call(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> TransformerCall:
        batch, _, height, width = arguments["hidden_states"].shape
        grid = (height // self.patch, width // self.patch)
        image_tokens = grid[0] * grid[1]
        lengths = arguments["encoder_attention_mask"].sum(dim=1)
        shortest, longest = (int(length) for length in lengths.aminmax())  # reads them once per forward
        order = _order(lengths, longest, image_tokens) if shortest < longest else None
        return TransformerCall(
            grid=grid,
            layout=Layout(True, image_tokens, longest, generated=image_tokens, masked=True, order=order),
            text=arguments["encoder_hidden_states"],
            batch=batch,
            timestep=PURE_NOISE * (1 - arguments["timestep"]),
        )


def _order(lengths: Tensor, longest: int, image_tokens: int) -> Tensor:
    """Positions [B, longest + image_tokens] of each row's text, its padding and its image, in that order."""
    text, image = (torch.arange(count, device=lengths.device) for count in (longest, image_tokens))
    own = lengths[:, None]
    padded = torch.where(text < own, text, text + image_tokens)
    return torch.cat([padded, own + image], dim=1)


BACKBONE = Lumina2(
    name="Lumina 2",
    transformer="Lumina2Transformer2DModel",
    pipeline="Lumina2Pipeline",
    lists=(
        BlockList(
            "layers",
            returns=("hidden_states",),
            unneeded=("feed_forward", "attn.to_out.0"),
            values=("attn.to_v",),
            text_queries=(),
        ),
    ),
    guidance="separate forwards",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    timestep_unit=1.0,
)
