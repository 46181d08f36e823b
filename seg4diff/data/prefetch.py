"""Pictures and labels are read while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from seg4diff.data.registry import Sample


@dataclass(frozen=True)
class Loaded:
    """A picture with its labels.

    Attributes:
        index: position in the data set.
        name: of the sample.
        image: RGB.
        labels: uint8 [height, width], of the size of ``image``.
        prompts: see :class:`seg4diff.data.registry.Sample`.
    """

    index: int
    name: str
    image: Image.Image
    labels: np.ndarray
    prompts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A picture that cannot be evaluated.

    Attributes:
        index: position in the data set.
        name: of the sample.
        reason: what is wrong, with the file's name.
    """

    index: int
    name: str
    reason: str


def load_ahead(
    samples: Sequence[Sample], groups: Sequence[Sequence[int]], *, threads: int = 4, ahead: int = 2
) -> Iterator[list[Loaded | Failure]]:
    """Read groups of samples in order, some groups ahead of what the caller works on.

    Args:
        samples: of the data set.
        groups: positions of the samples that come together.
        threads: that read; decoding pictures does not hold Python's lock.
        ahead: groups that are read before they are asked for.
    """
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        waiting: deque[list[Future[Loaded | Failure]]] = deque()
        try:
            for group in groups:
                waiting.append([pool.submit(load, samples[index], index) for index in group])
                if len(waiting) > ahead:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def load(sample: Sample, index: int) -> Loaded | Failure:
    """Read one sample; what is wrong with it is returned, not raised."""
    try:
        image, labels = sample.read_image(), sample.read_labels()
    except (ValueError, TypeError, OSError) as error:
        return Failure(index, sample.name, " ".join(str(error).split()))
    height, width = labels.shape
    if image.size != (width, height):
        return Failure(
            index,
            sample.name,
            f"the picture is {image.width} x {image.height}, its label map {width} x {height} (width x "
            "height)",
        )
    return Loaded(index, sample.name, image, labels, sample.prompts)
