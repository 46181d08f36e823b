"""Label maps: files whose values are classes, and data sets of such files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from seg4diff.data.items import Item, Items
from seg4diff.data.paths import IncompleteDatasetError, files_by_name, read_list, require, require_all
from seg4diff.images import as_rgb
from seg4diff.metrics import IGNORED

_INVALID = -1


@dataclass(frozen=True)
class LabelMaps:
    """Where a data set keeps its images, and label maps of the same names.

    Attributes:
        images, labels: folders, relative to the data root.
        classes: names of the classes, in the order of the positions in `table`.
        table: see `value_table`.
        download: what to download, from where, and where to unpack it.
        split: file that lists the names, relative to the data root; None for all images.
        image_suffix, label_suffix: what is cut off the names of files.
        read: reads a label map by `table`.
    """

    images: str
    labels: str
    classes: tuple[str, ...]
    table: np.ndarray
    download: str
    split: str | None = None
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
    read: Callable[[Path, np.ndarray], np.ndarray] | None = None

    def items(self, dataset: str, root: Path) -> tuple[Items, str]:
        """The items, whose files all exist, and what their labels are.

        Raises:
            IncompleteDatasetError: files are missing.
            ValueError: the list of names is empty or repeats one.
        """
        split = [self.split] if self.split else []
        require(dataset, root, [*split, self.images, self.labels], self.download)
        images = files_by_name(root / self.images, [self.image_suffix])
        labels = files_by_name(root / self.labels, [self.label_suffix])
        names = read_list(root / self.split) if self.split else sorted({*images, *labels})
        if not names:
            raise IncompleteDatasetError(
                f"data set {dataset!r} holds no image under {str(root)!r}. {self.download}"
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"data set {dataset!r} lists {twice!r} more than once")
        for kind, folder, found, suffix in (
            ("images", self.images, images, self.image_suffix),
            ("label maps", self.labels, labels, self.label_suffix),
        ):
            wanted = [f"{folder}/{name}{suffix}" for name in names]
            present = {f"{folder}/{name}{suffix}" for name in found}
            require_all(dataset, root, kind, wanted, present, self.download)

        def make(name: str) -> Item:
            image, label_map = root / self.images / images[name], root / self.labels / labels[name]
            return Item(
                name,
                partial(as_rgb, image),
                partial(self.read or read_label_map, label_map, self.table),
                classes=self.classes,
                files=(image, label_map),
            )

        return Items(names, make), f"{self.labels}, {self.split or f'all of {self.images}'}"


def value_table(classes: Mapping[int, int], ignored: Sequence[int] = (IGNORED,)) -> np.ndarray:
    """A table from values of a label map to positions in the classes.

    Args:
        classes: value -> position.
        ignored: values of pixels that do not count.

    Returns:
        int16, indexed by value; other values are invalid.
    """
    table = np.full(max([*classes, *ignored, 255]) + 1, _INVALID, np.int16)
    table[list(ignored)] = IGNORED
    for value, position in classes.items():
        table[value] = position
    return table


def read_label_map(path: Path, table: np.ndarray) -> np.ndarray:
    """Read a label map of 8 or 16 bits, with or without a palette.

    Args:
        path: a PNG whose values, not whose colours, are classes.
        table: see :func:`value_table`.

    Returns:
        uint8 [height, width], positions in the classes or 255.

    Raises:
        ValueError: the file is unreadable, holds colours, or a value that stands for no class.
    """
    try:
        with Image.open(path) as file:
            file.load()
            mode, values = file.mode, np.asarray(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"label map {str(path)!r} is unreadable ({error}); get a whole copy of it"
        ) from error
    if mode not in ("P", "L") and not mode.startswith("I"):
        raise ValueError(
            f"label map {str(path)!r} has mode {mode}: values of 8 or 16 bits expected, a class number for "
            "every pixel; colours cannot be read back safely"
        )
    return look_up(values, table, f"label map {str(path)!r}")


def look_up(values: np.ndarray, table: np.ndarray, source: str) -> np.ndarray:
    """Positions [height, width], uint8, of the classes of a label map's values.

    Raises:
        ValueError: a value that stands for no class; the message starts with `source`.
    """
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high < len(table):
        found = table[values]
        if not (found == _INVALID).any():
            return found.astype(np.uint8)
    wrong = [v for v in np.unique(values).tolist() if not 0 <= v < len(table) or table[v] == _INVALID]
    raise ValueError(
        f"{source} holds {', '.join(map(str, wrong[:5]))}{', ...' if len(wrong) > 5 else ''}, which stand"
        f"{'s' if len(wrong) == 1 else ''} for no class; is it of this data set, and in its original values?"
    )
