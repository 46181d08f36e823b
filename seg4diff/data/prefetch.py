"""What evaluation reads of a data set: images with a label for every pixel, while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from seg4diff.data.items import Item, UnusableItemError


@dataclass(frozen=True)
class Loaded:
    """An image with its labels.

    Attributes:
        index: position in the data set.
        name: of the item.
        image: RGB.
        labels: uint8 [height, width], of the size of `image`.
        prompts: see `Item`.
    """

    index: int
    name: str
    image: Image.Image
    labels: np.ndarray
    prompts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """An image that cannot be evaluated.

    Attributes:
        index: position in the data set.
        name: of the item.
        reason: what is wrong, with the file's name.
    """

    index: int
    name: str
    reason: str


def load_ahead(
    items: Sequence[Item], groups: Sequence[Sequence[int]], *, threads: int = 4, ahead: int = 2
) -> Iterator[list[Loaded | Failure]]:
    """Read groups of items in order, some groups ahead of the one that the caller works on.

    Args:
        items: of the data set.
        groups: positions of the items that come together.
        threads: that read; decoding images does not hold Python's lock.
        ahead: groups that are read before they are asked for.
    """
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        waiting: deque[list[Future[Loaded | Failure]]] = deque()
        try:
            for group in groups:
                waiting.append([pool.submit(load, items[index], index) for index in group])
                if len(waiting) > ahead:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def load(item: Item, index: int) -> Loaded | Failure:
    """Read one item; what is wrong with it is returned, not raised."""
    try:
        image, labels = item.image(), item.labels()
    except UnusableItemError as error:
        return Failure(index, item.name, str(error))
    height, width = labels.shape
    if image.size != (width, height):
        sizes = f"the image is {image.width} x {image.height}, its label map {width} x {height}"
        return Failure(index, item.name, f"{sizes} (width x height)")
    return Loaded(index, item.name, image, labels, item.prompts)
