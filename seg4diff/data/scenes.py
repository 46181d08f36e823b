"""The drawn scenes that the bundled model was made for; nothing to download."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from PIL import Image

from seg4diff.data.layout import Sample
from seg4diff.demo.scenes import CLASSES, HELD_OUT, Scene, scene

COUNT = 400
"""Scenes of the data set, from seed ``HELD_OUT`` on, which training never draws."""

_drawn = lru_cache(maxsize=64)(scene)


def read_scenes() -> tuple[tuple[Sample, ...], str]:
    """The held-out scenes; every pixel has a class.

    Returns:
        The samples, and what their labels are.
    """
    samples = tuple(
        Sample(f"scene-{number:04d}", partial(_image, HELD_OUT + number), partial(_labels, HELD_OUT + number))
        for number in range(COUNT)
    )
    return samples, f"drawn, seeds {HELD_OUT} to {HELD_OUT + COUNT - 1}"


def _image(seed: int) -> Image.Image:
    return _drawn(seed).image


def _labels(seed: int) -> np.ndarray:
    drawn: Scene = _drawn(seed)
    positions = np.array([CLASSES.index(name) for name in drawn.classes], np.uint8)
    return positions[drawn.labels]
