"""Random images, and the size of those in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def random_image(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Independent values in [0, 1): [height, width, 3], float64."""
    return np.random.default_rng(seed).random((height, width, 3))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image file."""
    with Image.open(path) as image:
        return image.size
