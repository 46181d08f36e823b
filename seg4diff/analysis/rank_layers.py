"""Which layers segment best: measured on labelled images, or guessed without labels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from seg4diff.segmentation.inputs import Noising, View, check_levels, views_of
from seg4diff.segmentation.layers import information_of_layers
from seg4diff.segmentation.maps import ImageMaps, Reading, run_maps
from seg4diff.segmentation.presets import Upsample, find_preset
from seg4diff.segmentation.prompts import PlannedPrompt, plan_prompts
from seg4diff.segmentation.scores import resize_scores, scores_of_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Criterion = Literal["value_norm_ratio", "mutual_information", "miou"]

_TITLES: dict[Criterion, str] = {
    "value_norm_ratio": "value-norm ratio",
    "mutual_information": "mutual information (nats)",
    "miou": "mIoU",
}


@dataclass(frozen=True, eq=False)
class Ranking:
    """Layers and how well each segments.

    Attributes:
        criterion: `"miou"`: mean intersection over union of segmentation by that layer alone, measured.
            `"mutual_information"`: of place and name, in nats, a guess without labels. `"value_norm_ratio"`:
            norm of the prompt's values over that of the image's, a poor guess without names.
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
            title=f"{_TITLES[self.criterion]}{' in %' if percent else ''} by layer and steps left",
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
        return plots.lines(self.layers, lines, _TITLES[self.criterion])

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
    """Rank layers by how well their image-to-text attention segments.

    With labels, every layer segments every image at every noise level, from one forward per level, as
    `seg4diff.segment` does with the names that are in the image (the sweep of the paper's figure 8).

    With names and no labels, by the mutual information of place and name in a layer's maps, by which
    `seg4diff.segment` chooses with `layers="auto"`.

    With prompts alone, by the norm of the prompt's values over that of the image's (Seg4Diff, section 3.3): a
    layer that writes more text into image tokens than image is a candidate. This is a poor guess: it ranks
    the expert of the bundled model, layer 2, fourth of six.

    Args:
        pipe: a pipeline.
        prompts: instead of names, as in `seg4diff.analyze`.
        images: needed with names.
        labels: for each image integers [height, width], an index into its classes; 255 does not count.
        classes: for each image the names of its classes, which make up its prompt.
        layers: the layers to compare; all when None.
        noise_levels, steps, preset, seed, batch_size, progress: as in `seg4diff.analyze`.

    Raises:
        ValueError: labels or classes without images, labels without classes, numbers or sizes that do not
            match, or what `seg4diff.analyze` refuses.
    """
    if labels is None and classes is None:
        return _by_value_norms(
            pipe, prompts, images=images, layers=layers, noise_levels=noise_levels, steps=steps,
            preset=preset, seed=seed, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    if images is None or classes is None:
        raise ValueError("images, and the names of their classes, are needed: give images= and classes=")
    if prompts is not None:
        raise ValueError("prompts are made of the names where classes are given; leave prompts out")
    state = patch_of(pipe)
    chosen = state.layers(layers)
    check_levels(noise_levels, steps)
    choices = find_preset(preset)
    given, _ = as_list(images)
    if len(given) != len(classes):
        raise ValueError(f"{len(given)} images and {len(classes)} lists of classes; give one for every image")
    span = state.backbone.name_span(pipe)
    views = views_of(pipe, given, choices.fit)
    plans = [plan_prompts(several, span, cut_at_hyphen=choices.cut_at_hyphen) for several in classes]
    shape = (len(noise_levels), len(chosen))
    tally: _Information | _Confusion = _Information(*shape)
    if labels is not None:
        truths = _checked_labels(labels, views, classes, preset)
        tally = _Confusion(*shape, truths, classes, choices.upsample or "geometric")
    timesteps = [float("nan")] * len(noise_levels)
    for found in run_maps(
        pipe, views, [[prompt.text for prompt in plan] for plan in plans],
        Reading(MapRequest(columns=("text", slice(0, span.end))), chosen),
        Noising(noise_levels, steps, seed, batch_size=batch_size), progress=progress,
    ):  # fmt: skip
        level = noise_levels.index(found.noise_level)
        timesteps[level] = found.timestep
        tally.add(level, found, plans[found.index])
    return Ranking(
        criterion="mutual_information" if labels is None else "miou",
        layers=chosen,
        noise_levels=tuple(noise_levels),
        timesteps=tuple(timesteps),
        scores=tally.scores(),
        images=len(given),
    )


def _by_value_norms(pipe: Pipeline, prompts: str | Sequence[str] | None, **options: Any) -> Ranking:
    report = analyze(pipe, prompts, **options)
    return Ranking(
        criterion="value_norm_ratio",
        layers=report.layers,
        noise_levels=report.noise_levels,
        timesteps=report.timesteps,
        scores=report.by_layer.value_norm_ratio,
        images=report.images,
    )


def _checked_labels(
    labels: Sequence[Tensor | np.ndarray],
    views: Sequence[View],
    classes: Sequence[Sequence[str]],
    preset: str,
) -> list[Tensor]:
    """The labels as tensors.

    Raises:
        ValueError: their number, size or values do not fit the images and classes.
    """
    if len(labels) != len(views):
        raise ValueError(f"{len(views)} images and {len(labels)} labels; give one for every image")
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
    return truths


class _Information:
    """Mutual information of place and name: sum over images, by noise level and layer."""

    def __init__(self, levels: int, layers: int) -> None:
        self._sum = torch.zeros(levels, layers, dtype=torch.float64)
        self._images = torch.zeros(levels, 1, dtype=torch.float64)

    def add(self, level: int, found: ImageMaps, plan: Sequence[PlannedPrompt]) -> None:
        self._sum[level] += information_of_layers(found.maps, plan).cpu()
        self._images[level] += 1

    def scores(self) -> Tensor:
        """Mean over the images [levels, layers], float64."""
        return self._sum / self._images


class _Confusion:
    """Confusion matrices of all images together, by noise level and layer."""

    def __init__(
        self,
        levels: int,
        layers: int,
        truths: Sequence[Tensor],
        classes: Sequence[Sequence[str]],
        upsample: Upsample,
    ) -> None:
        names = list(dict.fromkeys(name for several in classes for name in several))
        self._own = [torch.tensor([names.index(name) for name in several]) for several in classes]
        self._truths = truths
        self._upsample: Upsample = upsample
        self._matrices = torch.zeros(levels, layers, len(names), len(names), dtype=torch.int64)

    def add(self, level: int, found: ImageMaps, plan: Sequence[PlannedPrompt]) -> None:
        truth, own = self._truths[found.index], self._own[found.index]
        counted = truth != 255
        # Numbers of the whole list of classes, among which 255 is one like any other.
        actual = torch.where(counted, own[truth.long() * counted], -1)
        scores = scores_of_names(found.maps, plan, found.grid)  # [L, names, h, w]
        size = (truth.shape[0], truth.shape[1])
        for position, layer in enumerate(scores):
            labels = resize_scores(layer.cpu(), size, self._upsample).argmax(dim=0)
            classes = self._matrices.shape[-1]
            self._matrices[level, position] += confusion_matrix(own[labels], actual, classes, ignored=-1)

    def scores(self) -> Tensor:
        """mIoU [levels, layers], float64."""
        miou = [[counts_of(matrix).mean_iou for matrix in of_level] for of_level in self._matrices]
        return torch.tensor(miou, dtype=torch.float64)
