"""The search of one image for the names of a vocabulary: all of them, then those that are left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.segmentation.inputs import Noising, View, clean_latents
from seg4diff.segmentation.naming import name_regions, pack_prompts, prune
from seg4diff.segmentation.passes import NamedScores, recipe_of, run_scores
from seg4diff.segmentation.presence import THRESHOLD, UNEXPLAINED, presence_of
from seg4diff.segmentation.presets import Preset
from seg4diff.segmentation.prompts import PlannedPrompt, plan_prompts
from seg4diff.segmentation.result import BACKGROUND, Segmentation
from seg4diff.segmentation.scores import best_of
from seg4diff.segmentation.texts import encoded_texts


@dataclass(frozen=True)
class Plan:
    """How a vocabulary is read.

    Attributes:
        names: its names.
        lengths: tokens of each.
        prompts: those of all names.
        order: for the names in the order of the prompts their positions in `names`.
        texts: the encoded prompts.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    prompts: tuple[PlannedPrompt, ...]
    order: list[int]
    texts: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Search:
    """How images are searched; the attributes are the arguments of `seg4diff.discover`."""

    pipe: Pipeline
    preset: Preset
    layers: tuple[int, ...]
    seed: int
    batch_size: int
    cache: str | os.PathLike[str] | None
    background: bool

    def plan(self, names: tuple[str, ...]) -> Plan:
        """The prompts of a vocabulary, encoded."""
        span = patch_of(self.pipe).backbone.name_span(self.pipe)
        lengths = tuple(span.token_count(name) for name in names)
        prompts, order = pack_prompts(names, span)
        if len(prompts) == 1:
            prompts, order = plan_prompts(names, span), list(range(len(names)))
        return Plan(names, lengths, prompts, order, self._encoded(prompts))

    @torch.no_grad()
    def __call__(self, view: View, plan: Plan) -> Segmentation:
        """What an image shows of a vocabulary."""
        view = replace(view, latents=clean_latents(self.pipe, [view])[0])
        span = patch_of(self.pipe).backbone.name_span(self.pipe)
        recipe = recipe_of(self.pipe, self.preset)
        candidates, prompts, texts, coarse = list(range(len(plan.names))), plan.prompts, plan.texts, 0
        if len(plan.prompts) > 1:
            quick = replace(self.preset, passes=1, spread=False)
            scores = self._scores(view, prompts, texts, quick).scores
            presence = presence_of(scores, recipe).cpu()
            of_names = torch.empty_like(presence).index_copy_(0, torch.tensor(plan.order), presence)
            candidates, coarse = prune(of_names, plan.lengths, span.room), len(prompts)
            prompts = plan_prompts([plan.names[index] for index in candidates], span)
            texts = self._encoded(prompts)
        found = self._scores(view, prompts, texts, self.preset)
        assert found.outputs is not None  # only presets that spread are taken
        metadata = {
            "preset": self.preset.name,
            "layers": self.layers,
            "timestep": found.timestep,
            "seed": self.seed,
            "vocabulary": len(plan.names),
            "candidates": [plan.names[index] for index in candidates],
            "forwards": {"coarse": coarse, "fine": self.preset.passes},
            "size": view.pixels.size,
        }
        return self._segmentation(view, found.scores, found.outputs, metadata)

    def _encoded(self, prompts: Sequence[PlannedPrompt]) -> dict[str, dict[str, Tensor]]:
        texts = [prompt.text for prompt in prompts]
        return encoded_texts(self.pipe, texts, cache=self.cache, batch_size=self.batch_size)

    def _scores(
        self,
        view: View,
        prompts: Sequence[PlannedPrompt],
        texts: dict[str, dict[str, Tensor]],
        preset: Preset,
    ) -> NamedScores:
        (found,) = run_scores(
            self.pipe, [view], [prompts], preset, self.layers,
            Noising(seed=self.seed, batch_size=self.batch_size), progress=False, known_text=texts,
        )  # fmt: skip
        return found

    def _segmentation(
        self, view: View, scores: Tensor, outputs: Tensor, metadata: dict[str, Any]
    ) -> Segmentation:
        """The candidates that regions have as names, and their pixels."""
        recipe = recipe_of(self.pipe, self.preset)
        presence = presence_of(scores, recipe)
        present = ~(presence < THRESHOLD)  # NaN: not known
        if not present.any():
            present = presence == presence.max()
        kept = name_regions(scores, outputs, present)
        size = (view.image.height, view.image.width)
        upsample = self.preset.upsample or recipe.upsample
        best, labels = best_of(scores[kept], size, upsample, view.image)
        if self.background:
            floor = UNEXPLAINED * float(scores.max()) if recipe.floor is None else recipe.floor
            labels[best < floor] = BACKGROUND
        areas = labels[labels != BACKGROUND].bincount(minlength=len(kept))
        order = areas.argsort(descending=True, stable=True)
        labels = torch.where(labels == BACKGROUND, labels, order.argsort()[labels])
        chosen = [kept[index] for index in order.tolist()[: max(1, int((areas > 0).sum()))]]
        return Segmentation(
            labels=labels.cpu(),
            scores=scores[chosen].cpu(),
            classes=tuple(metadata["candidates"][index] for index in chosen),
            image=view.image,
            metadata=metadata,
            presence=presence[chosen].cpu(),
            upsample=upsample,
        )
