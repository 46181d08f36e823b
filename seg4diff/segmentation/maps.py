"""From pictures and prompts to attention maps: the part of the paper's recipe that all segmentation shares.

Called by :mod:`zero_shot` and :mod:`unsupervised`. It hides how a picture is fitted to the model, turned into
a noisy latent and run, with as little of the model as its maps need, in batches of equal size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from seg4diff.attention.maps import maps_of
from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Backbone
from seg4diff.backbones.base import PURE_NOISE
from seg4diff.kernels.types import MapRequest

Geometry = Literal["aspect", "crop", "squash"]
Resize = Literal["linear", "geometric"]

NOISE_STEPS, NOISE_INDEX = 28, -8
"""At which noise images are segmented: length of the schedule, and the position in it, sigma 0.515 with SD3's
shift of 3 (t = 8 from the clean end)."""


@dataclass(frozen=True)
class Preset:
    """A complete set of choices, from the paper (Seg4Diff, section 4.1, appendix A) or its public code.

    Attributes:
        name: what users write.
        geometry: how a picture is fitted to the model. ``"aspect"``: the whole picture, aspect ratio kept, at
            the model's native area. ``"crop"``: its central square; the result then covers that square.
            ``"squash"``: short side to 5/8 of the native size first, then a square regardless of the aspect.
        resize: how scores go from image tokens to pixels. ``"linear"``: bilinear, as in the paper.
            ``"geometric"``: bilinear on their logarithms, see :func:`resize_scores`.
        first_part_of_names: ``"wall-brick"`` enters the prompt as ``"wall"``.
    """

    name: str
    geometry: Geometry
    resize: Resize
    first_part_of_names: bool = False


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("default", geometry="aspect", resize="geometric"),
        Preset("paper", geometry="crop", resize="linear"),
        Preset("reference", geometry="squash", resize="linear", first_part_of_names=True),
    )
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; accepted: {', '.join(map(repr, PRESETS))}")
    return PRESETS[name]


@dataclass(frozen=True)
class View:
    """A picture as a preset sees it.

    Attributes:
        image: the part of the picture that a result covers, at its own resolution.
        pixels: the same part at the size the model gets, RGB.
    """

    image: Image.Image
    pixels: Image.Image


@dataclass(frozen=True)
class ImageMaps:
    """Attention maps of one picture.

    Attributes:
        index: position of the picture in the list that was given.
        maps: for each of its prompts [N, T'] or [H, N, T'], float32, averaged over the layers; layers that
            are kept apart come first.
        grid: height and width of the image tokens, N = height * width.
        timestep: the noise level at which the model looked.
    """

    index: int
    maps: tuple[Tensor, ...]
    grid: tuple[int, int]
    timestep: float


def fit_picture(image: Image.Image, preset: Preset, *, native: int, multiple: int, largest: int) -> View:
    """Fit an RGB picture to a model.

    Args:
        image: the picture, any size.
        preset: its ``geometry`` decides.
        native: side in pixels of the square the model was made for.
        multiple: sides are multiples of this.
        largest: no side is longer than this.
    """
    if preset.geometry == "aspect":
        scale = native / math.sqrt(image.width * image.height)
        width, height = (
            min(max(round(side * scale / multiple), 1), largest // multiple) * multiple for side in image.size
        )
        return View(image, image.resize((width, height), Image.Resampling.BICUBIC))
    if preset.geometry == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return View(image, image.resize((native, native), Image.Resampling.BICUBIC))
    scale = 0.625 * native / min(image.size)
    # The public code bounds the long side to four times the short one.
    short_first = tuple(min(max(round(side * scale), 1), round(2.5 * native)) for side in image.size)
    pixels = image.resize(short_first, Image.Resampling.BILINEAR)  # type: ignore[arg-type]
    return View(image, pixels.resize((native, native), Image.Resampling.BILINEAR))


def resize_scores(scores: Tensor, size: tuple[int, int], resize: Resize) -> Tensor:
    """Scores of image tokens [classes, h, w] at the pixels of a picture: [classes, height, width], float32.

    Probabilities of two words can differ by orders of magnitude. Halfway between a token that reads a strong
    word at 0.5 and one that does not, the linear mean is still 0.25, above a weaker word's 0.05 on both: the
    strong word's region grows by almost a token. The geometric mean has no such preference.
    """
    scores = scores.float()
    if resize == "geometric":
        scores = scores.clamp_min(torch.finfo(torch.float32).tiny).log()
    scores = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    return scores.exp() if resize == "geometric" else scores


def views_of(pipe: Any, images: Sequence[Image.Image], preset: Preset) -> list[View]:
    """Fit RGB pictures to the pipeline's model, see :func:`fit_picture`."""
    backbone = patch_of(pipe).backbone
    sizes = {
        "native": backbone.native_size(pipe),
        "multiple": backbone.pixel_multiple(pipe),
        "largest": backbone.largest_size(pipe),
    }
    return [fit_picture(image, preset, **sizes) for image in images]


