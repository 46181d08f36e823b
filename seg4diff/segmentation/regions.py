"""Regions without names: the attention to an empty prompt, grouped (Seg4Diff, section 4.2 and appendix A.4).

With an empty prompt, the begin, end and padding tokens still attend to distinct parts of the image. Tokens
that attend to the same places are merged; each group is a region.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.images import ImageInput, as_list
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.grouping import winning_regions
from seg4diff.segmentation.inputs import View, views_of
from seg4diff.segmentation.maps import ImageMaps, run_maps
from seg4diff.segmentation.presets import Grouping, PresetName, find_preset
from seg4diff.segmentation.result import Segmentation
from seg4diff.segmentation.scores import resize_scores

_MOST_MAPS = 8192  # the distances of all pairs take half a GiB


@overload
def segment_unsupervised(  # type: ignore[overload-overlap]  # a str is a sequence of str, and one image
    pipe: Pipeline,
    image: Image.Image | str | os.PathLike[str],
    *,
    preset: PresetName = ...,
    layers: Sequence[int] | int | None = ...,
    threshold: float | None = ...,
    seed: int | None = ...,
    generator: torch.Generator | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Segmentation: ...
@overload
def segment_unsupervised(
    pipe: Pipeline,
    image: Sequence[ImageInput],
    *,
    preset: PresetName = ...,
    layers: Sequence[int] | int | None = ...,
    threshold: float | None = ...,
    seed: int | None = ...,
    generator: torch.Generator | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> list[Segmentation]: ...
@overload
def segment_unsupervised(
    pipe: Pipeline,
    image: np.ndarray | torch.Tensor,
    *,
    preset: PresetName = ...,
    layers: Sequence[int] | int | None = ...,
    threshold: float | None = ...,
    seed: int | None = ...,
    generator: torch.Generator | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Segmentation | list[Segmentation]: ...  # the array may have a batch axis
def segment_unsupervised(
    pipe: Pipeline,
    image: ImageInput | Sequence[ImageInput],
    *,
    preset: PresetName = "default",
    layers: Sequence[int] | int | None = None,
    threshold: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Segmentation | list[Segmentation]:
    """Divide images into regions without names.

    The model gets the half-noised image with an empty prompt; the attention to the begin, end and padding
    tokens of the first text encoder is grouped by `seg4diff.segmentation.grouping.group_attention`.

    Args:
        pipe: a pipeline of a supported family.
        image: an image, or several (list, or array with a batch axis): PIL, path, numpy or tensor, any size.
        preset: how the image is fitted to the model, as in `seg4diff.segment`, and how tokens are grouped:
            a name in `seg4diff.segmentation.presets.PRESETS`. Where layers, heads and tokens make more than
            8192 maps (T5 alone has 512 tokens), heads are averaged first.
        layers: transformer blocks whose maps are averaged (a grouping of single heads keeps them apart); the
            model's expert layers when None.
        threshold: distance below which maps are merged, see `seg4diff.segmentation.presets.Grouping`; that of
            the preset when None. Smaller means more regions.
        seed, generator, batch_size, progress: as in `seg4diff.segment`.

    Returns:
        A `Segmentation` on the CPU, or a list of them if several images were given. Its classes are
        `"region 1"`, `"region 2"`, ..., those that win an image token and a pixel, largest first; `scores`
        are the mean distributions of the groups, resized to the image, times the number of image tokens (1 is
        the mean).

    Raises:
        NotImplementedError: the model family is not supported.
        TypeError: `pipe` has no VAE.
        ValueError: no or unreadable images, an unknown preset, a layer out of range, a threshold that is
            not above 0.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; segment_unsupervised takes a whole pipeline")
    choices = find_preset(preset, threshold=threshold)
    grouping = choices.grouping
    images, single = as_list(image)
    span = state.backbone.name_span(pipe)
    used = state.layers_or_experts(layers)
    heads: Any = state.backbone.attention(state.transformer, used[0]).heads
    if grouping.heads == "each" and len(used) * heads * span.length > _MOST_MAPS:
        grouping = replace(grouping, heads="mean")
    views = views_of(pipe, images, choices.fit)
    results: list[Segmentation | None] = [None] * len(images)
    for found in run_maps(
        pipe,
        views,
        [[""]] * len(images),
        layers=used,
        maps=MapRequest(heads=grouping.heads, columns=("text", slice(span.first, span.first + span.length))),
        seed=seed,
        generator=generator,
        batch_size=batch_size,
        progress=progress,
    ):
        metadata = {
            "preset": preset,
            "layers": used,
            "timestep": found.timestep,
            "threshold": grouping.threshold,
            "seed": None if generator is not None else seed or 0,
        }
        results[found.index] = _segmentation(found, views[found.index], grouping, metadata)
    finished = [result for result in results if result is not None]
    return finished[0] if single else finished


def _segmentation(found: ImageMaps, view: View, grouping: Grouping, metadata: dict[str, Any]) -> Segmentation:
    """Regions of one image, resized to it, and their argmax."""
    regions = winning_regions(found.maps[0], grid=found.grid, grouping=grouping).cpu()
    scores = resize_scores(regions, (view.image.height, view.image.width), "linear")
    areas = scores.argmax(dim=0).flatten().bincount(minlength=len(scores))
    order = areas.argsort(descending=True, stable=True)[: int((areas > 0).sum())]
    scores = scores[order] * regions[0].numel()
    return Segmentation(
        labels=scores.argmax(dim=0),
        scores=scores,
        classes=tuple(f"region {number}" for number in range(1, len(scores) + 1)),
        image=view.image,
        metadata={**metadata, "size": view.pixels.size},
    )
