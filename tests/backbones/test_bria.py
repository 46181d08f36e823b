"""What Bria 3.2 alone has: schedules with and without a shift, and schedulers of diffusion."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from seg4diff.backbones import find_backbone
from tests.support import models
from tests.support.tiny import seeded


@torch.no_grad()
def test_noise_levels_with_dynamic_shifting() -> None:
    pipe = models.bria_pipeline(use_dynamic_shifting=True)
    pipe("cat", height=64, width=96, num_inference_steps=9, max_sequence_length=16, generator=seeded(),
         output_type="latent")  # fmt: skip
    for index in (0, 4, -2):
        sigma = find_backbone(pipe).sigma(pipe, torch.zeros(1, 4, 8, 12), 9, index)
        assert float(sigma) == pytest.approx(float(pipe.scheduler.sigmas[:-1][index]), rel=1e-5)


def test_schedulers_of_diffusion_are_refused_by_name() -> None:
    pipe = models.bria_pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(NotImplementedError, match="DDIMScheduler is not a scheduler of flow matching"):
        find_backbone(pipe).sigma(pipe, torch.zeros(1, 4, 8, 12), 9, 0)
