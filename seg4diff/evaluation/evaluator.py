"""A model with the protocols of a data set: images in, label maps and counted pixels out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.data.prefetch import Failure, Loaded
from seg4diff.data.registry import Dataset
from seg4diff.evaluation import BackgroundBy, ProtocolName
from seg4diff.evaluation.protocols import Protocol, predict
from seg4diff.evaluation.results import Result
from seg4diff.metrics import IGNORED, Counts, boundary_counts, confusion_matrix, counts_of, matched_counts
from seg4diff.segmentation.inputs import Noising, View, views_of
from seg4diff.segmentation.layers import LayerChoice, known_layers, layer_groups
from seg4diff.segmentation.passes import recipe_of, run_scores
from seg4diff.segmentation.presets import Preset, PresetName, find_preset
from seg4diff.segmentation.prompts import PlannedPrompt
from seg4diff.segmentation.regions import segment_unsupervised

_KEPT_PROMPTS = 128  # text embeddings kept; one of SD3 takes 1.3 MB in bfloat16


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings that decide the figures of an evaluation.

    Attributes:
        protocols: one or several of `PROTOCOLS`; all are answered in one pass.
        preset: a name in `seg4diff.segmentation.presets.PRESETS`, or a preset.
        layers: transformer layers whose maps are averaged; `"auto"`: chosen for each image and its prompts;
            None: the model's expert layers, or as `"auto"` where none is known.
        seed: seed of the noise, the same for every image.
        batch_size: images, and pairs of image and prompt, in one pass through the model.
        background: how the background class of a data set is found: by its name in the prompt, or as what no
            name reaches.
        background_threshold: see `seg4diff.evaluation.protocols.Question`.
    """

    protocols: tuple[ProtocolName, ...] = ("oracle",)
    preset: PresetName | Preset = "paper"
    layers: tuple[int, ...] | Literal["auto"] | None = None
    seed: int = 0
    batch_size: int = 1
    background: BackgroundBy = "prompt"
    background_threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols={self.protocols!r} must be one or several different ones")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be a positive integer")


