"""What a segmentation is: a label and a score for every pixel, and the names of the classes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from seg4diff.files import write_atomically
from seg4diff.visualization import label_overlay, palette


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """A label and a score for every pixel of a picture.

    Attributes:
        labels: int64 [height, width], an index into ``classes``.
        scores: float32 [classes, height, width], larger where a class is more likely. How they are scaled is
            up to the method that made them.
        classes: a name for each label, all different.
        image: the picture that was segmented, at its own size, for :meth:`overlay`.
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
        """Where a class is: bool [height, width].

        Raises:
            ValueError: there is no class of that name; the message lists those there are.
        """
        if name not in self.classes:
            raise ValueError(f"class {name!r} is not among {', '.join(map(repr, self.classes))}")
        return self.labels == self.classes.index(name)

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """The labels in colours over the picture (or alone, if there is none), the names that occur below.

        Args:
            alpha: 0 shows only the picture, 1 only the colours.
            legend: whether to add the names; small pictures are enlarged for them. Without legend the result
                has the size of the picture.

        Raises:
            ValueError: ``alpha`` is outside [0, 1].
        """
        return label_overlay(self.labels, self.classes, self.image, alpha=alpha, legend=legend)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result, in the format that the suffix names. The file appears whole or not at all.

        * ``.png``: the labels, 8 bits with a palette; 16 bits of grey from 257 classes on. A text chunk
          ``classes`` holds the names as JSON.
        * ``.npz``: labels, scores, classes, picture and metadata, for :meth:`load` or
          ``numpy.load(path, allow_pickle=False)``.
        * ``.json``: COCO annotations, a run-length encoded mask for each class that occurs. The class at
          position i has the category id i + 1; ``score`` is the mean score inside its mask.

        Returns:
            ``path`` as a Path.

        Raises:
            ValueError: another suffix, or more than 65 536 classes in a PNG.
            OSError: the file cannot be written.
        """
        path = Path(path)
        writers: dict[str, Callable[[Path], None]] = {
            ".png": self._write_png,
            ".npz": self._write_npz,
            ".json": self._write_json,
        }
        writer = writers.get(path.suffix.lower())
        if writer is None:
            raise ValueError(
                f"path={str(path)!r}: unknown suffix {path.suffix!r}; use {', '.join(writers)} "
                "(for a picture to look at: result.overlay().save(path))"
            )
        return write_atomically(path, writer)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Segmentation:
        """Read what :meth:`save` wrote to an ``.npz`` file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or no segmentation.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"{os.fspath(path)!r} does not exist")
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                labels, scores = torch.from_numpy(arrays["labels"]), torch.from_numpy(arrays["scores"])
                classes = tuple(str(name) for name in arrays["classes"])
                image = Image.fromarray(arrays["image"]) if "image" in arrays else None
                metadata = json.loads(str(arrays["metadata"]))
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is no segmentation that was saved as .npz, or is damaged ({error})"
            ) from error
        return Segmentation(labels, scores, classes, image, metadata)

    def _write_png(self, path: Path) -> None:
        count = len(self.classes)
        if count > 65536:
            raise ValueError(f"{count} classes do not fit a PNG of 16 bits; save as .npz")
        labels = self.labels.cpu().numpy()
        if count <= 256:
            picture = Image.fromarray(labels.astype(np.uint8), mode="L")
            picture.putpalette(palette(count).tobytes())
        else:
            picture = Image.fromarray(labels.astype(np.uint16))
        text = PngImagePlugin.PngInfo()
        text.add_itxt("classes", json.dumps(self.classes, ensure_ascii=False))
        picture.save(path, format="PNG", pnginfo=text, optimize=True)

    def _write_npz(self, path: Path) -> None:
        arrays = {
            "labels": self.labels.cpu().numpy(),
            "scores": self.scores.detach().cpu().numpy(),
            "classes": np.array(self.classes, dtype=np.str_),
            "metadata": np.array(json.dumps(self.metadata, default=str)),
        }
        if self.image is not None:
            arrays["image"] = np.asarray(self.image.convert("RGB"))
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    def _write_json(self, path: Path) -> None:
        from pycocotools import mask as run_lengths

        height, width = self.labels.shape
        annotations: list[dict[str, Any]] = []
        for index in self.labels.unique().tolist():
            mask = self.labels == index
            encoded = run_lengths.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 1,
                    "category_id": index + 1,
                    "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                    "area": int(mask.sum()),
                    "bbox": [float(number) for number in run_lengths.toBbox(encoded)],
                    "iscrowd": 0,
                    "score": float(self.scores[index][mask].mean()),
                }
            )
        document = {
            "info": {"description": "seg4diff segmentation", "metadata": dict(self.metadata)},
            "images": [{"id": 1, "height": height, "width": width}],
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate(self.classes)],
            "annotations": annotations,
        }
        path.write_text(json.dumps(document, ensure_ascii=False, default=str), encoding="utf-8")

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.overlay().save(buffer, format="PNG")
        return buffer.getvalue()

    def shares(self) -> str:
        """What share of the image the largest classes have, as text: ``"cat 50%, red sofa 50%"``."""
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
