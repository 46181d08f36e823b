"""A transformer whose frozen weights are kept in 4 bits: NF4 (Dettmers et al. 2023), by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seg4diff.backbones import find_backbone


def quantise_nf4(transformer: nn.Module, device: torch.device) -> None:
    """Replace every linear layer of the transformer's blocks by one with NF4 weights, in place.

    Embeddings, norms and the last projection stay as they are; arithmetic is in the dtype of the transformer.
    diffusers quantises only what it reads from a file, and only where there is a GPU.

    Args:
        transformer: of a supported family, without adapters.
        device: where the quantised weights go.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    from bitsandbytes.nn import Linear4bit

    for block in find_backbone(transformer).blocks(transformer):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                size = layer.in_features, layer.out_features
                quantised: Any = Linear4bit(
                    *size, layer.bias is not None, compute_dtype=transformer.dtype, quant_type="nf4"
                )
                quantised.load_state_dict(layer.state_dict())
                quantised.bias = layer.bias  # in its own dtype
                block.set_submodule(name, quantised.to(device).requires_grad_(False))
