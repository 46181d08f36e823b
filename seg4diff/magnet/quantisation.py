"""A transformer whose frozen weights are kept in 4 bits: NF4 (Dettmers et al. 2023), by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seg4diff.backbones import find_backbone


def quantise_nf4(transformer: Any, device: torch.device) -> int:
    """Replace every linear layer of the transformer's blocks by one with NF4 weights, in place.

    Embeddings, norms and the last projection stay as they are; arithmetic is in the dtype of the transformer.

    Args:
        transformer: of a supported family, without adapters.
        device: where the quantised weights go.

    Returns:
        The number of layers replaced.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    import bitsandbytes.nn as bitsandbytes_nn

    replaced = 0
    for block in find_backbone(transformer).blocks(transformer):
        for name, layer in list(block.named_modules()):
            if not isinstance(layer, nn.Linear):
                continue
            quantised: Any = bitsandbytes_nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=transformer.dtype,
                quant_type="nf4",
            )
            quantised.load_state_dict(layer.state_dict())
            if quantised.bias is not None:
                quantised.bias.data = quantised.bias.data.to(transformer.dtype)
            parent, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(parent), attribute, quantised.to(device).requires_grad_(False))
            replaced += 1
    return replaced
