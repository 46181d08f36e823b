"""Scores of names from one or several passes over an image: with other noise, and mirrored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from PIL import ImageOps
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.backbones.base import Recipe
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.inputs import Noising, View
from seg4diff.segmentation.maps import ImageMaps, Reading, run_maps
from seg4diff.segmentation.presets import Preset
from seg4diff.segmentation.prompts import PlannedPrompt
from seg4diff.segmentation.scores import log_scores, scores_of_names, spread_scores


@dataclass(frozen=True)
class NamedScores:
    """Scores of one image's names.

    Attributes:
        index: position of the image in the list that was given.
        scores: probabilities [names, h, w], float32, at the image tokens.
        timestep: the model's timestep.
        outputs: attention outputs [h, w, C], float32, mean over the passes, by which scores were spread; None
            where they were not.
    """

    index: int
    scores: Tensor
    timestep: float
    outputs: Tensor | None = None


def recipe_of(pipe: Pipeline, preset: Preset) -> Recipe:
    """The recipe that a preset takes: its own, else the model's."""
    if preset.recipe is not None:
        return preset.recipe
    state = patch_of(pipe)
    return state.backbone.recipe(state.transformer)


@torch.no_grad()
def run_scores(
    pipe: Pipeline,
    views: Sequence[View],
    plans: Sequence[Sequence[PlannedPrompt]],
    preset: Preset,
    layers: Sequence[int],
    noising: Noising,
    *,
    progress: bool | None = None,
    known_text: Mapping[str, dict[str, Tensor]] | None = None,
) -> Iterator[NamedScores]:
    """Scores of the names of every image, in any order.

    Pass p takes the noise of seed + p, and the mirrored image where p is odd; its maps and outputs are
    mirrored back. Passes are averaged on logarithms, attention outputs as they are.

    Args:
        pipe: a pipeline.
        views: the images.
        plans: for each image its prompts.
        preset: how many passes, at which noise level, and whether scores are spread over like tokens.
        layers: the layers whose maps are averaged, ascending.
        noising: seed, generator and batch size; the noise level is the preset's.
        progress, known_text: as in `seg4diff.segmentation.maps.run_maps`.

    Raises:
        ValueError, torch.OutOfMemoryError: as `run_maps`.
    """
    state = patch_of(pipe)
    recipe = recipe_of(pipe, preset)
    span = state.backbone.name_span(pipe)
    steps, level = state.backbone.noise
    if preset.measured_level and recipe.level is not None:
        level = recipe.level
    compared = (min(layers[-1] + recipe.behind, len(state.blocks) - 1),) if preset.spread else ()
    count = preset.passes
    noising = replace(noising, levels=(level,), steps=steps)
    if noising.generator is None:
        seeds = [seed + number for seed in noising.seeds(len(views)) for number in range(count)]
        noising = replace(noising, seed=seeds)
    mirrored = [View(view.image, ImageOps.mirror(view.pixels)) for view in views] if count > 1 else []
    found: dict[int, list[tuple[Tensor, Tensor | None]]] = defaultdict(list)
    for maps in run_maps(
        pipe,
        [mirrored[i] if number % 2 else views[i] for i in range(len(views)) for number in range(count)],
        [[prompt.text for prompt in plan] for plan in plans for _ in range(count)],
        Reading(MapRequest(columns=("text", slice(0, span.end))), layers, compared),
        noising,
        progress=len(views) > 1 if progress is None else progress,
        known_text=known_text,
    ):
        index, number = divmod(maps.index, count)
        found[index].append(_of_one_pass(maps, plans[index], mirrored=number % 2 == 1))
        if len(found[index]) < count:
            continue
        of_scores, of_outputs = zip(*found.pop(index), strict=True)
        scores = of_scores[0] if count == 1 else torch.stack([log_scores(s) for s in of_scores]).mean(0).exp()
        outputs = None
        if preset.spread:
            outputs = torch.stack(of_outputs).mean(dim=0)
            scores = spread_scores(scores, outputs, recipe.tau)
        yield NamedScores(index, scores, maps.timestep, outputs)


def _of_one_pass(
    maps: ImageMaps, plan: Sequence[PlannedPrompt], *, mirrored: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores [names, h, w] and, where there are any, attention outputs [h, w, C], mean over the prompts."""
    scores = scores_of_names([of_prompt.mean(dim=0) for of_prompt in maps.maps], plan, maps.grid)
    outputs = None
    if maps.outputs is not None:
        mean = torch.stack([of_prompt[0].float() for of_prompt in maps.outputs]).mean(dim=0)
        outputs = rearrange(mean, "(h w) c -> h w c", h=maps.grid[0])
    if mirrored:
        scores = scores.flip(-1)
        outputs = None if outputs is None else outputs.flip(1)
    return scores, outputs
