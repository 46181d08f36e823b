"""Which layers segment best: by the size of their values, or measured on labelled images."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from seg4diff.analysis import plots
from seg4diff.analysis.analyze import analyze
from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.files import write_atomically
from seg4diff.images import ImageInput, as_list
from seg4diff.kernels.types import MapRequest
from seg4diff.metrics import confusion_matrix, counts_of
from seg4diff.segmentation.inputs import check_levels, views_of
from seg4diff.segmentation.maps import run_maps
from seg4diff.segmentation.presets import Upsample, find_preset
from seg4diff.segmentation.prompts import plan_prompts
from seg4diff.segmentation.scores import resize_scores, scores_of_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Criterion = Literal["value_norm_ratio", "miou"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Layers and how well each segments.

    Attributes:
        criterion: `"value_norm_ratio"`: norm of the prompt's values over that of the image's, a guess
            without labels. `"miou"`: mean intersection over union of segmentation by that layer alone,
            measured.
        layers: the layers compared, in the order of `scores`.
        noise_levels: steps that are left of the noise schedule.
        timesteps: the model's timestep at each level.
        scores: float64 [levels, layers]; larger is better.
        images: number of images.
    """

    criterion: Criterion
    layers: tuple[int, ...]
    noise_levels: tuple[int, ...]
    timesteps: tuple[float, ...]
    scores: Tensor
    images: int

    @property
    def order(self) -> tuple[int, ...]:
        """The layers, best first, each by its best noise level."""
        best = self.scores.max(dim=0).values.argsort(descending=True, stable=True)
        return tuple(self.layers[position] for position in best.tolist())

    @property
    def best(self) -> tuple[int, int]:
        """Layer and noise level of the largest score."""
        level, position = divmod(int(self.scores.argmax()), len(self.layers))
        return self.layers[position], self.noise_levels[level]

    def table(self) -> Table:
        """Scores of all layers, best layer first, to print with rich."""
        from rich.table import Table

        percent = self.criterion == "miou"
        table = Table(
            title="mIoU in % by layer and steps left"
            if percent
            else "value-norm ratio by layer and steps left",
            caption=f"{self.images} image{'s' if self.images != 1 else ''}",
        )
        table.add_column("layer", justify="right")
        for level, timestep in zip(self.noise_levels, self.timesteps, strict=True):
            table.add_column(f"{level} (t {timestep:.0f})", justify="right")
        for layer in self.order:
            scores = self.scores[:, self.layers.index(layer)].tolist()
            table.add_row(str(layer), *(f"{100 * s:.1f}" if percent else f"{s:.3f}" for s in scores))
        return table

    def plot(self) -> Figure:
        """Scores over layers, a line for every noise level."""
        lines = {f"{n} steps left": s for n, s in zip(self.noise_levels, self.scores, strict=True)}
        return plots.lines(self.layers, lines, "mIoU" if self.criterion == "miou" else "value-norm ratio")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as JSON; the file appears whole or not at all."""
        document = {
            "criterion": self.criterion,
            "layers": self.layers,
            "noise_levels": self.noise_levels,
            "timesteps": self.timesteps,
            "scores": self.scores.tolist(),
            "order": self.order,
            "images": self.images,
        }
        text = json.dumps(document, indent=2)
        return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def rank_layers(
    pipe: Pipeline,
    prompts: str | Sequence[str] | None = None,
    *,
    images: ImageInput | Sequence[ImageInput] | None = None,
    labels: Sequence[Tensor | np.ndarray] | None = None,
    classes: Sequence[Sequence[str]] | None = None,
    layers: Sequence[int] | int | None = None,
    noise_levels: Sequence[int] = (8,),
    steps: int = 28,
    preset: str = "default",
    seed: int = 0,
    batch_size: int = 1,
    progress: bool | None = None,
) -> Ranking:
    """Rank layers by how well their image-to-text attention should segment, or does.

    Without labels, by the norm of the prompt's values over that of the image's (Seg4Diff, section 3.3): a
    layer that writes more text into image tokens than image is a candidate. With labels, every layer segments
    every image at every noise level, from one forward per level, as `seg4diff.segment` does with the names
    that are in the image (the sweep of the paper's figure 8).

    Args:
        pipe: a pipeline.
        prompts: without labels, as in `seg4diff.analyze`.
        images: needed with labels.
        labels: for each image integers [height, width], an index into its classes; 255 does not count.
        classes: for each image the names of its classes, which make up its prompt.
        layers: the layers to compare; all when None.
        noise_levels, steps, preset, seed, batch_size, progress: as in `seg4diff.analyze`.

    Raises:
        ValueError: labels without images or classes, numbers or sizes that do not match, or what
            `seg4diff.analyze` refuses.
    """
    if labels is None:
        if classes is not None:
            raise ValueError("classes are given without labels; give both to measure, or prompts to guess")
        report = analyze(
            pipe, prompts, images=images, layers=layers, noise_levels=noise_levels, steps=steps,
            preset=preset, seed=seed, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return Ranking(
            criterion="value_norm_ratio",
            layers=report.layers,
            noise_levels=report.noise_levels,
            timesteps=report.timesteps,
            scores=report.by_layer.value_norm_ratio,
            images=report.images,
        )
    if images is None or classes is None:
        raise ValueError("labels need images and the names of their classes: give images= and classes=")
    if prompts is not None:
        raise ValueError("prompts are made of the names in classes= where labels are given; leave them out")
    return _measure(
        pipe, images, labels, classes,
        layers=layers, noise_levels=noise_levels, steps=steps, preset=preset, seed=seed,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip


@torch.no_grad()
def _measure(
    pipe: Pipeline,
    images: ImageInput | Sequence[ImageInput],
    labels: Sequence[Tensor | np.ndarray],
    classes: Sequence[Sequence[str]],
    *,
    layers: Sequence[int] | int | None,
    noise_levels: Sequence[int],
    steps: int,
    preset: str,
    seed: int,
    batch_size: int,
    progress: bool | None,
) -> Ranking:
    """mIoU over all images of every layer at every noise level."""
    state = patch_of(pipe)
    chosen = state.layers(layers)
    check_levels(noise_levels, steps)
    choices = find_preset(preset)
    given, _ = as_list(images)
    if not len(given) == len(labels) == len(classes):
        raise ValueError(
            f"{len(given)} images, {len(labels)} labels and {len(classes)} lists of classes; "
            "give one of each for every image"
        )
    views = views_of(pipe, given, choices.fit)
    truths = [torch.as_tensor(np.asarray(label)) for label in labels]
    for number, (view, truth) in enumerate(zip(views, truths, strict=True)):
        if tuple(truth.shape) != (view.image.height, view.image.width):
            raise ValueError(
                f"labels[{number}] have shape {list(truth.shape)}, but preset {preset!r} covers "
                f"{view.image.height} x {view.image.width} (height x width) of the image; "
                "use labels of the whole image and a preset that keeps it"
            )
        largest = int(truth[truth != 255].max()) if bool((truth != 255).any()) else 0
        if int(truth.min()) < 0 or largest >= len(classes[number]):
            raise ValueError(
                f"labels[{number}] reach from {int(truth.min())} to {largest}, but classes[{number}] names "
                f"{len(classes[number])}; accepted: indices of them, and 255 for what does not count"
            )
    span = state.backbone.name_span(pipe)
    names = list(dict.fromkeys(name for several in classes for name in several))
    plans = [plan_prompts(several, span, cut_at_hyphen=choices.cut_at_hyphen) for several in classes]
    confusion = torch.zeros(len(noise_levels), len(chosen), len(names), len(names), dtype=torch.int64)
    timesteps = [float("nan")] * len(noise_levels)
    for found in run_maps(
        pipe,
        views,
        [[prompt.text for prompt in plan] for plan in plans],
        layers=chosen,
        maps=MapRequest(columns=("text", slice(0, span.first + span.length))),
        noise_levels=noise_levels,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    ):
        level = noise_levels.index(found.noise_level)
        timesteps[level] = found.timestep
        scores = scores_of_names(found.maps, plans[found.index], found.grid)  # [L, names, h, w]
        own = torch.tensor([names.index(name) for name in classes[found.index]])
        confusion[level] += _confusions(scores, truths[found.index], own, len(names), choices.upsample)
    miou = [
        [counts_of(confusion[n, p]).mean_iou for p in range(len(chosen))] for n in range(len(noise_levels))
    ]
    return Ranking(
        criterion="miou",
        layers=chosen,
        noise_levels=tuple(noise_levels),
        timesteps=tuple(timesteps),
        scores=torch.tensor(miou, dtype=torch.float64),
        images=len(given),
    )


def _confusions(scores: Tensor, truth: Tensor, own: Tensor, classes: int, upsample: Upsample) -> Tensor:
    """Confusion matrices [L, classes, classes] of one image, from scores [L, names, h, w]."""
    counted = truth != 255
    size = (truth.shape[0], truth.shape[1])
    labels = [resize_scores(layer.cpu(), size, upsample).argmax(dim=0) for layer in scores]
    # Numbers of the whole list of classes, among which 255 is one like any other.
    actual = torch.where(counted, own[truth.long() * counted], -1)
    return torch.stack([confusion_matrix(own[label], actual, classes, ignored=-1) for label in labels])
