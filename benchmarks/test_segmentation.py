"""What stopping at the expert layer saves: maps of layer 9 of 24 against a whole forward, at 1024 px.

Random weights in SD3-medium's shape, with fewer heads on a CPU (the ratio does not depend on their number).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import seg4diff
from benchmarks.measuring import compare
from seg4diff.kernels.types import MapRequest

LAYERS, EXPERT = 24, 9


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    gpu = torch.cuda.is_available()
    heads = 24 if gpu else 4
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        model = SD3Transformer2DModel(
            sample_size=128,
            num_layers=LAYERS,
            num_attention_heads=heads,
            attention_head_dim=64,
            caption_projection_dim=heads * 64,
            pos_embed_max_size=192,
        )
    return seg4diff.patch(model.to(torch.bfloat16 if gpu else torch.float32).eval())


@torch.no_grad()
def test_early_stop(transformer: Any) -> None:
    options = {"device": transformer.device, "dtype": transformer.dtype}
    inputs = {
        "hidden_states": torch.randn(1, 16, 128, 128, **options),
        "encoder_hidden_states": torch.randn(1, 154, 4096, **options),
        "pooled_projections": torch.randn(1, 2048, **options),
        "timestep": torch.full((1,), 515.0, device=transformer.device),
    }
    request = MapRequest(columns=("text", slice(0, 77)))

    def maps(stop_early: bool) -> torch.Tensor:
        with seg4diff.capture(transformer, EXPERT, maps=request, stop_early=stop_early) as captured:
            transformer(**inputs)
        found = captured.records[0].maps
        assert found is not None
        return found

    tolerance = 1e-3 if transformer.dtype == torch.float32 else 0.1
    torch.testing.assert_close(maps(True), maps(False), rtol=tolerance, atol=0)
    rivals = {
        "whole forward": lambda: transformer(**inputs),
        "whole forward with the map": lambda: maps(False),
    }
    medians = compare(lambda: maps(True), rivals, rounds=3)
    print(f"\nearly stop: {medians['ours'] / medians['whole forward']:.3f} of a whole forward")
