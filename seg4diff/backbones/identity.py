"""What tells the encoders of two pipelines apart."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from seg4diff.backbones.base import Pipeline


def encoders_identity(pipe: Pipeline) -> str:
    """Hash of the VAE and the text encoders: classes, and names, shapes, dtypes, a sample of weights."""
    digest = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if "tokenizer" in part and module is not None:
            digest.update(f"{part} {type(module).__name__} {len(module)}\n".encode())
        if not isinstance(module, nn.Module) or "transformer" in part:
            continue
        digest.update(f"{part} {type(module).__name__}\n".encode())
        if part == "vae":
            config: Any = module.config
            digest.update(f"{config.scaling_factor} {config.shift_factor}\n".encode())
        for name, weight in module.state_dict().items():
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes()
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode() + sample)
    return digest.hexdigest()
