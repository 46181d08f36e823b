"""A model that sees perfectly: images whose red channel is the class of each pixel, and maps that say so.

:func:`perfect_maps` takes the place of ``run_maps``. All else (data set, names, prompts, tokens, resizing,
counting, files) is the real thing, so any shift, wrong order or lost pixel on the way shows in the figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from seg4diff.backbones import find_backbone
from seg4diff.segmentation import passes, regions
from seg4diff.segmentation.inputs import Noising, View
from seg4diff.segmentation.maps import ImageMaps, Reading

CLASSES = ("cat", "red sofa", "tree", "dog house")
"""The third begins like no other; two have several tokens; "dog house" is not "dog"."""


class PerfectMaps:
    """Stands for ``run_maps``; remembers what was asked."""

    def __init__(self, names: Sequence[str] = CLASSES, confused: Mapping[int, int] | None = None) -> None:
        self.names = names
        self.confused = confused or {}
        self.prompts: list[list[str]] = []
        self.batch_sizes: list[int] = []

    def __call__(
        self,
        pipe: Any,
        views: Sequence[View],
        prompts: Sequence[Sequence[str]],
        reading: Reading,
        noising: Noising,
        **options: Any,
    ) -> Iterator[ImageMaps]:
        span = find_backbone(pipe).name_span(pipe)
        known = options.get("known_text")
        assert known is None or all(prompt in known for several in prompts for prompt in several), (
            "text must be embedded before"
        )
        self.prompts += [list(several) for several in prompts]
        self.batch_sizes.append(noising.batch_size)
        for index in reversed(range(len(views))):  # in any order
            seen = np.asarray(views[index].image)[:, :, 0].astype(int)
            maps = []
            for prompt in prompts[index]:
                columns = torch.full((span.length, seen.size), 0.001)
                for label in np.unique(seen):
                    said = self.confused.get(int(label), int(label))
                    where = torch.from_numpy((seen == label).ravel())
                    if prompt == "":
                        columns[said + 1, where] = 1.0  # a token of its own for each class
                        continue
                    name = self.names[said]
                    start = f" {prompt} ".find(f" {name} ")
                    if start >= 0:
                        for column in span.columns(prompt, start, start + len(name)):
                            columns[column, where] = 1.0
                maps.append(columns.T[None].contiguous())  # of one layer
            yield ImageMaps(index, tuple(maps), seen.shape, 8, 500.0)


def use_maps(monkeypatch: pytest.MonkeyPatch, maps: PerfectMaps) -> None:
    """Let segmentation read these maps."""
    for module in (passes, regions):
        monkeypatch.setattr(module, "run_maps", maps)


LABELS = {
    "a": [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 255, 1, 1, 255]] * 3,  # wider than high
    "b": [[3, 3], [3, 255], [2, 2], [2, 2], [255, 0]],  # higher than wide
    "c": [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
    "inside/d": [[255, 3, 3, 3], [0, 3, 3, 3]],
}
"""Classes of four images; 255 does not count. In the red channel 255 becomes 0, a class like any other."""
