"""Joint attention the plain way: the whole matrix in memory, edited in place, on a stock model.

Independent of the library's own path; shares no code with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""From the image-to-text probabilities [B, H, N, T] to what takes their place."""


class MaterialisedProcessor:
    """A diffusers attention processor that edits the image-to-text block of its softmax."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.shape[1]

        def joined(image: Any, text: Any, norm: Any, text_norm: Any) -> Tensor:
            parts = []
            for projection, states, norm_of in (
                (image, hidden_states, norm),
                (text, encoder_hidden_states, text_norm),
            ):
                split = projection(states).unflatten(-1, (attn.heads, -1))
                parts.append(split if norm_of is None else norm_of(split))
            return torch.cat(parts, dim=1).transpose(1, 2)  # [B, H, S, D]

        query = joined(attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q)
        key = joined(attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k)
        value = joined(attn.to_v, attn.add_v_proj, None, None)
        probabilities = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        edited = probabilities.clone()
        edited[:, :, :tokens, tokens:] = self.edit(probabilities[:, :, :tokens, tokens:])
        output = (edited @ value).transpose(1, 2).flatten(2)
        text = output[:, tokens:]
        return attn.to_out[0](output[:, :tokens]), text if attn.context_pre_only else attn.to_add_out(text)


@contextmanager
def materialised(transformer: Any, edits: dict[int, Edit]) -> Iterator[None]:
    """Run some layers of a stock transformer with an edited attention matrix."""
    stock = {layer: transformer.transformer_blocks[layer].attn.processor for layer in edits}
    for layer, edit in edits.items():
        transformer.transformer_blocks[layer].attn.processor = MaterialisedProcessor(edit)
    try:
        yield
    finally:
        for layer, processor in stock.items():
            transformer.transformer_blocks[layer].attn.processor = processor
