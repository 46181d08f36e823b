"""Attention maps the plain way: forward hooks on a stock model's projections, then a float64 softmax.

Independent of the library's own path from projections to maps; shares no code with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.support.materialised import joint_scores

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
NORMS = {"to_q": "norm_q", "to_k": "norm_k", "add_q_proj": "norm_added_q", "add_k_proj": "norm_added_k"}


@contextmanager
def hooked_projections(transformer: Any) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Collect, for each layer of the next forward, every projection after its norm as [B, tokens, H, D]."""
    found: dict[int, dict[str, Tensor]] = {}
    handles = []
    for layer, block in enumerate(transformer.transformer_blocks):
        attention = block.attn
        found[layer] = {}
        for name in PROJECTIONS:
            norm = getattr(attention, NORMS.get(name, ""), None)

            def keep(
                module: Any, args: Any, output: Tensor, layer: int = layer, name: str = name,
                attention: Any = attention, normed: bool = norm is not None,
            ) -> None:  # fmt: skip
                if normed:  # [B, H, tokens, D] in stock processors, [B, tokens, H, D] in ours
                    heads_first = output.shape[1] == attention.heads and output.shape[2] != attention.heads
                    tensor = output.transpose(1, 2) if heads_first else output
                else:
                    tensor = output.unflatten(-1, (attention.heads, -1))
                found[layer][name] = tensor.detach()

            handles.append((getattr(attention, name) if norm is None else norm).register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def image_to_text(projections: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """Softmax over all keys, image rows and text columns of every head: [B, H, N, T]."""
    query, key, text_key = (projections[name].to(dtype) for name in ("to_q", "to_k", "add_k_proj"))
    scores = joint_scores(query, key, query[:, :0], text_key)  # of image rows alone
    return scores.softmax(dim=-1)[..., query.shape[1] :]
