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
from seg4diff.segmentation.inputs import View, model_inputs


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


@torch.no_grad()
def run_maps(
    pipe: Pipeline,
    views: Sequence[View],
    prompts: Sequence[Sequence[str]],
    *,
    layers: Sequence[int] | int | None = None,
    maps: MapRequest,
    output_layers: Sequence[int] = (),
    noise_levels: Sequence[int] | None = None,
    steps: int | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    progress: bool | None = None,
    known_text: Mapping[str, dict[str, Tensor]] | None = None,
) -> Iterator[ImageMaps]:
    """Attention maps of every image under each of its prompts, once per noise level, in any order.

    The model runs up to the last of `layers` and `output_layers` and no further.

    Args:
        pipe: a pipeline.
        views: the images.
        prompts: for each image its prompts, at least one.
        layers: layers to read; the model's expert layers when None.
        maps: which columns, scores and heads.
        output_layers: layers whose attention outputs to return too, ascending.
        noise_levels: steps that are left of the schedule of `steps` steps; that of the model family when
            None.
        steps: length of the noise schedule; that of the model family when None.
        seed, generator, batch_size, known_text: as in `seg4diff.segmentation.inputs.model_inputs`.
        progress: whether to show the pipeline's progress bar; when None, for more than one item.

    Raises:
        ValueError: layers, seed or batch size are out of range, or no expert layer is known.
        torch.OutOfMemoryError: with remedies.
    """
    state = patch_of(pipe)
    chosen = state.layers_or_experts(layers)
    own_steps, own_level = state.backbone.noise
    steps = own_steps if steps is None else steps
    noise_levels = (own_level,) if noise_levels is None else noise_levels
    found: dict[tuple[int, int], list[tuple[Tensor, Tensor | None]]] = defaultdict(list)
    try:
        with progress_bar(pipe, len(views) * len(noise_levels), progress) as bar:
            for inputs in model_inputs(
                pipe,
                views,
                prompts,
                steps=steps,
                noise_levels=noise_levels,
                seed=seed,
                generator=generator,
                batch_size=batch_size,
                known_text=known_text,
            ):
                outputs = None
                if output_layers:
                    layer_maps, outputs = maps_and_outputs(
                        pipe.transformer, chosen, maps, inputs.arguments, output_layers
                    )
                else:
                    layer_maps = maps_of(pipe.transformer, chosen, maps, inputs.arguments)  # [L, rows, ...]
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
                            of_outputs if output_layers else None,
                        )
    except torch.OutOfMemoryError as error:
        width, height = views[0].pixels.size
        raise torch.OutOfMemoryError(
            f"out of memory at {width} x {height} pixels with batch_size={batch_size}; use batch_size=1, "
            f"load the pipeline in torch.bfloat16, or call pipe.enable_model_cpu_offload() ({error})"
        ) from error
    finally:
        pipe.maybe_free_model_hooks()


def progress_bar(pipe: Pipeline, total: int, progress: bool | None) -> Any:
    """The pipeline's own progress bar, or a silent one: for a single item when `progress` is None."""
    if progress or (progress is None and total > 1):
        return pipe.progress_bar(total=total)
    from tqdm import tqdm

    return tqdm(total=total, disable=True)
