"""Regions without names: the attention to an empty prompt, grouped (Seg4Diff, section 4.2 and appendix A.4).

With nothing to say, the begin, end and padding tokens of the prompt still share out the picture among them.
Tokens that read the same places are merged; each group is a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.images import ImageInput, as_list
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.maps import ImageMaps, View, find_preset, run_maps, views_of
from seg4diff.segmentation.result import Segmentation


@dataclass(frozen=True)
class Grouping:
    """How text tokens become regions.

    A token's map is min-max normalised per image token, over the text tokens, multiplied by ``sharpness`` and
    made a probability distribution over the image tokens by a softmax. Maps are then merged in token order.

    Attributes:
        threshold: maps whose symmetric Kullback-Leibler divergence (the mean of both directions, in nats)
            from the first of their group is below it are merged. Above 0.
        sharpness: factor before the softmax. Normalised values lie in [0, 1], so with 1 (the public code) no
            two image tokens differ by more than a factor e.
        taken_again: whether a map that was merged into one group may also enter the mean of a later one.
        heads: ``"mean"`` averages a token's maps over heads and layers first; ``"each"`` keeps them apart, as
            if every head of every layer had tokens of its own.
    """

    threshold: float
    sharpness: float = 1.0
    taken_again: bool = False
    heads: Literal["mean", "each"] = "mean"


GROUPINGS = {
    # The public code: 0.1 is fixed there, whatever its configuration files say, and maps are taken again.
    "reference": Grouping(threshold=0.1, taken_again=True),
    # The paper says "greedy merge" and gives neither normalisation nor threshold: the code's normalisation,
    # the threshold of its configuration files (0.035), and every token in one group, as "merge" has it.
    "paper": Grouping(threshold=0.035),
    # What measures best on training scenes of the demo model, among seven thresholds and four sharpnesses.
    # Heads look for different things, and their mean blurs that.
    "default": Grouping(threshold=1.0, sharpness=4.0, heads="each"),
}


def find_grouping(preset: str, threshold: float | None = None) -> Grouping:
    """The choices of a preset, with another threshold if one is given.

    Raises:
        ValueError: no such preset, or a threshold that is not above 0.
    """
    if preset not in GROUPINGS:
        raise ValueError(f"preset={preset!r} is unknown; accepted: {', '.join(map(repr, GROUPINGS))}")
    grouping = GROUPINGS[preset]
    if threshold is None:
        return grouping
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        raise ValueError(f"threshold={threshold!r} must be a number above 0 (nats)")
    return replace(grouping, threshold=float(threshold))


def group_attention(
    attention: Tensor,
    *,
    grid: tuple[int, int],
    threshold: float | None = None,
    preset: str = "default",
) -> Tensor:
    """Merge the maps of text tokens that read the same places.

    Takes milliseconds. Runs in float64 on the CPU wherever ``attention`` lives, so that every device gives
    the same answer: whether two maps are merged must not hang on a last digit.

    Args:
        attention: image-to-text attention of one picture [N, T], for every image token its share for each
            text token; any floating dtype.
        grid: height h and width w of the image tokens, N = h * w.
        threshold: see :class:`Grouping`; that of the preset when None. Smaller means more regions.
        preset: ``"default"``, ``"paper"`` or ``"reference"`` (what the public code does), see
            :class:`Grouping`.

    Returns:
        [regions, h, w], float32, on the device of ``attention``: the mean distribution over the picture of
        each group's tokens, groups in the order of their first token. ``argmax(0)`` is the label map; a
        region may win nowhere.

    Raises:
        ValueError: shapes do not fit, values are not finite, the threshold is not above 0, or no such preset.
        TypeError: ``attention`` is no floating-point tensor.
    """
    grouping = find_grouping(preset, threshold)
    if not isinstance(attention, Tensor) or not attention.is_floating_point():
        kind = attention.dtype if isinstance(attention, Tensor) else type(attention).__name__
        raise TypeError(
            f"attention is a {kind}: a floating-point tensor [image tokens, text tokens] expected"
        )
    height, width = grid
    if attention.dim() != 2 or attention.shape[0] != height * width or 0 in attention.shape:
        raise ValueError(
            f"attention has shape {list(attention.shape)}; [image tokens, text tokens] expected, with "
            f"{height} x {width} = {height * width} image tokens"
        )
    exact = attention.detach().to(device="cpu", dtype=torch.float64)
    if not bool(exact.isfinite().all()):
        raise ValueError(f"attention holds {int((~exact.isfinite()).sum())} values that are NaN or infinite")
    low, high = exact.aminmax(dim=1, keepdim=True)
    exponents = ((exact - low) / (high - low + 1e-6) * grouping.sharpness).T.contiguous()  # [T, N]
    distributions = exponents.softmax(dim=1)
    members = _merge(_divergence(distributions, exponents), grouping)  # [regions, T]
    weights = members / members.sum(dim=1, keepdim=True)
    groups = rearrange(weights @ distributions, "regions (h w) -> regions h w", h=height)
    return groups.to(device=attention.device, dtype=torch.float32)


def winning_regions(
    maps: Tensor, *, grid: tuple[int, int], threshold: float | None = None, preset: str = "default"
) -> Tensor:
    """The groups of :func:`group_attention` that win at least one image token; those that win most come
    first.

    Most groups win nowhere, and of many heads there may be a thousand: not worth a score for every pixel.

    Args:
        maps: [N, T], or [L, H, N, T] for a preset that keeps the heads of layers apart.
        grid, threshold, preset: as in :func:`group_attention`.

    Returns:
        [regions, h, w], as :func:`group_attention`.

    Raises:
        ValueError, TypeError: as :func:`group_attention`.
    """
    columns = rearrange(maps, "l heads n t -> n (l heads t)") if maps.dim() == 4 else maps
    groups = group_attention(columns, grid=grid, threshold=threshold, preset=preset)
    wins = groups.flatten(1).argmax(dim=0).bincount(minlength=len(groups))
    return groups[wins.argsort(descending=True, stable=True)[: int((wins > 0).sum())]]


def _divergence(distributions: Tensor, exponents: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence [T, T] of ``distributions`` = softmax(``exponents``), [T, N].

    (KL(a|b) + KL(b|a)) / 2 = <a - b, log a - log b> / 2, in which the logarithms of the softmaxes'
    denominators drop out because a - b sums to zero.
    """
    cross = distributions @ exponents.T
    own = cross.diagonal()
    return (own[:, None] + own[None, :] - cross - cross.T) / 2


