"""The result of a segmentation: a label and a score for every pixel, and the names of the classes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from seg4diff.files import write_atomically
from seg4diff.segmentation.formats import WRITERS, read_npz
from seg4diff.visualization import label_overlay


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """A label and a score for every pixel of an image.

    Attributes:
        labels: int64 [height, width], an index into `classes`.
        scores: float32 [classes, height, width], larger where a class is more likely. Their scale
            depends on the method that made them.
        classes: a name for each label, all different.
        image: the image that was segmented, at its own size, for `overlay`.
        metadata: how the result was made, e.g. preset, layers, prompt and seed.

    Raises:
        ValueError: shapes disagree, a label has no name, a name occurs twice, or there is no pixel.
        TypeError: a field has another type or dtype.
    """

    labels: torch.Tensor
    scores: torch.Tensor
    classes: tuple[str, ...]
    image: Image.Image | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

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
        expected = (len(self.classes), *self.labels.shape)
        if tuple(self.scores.shape) != expected:
            raise ValueError(
                f"scores have shape {list(self.scores.shape)}: {list(expected)} expected from "
                f"{len(self.classes)} classes and labels of shape {list(self.labels.shape)}"
            )
        lowest, highest = int(self.labels.min()), int(self.labels.max())
        if lowest < 0 or highest >= len(self.classes):
            raise ValueError(
                f"labels reach from {lowest} to {highest}: indices of {len(self.classes)} classes expected"
            )
        height, width = self.labels.shape
        if self.image is not None and self.image.size != (width, height):
            raise ValueError(
                f"image is {self.image.width} x {self.image.height} (width x height), "
                f"labels are {width} x {height}"
            )
        object.__setattr__(self, "metadata", dict(self.metadata))

    def mask(self, name: str) -> torch.Tensor:
        """The pixels of a class: bool [height, width].

        Raises:
            ValueError: there is no class of that name; the message lists those there are.
        """
        if name not in self.classes:
            raise ValueError(f"class {name!r} is not among {', '.join(map(repr, self.classes))}")
        return self.labels == self.classes.index(name)

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

        * `.png`: the labels, 8 bits with a palette; 16 bits of grey from 257 classes on. A text chunk
          `classes` holds the names as JSON.
        * `.npz`: labels, scores, classes, image and metadata, for `load` or
          `numpy.load(path, allow_pickle=False)`.
        * `.json`: COCO annotations, a run-length encoded mask for each class that occurs. The class at
          position i has the category id i + 1; `score` is the mean score inside its mask.

        Returns:
            `path` as a Path.

        Raises:
            ValueError: another suffix, or more than 65 536 classes in a PNG.
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
        pixels = torch.bincount(self.labels.flatten().cpu())
        largest = [index for index in pixels.argsort(descending=True, stable=True).tolist() if pixels[index]]
        parts = [
            f"{self.classes[index]} {int(pixels[index]) / self.labels.numel():.0%}" for index in largest[:5]
        ]
        if len(largest) > 5:
            parts.append(f"{len(largest) - 5} more")
        return ", ".join(parts)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Segmentation({width} x {height}: {self.shares()})"
