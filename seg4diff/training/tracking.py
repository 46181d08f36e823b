"""Images of a run for its trackers: predicted masks beside true ones, and samples of the tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from seg4diff.backbones import Pipeline, find_backbone
from seg4diff.training.data.cache import Encodings
from seg4diff.training.data.samples import HeldOutSamples
from seg4diff.training.objective.magnet import Magnet, resize
from seg4diff.visualization import label_overlay


@torch.no_grad()
def mask_overlays(
    magnet: Magnet, samples: HeldOutSamples, encodings: Encodings, count: int = 4, tile: int = 256
) -> np.ndarray:
    """Held-out images with their masks, true on the left, predicted on the right.

    Returns:
        [images, tile, 2 tile, 3] as floats in [0, 1]; images without masks are left out.
    """
    sheets = []
    for number in range(min(count, len(samples))):
        batch = samples[number].to(next(magnet.parameters()).device)
        if len(batch.masks[0]) == 0 or not batch.columns[0]:
            continue
        predicted, true = magnet.predict(batch)[0]
        size = batch.masks[0].shape[-2:]
        thumbnail = Image.fromarray(encodings.thumbnail(samples.indices[number]).numpy()).resize((tile, tile))
        names = [str(position) for position in range(len(true) + 1)]
        labels = [
            torch.where(true.amax(0) > 0, true.argmax(0) + 1, 0),
            torch.where(predicted.amax(0) > 0, predicted.argmax(0) + 1, 0),
        ]
        pair = [
            label_overlay(
                resize(found.view(1, *size).float(), (tile, tile))[0].round().long().cpu(),
                names,
                thumbnail,
                legend=False,
            ).resize((tile, tile))
            for found in labels
        ]
        sheets.append(np.concatenate([np.asarray(tile_.convert("RGB")) for tile_ in pair], axis=1))
    return (
        np.stack(sheets).astype(np.float32) / 255.0
        if sheets
        else np.zeros((0, tile, 2 * tile, 3), np.float32)
    )


class SamplePrompts:
    """Prompts to draw during training; encoded once, so that only the VAE stays, on the CPU."""

    def __init__(
        self, pipe: Pipeline, prompts: Sequence[str], *, steps: int = 28, guidance_scale: float = 5.0
    ) -> None:
        self._prompts = tuple(prompts)
        self._steps, self._scale = steps, guidance_scale
        self._embeddings = find_backbone(pipe).prompt_arguments(pipe, list(prompts))
        parts = dict.fromkeys(pipe.components)
        parts.update(vae=pipe.vae, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
        self._pipeline, self._parts = type(pipe), parts

    @torch.no_grad()
    def draw(self, transformer: nn.Module) -> np.ndarray:
        """one image per prompt, from noise that never changes, [prompts, height, width, 3] in [0, 1]."""
        place: Any = next(transformer.parameters())
        pipe = self._pipeline(**{**self._parts, "transformer": transformer})
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.to(place.device)
        images = pipe(
            **{
                name: value.to(place.device) if isinstance(value, torch.Tensor) else value
                for name, value in self._embeddings.items()
            },
            num_inference_steps=self._steps,
            guidance_scale=self._scale,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        pipe.vae.to("cpu")
        return np.asarray(images, dtype=np.float32)