def _merge(divergence: Tensor, grouping: Grouping) -> Tensor:
    """Which tokens [regions, T], as 0.0 and 1.0, make up each region: one pass in token order."""
    close = divergence.numpy() < grouping.threshold
    np.fill_diagonal(close, True)
    taken = np.zeros(len(close), dtype=bool)
    groups = []
    for token, neighbours in enumerate(close):
        if taken[token]:
            continue
        groups.append(neighbours if grouping.taken_again else neighbours & ~taken)
        taken |= neighbours
    return torch.from_numpy(np.stack(groups)).double()


def segment_unsupervised(
    pipe: Any,
    image: ImageInput | Sequence[ImageInput],
    *,
    preset: str = "default",
    layers: Sequence[int] | int | None = None,
    threshold: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Segmentation | list[Segmentation]:
    """Divide pictures into regions without naming any.

    The model reads the half-noised picture with an empty prompt; the attention to the begin, end and padding
    tokens of the first text encoder is grouped by :func:`group_attention`.

    Args:
        pipe: a pipeline of a supported family.
        image: a picture, or several (list, or array with a batch axis): PIL, path, numpy or tensor, any size.
        preset: how the picture is fitted to the model, as in :func:`seg4diff.segment`, and how tokens are
            grouped, see :class:`Grouping`: ``"default"``, ``"paper"`` or ``"reference"``.
        layers: transformer blocks whose maps are averaged (a grouping of single heads keeps them apart); the
            model's expert layers when None.
        threshold: when maps are merged; that of the preset when None. Smaller means more regions.
        seed, generator, batch_size, progress: as in :func:`seg4diff.segment`.

    Returns:
        A :class:`Segmentation` on the CPU, or a list of them if several pictures were given. Its classes are
        ``"region 1"``, ``"region 2"``, ..., those that win an image token and a pixel, largest first;
        ``scores`` are what :func:`group_attention` returns, resized to the picture, times the number of image
        tokens (1 is the mean).

    Raises:
        NotImplementedError: the model family is not supported.
        TypeError: ``pipe`` has no VAE.
        ValueError: no or unreadable pictures, an unknown preset, a layer out of range, a threshold that is
            not above 0.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; segment_unsupervised takes a whole pipeline")
    grouping = find_grouping(preset, threshold)
    choices = find_preset(preset)
    images, single = as_list(image)
    span = state.backbone.name_span(pipe)
    used = state.layers_or_experts(layers)
    views = views_of(pipe, images, choices)
    results: list[Segmentation | None] = [None] * len(images)
    for found in run_maps(
        pipe,
        views,
        [[""]] * len(images),
        layers=used,
        maps=MapRequest(heads=grouping.heads, columns=("text", slice(span.first, span.first + span.length))),
        seed=seed,
        generator=generator,
        batch_size=batch_size,
        progress=progress,
        average_layers=grouping.heads == "mean",
    ):
        metadata = {
            "preset": preset,
            "layers": used,
            "timestep": found.timestep,
            "threshold": grouping.threshold,
            "seed": None if generator is not None else seed or 0,
        }
        results[found.index] = _segmentation(found, views[found.index], preset, threshold, metadata)
    finished = [result for result in results if result is not None]
    return finished[0] if single else finished


def _segmentation(
    found: ImageMaps, view: View, preset: str, threshold: float | None, metadata: dict[str, Any]
) -> Segmentation:
    """Regions of one picture, resized to it, and their argmax."""
    regions = winning_regions(found.maps[0], grid=found.grid, threshold=threshold, preset=preset).cpu()
    size = (view.image.height, view.image.width)
    scores = F.interpolate(regions[None], size=size, mode="bilinear", align_corners=False)[0]
    areas = scores.argmax(dim=0).flatten().bincount(minlength=len(scores))
    order = areas.argsort(descending=True, stable=True)[: int((areas > 0).sum())]
    scores = scores[order] * regions[0].numel()
    return Segmentation(
        labels=scores.argmax(dim=0),
        scores=scores,
        classes=tuple(f"region {number}" for number in range(1, len(scores) + 1)),
        image=view.image,
        metadata={**metadata, "size": view.pixels.size},
    )
