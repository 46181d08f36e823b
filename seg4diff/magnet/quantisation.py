"""A transformer whose frozen weights are kept in 4 bits (Dettmers et al. 2023), through bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_nf4(model: str, device: torch.device) -> Any:
    """The transformer of a pipeline, its linear layers in NF4 and the rest in bfloat16.

    Args:
        model: a local folder in diffusers' format, a name on the hub, or ``"demo"``.
        device: where it goes.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError("memory.quantise='nf4' needs bitsandbytes: pip install 'seg4diff[quant]'") from error
    from diffusers import BitsAndBytesConfig, SD3Transformer2DModel

    folder: str | Path = model
    if model == "demo":
        from seg4diff.demo import WEIGHTS

        folder = WEIGHTS
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return SD3Transformer2DModel.from_pretrained(
        folder,
        subfolder="transformer",
        quantization_config=config,
        torch_dtype=torch.bfloat16,
        device_map={"": str(device)},
    )