class Evaluator:
    """A model with the protocols of a data set.

    Attributes:
        pipe: the pipeline.
        settings: as given, with the layers that are read.
        preset: that of the settings.
        recipe: what was measured of the model, for presets that use it.
        protocols: by name.
    """

    def __init__(self, pipe: Pipeline, dataset: Dataset, settings: EvaluationSettings) -> None:
        """Check all that can be checked before the first image.

        Raises:
            TypeError: `pipe` has no VAE.
            ValueError: unknown preset or protocol, a layer out of range, a class name that cannot be
                prompted.
        """
        state = patch_of(pipe)
        if not hasattr(pipe, "vae"):
            raise TypeError(f"{type(pipe).__name__} has no VAE; evaluation takes a whole pipeline")
        self.pipe = pipe
        self.preset = find_preset(settings.preset)
        self.settings = replace(settings, layers=known_layers(state, settings.layers) or "auto")
        span = state.backbone.name_span(pipe)
        self.protocols: dict[str, Protocol] = {
            name: Protocol(
                name,
                dataset,
                self.preset,
                span,
                background=settings.background,
                threshold=settings.background_threshold,
            )
            for name in settings.protocols
        }
        self._classes = len(dataset.classes)
        self._given_layers: LayerChoice = settings.layers
        self.recipe = recipe_of(pipe, self.preset)
        self._text: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # embeddings of recent prompts

    def results(self, group: Sequence[Loaded | Failure]) -> list[Result]:
        """Results of images that are evaluated together, in their order."""
        items = [item for item in group if isinstance(item, Loaded)]
        found = {item.index: Result(item.index, item.name, group=len(items)) for item in items}
        for item, labels, predicted in self._label_maps(items):
            actual = torch.from_numpy(labels.copy())
            found[item.index] = replace(
                found[item.index],
                counts={name: self._count(name, labels, actual) for name, labels in predicted.items()},
                boundary={
                    name: boundary_counts(labels, actual, self._classes)
                    for name, labels in predicted.items()
                    if name != "unsupervised"
                },
                predicted=predicted,
            )
        return [
            Result(item.index, item.name, failure=item.reason)
            if isinstance(item, Failure)
            else found[item.index]
            for item in group
        ]

    def views(self, items: Sequence[Loaded]) -> list[tuple[View, np.ndarray]]:
        """The part of each image that the preset sees, and its labels."""
        views = views_of(self.pipe, [item.image for item in items], self.preset.fit)
        return [(view, _seen_part(item.labels, view)) for item, view in zip(items, views, strict=True)]

    def _label_maps(self, items: Sequence[Loaded]) -> Iterator[tuple[Loaded, np.ndarray, dict[str, Tensor]]]:
        """Labels and predictions of every image of which a pixel counts."""
        seen = [
            (item, view, labels)
            for item, (view, labels) in zip(items, self.views(items), strict=True)
            if (labels != IGNORED).any()
        ]
        predicted: list[dict[str, Tensor]] = [{} for _ in seen]
        scores: dict[
            tuple[int, tuple[PlannedPrompt, ...]], Tensor
        ] = {}  # protocols can have prompts in common
        for name, protocol in self.protocols.items():
            views = [view for _, view, _ in seen]
            if name == "unsupervised":
                for index, regions in enumerate(self._regions([item.image for item, _, _ in seen])):
                    predicted[index][name] = regions
                continue
            questions = [protocol.question(labels, item.prompts) for item, _, labels in seen]
            keys = [(index, question.prompts) for index, question in enumerate(questions)]
            scores |= self._scores(views, [key for key in keys if key[1] and key not in scores])
            for key, question, view in zip(keys, questions, views, strict=True):
                predicted[key[0]][name] = predict(question, scores.get(key), view, self.preset, self.recipe)
        for (item, _, labels), by_protocol in zip(seen, predicted, strict=True):
            yield item, labels, by_protocol
        while len(self._text) > _KEPT_PROMPTS:
            self._text.popitem(last=False)

    def _scores(
        self, views: Sequence[View], keys: Sequence[tuple[int, tuple[PlannedPrompt, ...]]]
    ) -> dict[tuple[int, tuple[PlannedPrompt, ...]], Tensor]:
        """Scores [names, h, w] of images, given by position, under their prompts."""
        self._encode([prompt.text for _, prompts in keys for prompt in prompts])
        seen = [views[index] for index, _ in keys]
        plans = [prompts for _, prompts in keys]
        seed, batch_size = self.settings.seed, self.settings.batch_size
        found: dict[tuple[int, tuple[PlannedPrompt, ...]], Tensor] = {}
        for layers, members in layer_groups(
            self.pipe,
            seen,
            plans,
            self.settings.layers,
            seed=seed,
            batch_size=batch_size,
            known_text=self._text,
        ):
            for scores in run_scores(
                self.pipe,
                [seen[position] for position in members],
                [plans[position] for position in members],
                self.preset,
                layers,
                Noising(seed=seed, batch_size=batch_size),
                progress=False,
                known_text=self._text,
            ):
                found[keys[members[scores.index]]] = scores.scores
        return found

    def _regions(self, images: list[Image.Image]) -> Iterator[Tensor]:
        """The regions of each image, uint8 [height, width]."""
        if not images:
            return
        for found in segment_unsupervised(
            self.pipe,
            images,
            preset=self.settings.preset,
            layers=self._given_layers,
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
            progress=False,
        ):
            yield found.labels.clamp(max=IGNORED - 1).to(torch.uint8)

    def _encode(self, texts: Sequence[str]) -> None:
        """Embed prompts that are not known, one by one so that results do not depend on the batch."""
        backbone = patch_of(self.pipe).backbone
        for text in texts:
            if text not in self._text:
                with torch.no_grad():
                    arguments = backbone.encode_text(self.pipe, [text])
                self._text[text] = {key: tensor[0] for key, tensor in arguments.items()}
            self._text.move_to_end(text)

    def _count(self, protocol: str, predicted: Tensor, actual: Tensor) -> Counts:
        if protocol == "unsupervised":
            disjoint = self.preset.match_disjoint
            return matched_counts(predicted, actual, self._classes, match_disjoint=disjoint)
        labels = self.protocols[protocol].labels
        return counts_of(confusion_matrix(predicted, actual, self._classes, predictions=labels))


def _seen_part(labels: np.ndarray, view: View) -> np.ndarray:
    """The labels of the part of an image that a view covers: all of it, or its centre."""
    height, width = labels.shape
    top, left = (height - view.image.height) // 2, (width - view.image.width) // 2
    return labels[top : top + view.image.height, left : left + view.image.width]
