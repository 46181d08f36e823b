"""The maps of one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seg4diff.attention.observer import Forward, Observer, attach
from seg4diff.attention.patch import patch_of
from seg4diff.attention.requests import LayerRequest, LayerResult
from seg4diff.backbones import transformer_of
from seg4diff.kernels.types import MapRequest


def maps_of(
    transformer: nn.Module, layers: Sequence[int], request: MapRequest, arguments: Mapping[str, Any]
) -> Tensor:
    """Image-to-text maps of one forward, which runs no further than the maps need.

    Args:
        transformer: the model, possibly compiled.
        layers: the layers to read, ascending.
        request: which maps.
        arguments: of the transformer's call.

    Returns:
        [L, B, (H,) N, T'], float32: the layers of `layers` in ascending order. Gradients flow where they are
        enabled.
    """
    return torch.stack(forward_with_maps(transformer, layers, request, arguments, stop_early=True)[0])


def maps_and_outputs(
    transformer: Any,
    layers: Sequence[int],
    request: MapRequest,
    arguments: Mapping[str, Any],
    output_layers: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Maps as of `maps_of`, and attention outputs of the image tokens, of one forward that stops early.

    Args:
        transformer, layers, request, arguments: as in `maps_of`.
        output_layers: the layers whose outputs to return, ascending; they may lie behind `layers`.

    Returns:
        The maps, and [L', B, N, H D] in the model's dtype: what the heads of each of `output_layers` read,
        concatenated, before the output projection.
    """
    keeper = _Keeper()
    chosen = patch_of(transformer).layers(output_layers)
    with attach(transformer, chosen, LayerRequest(output=True), keeper, stop_early=True):
        maps = maps_of(transformer, layers, request, arguments)
    return maps, torch.stack([keeper.results[layer].output for layer in chosen])  # type: ignore[misc]


def forward_with_maps(
    transformer: nn.Module,
    layers: Sequence[int],
    request: MapRequest,
    arguments: Mapping[str, Any],
    *,
    stop_early: bool = False,
) -> tuple[list[Tensor], Any]:
    """Maps of one forward, one per layer as in `maps_of`, and what the forward returned.

    With `stop_early` the latter is meaningless.

    Raises:
        RuntimeError: a layer did not run.
        TypeError, ValueError: layers that the model does not have.
    """
    keeper = _Keeper()
    state = patch_of(transformer)
    chosen = state.layers(layers)
    asked = attach(transformer, chosen, LayerRequest(maps=request), keeper, stop_early=stop_early)
    with asked, _without_caches(transformer_of(transformer)):
        output = transformer(**arguments)
    missing = sorted(set(chosen) - set(keeper.results))
    if missing:
        raise RuntimeError(f"layers {missing} did not run; was a part of the model replaced?")
    return [keeper.results[layer].maps for layer in chosen], output  # type: ignore[misc]


class _Keeper(Observer):
    """Keeps the results of the one forward."""

    def __init__(self) -> None:
        self.results: Mapping[int, LayerResult] = {}

    def after_forward(self, forward: Forward, results: Mapping[int, LayerResult], output: Any) -> None:
        self.results = results


@contextmanager
def _without_caches(transformer: Any) -> Iterator[None]:
    """Keep diffusers' caches, which would take blocks of an earlier forward for ours, out of a forward."""
    if not getattr(transformer, "is_cache_enabled", False):
        yield
        return
    transformer._reset_stateful_cache()
    try:
        with transformer.cache_context("seg4diff"):
            yield
    finally:
        transformer._reset_stateful_cache()
