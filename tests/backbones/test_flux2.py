"""What Flux.2 alone has: reference images, and pipelines that keep the keys and values of those."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.kernels.types import MapRequest
from tests.support import models
from tests.support.families import attention_calls
from tests.support.tiny import seeded


@torch.no_grad()
def test_reference_images() -> None:
    """Maps have rows for the generated image alone."""
    pipe = models.flux2_pipeline(klein=True)
    call = {"height": 64, "width": 96, "num_inference_steps": 1, "max_sequence_length": 32}
    call |= {"guidance_scale": 1.0, "output_type": "latent", "image": Image.new("RGB", (64, 64), "red")}
    with seg4diff.capture(pipe, [1, 3], maps=MapRequest(heads="each")) as captured:
        pipe(prompt="a cat", generator=seeded(), **call)
    with attention_calls() as calls:
        pipe(prompt="a cat", generator=seeded(), **call)
    joint = [(q, k) for q, k in calls if q.shape[2] == 32 + 24 + 16]
    assert len(joint) == 4
    for record in captured.records:
        assert record.grid == (4, 6)
        query, key = (tensor.double() for tensor in joint[record.layer])
        exact = (query @ key.mT / 4).softmax(dim=-1)[:, :, 32 : 32 + 24, :32]
        torch.testing.assert_close(record.maps.double(), exact, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_kept_keys_and_values_are_refused_by_name() -> None:
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2KVAttnProcessor,
        Flux2KVParallelSelfAttnProcessor,
    )

    transformer, inputs = models.flux2_transformer(), models.flux2_inputs(reference=10)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    for layer, name in ((0, "Flux2KVAttnProcessor"), (2, "Flux2KVParallelSelfAttnProcessor")):
        with (
            seg4diff.capture(transformer, layer),
            pytest.raises(RuntimeError, match=f"{name} made no joint attention call"),
        ):
            transformer(**inputs, kv_cache_mode="extract", num_ref_tokens=10)
    with seg4diff.capture(transformer, 0) as captured:
        transformer(**inputs)
    assert captured.records[0].maps is not None
