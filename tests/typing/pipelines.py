"""diffusers' own classes as users pass them, and what is refused. Checked like `snippets.py`."""

from __future__ import annotations

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

import seg4diff


def stable_diffusion_3(pipe: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    seg4diff.segment(pipe, "kitchen.jpg", ["cat"])
    return seg4diff.patch(pipe)


def flux(pipe: FluxPipeline) -> FluxPipeline:
    seg4diff.guide(pipe, "a cat")
    return seg4diff.load_lora(pipe, "adapters.safetensors")


def kontext(pipe: FluxKontextPipeline) -> None:
    seg4diff.rank_layers(pipe, ["a cat"])


def transformer(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    with seg4diff.capture(model, layers=[9]):
        pass
    return seg4diff.unpatch(model)


def refused(pipe: StableDiffusion3Pipeline) -> None:
    seg4diff.segment(3, "kitchen.jpg", ["cat"])  # type: ignore[call-overload]
    seg4diff.patch("a model")  # type: ignore[type-var]
    seg4diff.segment(pipe, "kitchen.jpg", ["cat"], preset="papr")  # type: ignore[call-overload]
