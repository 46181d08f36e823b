"""Masks in COCO's formats: run lengths, compressed or not, and polygons.

pycocotools trusts what it is given: sizes and run lengths that do not fit each other, and coordinates far
outside, make it write beyond its memory. So run lengths are decoded here, and polygons are checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_LONGEST_NUMBER = 7  # characters of 5 bits each, for the 32 bits of a run length


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels of a mask.

    Args:
        segmentation: run lengths `{"size": [height, width], "counts": ...}`, or a list of polygons
            `[[x, y, x, y, ...], ...]`.
        height, width: of the image.

    Returns:
        bool [height, width].

    Raises:
        ValueError: it is neither, of another size, or not whole.
    """
    if isinstance(segmentation, list):
        return _draw(segmentation, height, width)
    runs = run_lengths(segmentation, height, width)
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def run_lengths(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Lengths of a mask's runs down its columns, int64: outside, inside, outside, ...; their sum is the area.

    Arguments and errors are those of :func:`decode_mask`, without polygons.
    """
    if not isinstance(segmentation, Mapping) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("a mask is neither run lengths with size and counts nor a list of polygons")
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"a mask has size {size!r:.60}, the image [{height}, {width}] (height, width)")
    if isinstance(counts, (str, bytes)):
        runs = _decompressed(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count < 1 << 32 for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise ValueError("a mask's counts are neither a list of whole numbers nor a compressed string")
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(f"a mask's run lengths do not add up to the {height * width} pixels of the image")
    return runs


def _decompressed(counts: str | bytes) -> np.ndarray:
    """The numbers of COCO's compressed string.

    A character holds 5 bits of a number, lowest first, a sixth that says whether more follow, and an offset
    of 48; bit 4 of the last is the sign. From the fourth on, numbers are differences to the last but one.
    """
    text = counts.encode("latin-1", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if codes.size == 0 or (codes < 0).any() or (codes > 63).any() or codes[-1] & 32:
        raise ValueError("a mask's compressed counts are damaged or cut off")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise ValueError("a mask's compressed counts hold a number of more than 32 bits")
    places = np.arange(codes.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << 5 * places, starts)
    numbers -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def _draw(polygons: list[Any], height: int, width: int) -> np.ndarray:
    """Polygons, filled as pycocotools fills them."""
    from pycocotools import mask as coco_masks

    # pycocotools holds five points for every pixel of an outline, so corners and outlines are bounded.
    furthest, longest = 2 * max(height, width), height * width + 10_000
    for polygon in polygons:
        numbers = polygon if isinstance(polygon, list) else []
        if len(numbers) < 6 or len(numbers) % 2 or not all(type(n) in (int, float) for n in numbers):
            raise ValueError("a polygon is not a list of at least three pairs of numbers")
        if not all(abs(n) <= furthest for n in numbers):  # NaN is not
            raise ValueError(f"a polygon leaves the image of {width} x {height} pixels by far")
        corners = np.array(numbers, np.float64).reshape(-1, 2)
        longest -= len(corners) + np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum()
    if not polygons or longest < 0:
        raise ValueError("a mask has no polygon, or outlines of more pixels than the image")
    encoded = coco_masks.merge(coco_masks.frPyObjects(polygons, height, width))
    return coco_masks.decode(encoded).astype(bool)
