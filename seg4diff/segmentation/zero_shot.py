"""Segmentation by names: the image-to-text attention of the expert layers (Seg4Diff, section 4.1)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.backbones.base import Recipe
from seg4diff.images import ImageInput, as_list
from seg4diff.segmentation.inputs import Noising, View, views_of
from seg4diff.segmentation.layers import LayerChoice, layer_groups
from seg4diff.segmentation.passes import recipe_of, run_scores
from seg4diff.segmentation.presence import UNEXPLAINED, presence_of, threshold_for
from seg4diff.segmentation.presets import Absent, Preset, PresetName, find_preset
from seg4diff.segmentation.prompts import names_for_each, plan_prompts
from seg4diff.segmentation.result import BACKGROUND, Segmentation
from seg4diff.segmentation.scores import best_of


@overload
def segment(  # type: ignore[overload-overlap]  # a str is a sequence of str, and one image
    pipe: Pipeline,
    image: Image.Image | str | os.PathLike[str],
    classes: Sequence[str],
    *,
    preset: PresetName | Preset = ...,
    absent: Absent | None = ...,
    false_names: float | None = ...,
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
    preset: PresetName | Preset = ...,
    absent: Absent | None = ...,
    false_names: float | None = ...,
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
    preset: PresetName | Preset = ...,
    absent: Absent | None = ...,
    false_names: float | None = ...,
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
    preset: PresetName | Preset = "default",
    absent: Absent | None = None,
    false_names: float | None = None,
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
            to it geometrically, which keeps strong words from bleeding over their edges. `"best"`: two passes
            to a layer or two further, one over the mirrored image; scores averaged over tokens with like
            features; absent names left out; all at what was measured of the model. `"fast"`: that with one
            pass. `"paper"`: on its central square, resized linearly; the result covers that square.
            `"reference"`: as the paper's public code does it, squashed to a square, names cut at the first
            hyphen. Or a `Preset` of your own.
        absent: what becomes of names that are not in the image, by their `Segmentation.presence`. `"ignore"`:
            they are left out, and every pixel gets one of the others (the most likely name if none is left).
            `"background"`: they are left out, and pixels that no other name explains get the label -1.
            `"keep"`: all names compete. That of the preset when None. A single name has no other to compete
            with: unless `"keep"`, it gets the pixels that it explains.
        false_names: find a name only if it is so likely that at most this many names per image are found that
            are not there, by the calibration of the model. None: where it wins a block of tokens.
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
        probabilities at the image tokens, averaged over heads and over a name's tokens.

    Raises:
        NotImplementedError: the model family is not supported.
        ValueError: no names, blank or repeated ones, a name that is longer than a prompt or without tokens,
            an unreadable image, an unknown preset or `absent`, a layer out of range, or `false_names` which
            the model's calibration does not reach.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; segment takes a whole pipeline")
    choices = find_preset(preset)
    if absent is not None:
        choices = replace(choices, absent=absent)
    recipe = recipe_of(pipe, choices)
    threshold = threshold_for(false_names, recipe)
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
    noising = Noising(seed=seed, generator=generator, batch_size=batch_size)
    for used, members in layer_groups(pipe, views, planned, layers, seed=seed, batch_size=batch_size):
        for found in run_scores(
            pipe,
            [views[index] for index in members],
            [planned[index] for index in members],
            choices,
            used,
            noising,
            progress=progress,
        ):
            index = members[found.index]
            view = views[index]
            presence = presence_of(found.scores, recipe)
            results[index] = Segmentation(
                labels=_labels(found.scores, presence, threshold, choices, recipe, view),
                scores=found.scores.cpu(),
                classes=names[index],
                image=view.image,
                metadata={
                    "preset": choices.name,
                    "layers": used,
                    "timestep": found.timestep,
                    "prompts": [prompt.text for prompt in planned[index]],
                    "seed": None if generator is not None else seed or 0,
                    "absent": choices.absent,
                    "threshold": threshold,
                    "size": view.pixels.size,
                },
                presence=presence.cpu(),
                upsample=choices.upsample or recipe.upsample,
            )
    finished = [result for result in results if result is not None]
    return finished[0] if single else finished


def _labels(
    scores: Tensor, presence: Tensor, threshold: float, choices: Preset, recipe: Recipe, view: View
) -> Tensor:
    """The labels of an image's pixels, int64 on the CPU: positions in its names, or `BACKGROUND`."""
    size = (view.image.height, view.image.width)
    alone = len(scores) == 1
    kept = torch.arange(len(scores), device=scores.device)
    if choices.absent != "keep":
        kept = kept[~(presence < threshold)]  # NaN: not known
        if choices.absent == "ignore" and not len(kept) and not alone:
            kept = presence.argmax()[None]
    if not len(kept):
        return torch.full(size, BACKGROUND)
    best, winner = best_of(scores[kept], size, choices.upsample or recipe.upsample, view.image)
    labels = kept[winner]
    if choices.absent == "background" or (choices.absent == "ignore" and alone):
        floor = UNEXPLAINED * float(scores.max()) if recipe.floor is None else recipe.floor
        labels[best < floor] = BACKGROUND
    return labels.cpu()
