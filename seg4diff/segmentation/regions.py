"""Regions without names, from one forward with an empty prompt.

Image tokens whose attention outputs are alike are clustered; or text tokens that are read at the same places
are merged: with an empty prompt, distinct parts of the image still read the begin, end and padding tokens
(Seg4Diff, section 4.2 and appendix A.4).
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
from seg4diff.segmentation.grouping import find_regions
from seg4diff.segmentation.inputs import Noising, View, views_of
from seg4diff.segmentation.layers import LayerChoice, layer_groups
from seg4diff.segmentation.maps import ImageMaps, Reading, run_maps
from seg4diff.segmentation.presets import Clustering, Grouping, Preset, PresetName, find_preset
from seg4diff.segmentation.prompts import PlannedPrompt
from seg4diff.segmentation.result import Segmentation
from seg4diff.segmentation.scores import resize_scores


@overload
def segment_unsupervised(  # type: ignore[overload-overlap]  # a str is a sequence of str, and one image
    pipe: Pipeline,
    image: Image.Image | str | os.PathLike[str],
    *,
    preset: PresetName | Preset = ...,
    layers: LayerChoice = ...,
    threshold: float | None = ...,
    regions: int | None = ...,
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
    preset: PresetName | Preset = ...,
    layers: LayerChoice = ...,
    threshold: float | None = ...,
    regions: int | None = ...,
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
    preset: PresetName | Preset = ...,
    layers: LayerChoice = ...,
    threshold: float | None = ...,
    regions: int | None = ...,
    seed: int | None = ...,
    generator: torch.Generator | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Segmentation | list[Segmentation]: ...  # the array may have a batch axis
def segment_unsupervised(
    pipe: Pipeline,
    image: ImageInput | Sequence[ImageInput],
    *,
    preset: PresetName | Preset = "default",
    layers: LayerChoice = None,
    threshold: float | None = None,
    regions: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Segmentation | list[Segmentation]:
    """Divide images into regions without names.

    The model gets the half-noised image with an empty prompt and runs once. The attention outputs of the
    expert layers and of the two behind each are clustered by Ward's method; the paper's presets merge the
    attention to the text tokens instead, see `seg4diff.segmentation.grouping`.

    Args:
        pipe: a pipeline of a supported family.
        image: an image, or several (list, or array with a batch axis): PIL, path, numpy or tensor, any size.
        preset: how the image is fitted to the model, as in `seg4diff.segment`, and how tokens are grouped:
            a name in `seg4diff.segmentation.presets.PRESETS`, or a preset.
        layers: transformer blocks to read: outputs of exactly these, or means of their maps. When None, the
            model's expert layers (for outputs with those behind). `"auto"`, and None where no expert is
            known: at most three layers instead, chosen for each image by the mutual information of place and
            text token, at the cost of one more forward, through all layers.
        threshold: distance up to which tokens are joined, see `seg4diff.segmentation.presets.Clustering` and
            `Grouping`; that of the preset when None. Smaller means more regions.
        regions: number of regions, 1 up to the number of image tokens; found by itself when None. One that
            wins no pixel (of an image smaller than the model's) is left out.
        seed, generator, batch_size, progress: as in `seg4diff.segment`.

    Returns:
        A `Segmentation` on the CPU, or a list of them if several images were given. Its classes are
        `"region 1"`, `"region 2"`, ..., those that win an image token and a pixel, largest first. `scores`
        are membership of the image tokens, resized to the image; of the paper's presets, the mean
        distributions of the groups, resized, times the number of image tokens (1 is the mean).

    Raises:
        NotImplementedError: the model family is not supported.
        TypeError: `pipe` has no VAE, or `regions` is not an integer.
        ValueError: no or unreadable images, an unknown preset, a layer out of range, a threshold that is
            not above 0, a number of regions that is out of range, that comes with a threshold, or that the
            preset cannot meet.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; segment_unsupervised takes a whole pipeline")
    choices = find_preset(preset, threshold=threshold)
    grouping = choices.grouping if regions is None else _with_regions(choices, regions, threshold)
    images, single = as_list(image)
    span = state.backbone.name_span(pipe)
    views = views_of(pipe, images, choices.fit)
    results: list[Segmentation | None] = [None] * len(images)
    empty = [(PlannedPrompt("", ()),)] * len(images)
    noising = Noising(seed=seed, generator=generator, batch_size=batch_size)
    clustered = isinstance(grouping, Clustering)
    # Clustering needs no map: one column is the least that can be asked.
    columns = slice(span.first, span.first + 1 if clustered else span.end)
    for chosen, members in layer_groups(pipe, views, empty, layers, seed=seed, batch_size=batch_size):
        used = chosen
        if layers is None or isinstance(layers, str):
            used = layers_behind(chosen, grouping, len(state.blocks))
        for found in run_maps(
            pipe, [views[index] for index in members], [[""]] * len(members),
            Reading(MapRequest(columns=("text", columns)), chosen, used if clustered else ()),
            noising, progress=progress,
        ):  # fmt: skip
            metadata = {
                "preset": choices.name,
                "layers": used,
                "timestep": found.timestep,
                "threshold": grouping.threshold if regions is None else None,
                "seed": None if generator is not None else seed or 0,
            }
            index = members[found.index]
            results[index] = _segmentation(found, views[index], grouping, metadata)
    finished = [result for result in results if result is not None]
    return finished[0] if single else finished


def layers_behind(chosen: Sequence[int], grouping: Grouping | Clustering, count: int) -> tuple[int, ...]:
    """The layers that a grouping reads, of a model of `count`: `chosen`, and for outputs those behind."""
    behind = grouping.behind if isinstance(grouping, Clustering) else 0
    return tuple(sorted({min(layer + k, count - 1) for layer in chosen for k in range(behind + 1)}))


def _with_regions(preset: Preset, regions: int, threshold: float | None) -> Clustering:
    """The clustering of a preset, with the number of regions given."""
    grouping = preset.grouping
    if not isinstance(grouping, Clustering):
        raise ValueError(
            f"regions={regions!r}: preset {preset.name!r} merges text tokens up to a threshold, whatever "
            "number that gives; leave regions out, or take a preset that clusters image tokens, as the "
            "default does"
        )
    if threshold is not None:
        raise ValueError(f"regions={regions!r} and threshold={threshold!r} are both given; give one")
    return replace(grouping, regions=regions)


def _segmentation(
    found: ImageMaps, view: View, grouping: Grouping | Clustering, metadata: dict[str, Any]
) -> Segmentation:
    """Regions of one image, resized to it, and their argmax."""
    read = found.maps if found.outputs is None else found.outputs
    regions = find_regions(read[0], grid=found.grid, grouping=grouping).cpu()
    scores = resize_scores(regions, (view.image.height, view.image.width), "linear")
    areas = scores.argmax(dim=0).flatten().bincount(minlength=len(scores))
    order = areas.argsort(descending=True, stable=True)[: int((areas > 0).sum())]
    scores = scores[order]
    if isinstance(grouping, Grouping):
        scores = scores * regions[0].numel()
    return Segmentation(
        labels=scores.argmax(dim=0),
        scores=scores,
        classes=tuple(f"region {number}" for number in range(1, len(scores) + 1)),
        image=view.image,
        metadata={**metadata, "size": view.pixels.size},
    )
