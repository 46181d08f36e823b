"""The drawn scenes that the bundled model was made for; nothing to download."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

from seg4diff.data.items import Item, Items
from seg4diff.demo.scenes import CLASSES, HELD_OUT, Conditions, scene

EVALUATION = range(HELD_OUT, HELD_OUT + 400)
"""Seeds of the data set `scenes`, which training never draws."""

_drawn = lru_cache(maxsize=64)(scene)


def read_scenes(seeds: range, conditions: Conditions) -> tuple[Items, str]:
    """The scenes of these seeds, and what their labels are; every pixel has a class."""
    items = Items([f"scene-{seed}" for seed in seeds], partial(_item, conditions))
    return items, f"drawn, seeds {seeds[0]} to {seeds[-1]}, {conditions}"


def _item(conditions: Conditions, name: str) -> Item:
    seed = int(name.removeprefix("scene-"))
    return Item(
        name,
        lambda: _drawn(seed, conditions).image,
        lambda: _labels(seed, conditions),
        read_captions=lambda: (_drawn(seed, conditions).caption,),
        classes=CLASSES,
    )


def _labels(seed: int, conditions: Conditions) -> np.ndarray:
    drawn = _drawn(seed, conditions)
    positions = np.array([CLASSES.index(name) for name in drawn.classes], np.uint8)
    return positions[drawn.labels]
