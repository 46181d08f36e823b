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
            scale = "scaling_factor", "shift_factor"  # of most; others scale each channel
            names = scale if "scaling_factor" in config else ("latents_mean", "latents_std")
            digest.update(f"{' '.join(str(config.get(name)) for name in names)}\n".encode())
        for name, weight in module.state_dict().items():
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes()
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode() + sample)
    return digest.hexdigest()
