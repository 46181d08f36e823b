"""What is in an image, and where, without a list of its classes: names come from a vocabulary."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.data.names import VocabularyName
from seg4diff.data.vocabularies import read_vocabulary
from seg4diff.images import ImageInput, as_list
from seg4diff.segmentation.inputs import View, clean_latents, views_of
from seg4diff.segmentation.maps import progress_bar
from seg4diff.segmentation.naming import name_regions, names_in, pack_prompts, prune
from seg4diff.segmentation.passes import NamedScores, recipe_of, run_scores
from seg4diff.segmentation.presence import THRESHOLD, UNEXPLAINED, presence_of
from seg4diff.segmentation.presets import Preset, find_preset
from seg4diff.segmentation.prompts import PlannedPrompt, checked_names, plan_prompts
from seg4diff.segmentation.result import BACKGROUND, Segmentation
from seg4diff.segmentation.scores import best_of
from seg4diff.segmentation.texts import encoded_texts

Vocabulary = VocabularyName | str | Sequence[str]
Captioner = Callable[[Sequence[Image.Image]], Sequence[str]]


@overload
def discover(
    pipe: Any,
    image: Image.Image | str | os.PathLike[str],
    vocabulary: Vocabulary = ...,
    *,
    preset: Literal["fast", "best"] | Preset = ...,
    background: bool = ...,
    captioner: Captioner | None = ...,
    cache: str | os.PathLike[str] | None = ...,
    layers: Sequence[int] | int | None = ...,
    seed: int = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Segmentation: ...
@overload
def discover(
    pipe: Any,
    image: Sequence[ImageInput],
    vocabulary: Vocabulary = ...,
    *,
    preset: Literal["fast", "best"] | Preset = ...,
    background: bool = ...,
    captioner: Captioner | None = ...,
    cache: str | os.PathLike[str] | None = ...,
    layers: Sequence[int] | int | None = ...,
    seed: int = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> list[Segmentation]: ...
@overload
def discover(
    pipe: Any,
    image: np.ndarray | torch.Tensor,
    vocabulary: Vocabulary = ...,
    *,
    preset: Literal["fast", "best"] | Preset = ...,
    background: bool = ...,
    captioner: Captioner | None = ...,
    cache: str | os.PathLike[str] | None = ...,
    layers: Sequence[int] | int | None = ...,
    seed: int = ...,
    batch_size: int = ...,
    progress: bool | None = ...,
) -> Segmentation | list[Segmentation]: ...  # the array may have a batch axis
def discover(
    pipe: Any,
    image: ImageInput | Sequence[ImageInput],
    vocabulary: Vocabulary = "coco",
    *,
    preset: Literal["fast", "best"] | Preset = "fast",
    background: bool = False,
    captioner: Captioner | None = None,
    cache: str | os.PathLike[str] | None = None,
    layers: Sequence[int] | int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Segmentation | list[Segmentation]:
    """Segment images by names that are found in a vocabulary, without training.

    A vocabulary of more tokens than one prompt holds is read in several prompts, of which each costs one
    forward to the expert layer; the names of the largest presence, as many as one prompt holds, are then read
    together. Regions of like image tokens are named by their mean logarithm of the scores, presence decides
    which names count, and regions of one name become one. The image is encoded once, or once more mirrored
    where the preset has a second pass.

    Args:
        pipe: a pipeline of a supported family.
        image: an image, or several (list, or array with a batch axis): PIL, path, numpy or tensor, any size.
        vocabulary: `"coco"`, `"ade20k"`, `"lvis"` or `"wordnet"`, a text file of one name per line (see
            `seg4diff.data.vocabularies.read_vocabulary`), or a list of names, which may be thousands.
        preset: `"fast"`: one pass over the names that are left. `"best"`: two, one over the mirrored image.
            Or a `Preset` of your own whose `spread` is true.
        background: whether pixels that no name explains get the label -1. Otherwise each gets the best name.
        captioner: writes a caption for each image, such as `seg4diff.data.captioning.Captioner(model)`. Only
            names that the caption mentions are searched; all, where it mentions none.
        cache: a folder that keeps encoded prompts for the next call; None keeps them for this call only.
        layers: transformer blocks whose maps are averaged; the model's expert layers when None.
        seed: seed of the noise.
        batch_size: prompts of an image that run together.
        progress: whether to show a progress bar; when None, for more than one image.

    Returns:
        A `Segmentation` on the CPU, or a list of them if several images were given. `classes` are the names
        that have pixels, the largest first, `scores` and `presence` theirs. `metadata["forwards"]` counts the
        forwards of the image, `"coarse"` over its vocabulary and `"fine"` over the names left;
        `metadata["vocabulary"]` is the number of names searched, `metadata["candidates"]` those left.

    Raises:
        NotImplementedError: the model family is not supported.
        TypeError: `pipe` has no VAE.
        ValueError: an empty vocabulary, blank or repeated names, a name that is longer than a prompt or without
            tokens, an unreadable image or file, an unknown preset or one that does not spread scores, a layer
            out of range, or no expert layer is known.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; discover takes a whole pipeline")
    choices = find_preset(preset)
    if not choices.spread:
        raise ValueError(f'preset={choices.name!r} does not compare image tokens; use "fast" or "best"')
    names = _names_of(vocabulary)
    images, single = as_list(image)
    search = _Search(pipe, choices, state.layers_or_experts(layers), seed, batch_size, cache, background)
    captions = [None] * len(images) if captioner is None else list(captioner(images))
    searched = [names if text is None else tuple(names_in(text, names)) or names for text in captions]
    plans = {several: search.plan(several) for several in dict.fromkeys(searched)}
    results = []
    with progress_bar(pipe, len(images), progress) as bar:
        for view, caption, several in zip(views_of(pipe, images, choices.fit), captions, searched, strict=True):
            result = search(view, plans[several])
            results.append(result if caption is None else _with_caption(result, caption))
            bar.update()
    return results[0] if single else results


