"""Words in, segmentation out: the image-to-text attention of the expert layer (Seg4Diff, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange

from seg4diff.attention.patch import patch_of
from seg4diff.backbones.text import TextSpan
from seg4diff.images import ImageInput, as_list
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.maps import (
    ImageMaps,
    Preset,
    View,
    find_preset,
    resize_scores,
    run_maps,
    views_of,
)
from seg4diff.segmentation.result import Segmentation


def segment(
    pipe: Any,
    image: ImageInput | Sequence[ImageInput],
    classes: Sequence[str] | Sequence[Sequence[str]],
    *,
    preset: str = "default",
    layers: Sequence[int] | int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Segmentation | list[Segmentation]:
    """Segment pictures by the names of the things in them, without training.

    The picture becomes a half-noised latent, the names one prompt, and the model runs once, up to its expert
    layer. How strongly an image token attends to the tokens of a name is that name's score there.

    Args:
        pipe: a pipeline of a supported family.
        image: a picture, or several (list, or array with a batch axis): PIL, path, numpy or tensor, any size.
        classes: the names to choose from, in any number; more than one prompt holds are spread over several.
            A list of lists gives every picture its own.
        preset: ``"default"``: the paper's recipe on the whole picture, its aspect ratio kept, and scores
            resized to it geometrically, which keeps strong words from bleeding over their edges.
            ``"paper"``: on its central square, resized linearly; the result covers that square.
            ``"reference"``: as the paper's public code does it, squashed to a square, names cut at the first
            hyphen.
        layers: transformer blocks whose maps are averaged; the model's expert layers when None.
        seed: of the noise; 0 when neither it nor ``generator`` is given, so that results repeat.
        generator: draws the noise instead, for one picture after the other.
        batch_size: pictures (and prompts) that run together.
        progress: whether to show a progress bar; when None, for more than one picture.

    Returns:
        A :class:`Segmentation` on the CPU, or a list of them if several pictures were given. ``scores`` are
        attention probabilities, averaged over heads and over a name's tokens.

    Raises:
        NotImplementedError: the model family is not supported.
        ValueError: no names, blank or repeated ones, a name that is longer than a prompt or without tokens,
            an unreadable picture, an unknown preset, a layer out of range.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; segment takes a whole pipeline")
    choices = find_preset(preset)
    images, single = as_list(image)
    names = _names_for_each(classes, len(images))
    used = state.layers_or_experts(layers)
    span = state.backbone.name_span(pipe)
    plans = {per_image: plan_prompts(per_image, span, choices) for per_image in dict.fromkeys(names)}
    views = views_of(pipe, images, choices)
    results: list[Segmentation | None] = [None] * len(images)
    for found in run_maps(
        pipe,
        views,
        [[prompt.text for prompt in plans[per_image]] for per_image in names],
        layers=used,
        maps=MapRequest(columns=("text", slice(0, span.first + span.length))),
        seed=seed,
        generator=generator,
        batch_size=batch_size,
        progress=progress,
    ):
        per_image = names[found.index]
        results[found.index] = _segmentation(
            found,
            views[found.index],
            per_image,
            plans[per_image],
            choices,
            {
                "preset": preset,
                "layers": used,
                "timestep": found.timestep,
                "prompts": [prompt.text for prompt in plans[per_image]],
                "seed": None if generator is not None else seed or 0,
            },
        )
    finished = [result for result in results if result is not None]
    return finished[0] if single else finished


@dataclass(frozen=True)
class PlannedPrompt:
    """One prompt made of names.

    Attributes:
        text: what the text encoders read.
        columns: for each of its names, the text columns of its tokens.
    """

    text: str
    columns: tuple[tuple[int, ...], ...]


def plan_prompts(names: Sequence[str], span: TextSpan, preset: Preset) -> tuple[PlannedPrompt, ...]:
    """Spread names, in order, over as few prompts as the text encoder's length allows.

    Raises:
        ValueError: a name has no tokens, or more than one prompt holds.
    """
    room = span.room
    groups: list[list[str]] = []
    used = room
    for name in names:
        spoken = name.split("-")[0].strip() or name if preset.first_part_of_names else name
        count = span.token_count(spoken)
        if count == 0:
            raise ValueError(f"class name {name!r} has no tokens; use a name made of letters or digits")
        if count > room:
            raise ValueError(f"class name {name!r} has {count} tokens, but a prompt holds {room}; shorten it")
        if used + count > room:
            groups.append([])
            used = 0
        groups[-1].append(spoken)
        used += count
    return tuple(_plan(group, span) for group in groups)


def _plan(group: Sequence[str], span: TextSpan) -> PlannedPrompt:
    text = " ".join(group)
    columns = []
    start = 0
    for name in group:
        found = span.columns(text, start, start + len(name))
        if not found:
            raise ValueError(f"class name {name!r} has no tokens of its own in the prompt {text!r}")
        columns.append(tuple(found))
        start += len(name) + 1
    return PlannedPrompt(text, tuple(columns))


def _segmentation(
    found: ImageMaps,
    view: View,
    names: tuple[str, ...],
    plan: Sequence[PlannedPrompt],
    preset: Preset,
    metadata: dict[str, Any],
) -> Segmentation:
    """Scores of a picture's names, resized to the picture, and their argmax."""
    scores = torch.stack(
        [
            maps[:, list(columns)].mean(dim=-1)
            for maps, prompt in zip(found.maps, plan, strict=True)
            for columns in prompt.columns
        ]
    )
    scores = rearrange(scores, "names (h w) -> names h w", h=found.grid[0])
    size = (view.image.height, view.image.width)
    scores = resize_scores(scores, size, preset.resize).cpu()
    return Segmentation(
        labels=scores.argmax(dim=0),
        scores=scores,
        classes=names,
        image=view.image,
        metadata={**metadata, "size": view.pixels.size},
    )


def _names_for_each(classes: Sequence[str] | Sequence[Sequence[str]], pictures: int) -> list[tuple[str, ...]]:
    """The checked names of every picture."""
    if isinstance(classes, str):
        raise ValueError(f"classes={classes!r} is one string; give a list of names, such as [{classes!r}]")
    given = list(classes)
    if not given:
        raise ValueError("classes is empty; name at least one thing to look for")
    if all(isinstance(name, str) for name in given):
        return [_checked_names(given)] * pictures  # type: ignore[arg-type]
    if any(isinstance(name, str) for name in given):
        raise ValueError(
            "classes mixes names and lists of names; give one list, or one list for each picture"
        )
    if len(given) != pictures:
        raise ValueError(f"classes holds {len(given)} lists of names for {pictures} pictures")
    return [_checked_names(list(names)) for names in given]


def _checked_names(names: list[str]) -> tuple[str, ...]:
    if not names:
        raise ValueError("a picture's list of classes is empty; name at least one thing to look for")
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"class name {name!r} is not a string")
        if not name.strip():
            raise ValueError(f"class name {name!r} is blank")
        same = seen.get(name.strip().casefold())
        if same is not None:
            raise ValueError(
                f"class names {same!r} and {name!r} are the same to the model; name each class once"
            )
        seen[name.strip().casefold()] = name
    return tuple(name.strip() for name in names)
