"""Which layers to read: those given, the model's experts, or those whose maps tell most about an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from seg4diff.attention.patch import Patch, patch_of
from seg4diff.backbones import Pipeline
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.inputs import Noising, View
from seg4diff.segmentation.maps import Reading, run_maps
from seg4diff.segmentation.prompts import PlannedPrompt

LayerChoice: TypeAlias = Sequence[int] | int | Literal["auto"] | None
"""Numbers of layers; `"auto"`: chosen for each image; None: the model's experts, or as `"auto"`."""

_MOST = 3  # layers that are chosen
_SHARE = 0.5  # of the largest mutual information, which others need


def layer_groups(
    pipe: Pipeline,
    views: Sequence[View],
    plans: Sequence[Sequence[PlannedPrompt]],
    layers: LayerChoice,
    *,
    seed: int | None = None,
    batch_size: int = 1,
    known_text: Mapping[str, dict[str, Tensor]] | None = None,
) -> list[tuple[tuple[int, ...], list[int]]]:
    """The layers to read of each image, and the positions of the images of which they are read.

    Layers that are known cost nothing. To choose them costs one whole forward per image and prompt.

    Args:
        pipe: a pipeline.
        views: the images.
        plans: for each image its prompts.
        layers: see `LayerChoice`.
        seed, batch_size, known_text: as in `seg4diff.segmentation.maps.run_maps`.

    Raises:
        TypeError, ValueError: layers that the model does not have, or another word than `"auto"`.
    """
    state = patch_of(pipe)
    known = known_layers(state, layers)
    if known is not None:
        return [(known, list(range(len(views))))]
    span = state.backbone.name_span(pipe)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for found in run_maps(
        pipe,
        views,
        [[prompt.text for prompt in plan] for plan in plans],
        Reading(MapRequest(columns=("text", slice(0, span.end))), state.layers(None)),
        Noising(seed=seed, batch_size=batch_size),
        progress=False,
        known_text=known_text,
    ):
        information = information_of_layers(found.maps, plans[found.index])
        groups[informative_layers(information)].append(found.index)
    return sorted((layers, sorted(members)) for layers, members in groups.items())


def known_layers(state: Patch, layers: LayerChoice) -> tuple[int, ...] | None:
    """The layers, or None where they are to be chosen.

    Raises:
        TypeError, ValueError: as `layer_groups`.
    """
    if isinstance(layers, str):
        if layers != "auto":
            raise ValueError(f'layers={layers!r} is unknown; accepted: numbers, "auto", None')
        return None
    if layers is None and not state.backbone.knows_experts(state.transformer):
        return None
    return state.layers_or_experts(layers)


def information_of_layers(maps: Sequence[Tensor], plan: Sequence[PlannedPrompt]) -> Tensor:
    """How much the place tells of the word that is read there, by layer: see `mutual_information`.

    Args:
        maps: for each prompt [L, N, T'], whose columns begin with the first text column.
        plan: the prompts. Where one names nothing (the empty prompt), every text token but the first, which
            is read everywhere, counts as a word, by its share of them.

    Returns:
        [L], float64, in nats: the mean over the prompts.
    """
    information = []
    for attention, prompt in zip(maps, plan, strict=True):
        if prompt.columns:
            words = [attention[..., list(columns)].sum(dim=-1) for columns in prompt.columns]
            shares = torch.stack(words, dim=-1)
        else:
            shares = attention[..., 1:] / attention[..., 1:].sum(dim=-1, keepdim=True)
        information.append(mutual_information(shares))
    return torch.stack(information).mean(dim=0)


def mutual_information(shares: Tensor) -> Tensor:
    """Mutual information of place and word, where all image tokens are alike likely.

    Args:
        shares: [..., N, C], for each image token the probability of each word. What they lack to 1 is the
            probability of no word at all, so that a single word has a mutual information too, and words that
            are hardly read have little.

    Returns:
        [...], float64, in nats: the Kullback-Leibler divergence of a token's distribution from the mean one,
        mean over the image tokens. 0 where all places read alike, at most the logarithm of C + 1.
    """
    exact = shares.double()
    exact = torch.cat([exact, (1 - exact.sum(dim=-1, keepdim=True)).clamp_min(0)], dim=-1)
    mean = exact.mean(dim=-2, keepdim=True)
    return (exact.xlogy(exact) - exact.xlogy(mean)).sum(dim=-1).mean(dim=-1)


def informative_layers(information: Tensor) -> tuple[int, ...]:
    """At most three layers: that of the largest mutual information, and those that have half of it or more.

    Args:
        information: [L], in nats.

    Returns:
        Their positions, ascending.
    """
    largest, order = information.sort(descending=True, stable=True)
    enough = int((largest[:_MOST] >= _SHARE * largest[0]).sum())
    return tuple(sorted(order[:enough].tolist()))
