"""From images and prompts to the arguments of a transformer's forward: noisy latents and encoded text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Backbone, Pipeline
from seg4diff.backbones.base import PURE_NOISE
from seg4diff.segmentation.presets import Fit


@dataclass(frozen=True)
class View:
    """An image as the model gets it.

    Attributes:
        image: the part of the image that a result covers, at its own resolution.
        pixels: the same part at the size the model gets, RGB.
        latents: clean latents [C, h, w] of `pixels`, where they are known already.
    """

    image: Image.Image
    pixels: Image.Image
    latents: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Noising:
    """How images are noised, and how many run together.

    Attributes:
        levels: steps that are left of the noise schedule, 1 to `steps`; that of the model family when None.
        steps: length of the noise schedule; that of the model family when None.
        seed: every image's noise is drawn from a generator of this seed (0 when None), or of its own where
            each image has one, so that a result does not depend on the rest of the list.
        generator: draws the noise of one image after the other instead.
        batch_size: number of images of equal size, and of (image, prompt) pairs, that run together.

    Raises:
        ValueError: `seed` and `generator` are both given, or `batch_size` is not a positive integer.
    """

    levels: Sequence[int] | None = None
    steps: int | None = None
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be a positive integer")
        if self.seed is not None and self.generator is not None:
            raise ValueError("seed and generator are both given; give one")

    def seeds(self, images: int) -> list[int]:
        """The seed of each of `images` images."""
        if isinstance(self.seed, Sequence):
            return list(self.seed)
        return [0 if self.seed is None else self.seed] * images

    def schedule(self, backbone: Backbone) -> tuple[int, Sequence[int]]:
        """Steps and levels, those of the model family where none are given."""
        steps, level = backbone.noise
        return (
            steps if self.steps is None else self.steps,
            (level,) if self.levels is None else self.levels,
        )


def fit_image(image: Image.Image, fit: Fit, *, native: int, multiple: int, largest: int) -> View:
    """Fit an RGB image to a model.

    Args:
        image: the image, any size.
        fit: how, see `seg4diff.segmentation.presets.Preset`.
        native: side in pixels of the square the model was made for.
        multiple: sides are multiples of this.
        largest: no side is longer than this.
    """
    if fit == "aspect":
        scale = native / math.sqrt(image.width * image.height)
        width, height = (
            min(max(round(side * scale / multiple), 1), largest // multiple) * multiple for side in image.size
        )
        return View(image, image.resize((width, height), Image.Resampling.BICUBIC))
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return View(image, image.resize((native, native), Image.Resampling.BICUBIC))
    scale = 0.625 * native / min(image.size)
    # The public code bounds the long side to four times the short one.
    short_first = tuple(min(max(round(side * scale), 1), round(2.5 * native)) for side in image.size)
    pixels = image.resize(short_first, Image.Resampling.BILINEAR)  # type: ignore[arg-type]
    return View(image, pixels.resize((native, native), Image.Resampling.BILINEAR))


def views_of(pipe: Pipeline, images: Sequence[Image.Image], fit: Fit) -> list[View]:
    """Fit RGB images to the pipeline's model, see `fit_image`."""
    backbone = patch_of(pipe).backbone
    sizes = {
        "native": backbone.native_size(pipe),
        "multiple": backbone.pixel_multiple(pipe),
        "largest": backbone.largest_size(pipe),
    }
    return [fit_image(image, fit, **sizes) for image in images]


@torch.no_grad()
def clean_latents(pipe: Pipeline, views: Sequence[View]) -> Tensor:
    """Clean latents of views of one size, [B, C, h, w], float32; encoded only where they are not known."""
    known = {row: view.latents for row, view in enumerate(views) if view.latents is not None}
    missing = [row for row in range(len(views)) if row not in known]
    if missing:
        pixels = torch.stack([_as_tensor(views[row].pixels) for row in missing])
        known.update(zip(missing, patch_of(pipe).backbone.latents(pipe, pixels).float(), strict=True))
    return torch.stack([known[row] for row in range(len(views))])


@dataclass(frozen=True)
class ModelInputs:
    """One call of the transformer: images at one noise level, each with one of its prompts.

    Attributes:
        images: for every row, the position of its image in the list that was given.
        prompts: for every row, its prompt.
        noise_level: steps that are left of the noise schedule.
        timestep: the model's timestep at that level.
        arguments: the arguments of the transformer's call.
    """

    images: tuple[int, ...]
    prompts: tuple[str, ...]
    noise_level: int
    timestep: float
    arguments: dict[str, Any]


