"""What is in an image, and where, without a list of its classes: names come from a vocabulary."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, overload

import numpy as np
import torch
from PIL import Image

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.data.names import VocabularyName
from seg4diff.data.vocabularies import read_vocabulary
from seg4diff.images import ImageInput, as_list
from seg4diff.segmentation.inputs import views_of
from seg4diff.segmentation.maps import progress_bar
from seg4diff.segmentation.naming import names_in
from seg4diff.segmentation.presets import Preset, find_preset
from seg4diff.segmentation.prompts import checked_names
from seg4diff.segmentation.result import Segmentation
from seg4diff.segmentation.search import Search

Vocabulary = VocabularyName | str | os.PathLike[str] | Sequence[str]
Captioner = Callable[[Sequence[Image.Image]], Sequence[str]]


@overload
def discover(  # type: ignore[overload-overlap]  # a str is a sequence of str, and one image
    pipe: Pipeline,
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
    pipe: Pipeline,
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
    pipe: Pipeline,
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
    pipe: Pipeline,
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
        ValueError: an empty vocabulary, blank or repeated names, a name that is longer than a prompt or
            without tokens, an unreadable image or file, an unknown preset or one that does not spread
            scores, a layer out of range, or no expert layer is known.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; discover takes a whole pipeline")
    choices = find_preset(preset)
    if not choices.spread:
        raise ValueError(f'preset={choices.name!r} does not compare image tokens; use "fast" or "best"')
    names = _names_of(vocabulary)
    images, single = as_list(image)
    search = Search(pipe, choices, state.layers_or_experts(layers), seed, batch_size, cache, background)
    captions = [None] * len(images) if captioner is None else list(captioner(images))
    searched = [names if text is None else tuple(names_in(text, names)) or names for text in captions]
    plans = {several: search.plan(several) for several in dict.fromkeys(searched)}
    results = []
    with progress_bar(pipe, len(images), progress) as bar:
        for view, caption, several in zip(
            views_of(pipe, images, choices.fit), captions, searched, strict=True
        ):
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
