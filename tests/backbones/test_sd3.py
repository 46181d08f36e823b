"""What the library knows of Stable Diffusion 3: layers, noise levels, latents, text, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seg4diff.backbones import find_backbone, transformer_of
from seg4diff.backbones.base import EXPERTS_KEY
from tests.support import tiny


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


def test_expert_layers(tmp_path: Any) -> None:
    from diffusers import SD3Transformer2DModel

    small = tiny.transformer()
    backbone = find_backbone(small)
    with pytest.raises(ValueError, match="transformer of 3 blocks"):
        backbone.expert_layers(small)
    assert backbone.expert_layers(tiny.transformer(layers=24)) == (9,)
    small.register_to_config(**{EXPERTS_KEY: [1]})
    small.save_pretrained(tmp_path)
    assert backbone.expert_layers(SD3Transformer2DModel.from_pretrained(tmp_path)) == (1,)


def test_noise_level_of_the_recipe(pipe: Any) -> None:
    """`timesteps[-8]` of 28 with SD3's shift: sigma = 0.515 (and not index 8, which is 0.877)."""
    backbone = find_backbone(pipe)
    latents = torch.ones(1, 4, 8, 8)
    assert float(backbone.sigma(pipe, latents, 28, -8)) == pytest.approx(0.51507, abs=1e-5)
    assert float(backbone.sigma(pipe, latents, 28, 8)) == pytest.approx(0.877, abs=1e-3)
    with pytest.raises(ValueError, match="outside a schedule of 28 steps"):
        backbone.sigma(pipe, latents, 28, 28)


def test_arguments_are_those_of_a_pipeline_step(pipe: Any) -> None:
    """Noisy latents as they are, the timestep in the transformer's own units, and the text."""
    backbone = find_backbone(pipe)
    noisy, sigma = torch.randn(2, 4, 8, 12), torch.tensor([0.25, 1.0])
    text = {"encoder_hidden_states": torch.randn(2, 9, 64), "pooled_projections": torch.randn(2, 64)}
    arguments = backbone.arguments(pipe.transformer, noisy, sigma, text)
    assert arguments["timestep"].tolist() == [250.0, 1000.0]
    call = backbone.read_call(pipe.transformer, arguments)
    assert (call.grid, call.batch, call.layout.tokens) == ((4, 6), 2, 24 + 9)
    assert call.timestep is not None
    assert call.timestep.tolist() == [250.0, 1000.0]
    output = pipe.transformer(**arguments).sample
    assert backbone.prediction(output, noisy).shape == noisy.shape


def test_noise_level_with_dynamic_shifting() -> None:
    """As the pipeline computes it: more image tokens, more noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny.pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    seen: list[float] = []
    pipe("cat", num_inference_steps=28, output_type="latent", guidance_scale=1.0,
         callback_on_step_end=lambda p, i, t, k: seen.append(float(t)) or k)  # fmt: skip
    latents = torch.zeros(1, 4, 8, 8)
    sigma = find_backbone(pipe).sigma(pipe, latents, 28, -8)
    assert 1000 * float(sigma) == pytest.approx(seen[-8], rel=1e-5)


@torch.no_grad()
def test_latents_are_the_scaled_posterior_mean(pipe: Any) -> None:
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = find_backbone(pipe).latents(pipe, pixels)
    assert latents.shape == (2, 4, 4, 6)
    mean = pipe.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(latents, (mean - 0.1) * 1.5)


@torch.no_grad()
def test_text_is_clip_then_t5(pipe: Any) -> None:
    backbone = find_backbone(pipe)
    arguments = backbone.encode_text(pipe, ["cat", "red sofa"])
    assert arguments["encoder_hidden_states"].shape == (2, 154, 64)
    assert arguments["encoder_hidden_states"][:, 77:].abs().max() == 0
    assert arguments["encoder_hidden_states"][:, :77].abs().max() > 0
    assert arguments["pooled_projections"].shape == (2, 64)
    (clip,) = backbone.text_spans(pipe, 154)
    assert (clip.encoder, clip.first, clip.length) == ("clip", 0, 77)
    with_t5 = tiny.pipeline(t5=True)
    length = backbone.encode_text(with_t5, ["cat"])["encoder_hidden_states"].shape[1]
    clip, t5 = backbone.text_spans(with_t5, length)
    assert (t5.encoder, t5.first, t5.length) == ("t5", 77, length - 77)
    assert backbone.text_spans(with_t5) == (clip, t5)
    assert backbone.name_span(with_t5) == clip


def test_sizes_in_pixels(pipe: Any) -> None:
    backbone = find_backbone(pipe)
    assert backbone.pixel_multiple(pipe) == 16
    assert backbone.native_size(pipe) == 64
    assert backbone.largest_size(pipe) == 512


def test_transformers_are_found(pipe: Any) -> None:
    assert transformer_of(pipe) is pipe.transformer
    assert transformer_of(pipe.transformer) is pipe.transformer
    assert transformer_of(torch.compile(pipe.transformer, backend="eager")) is pipe.transformer
    with pytest.raises(TypeError, match="neither|nor a transformer"):
        transformer_of(object())
    with pytest.raises(NotImplementedError, match="Linear is not supported"):
        find_backbone(torch.nn.Linear(1, 1))
