"""Joint attention the plain way: the whole matrix in memory, edited in place, on a stock model.

Independent of the library's own path; shares no code with it. Tests and benchmarks compare with it where the
loops of `tests/kernels/test_reference.py` are too slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""From the image-to-text probabilities [B, H, N, T] to what takes their place."""


def joint_scores(query: Tensor, key: Tensor, text_query: Tensor, text_key: Tensor) -> Tensor:
    """Scaled scores of all tokens with all, image before text: [B, tokens, H, D] each to [B, H, S, S].

    In the dtype of the inputs.
    """
    queries = torch.cat([query, text_query], dim=1).transpose(1, 2)  # [B, H, S, D]
    keys = torch.cat([key, text_key], dim=1).transpose(1, 2)
    return queries @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5


class MaterialisedProcessor:
    """A diffusers attention processor that edits the image-to-text block of its softmax.

    Attributes:
        scores: of its last call, [B, H, S, S], with their graph.
    """

    def __init__(self, edit: Edit | None = None) -> None:
        self.edit = edit
        self.scores: Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.shape[1]

        def projected(projection: Any, states: Tensor, norm: Any = None) -> Tensor:
            split = projection(states).unflatten(-1, (attn.heads, -1))
            return split if norm is None else norm(split)

        self.scores = joint_scores(
            projected(attn.to_q, hidden_states, attn.norm_q),
            projected(attn.to_k, hidden_states, attn.norm_k),
            projected(attn.add_q_proj, encoder_hidden_states, attn.norm_added_q),
            projected(attn.add_k_proj, encoder_hidden_states, attn.norm_added_k),
        )
        values = [
            projected(attn.to_v, hidden_states),
            projected(attn.add_v_proj, encoder_hidden_states),
        ]
        probabilities = self.scores.softmax(dim=-1)
        if self.edit is not None:
            edited = probabilities.clone()
            edited[:, :, :tokens, tokens:] = self.edit(probabilities[:, :, :tokens, tokens:])
            probabilities = edited
        output = (probabilities @ torch.cat(values, dim=1).transpose(1, 2)).transpose(1, 2).flatten(2)
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
