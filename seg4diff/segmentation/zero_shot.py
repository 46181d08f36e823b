"""Segmentation by names: the image-to-text attention of the expert layers (Seg4Diff, section 4.1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.images import ImageInput, as_list
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.inputs import View, views_of
from seg4diff.segmentation.layers import LayerChoice, layer_groups
from seg4diff.segmentation.maps import ImageMaps, run_maps
from seg4diff.segmentation.presets import PresetName, Upsample, find_preset
from seg4diff.segmentation.prompts import PlannedPrompt, names_for_each, plan_prompts
from seg4diff.segmentation.result import Segmentation
from seg4diff.segmentation.scores import resize_scores, scores_of_names


@overload
def segment(  # type: ignore[overload-overlap]  # a str is a sequence of str, and one image
    pipe: Pipeline,
    image: Image.Image | str | os.PathLike[str],
    classes: Sequence[str],
    *,
    preset: PresetName = ...,
    layers: LayerChoice = ...,
    seed: int | None = ...,
    generator: torch.Generator | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Segmentation: ...
@overload
def segment(
    pipe: Pipeline,
    image: Sequence[ImageInput],
    classes: Sequence[str] | Sequence[Sequence[str]],
    *,
    preset: PresetName = ...,
    layers: LayerChoice = ...,
    seed: int | None = ...,
    generator: torch.Generator | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> list[Segmentation]: ...
@overload
def segment(
    pipe: Pipeline,
    image: np.ndarray | torch.Tensor,
    classes: Sequence[str] | Sequence[Sequence[str]],
    *,
    preset: PresetName = ...,
    layers: LayerChoice = ...,
    seed: int | None = ...,
    generator: torch.Generator | None = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Segmentation | list[Segmentation]: ...  # the array may have a batch axis
def segment(
    pipe: Pipeline,
    image: ImageInput | Sequence[ImageInput],
    classes: Sequence[str] | Sequence[Sequence[str]],
    *,
    preset: PresetName = "default",
    layers: LayerChoice = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Segmentation | list[Segmentation]:
    """Segment images by the names of the things in them, without training.

    The image becomes a half-noised latent, the names one prompt, and the model runs once, up to its expert
    layer. How strongly an image token attends to the tokens of a name is that name's score there.

    Args:
        pipe: a pipeline of a supported family.
        image: an image, or several (list, or array with a batch axis): PIL, path, numpy or tensor, any size.
        classes: the names to choose from, in any number; more than one prompt holds are spread over several.
            A list of lists gives every image its own.
        preset: `"default"`: the paper's method on the whole image, its aspect ratio kept, and scores resized
            to it geometrically, which keeps strong words from bleeding over their edges. `"paper"`: on its
            central square, resized linearly; the result covers that square. `"reference"`: as the paper's
            public code does it, squashed to a square, names cut at the first hyphen.
        layers: transformer blocks whose maps are averaged; the model's expert layers when None. `"auto"`, and
            None where no expert is known: at most three layers, chosen for each image by the mutual
            information of place and name in its maps. That costs one more forward per image, through all
            layers: for many images, take the layers of one from its result's `metadata["layers"]`.
        seed: seed of the noise; 0 when neither it nor `generator` is given, so that results repeat.
        generator: draws the noise instead, for one image after the other.
        batch_size: images (and prompts) that run together.
        progress: whether to show a progress bar; when None, for more than one image.

    Returns:
        A `Segmentation` on the CPU, or a list of them if several images were given. `scores` are attention
        probabilities, averaged over heads and over a name's tokens.

    Raises:
        NotImplementedError: the model family is not supported.
        ValueError: no names, blank or repeated ones, a name that is longer than a prompt or without tokens,
            an unreadable image, an unknown preset, a layer out of range.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; segment takes a whole pipeline")
    choices = find_preset(preset)
    images, single = as_list(image)
    names = names_for_each(classes, len(images))
    span = state.backbone.name_span(pipe)
    plans = {
        per_image: plan_prompts(per_image, span, cut_at_hyphen=choices.cut_at_hyphen)
        for per_image in dict.fromkeys(names)
    }
    views = views_of(pipe, images, choices.fit)
    results: list[Segmentation | None] = [None] * len(images)
    planned = [plans[per_image] for per_image in names]
    for used, members in layer_groups(pipe, views, planned, layers, seed=seed, batch_size=batch_size):
        for found in run_maps(
            pipe,
            [views[index] for index in members],
            [[prompt.text for prompt in planned[index]] for index in members],
            layers=used,
            maps=MapRequest(columns=("text", slice(0, span.first + span.length))),
            seed=seed,
            generator=generator,
            batch_size=batch_size,
            progress=progress,
        ):
            index = members[found.index]
            results[index] = _segmentation(
                found,
                views[index],
                names[index],
                planned[index],
                choices.upsample,
                {
                    "preset": preset,
                    "layers": used,
                    "timestep": found.timestep,
                    "prompts": [prompt.text for prompt in planned[index]],
                    "seed": None if generator is not None else seed or 0,
                },
            )
    finished = [result for result in results if result is not None]
    return finished[0] if single else finished


def _segmentation(
    found: ImageMaps,
    view: View,
    names: tuple[str, ...],
    plan: Sequence[PlannedPrompt],
    upsample: Upsample,
    metadata: dict[str, Any],
) -> Segmentation:
    """Scores of an image's names, resized to the image, and their argmax."""
    scores = scores_of_names([maps.mean(dim=0) for maps in found.maps], plan, found.grid)
    scores = resize_scores(scores, (view.image.height, view.image.width), upsample).cpu()
    return Segmentation(
        labels=scores.argmax(dim=0),
        scores=scores,
        classes=names,
        image=view.image,
        metadata={**metadata, "size": view.pixels.size},
    )
