"""Random images."""

from __future__ import annotations

import numpy as np


def random_image(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Independent values in [0, 1): [height, width, 3], float64."""
    return np.random.default_rng(seed).random((height, width, 3))
