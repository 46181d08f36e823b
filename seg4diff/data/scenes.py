"""The drawn scenes that the bundled model was made for; nothing to download."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from PIL import Image

from seg4diff.data.layout import Sample
from seg4diff.demo.scenes import CLASSES, HELD_OUT, Conditions, scene

COUNT = 400
"""Scenes of the data set, from seed ``HELD_OUT`` on, which training never draws."""

_drawn = lru_cache(maxsize=64)(scene)


def read_scenes(conditions: Conditions) -> tuple[tuple[Sample, ...], str]:
    """The held-out scenes under these conditions; every pixel has a class.

    Returns:
        The samples, and what their labels are.
    """
    samples = tuple(
        Sample(f"scene-{number:04d}", partial(_image, seed, conditions), partial(_labels, seed, conditions))
        for number, seed in enumerate(range(HELD_OUT, HELD_OUT + COUNT))
    )
    return samples, f"drawn, seeds {HELD_OUT} to {HELD_OUT + COUNT - 1}, {conditions}"


def _image(seed: int, conditions: Conditions) -> Image.Image:
    return _drawn(seed, conditions).image


def _labels(seed: int, conditions: Conditions) -> np.ndarray:
    drawn = _drawn(seed, conditions)
    positions = np.array([CLASSES.index(name) for name in drawn.classes], np.uint8)
    return positions[drawn.labels]