def check_levels(noise_levels: Sequence[int], steps: int) -> None:
    """Raise ValueError unless there are noise levels, all different, within a schedule of `steps` steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a positive integer")
    if not noise_levels or len(set(noise_levels)) < len(noise_levels):
        raise ValueError(f"noise_levels={noise_levels!r} must name at least one level, each once")
    for level in noise_levels:
        if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= steps:
            raise ValueError(
                f"noise level {level!r} is out of range: 1 to {steps} of {steps} steps; give other levels"
            )


@torch.no_grad()
def model_inputs(
    pipe: Pipeline,
    views: Sequence[View],
    prompts: Sequence[Sequence[str]],
    noising: Noising,
    *,
    known_text: Mapping[str, dict[str, Tensor]] | None = None,
) -> Iterator[ModelInputs]:
    """Noisy latents and encoded prompts of images, in batches of one size.

    An image's rows follow each other in the order of its prompts, once per noise level. Its noise is the same
    at all levels. Prompts and images are encoded once each.

    Args:
        pipe: a pipeline.
        views: the images.
        prompts: for each image its prompts, at least one.
        noising: see `Noising`.
        known_text: prompts that need no encoding: for each the result of `Backbone.encode_text`, without the
            batch axis.
    """
    state = patch_of(pipe)
    backbone = state.backbone
    steps, levels = noising.schedule(backbone)
    batch_size, seeds = noising.batch_size, noising.seeds(len(views))
    text = _encode(backbone, pipe, prompts, batch_size, {} if known_text is None else known_text)
    for batch in _batches(views, batch_size):
        latents = clean_latents(pipe, [views[i] for i in batch])
        noise = _noise(latents, [seeds[i] for i in batch], noising.generator)
        pairs = [(row, prompt) for row, i in enumerate(batch) for prompt in prompts[i]]
        for level in levels:
            sigma = backbone.sigma(pipe, latents, steps, -level)
            noisy = backbone.noisy(pipe, latents, noise, sigma).to(state.transformer.dtype)  # type: ignore[arg-type]
            for alike in _alike(pairs, text, batch_size):
                rows, texts = zip(*alike, strict=True)
                encoded = {
                    key: torch.stack([text[prompt][key] for prompt in texts]).to(noisy.device)
                    for key in text[texts[0]]
                }
                arguments = backbone.arguments(
                    state.transformer, noisy[list(rows)], sigma.expand(len(rows)), encoded
                )
                yield ModelInputs(
                    tuple(batch[row] for row in rows),
                    texts,
                    level,
                    PURE_NOISE * float(sigma),
                    {**arguments, "return_dict": False},
                )


def _encode(
    backbone: Backbone,
    pipe: Pipeline,
    prompts: Sequence[Sequence[str]],
    batch_size: int,
    known: Mapping[str, dict[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """Transformer arguments of every different prompt, without the batch axis."""
    wanted = dict.fromkeys(prompt for several in prompts for prompt in several)
    encoded = {prompt: known[prompt] for prompt in wanted if prompt in known}
    different = [prompt for prompt in wanted if prompt not in known]
    for first in range(0, len(different), batch_size):
        batch = different[first : first + batch_size]
        encoded.update(zip(batch, backbone.encode_each(pipe, batch), strict=True))
    return encoded


def _batches(views: Sequence[View], batch_size: int) -> Iterator[list[int]]:
    """Positions of images that run together: of one size, at most `batch_size`."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, view in enumerate(views):
        by_size[view.pixels.size].append(position)
    for positions in by_size.values():
        for first in range(0, len(positions), batch_size):
            yield positions[first : first + batch_size]


def _alike(
    pairs: Sequence[tuple[int, str]], text: Mapping[str, dict[str, Tensor]], batch_size: int
) -> Iterator[Sequence[tuple[int, str]]]:
    """(Image, prompt) pairs that run together: in order, of texts of one length, at most `batch_size`."""
    for _, group in groupby(pairs, key=lambda pair: [value.shape for value in text[pair[1]].values()]):
        same = list(group)
        for first in range(0, len(same), batch_size):
            yield same[first : first + batch_size]


def _as_tensor(pixels: Image.Image) -> Tensor:
    """[3, height, width], float32 in [-1, 1]."""
    width, height = pixels.size
    data = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return rearrange(data, "h w c -> c h w").float() / 127.5 - 1.0


def _noise(latents: Tensor, seeds: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Float32 noise, drawn on the CPU unless `generator` is on another device: the same on every device."""

    def draw(source: torch.Generator) -> Tensor:
        return torch.randn(latents.shape[1:], generator=source, device=source.device)

    if generator is not None:
        rows = [draw(generator) for _ in latents]
    else:
        by_seed = {seed: draw(torch.Generator().manual_seed(seed)) for seed in dict.fromkeys(seeds)}
        rows = [by_seed[seed] for seed in seeds]
    return torch.stack(rows).to(latents.device)
