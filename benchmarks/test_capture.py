"""What a captured layer costs beside the stock one: time and peak memory, at 1024 px token counts.

Two blocks in SD3-medium's shape (24 heads of 64) with random weights, 4096 image and 154 text tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import seg4diff
from benchmarks.measuring import compare
from benchmarks.memory import peak_bytes
from seg4diff.attention.maps import maps_of
from seg4diff.kernels.types import MapRequest


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        model = SD3Transformer2DModel(
            sample_size=128,
            num_layers=2,  # the last block's text rows are cut short, the first is whole
            num_attention_heads=24,
            attention_head_dim=64,
            caption_projection_dim=24 * 64,
            pos_embed_max_size=192,
        )
    return model.to(torch.bfloat16 if gpu else torch.float32).eval()


@torch.no_grad()
def test_captured_layer(transformer: Any) -> None:
    options = {"device": transformer.device, "dtype": transformer.dtype}
    inputs = {
        "hidden_states": torch.randn(1, 16, 128, 128, **options),
        "encoder_hidden_states": torch.randn(1, 154, 4096, **options),
        "pooled_projections": torch.randn(1, 2048, **options),
        "timestep": torch.full((1,), 515.0, device=transformer.device),
    }
    stock = transformer(**inputs).sample

    def captured() -> torch.Tensor:
        with seg4diff.capture(transformer) as found:
            output = transformer(**inputs).sample
        assert len(found.records) == 2
        return output

    tolerance = (
        {"rtol": 1e-3, "atol": 1e-4} if transformer.dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    )
    torch.testing.assert_close(captured(), stock, **tolerance)
    seg4diff.unpatch(transformer)
    medians = compare(captured, {"stock": lambda: transformer(**inputs)}, rounds=7)
    resident = list(transformer.parameters())
    peaks = {
        "captured": peak_bytes(captured, resident),
        "stock": peak_bytes(lambda: transformer(**inputs), resident),
    }
    extra = (peaks["captured"] - peaks["stock"]) / 2**20
    print(
        f"\ntwo captured layers: {medians['ours'] / medians['stock']:.3f} of stock, {extra:+.1f} MiB at peak"
    )
    early = compare(
        lambda: maps_of(transformer, [0], MapRequest(), inputs),
        {"stock": lambda: transformer(**inputs)},
        rounds=5,
    )
    print(f"map of the first of two layers alone: {early['ours'] / early['stock']:.3f} of a whole forward")