@torch.no_grad()
def run_maps(
    pipe: Any,
    views: Sequence[View],
    prompts: Sequence[Sequence[str]],
    *,
    layers: Sequence[int] | int | None = None,
    maps: MapRequest,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
    known_text: Mapping[str, dict[str, Tensor]] | None = None,
    average_layers: bool = True,
) -> Iterator[ImageMaps]:
    """Attention maps of every picture under each of its prompts, in any order of pictures.

    Prompts are encoded once each, pictures once each. The model runs up to the last of ``layers`` and no
    further.

    Args:
        pipe: a pipeline.
        views: the pictures.
        prompts: for each picture its prompts, at least one.
        layers: layers to average; the model's expert layers when None.
        maps: which columns, scores and heads.
        seed: every picture's noise is drawn from a generator of this seed (0 when None), so that a result
            does not depend on what else is in the list.
        generator: draws the noise of one picture after the other instead.
        batch_size: pictures of equal size, and (picture, prompt) pairs, that run together.
        progress: whether to show the pipeline's progress bar; when None, for more than one picture.
        known_text: prompts that need no encoding: for each what ``Backbone.encode_text`` gives, without the
            batch axis.
        average_layers: False keeps the layers apart, as the first axis of every map.

    Raises:
        ValueError: layers, seed or batch size are out of range, or no expert layer is known.
        torch.OutOfMemoryError: with remedies.
    """
    state = patch_of(pipe)
    chosen = state.layers_or_experts(layers)
    show = len(views) > 1 if progress is None else progress
    found: dict[int, list[Tensor]] = defaultdict(list)
    try:
        with _bar(pipe, total=len(views), show=show) as bar:
            for inputs in model_inputs(
                pipe,
                views,
                prompts,
                steps=NOISE_STEPS,
                noise_indices=(NOISE_INDEX,),
                seed=seed,
                generator=generator,
                batch_size=batch_size,
                known_text=known_text,
            ):
                layer_maps = maps_of(pipe.transformer, chosen, maps, inputs.arguments)  # [L, rows, ...]
                height, width = state.backbone.read_call(state.transformer, inputs.arguments).grid
                row_maps = layer_maps.mean(dim=0) if average_layers else layer_maps.transpose(0, 1)
                for picture, entry in zip(inputs.pictures, row_maps, strict=True):
                    found[picture].append(entry)
                    if len(found[picture]) == len(prompts[picture]):
                        bar.update()
                        yield ImageMaps(picture, tuple(found.pop(picture)), (height, width), inputs.timestep)
    except torch.OutOfMemoryError as error:
        width, height = views[0].pixels.size
        raise torch.OutOfMemoryError(
            f"out of memory at {width} x {height} pixels with batch_size={batch_size}; use batch_size=1, "
            f"load the pipeline in torch.bfloat16, or call pipe.enable_model_cpu_offload() ({error})"
        ) from error
    finally:
        pipe.maybe_free_model_hooks()


