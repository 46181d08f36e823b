"""Bria 3.2: blocks of Flux's kind over [text; image] tokens, text of T5 with zeros for padding.

Both branches of guidance run in one forward. Only flow matching gives noise levels: with another scheduler
images can be drawn and captured, but not segmented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seg4diff.backbones.base import Pipeline
from seg4diff.backbones.flux import DOUBLE, SINGLE, Packed
from seg4diff.backbones.single import SingleEncoder


@dataclass(frozen=True)
class Bria(Packed, SingleEncoder):
    """See `Backbone`."""

    def sigma(self, pipe: Pipeline, latents: Tensor, steps: int, index: int) -> Tensor:
        """As `Backbone.sigma`.

        Raises:
            NotImplementedError: the pipeline's scheduler is not of flow matching.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            raise NotImplementedError(
                f"{type(pipe.scheduler).__name__} is not a scheduler of flow matching, so images get no "
                "noise; give the pipeline a FlowMatchEulerDiscreteScheduler"
            )
        return super().sigma(pipe, latents, steps, index)

    def schedule(self, scheduler_config: Mapping[str, Any], steps: int) -> dict[str, Any]:
        from diffusers.pipelines.bria.pipeline_bria import get_original_sigmas

        if scheduler_config.get("use_dynamic_shifting"):
            return super().schedule({}, steps)
        return {"sigmas": get_original_sigmas(scheduler_config["num_train_timesteps"], steps)}

    def pixel_multiple(self, pipe: Pipeline) -> int:
        return int(pipe.vae_scale_factor)  # which counts the packing


BACKBONE = Bria(
    name="Bria 3.2",
    transformer="BriaTransformer2DModel",
    pipeline="BriaPipeline",
    lists=(DOUBLE, SINGLE),
    guidance="one forward",
    timestep_unit=1000.0,
    encoder="t5",
    negative=1,
    text_tokens=128,
    name_tokens=128,
)
