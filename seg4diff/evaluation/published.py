"""Figures of the paper (Seg4Diff, tables 1 and 2, mIoU in percent; CLIPScore)."""

from __future__ import annotations

PAPER_ROWS = ("SD3", "SD3.5", "Flux.1-dev", "SD3+MAGNET SA-1B", "SD3+MAGNET COCO")
"""Models of the paper, in its order."""

ORACLE: dict[str, tuple[float | None, ...]] = {
    "voc20": (89.2, 86.1, 83.1, 89.1, 89.8),
    "coco-object": (62.0, 57.8, 50.6, 62.0, 62.9),
    "pc59": (49.0, 43.4, 38.2, 49.1, 51.2),
    "ade150": (34.2, 30.7, 23.9, 34.7, 35.2),
    "cityscapes19": (26.5, 23.8, 17.1, 25.4, 26.0),
}
"""Table 1: zero-shot, each image's prompt names the classes that are in it. For `PAPER_ROWS`."""

# The public code measures "PC59" of table 2 with background. That "Obj" is with background too is inferred.
UNSUPERVISED: dict[str, tuple[float | None, ...]] = {
    "voc21": (54.9, 52.3, None, 55.1, 56.1),
    "pc60": (52.6, 52.9, None, 52.8, 53.5),
    "coco-object-bg": (38.5, 36.8, None, 39.0, 38.8),
    "coco-stuff27": (49.7, 47.1, None, 50.8, 53.5),
    "cityscapes19": (24.2, 24.2, None, 24.2, 24.4),
    "ade150": (44.9, 41.5, None, 45.0, 45.4),
}
"""Table 2: regions without names, matched with the classes of each image."""

PUBLISHED = {"oracle": ORACLE, "full": {}, "unsupervised": UNSUPERVISED}
"""By protocol. No figure over the whole vocabulary was published."""

CLIP_SCORE: dict[str, tuple[float, float, float, float]] = {
    "SD3": (27.0252, 26.0638, 28.3422, 27.1437),
    "SD3+MAGNET SA-1B": (27.0547, 26.2318, 28.4476, 27.2447),
    "SD3+MAGNET COCO": (27.0409, 26.2319, 28.5553, 27.2760),
}
"""CLIPScore on Pick-a-Pic, COCO and SA-1B captions, and their mean."""
