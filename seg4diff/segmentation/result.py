"""The result of a segmentation: a label and a score for every pixel, and the names of the classes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from seg4diff.files import write_atomically
from seg4diff.segmentation.formats import WRITERS, read_npz
from seg4diff.segmentation.instances import Instances, find_instances
from seg4diff.segmentation.presets import Upsample
from seg4diff.segmentation.scores import resize_scores
from seg4diff.visualization import label_overlay

BACKGROUND = -1
"""Label of pixels that no name explains."""


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """A label and a score for every pixel of an image.

    Attributes:
        labels: int64 [height, width], an index into `classes`, or `BACKGROUND`.
        scores: float32 [classes, h, w], larger where a class is more likely: at the image tokens, or at the
            pixels. Their scale depends on the method that made them. `pixel_scores` resizes them.
        classes: a name for each label, all different.
        image: the image that was segmented, at its own size, for `overlay`.
        metadata: how the result was made, e.g. preset, layers, prompt and seed.
        presence: how surely each class is in the image, float32 [classes] in [0, 1], see
            `seg4diff.segmentation.presence.presence_of`; None where no names were asked for. A class that was
            found absent has scores, and no pixel.
        upsample: how scores go from image tokens to pixels, see `seg4diff.segmentation.scores.resize_scores`.

    Raises:
        ValueError: shapes disagree, a label has no name, a name occurs twice, or there is no pixel.
        TypeError: a field has another type or dtype.
    """

    labels: torch.Tensor
    scores: torch.Tensor
    classes: tuple[str, ...]
    image: Image.Image | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    presence: torch.Tensor | None = None
    upsample: Upsample = "linear"

    def __post_init__(self) -> None:
        for name, dtype, rank in (("labels", torch.int64, 2), ("scores", torch.float32, 3)):
            tensor = getattr(self, name)
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
                found = (
                    f"{tensor.dtype} tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                )
                raise TypeError(f"{name} is a {found}: a {dtype} tensor expected")
            if tensor.ndim != rank or tensor.numel() == 0:
                axes = "[height, width]" if rank == 2 else "[classes, height, width]"
                raise ValueError(f"{name} has shape {list(tensor.shape)}: {axes} expected, none of them 0")
        if isinstance(self.classes, str) or not all(isinstance(name, str) for name in self.classes):
            raise TypeError(f"classes={self.classes!r} must be a tuple of names")
        object.__setattr__(self, "classes", tuple(self.classes))
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"classes name {', '.join(map(repr, twice))} more than once")
        if len(self.scores) != len(self.classes):
            raise ValueError(f"scores have shape {list(self.scores.shape)} for {len(self.classes)} classes")
        if self.presence is not None and tuple(self.presence.shape) != (len(self.classes),):
            raise ValueError(
                f"presence has shape {list(self.presence.shape)} for {len(self.classes)} classes"
            )
        if self.upsample not in get_args(Upsample):
            accepted = ", ".join(map(repr, get_args(Upsample)))
            raise ValueError(f"upsample={self.upsample!r} is unknown; accepted: {accepted}")
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < BACKGROUND or highest >= len(self.classes):
            raise ValueError(
                f"labels reach from {lowest} to {highest}: indices of {len(self.classes)} classes expected, "
                f"or {BACKGROUND} for background"
            )
        height, width = self.labels.shape
        if self.image is not None and self.image.size != (width, height):
            raise ValueError(
                f"image is {self.image.width} x {self.image.height} (width x height), "
                f"labels are {width} x {height}"
            )
        object.__setattr__(self, "metadata", dict(self.metadata))

    def pixel_scores(self) -> torch.Tensor:
        """Scores at the pixels: float32 [classes, height, width]. Computed at each call.

        Raises:
            ValueError: they follow the edges of the image, and there is none.
        """
        height, width = self.labels.shape
        if self.scores.shape[1:] == self.labels.shape:
            return self.scores
        return resize_scores(self.scores, (height, width), self.upsample, self.image)

    def mask(self, name: str) -> torch.Tensor:
        """The pixels of a class: bool [height, width].

        Raises:
            ValueError: there is no class of that name; the message lists those there are.
        """
        if name not in self.classes:
            raise ValueError(f"class {name!r} is not among {', '.join(map(repr, self.classes))}")
        return self.labels == self.classes.index(name)

    def instances(self, things: Sequence[str] | None = None) -> Instances:
        """The things of each class one by one: its connected components, divided at the necks between them.

        It needs the labels alone: see `seg4diff.segmentation.instances`. Computed at each call.

        Args:
            things: names of the classes to divide; the others are one instance each. All when None.

        Raises:
            ValueError: one of `things` is not a class; the message lists those there are. Or scores follow
                the edges of the image, and there is none.
        """
        return find_instances(self.labels, self.pixel_scores(), self.classes, things)

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """The labels in colours over the image (or alone, if there is none), the names that occur below it.

        Args:
            alpha: 0 shows only the image, 1 only the colours.
            legend: whether to add the names; small images are enlarged for them. Without legend the result
                has the size of the image.

        Raises:
            ValueError: `alpha` is outside [0, 1].
        """
        return label_overlay(self.labels, self.classes, self.image, alpha=alpha, legend=legend)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result, in the format that the suffix names. The file appears whole or not at all.

        * `.png`: the labels, 8 bits with a palette, background 255; from 256 classes on, 16 bits of grey,
          background 65535. A text chunk `classes` holds the names as JSON.
        * `.npz`: all attributes, for `load` or
          `numpy.load(path, allow_pickle=False)`.
        * `.json`: COCO annotations, a run-length encoded mask for each class that occurs. The class at
          position i has the category id i + 1; `score` is the mean score inside its mask.

        Returns:
            `path` as a Path.

        Raises:
            ValueError: another suffix, or more than 65 535 classes in a PNG.
            OSError: the file cannot be written.
        """
        path = Path(path)
        writer = WRITERS.get(path.suffix.lower())
        if writer is None:
            raise ValueError(
                f"path={str(path)!r}: unknown suffix {path.suffix!r}; use {', '.join(WRITERS)} "
                "(for an image to look at: result.overlay().save(path))"
            )
        return write_atomically(path, lambda temporary: writer(self, temporary))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Segmentation:
        """Read what `save` wrote to an `.npz` file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or not a segmentation.
        """
        return Segmentation(**read_npz(Path(path)))

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.overlay().save(buffer, format="PNG")
        return buffer.getvalue()

    def shares(self) -> str:
        """What share of the image the largest classes have, as text: `"cat 50%, red sofa 50%"`."""
        labels = self.labels[self.labels != BACKGROUND].cpu()
        if not labels.numel():
            return "background 100%"
        pixels = torch.bincount(labels)
        largest = [index for index in pixels.argsort(descending=True, stable=True).tolist() if pixels[index]]
        parts = [
            f"{self.classes[index]} {int(pixels[index]) / self.labels.numel():.0%}" for index in largest[:5]
        ]
        if len(largest) > 5:
            parts.append(f"{len(largest) - 5} more")
        if labels.numel() < self.labels.numel():
            parts.append(f"background {1 - labels.numel() / self.labels.numel():.0%}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Segmentation({width} x {height}: {self.shares()})"