def _names_of(vocabulary: Vocabulary) -> tuple[str, ...]:
    names = read_vocabulary(vocabulary) if isinstance(vocabulary, (str, os.PathLike)) else tuple(vocabulary)
    if not names:
        raise ValueError(
            f"vocabulary={vocabulary!r} is empty; give at least one name, or that of a built-in vocabulary"
        )
    return checked_names(names)


def _with_caption(result: Segmentation, caption: str) -> Segmentation:
    return replace(result, metadata={**result.metadata, "caption": caption})


@dataclass(frozen=True)
class _Plan:
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
class _Search:
    """The search of one image after the other, for the arguments of `discover`."""

    pipe: Any
    preset: Preset
    layers: tuple[int, ...]
    seed: int
    batch_size: int
    cache: str | os.PathLike[str] | None
    background: bool

    def plan(self, names: tuple[str, ...]) -> _Plan:
        span = patch_of(self.pipe).backbone.name_span(self.pipe)
        lengths = tuple(span.token_count(name) for name in names)
        prompts, order = pack_prompts(names, span)
        if len(prompts) == 1:
            prompts, order = plan_prompts(names, span), list(range(len(names)))
        return _Plan(names, lengths, prompts, order, self._encoded(prompts))

    def __call__(self, view: View, plan: _Plan) -> Segmentation:
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
        assert found.outputs is not None  # `discover` takes presets that spread
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
            self.pipe, [view], [prompts], preset, layers=self.layers, seed=self.seed,
            batch_size=self.batch_size, progress=False, known_text=texts,
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
        areas = (labels[..., None] == torch.arange(len(kept), device=labels.device)).sum(dim=(0, 1))
        order = areas.argsort(descending=True, stable=True)[: max(1, int((areas > 0).sum()))]
        renumbered = torch.full((len(kept) + 1,), BACKGROUND, device=labels.device)
        renumbered[order] = torch.arange(len(order), device=labels.device)
        names = [metadata["candidates"][index] for index in kept]
        chosen = torch.tensor(kept, device=order.device)[order]
        return Segmentation(
            labels=renumbered[labels].cpu(),
            scores=scores[chosen].cpu(),
            classes=tuple(names[index] for index in order.tolist()),
            image=view.image,
            metadata=metadata,
            presence=presence[chosen].cpu(),
            upsample=upsample,
        )