@dataclass(frozen=True)
class ModelInputs:
    """One call of the transformer: pictures at one noise level, each with one of its prompts.

    Attributes:
        pictures: for every row, the position of its picture in the list that was given.
        prompts: for every row, its prompt.
        noise_index: position in the noise schedule.
        timestep: what the schedule has there.
        arguments: of the transformer's call.
    """

    pictures: tuple[int, ...]
    prompts: tuple[str, ...]
    noise_index: int
    timestep: float
    arguments: dict[str, Any]


@torch.no_grad()
def model_inputs(
    pipe: Any,
    views: Sequence[View],
    prompts: Sequence[Sequence[str]],
    *,
    steps: int,
    noise_indices: Sequence[int],
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    known_text: Mapping[str, dict[str, Tensor]] | None = None,
) -> Iterator[ModelInputs]:
    """Noisy latents and encoded prompts of pictures, in batches of one size.

    A picture's rows follow each other in the order of its prompts, once for every noise level. Its noise is
    the same at all levels. Arguments and errors are those of :func:`run_maps`; ``noise_indices`` are
    positions in a schedule of ``steps`` steps.
    """
    state = patch_of(pipe)
    backbone = state.backbone
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a positive integer")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator are both given; give one")
    text = _encode(backbone, pipe, prompts, batch_size, {} if known_text is None else known_text)
    for batch in _batches(views, batch_size):
        pixels = torch.stack([_as_tensor(views[i].pixels) for i in batch])
        latents = backbone.latents(pipe, pixels).float()
        noise = _noise(latents, seed, generator)
        pairs = [(row, prompt) for row, i in enumerate(batch) for prompt in prompts[i]]
        for index in noise_indices:
            sigma = backbone.sigma(pipe, latents, steps, index)
            noisy = torch.lerp(latents, noise, sigma.to(latents)).to(state.transformer.dtype)  # type: ignore[arg-type]
            for first in range(0, len(pairs), batch_size):
                rows, texts = zip(*pairs[first : first + batch_size], strict=True)
                encoded = {
                    key: torch.stack([text[prompt][key] for prompt in texts]).to(noisy.device)
                    for key in text[texts[0]]
                }
                arguments = backbone.arguments(
                    state.transformer, noisy[list(rows)], sigma.expand(len(rows)), encoded
                )
                pictures = tuple(batch[row] for row in rows)
                yield ModelInputs(
                    pictures, texts, index, PURE_NOISE * float(sigma), {**arguments, "return_dict": False}
                )


def _encode(
    backbone: Backbone,
    pipe: Any,
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
        arguments = backbone.encode_text(pipe, batch)
        for row, prompt in enumerate(batch):
            encoded[prompt] = {key: tensor[row] for key, tensor in arguments.items()}
    return encoded


def _batches(views: Sequence[View], batch_size: int) -> Iterator[list[int]]:
    """Positions of pictures that run together: of one size, at most ``batch_size``."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, view in enumerate(views):
        by_size[view.pixels.size].append(position)
    for positions in by_size.values():
        for first in range(0, len(positions), batch_size):
            yield positions[first : first + batch_size]


def _as_tensor(pixels: Image.Image) -> Tensor:
    """[3, height, width], float32 in [-1, 1]."""
    width, height = pixels.size
    data = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return rearrange(data, "h w c -> c h w").float() / 127.5 - 1.0


def _noise(latents: Tensor, seed: int | None, generator: torch.Generator | None) -> Tensor:
    """Float32 noise, drawn on the CPU unless ``generator`` lives elsewhere: the same on every device."""

    def draw(source: torch.Generator) -> Tensor:
        return torch.randn(latents.shape[1:], generator=source, device=source.device)

    if generator is not None:
        rows = [draw(generator) for _ in latents]
    else:
        rows = [draw(torch.Generator().manual_seed(0 if seed is None else seed))] * len(latents)
    return torch.stack(rows).to(latents.device)


def _bar(pipe: Any, total: int, show: bool) -> Any:
    if show:
        return pipe.progress_bar(total=total)
    from tqdm import tqdm

    return tqdm(total=total, disable=True)
