"""Attention maps of images under their prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seg4diff.attention.maps import maps_and_outputs, maps_of
from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.inputs import Noising, View, model_inputs


@dataclass(frozen=True)
class ImageMaps:
    """Attention maps of one image at one noise level.

    Attributes:
        index: position of the image in the list that was given.
        maps: for each of its prompts [L, N, T'] or [L, H, N, T'], float32, a layer at each first index.
        grid: height and width of the image tokens, N = height * width.
        noise_level: steps that are left of the noise schedule.
        timestep: the model's timestep at that level.
        outputs: for each of its prompts [L', N, H D], dtype of the model, the attention outputs of the layers
            that were asked for them; None where none was.
    """

    index: int
    maps: tuple[Tensor, ...]
    grid: tuple[int, int]
    noise_level: int
    timestep: float
    outputs: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """What is read of a model's attention.

    Attributes:
        maps: which columns, scores and heads.
        layers: layers whose maps are returned; the model's expert layers when None.
        output_layers: layers whose attention outputs are returned too, ascending.
    """

    maps: MapRequest
    layers: Sequence[int] | int | None = None
    output_layers: Sequence[int] = ()


@torch.no_grad()
def run_maps(
    pipe: Pipeline,
    views: Sequence[View],
    prompts: Sequence[Sequence[str]],
    reading: Reading,
    noising: Noising = Noising(),  # noqa: B008
    *,
    progress: bool | None = None,
    known_text: Mapping[str, dict[str, Tensor]] | None = None,
) -> Iterator[ImageMaps]:
    """Attention maps of every image under each of its prompts, once per noise level, in any order.

    The model runs up to the last layer that is read and no further.

    Args:
        pipe: a pipeline.
        views: the images.
        prompts: for each image its prompts, at least one.
        reading: see `Reading`.
        noising: see `seg4diff.segmentation.inputs.Noising`.
        progress: whether to show the pipeline's progress bar; when None, for more than one item.
        known_text: as in `seg4diff.segmentation.inputs.model_inputs`.

    Raises:
        ValueError: layers are out of range, or no expert layer is known.
        torch.OutOfMemoryError: with remedies.
    """
    state = patch_of(pipe)
    chosen = state.layers_or_experts(reading.layers)
    levels = noising.schedule(state.backbone)[1]
    found: dict[tuple[int, int], list[tuple[Tensor, Tensor | None]]] = defaultdict(list)
    try:
        with progress_bar(pipe, len(views) * len(levels), progress) as bar:
            for inputs in model_inputs(pipe, views, prompts, noising, known_text=known_text):
                outputs = None
                if reading.output_layers:
                    layer_maps, outputs = maps_and_outputs(
                        pipe.transformer, chosen, reading.maps, inputs.arguments, reading.output_layers
                    )
                else:  # [L, rows, ...]
                    layer_maps = maps_of(pipe.transformer, chosen, reading.maps, inputs.arguments)
                height, width = state.backbone.read_call(state.transformer, inputs.arguments).grid
                for row, index in enumerate(inputs.images):
                    key = (inputs.noise_level, index)
                    found[key].append((layer_maps[:, row], None if outputs is None else outputs[:, row]))
                    if len(found[key]) == len(prompts[index]):
                        bar.update()
                        of_maps, of_outputs = zip(*found.pop(key), strict=True)
                        yield ImageMaps(
                            index,
                            of_maps,
                            (height, width),
                            inputs.noise_level,
                            inputs.timestep,
                            of_outputs if reading.output_layers else None,
                        )
    except torch.OutOfMemoryError as error:
        width, height = views[0].pixels.size
        raise torch.OutOfMemoryError(
            f"out of memory at {width} x {height} pixels with batch_size={noising.batch_size}; use "
            "batch_size=1, load the pipeline in torch.bfloat16, or call pipe.enable_model_cpu_offload() "
            f"({error})"
        ) from error
    finally:
        pipe.maybe_free_model_hooks()


def progress_bar(pipe: Pipeline, total: int, progress: bool | None) -> Any:
    """The pipeline's own progress bar, or a silent one: for a single item when `progress` is None."""
    if progress or (progress is None and total > 1):
        return pipe.progress_bar(total=total)
    from tqdm import tqdm

    return tqdm(total=total, disable=True)
