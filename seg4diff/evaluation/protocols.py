"""Protocols: which names are prompted for an image, and how its maps become a label map.

`oracle` (the paper's): only the classes that are present in the image. `full`: every class of the data set,
in as many prompts as the tokenizer needs. `unsupervised`: no names; regions are matched with classes
afterwards. All three read the same noisy latent, so an image is encoded once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from seg4diff.backbones.text import TextSpan
from seg4diff.data.registry import Dataset
from seg4diff.evaluation import BackgroundBy, ProtocolName
from seg4diff.metrics import IGNORED
from seg4diff.segmentation.grouping import find_regions
from seg4diff.segmentation.presets import Preset, Upsample
from seg4diff.segmentation.prompts import PlannedPrompt, plan_prompts
from seg4diff.segmentation.scores import resize_scores, scores_of_names

PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)

_CLASSES_AT_ONCE = 16


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
        if name == "full" and not dataset.common_vocabulary:
            raise ValueError(
                f"data set {dataset.name!r} has no vocabulary common to its images; use a protocol other "
                "than full"
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
        if self.name == "full":
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


def predict(
    question: Question,
    maps: Sequence[Tensor],
    grid: tuple[int, int],
    size: tuple[int, int],
    preset: Preset,
) -> Tensor:
    """The label map of an image.

    Args:
        question: what was prompted.
        maps: for each of its prompts the attention [N, T']; without names by layer [L, N, T'], or by layer
            and head [L, H, N, T'], if that is what the preset groups.
        grid: height h and width w of the image tokens, N = h * w.
        size: height and width of the image.
        preset: how scores are resized, and how regions are grouped without names.

    Returns:
        uint8 [height, width] on the CPU: positions in the data set's classes, or numbers of regions.
    """
    if question.protocol == "unsupervised":
        regions = find_regions(maps[0], grid=grid, grouping=preset.grouping)[:IGNORED]
        _, winner = _winners(regions, size, "linear")
        return winner.to("cpu", torch.uint8)
    if not question.labels:  # nothing but background
        fill = IGNORED if question.background is None else question.background
        return torch.full(size, fill, dtype=torch.uint8)
    scores, winner = _winners(class_scores(question, maps, grid), size, preset.upsample or "geometric")
    labels = torch.tensor(question.labels, dtype=torch.uint8, device=winner.device)[winner]
    if question.threshold is not None and question.background is not None:
        labels[scores < question.threshold * scores.max()] = question.background
    return labels.cpu()


def class_scores(question: Question, maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Scores [classes prompted, h, w]: mean over the tokens of a name, maximum over the names of a class."""
    by_name = scores_of_names(maps, question.prompts, grid).float()
    parts = by_name.split([len(several) for several in question.names])
    return torch.stack([part.amax(dim=0) for part in parts])


def _winners(scores: Tensor, size: tuple[int, int], upsample: Upsample) -> tuple[Tensor, Tensor]:
    """Largest score and its position for every pixel [height, width], from scores [classes, h, w].

    Scores are resized in chunks of 16 classes to bound memory. The first of equal scores wins.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    winner = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(scores), _CLASSES_AT_ONCE):
        part = scores[first : first + _CLASSES_AT_ONCE]
        values, positions = resize_scores(part, size, upsample).max(dim=0)
        better = values > best
        best = torch.where(better, values, best)
        winner = torch.where(better, positions + first, winner)
    return best, winner
