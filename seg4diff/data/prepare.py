"""A data set checked file by file, and written as a plain folder where that is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from seg4diff.data.folder import CLASSES, IMAGES, LABELS
from seg4diff.data.prefetch import Failure, load_ahead
from seg4diff.data.registry import Dataset
from seg4diff.files import check_outputs, checked_name, no_space, write_atomically
from seg4diff.metrics import IGNORED
from seg4diff.visualization import palette

_AT_ONCE = 32


@dataclass(frozen=True)
class Inspection:
    """What the files of a data set hold.

    Attributes:
        images: how many were read without fault.
        failures: those that were not.
        pixels: of each class over all images.
        occurs: for each class the number of images that hold it.
        ignored: pixels that do not count.
    """

    images: int
    failures: tuple[Failure, ...]
    pixels: tuple[int, ...]
    occurs: tuple[int, ...]
    ignored: int


def prepare(
    dataset: Dataset, out: Path | None = None, *, threads: int = 4, progress: bool = True
) -> Inspection:
    """Read every image and label map of a data set.

    Args:
        dataset: see `seg4diff.data.registry.open_dataset`.
        out: a folder to write the data set to, in the format of `--dataset folder`: label maps as palette
            PNGs in the classes of `dataset`, images as lossless PNGs.
        threads: that read.
        progress: show a bar.

    Raises:
        ValueError: a file of the data set would be overwritten.
        OSError: `out` cannot be written to.
    """
    if out is not None:
        check_outputs(
            [path for item in dataset.items for path in _paths(out, item.name)],
            [file for item in dataset.items for file in item.files],
        )
        names = "".join(f"{name}\n" for name in dataset.classes)
        write_atomically(out / CLASSES, lambda path: path.write_text(names, encoding="utf-8"))
    pixels = np.zeros(IGNORED + 1, np.int64)
    occurs = np.zeros(IGNORED + 1, np.int64)
    failures: list[Failure] = []
    every = range(len(dataset.items))
    groups = [every[first : first + _AT_ONCE] for first in every[::_AT_ONCE]]
    with tqdm(total=len(every), unit="image", disable=not progress, desc=dataset.name) as bar:
        for group in load_ahead(dataset.items, groups, threads=threads):
            for item in group:
                bar.update()
                if isinstance(item, Failure):
                    failures.append(item)
                    continue
                counts = np.bincount(item.labels.ravel(), minlength=len(pixels))
                pixels += counts
                occurs += counts > 0
                if out is not None:
                    _write(out, item.name, item.image, item.labels)
    count = len(dataset.classes)
    return Inspection(
        len(every) - len(failures),
        tuple(failures),
        tuple(pixels[:count].tolist()),
        tuple(occurs[:count].tolist()),
        int(pixels[IGNORED]),
    )


def _paths(out: Path, name: str) -> tuple[Path, Path]:
    """Where the image and the label map of an item are written."""
    checked_name(name, "the data set")
    return out / IMAGES / f"{name}.png", out / LABELS / f"{name}.png"


def _write(out: Path, name: str, image: Image.Image, labels: np.ndarray) -> None:
    label_map = Image.fromarray(labels)
    label_map.putpalette(palette(256).tobytes())
    for path, content in zip(_paths(out, name), (image, label_map), strict=True):
        try:
            write_atomically(path, lambda temporary, content=content: content.save(temporary))  # type: ignore[misc]
        except OSError as error:
            raise no_space(error, path) from error
