"""An item of a data set: an image with labels, masks and captions, as far as it has them, read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from PIL import Image

from seg4diff.data.class_names import BACKGROUND
from seg4diff.files import checked_name
from seg4diff.metrics import IGNORED


class UnusableItemError(ValueError):
    """An item cannot be used. Callers leave it out and count it under `reason`.

    Attributes:
        reason: the same text for all items with this fault.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason = reason


class Mask(NamedTuple):
    """A mask.

    Attributes:
        name: of what it covers; empty if unknown.
        pixels: bool [height, width].
    """

    name: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Item:
    """An image and what is known of it. Its methods read files and raise UnusableItemError.

    Attributes:
        name: unique in its data set; a relative path with `/` between folders.
        read_image: returns the image, RGB.
        read_labels: returns uint8 [height, width], positions in `classes`, 255 where a pixel does not count.
        read_masks: returns the masks for an image of this height and width.
        read_captions: returns the captions.
        classes: names of the labels.
        prompts: names to prompt in this image for some classes, by position, instead of the data set's.
        files: all files of the item, whether or not they exist.
    """

    name: str
    read_image: Callable[[], Image.Image]
    read_labels: Callable[[], np.ndarray] | None = None
    read_masks: Callable[[int, int], Iterable[Mask]] | None = None
    read_captions: Callable[[], tuple[str, ...]] | None = None
    classes: tuple[str, ...] = ()
    prompts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        checked_name(self.name, "the data set")

    def image(self) -> Image.Image:
        """The image, RGB."""
        with self._reading("image"):
            return self.read_image()

    def labels(self) -> np.ndarray:
        """uint8 [height, width], positions in `classes`, or 255 where a pixel does not count."""
        if self.read_labels is None:
            raise UnusableItemError("no labels", self.name)
        with self._reading("labels"):
            return self.read_labels()

    def masks(self, height: int, width: int) -> list[Mask]:
        """The masks for an image of this size; of labels, one mask per class but background."""
        if self.read_masks is not None:
            with self._reading("masks"):
                masks = list(self.read_masks(height, width))
        elif self.read_labels is not None:
            labels = self.labels()
            present = [value for value in np.unique(labels).tolist() if value != IGNORED]
            masks = [Mask(self.classes[v], labels == v) for v in present if self.classes[v] != BACKGROUND]
        else:
            raise UnusableItemError("no masks", self.name)
        for mask in masks:
            if mask.pixels.shape != (height, width):
                found = " x ".join(map(str, mask.pixels.shape[::-1]))
                raise UnusableItemError(
                    "masks of another size than the image", f"{self.name}: {found}, image {width} x {height}"
                )
        return masks

    def captions(self) -> tuple[str, ...]:
        """The captions, perhaps none."""
        if self.read_captions is None:
            return ()
        with self._reading("captions"):
            return self.read_captions()

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except UnusableItemError:
            raise
        except FileNotFoundError as error:
            raise UnusableItemError("missing file", str(error)) from error
        except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:  # of file or annotations
            detail = repr(error) if isinstance(error, KeyError) else " ".join(str(error).split())
            raise UnusableItemError(f"unreadable {what}", f"{self.name}: {detail}") from error


class Items(Sequence[Item]):
    """Items that are made when they are asked for: what is kept of each is its name."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Item]) -> None:
        self._names = names
        self._make = make

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Items: ...
    def __getitem__(self, index: int | slice) -> Item | Items:
        if isinstance(index, slice):
            return Items(self._names[index], self._make)
        return self._make(self._names[index])


Reader = Callable[[str, Path, tuple[str, ...]], tuple[Items, str]]
"""Reads a data set, from its name, the data root and its classes: the items, and what their labels are.

Background is a class if `classes` begin with it; else it does not count. Raises IncompleteDatasetError if
files are missing, and ValueError if a list of names, classes or annotations is damaged.
"""
