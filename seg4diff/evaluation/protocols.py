"""Protocols: which names are prompted for an image, and how its maps become a label map.

`oracle` (the paper's): only the classes that are present in the image. `full`: every class of the data set,
in as many prompts as the tokenizer needs. `unsupervised`: no names; regions are matched with classes
afterwards. `presence`: as `full`, and classes that are not found in the image are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from seg4diff.backbones.base import Recipe
from seg4diff.backbones.text import TextSpan
from seg4diff.data.registry import Dataset
from seg4diff.evaluation import BackgroundBy, ProtocolName
from seg4diff.metrics import IGNORED
from seg4diff.segmentation.inputs import View
from seg4diff.segmentation.presence import presence_of, threshold_for
from seg4diff.segmentation.presets import Preset
from seg4diff.segmentation.prompts import PlannedPrompt, plan_prompts
from seg4diff.segmentation.scores import best_of

PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)


@dataclass(frozen=True)
class Question:
    """What is prompted for an image under one protocol.

    Attributes:
        protocol: name of the protocol.
        labels: position in the data set's classes of each class that is prompted; `len(classes)` for a name
            that stands for no class.
        names: the names of each of them.
        prompts: the names, spread over prompts; `""` alone for `"unsupervised"`.
        threshold: pixels whose largest score is below this share of the image's largest are background;
            None where background is not decided by a threshold.
        background: position of the background class, if it is decided by a threshold.
    """

    protocol: ProtocolName
    labels: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    prompts: tuple[PlannedPrompt, ...]
    threshold: float | None = None
    background: int | None = None


class Protocol:
    """One protocol on one data set; keeps the prompts of every set of classes that occurred."""

    def __init__(
        self,
        name: ProtocolName,
        dataset: Dataset,
        preset: Preset,
        span: TextSpan,
        *,
        background: BackgroundBy = "prompt",
        threshold: float = 0.5,
    ) -> None:
        """Plan the prompts of the whole vocabulary, so that a name that cannot be prompted is found at once.

        Args:
            name: one of `PROTOCOLS`.
            dataset: gives the classes and their names.
            preset: decides whether names are cut at the hyphen, and whether a stray name is kept.
            span: the text encoder whose tokens are read.
            background: how the background class, if there is one, is decided.
            threshold: see `Question`, in (0, 1).

        Raises:
            ValueError: unknown protocol, a threshold out of range, or a name that has no tokens or too many.
        """
        if name not in PROTOCOLS:
            raise ValueError(f"protocol {name!r} is unknown; known: {', '.join(PROTOCOLS)}")
        if background not in get_args(BackgroundBy):
            raise ValueError(
                f"background by {background!r} is unknown; known: {', '.join(get_args(BackgroundBy))}"
            )
        if not 0 < threshold < 1:
            raise ValueError(f"background threshold {threshold} must lie between 0 and 1")
        self.name: ProtocolName = name
        self._dataset = dataset
        self._preset = preset
        self._span = span
        self._by_threshold = dataset.background is not None and background == "threshold"
        self._threshold = threshold
        self._questions: dict[tuple[Any, ...], Question] = {}
        if name in ("full", "presence") and not dataset.common_vocabulary:
            raise ValueError(
                f"data set {dataset.name!r} has no vocabulary common to its images; use the protocol "
                "oracle or unsupervised"
            )
        if name != "unsupervised":
            self._question(tuple(range(len(dataset.classes))), {})

    @property
    def labels(self) -> int:
        """Number of labels a prediction may have: the classes, and one for no class where that may occur."""
        stray = self.name == "oracle" and self._keeps_stray_name
        return len(self._dataset.classes) + stray

    def question(self, labels: np.ndarray, prompts: Mapping[int, tuple[str, ...]] | None = None) -> Question:
        """What to prompt for an image.

        Args:
            labels: uint8 [height, width], 255 for pixels that do not count.
            prompts: the image's own names for some classes, by position.
        """
        if self.name == "unsupervised":
            return Question(self.name, (), (), (PlannedPrompt("", ()),))
        classes = len(self._dataset.classes)
        if self.name in ("full", "presence"):
            return self._question(tuple(range(classes)), prompts or {})
        present = [int(value) for value in np.unique(labels) if value != IGNORED]
        if self._keeps_stray_name and (labels == IGNORED).any():
            present.append(classes)
        return self._question(tuple(present), prompts or {})

    @property
    def _keeps_stray_name(self) -> bool:
        return self._preset.stray_name and self._dataset.stray_name is not None

    def _question(self, present: tuple[int, ...], prompts: Mapping[int, tuple[str, ...]]) -> Question:
        key = (present, *sorted(prompts.items()))
        if key not in self._questions:
            dataset = self._dataset
            labels = tuple(
                label for label in present if not (self._by_threshold and label == dataset.background)
            )
            stray = (dataset.stray_name or "",)
            names = tuple(
                prompts.get(label, dataset.prompts[label]) if label < len(dataset.classes) else stray
                for label in labels
            )
            flat = [name for several in names for name in several]
            self._questions[key] = Question(
                self.name,
                labels,
                names,
                plan_prompts(flat, self._span, cut_at_hyphen=self._preset.cut_at_hyphen) if flat else (),
                self._threshold if self._by_threshold else None,
                dataset.background if self._by_threshold else None,
            )
        return self._questions[key]


def predict(question: Question, scores: Tensor | None, view: View, preset: Preset, recipe: Recipe) -> Tensor:
    """The label map of an image.

    Args:
        question: what was prompted.
        scores: of its names at the image tokens, [names, h, w]; None where nothing was prompted.
        view: the image.
        preset: how scores are resized.
        recipe: what was measured of the model.

    Returns:
        uint8 [height, width] on the CPU: positions in the data set's classes.
    """
    size = (view.image.height, view.image.width)
    if scores is None:  # nothing but background
        fill = IGNORED if question.background is None else question.background
        return torch.full(size, fill, dtype=torch.uint8)
    by_class = class_scores(question, scores)
    labels = torch.tensor(question.labels, dtype=torch.uint8, device=scores.device)
    if question.protocol == "presence" and len(labels) > 1:
        presence = presence_of(by_class, recipe)
        kept = presence >= threshold_for(None, recipe)
        kept |= ~kept.any() & (presence == presence.max())  # the likeliest name, if none is left
        by_class, labels = by_class[kept], labels[kept]
    best, winner = best_of(by_class, size, preset.upsample or recipe.upsample, view.image)
    found = labels[winner]
    if question.threshold is not None and question.background is not None:
        found[best < question.threshold * best.max()] = question.background
    return found.cpu()


def class_scores(question: Question, scores: Tensor) -> Tensor:
    """Scores of classes [classes prompted, h, w]: the maximum over the names of each class."""
    parts = scores.split([len(several) for several in question.names])
    return torch.stack([part.amax(dim=0) for part in parts])
