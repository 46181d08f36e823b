"""Instances: the connected components of a class, divided where things of the class touch.

Where two things touch, their common outline has a neck. The depth of a pixel is its distance to the outline:
it has a peak inside of each thing, and a saddle at the neck. A watershed of the depth divides a component
between those of its peaks that rise high enough above the saddles around them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter, label
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from torch import Tensor

from seg4diff.files import write_atomically

_NECK = 0.8  # depth of a saddle over that of the lower peak, at most, where a component is divided
_SMOOTHING = 0.08  # of the depth: standard deviation over the root of the component's area
_SMALLEST = 0.0025  # share of the image of an instance, at least
_LEVEL = 0.95  # ratio of successive depths at which components are compared


@dataclass(frozen=True)
class Instance:
    """One thing, or the pixels of a class that is not divided.

    Attributes:
        label: index of its class.
        score: mean score of its class inside of it, in the unit of `Segmentation.scores`.
        area: pixels.
    """

    label: int
    score: float
    area: int


@dataclass(frozen=True, eq=False)
class Instances:
    """The instances of an image. Every pixel that has a class belongs to one.

    Attributes:
        map: int64 [height, width], an index into `instances`, or -1 for background.
        instances: by class, in reading order of their first pixels.
        classes: names of the classes.
        things: the classes that were divided.
    """

    map: Tensor
    instances: tuple[Instance, ...]
    classes: tuple[str, ...]
    things: tuple[str, ...]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the instances in COCO's panoptic format. The file appears whole or not at all.

        * `.png`: id = R + 256 G + 256^2 B, 0 for background; instance i has the id i + 1.
        * `.json`: one annotation with `segments_info`, and the categories. It names the PNG of the same stem.
          The class at position i has the category id i + 1. `score` is an addition to COCO's format.

        Returns:
            `path` as a Path.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() == ".png":
            return write_atomically(path, lambda temporary: self._image().save(temporary, format="PNG"))
        if path.suffix.lower() == ".json":
            text = json.dumps(self._document(f"{path.stem}.png"), ensure_ascii=False)
            return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        raise ValueError(f"path={str(path)!r}: unknown suffix {path.suffix!r}; use .png, .json")

    def _image(self) -> Image.Image:
        ids = self.map.numpy() + 1
        return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))

    def _document(self, file_name: str) -> dict[str, object]:
        height, width = self.map.shape
        windows = find_objects(self.map.numpy() + 1)
        segments = [
            {
                "id": number + 1,
                "category_id": one.label + 1,
                "area": one.area,
                "bbox": [
                    columns.start,
                    rows.start,
                    columns.stop - columns.start,
                    rows.stop - rows.start,
                ],
                "iscrowd": 0,
                "score": one.score,
            }
            for number, (one, (rows, columns)) in enumerate(zip(self.instances, windows, strict=True))
        ]
        return {
            "info": {"description": "seg4diff instances"},
            "images": [{"id": 1, "height": height, "width": width, "file_name": file_name}],
            "annotations": [{"image_id": 1, "file_name": file_name, "segments_info": segments}],
            "categories": [
                {"id": index + 1, "name": name, "isthing": int(name in self.things)}
                for index, name in enumerate(self.classes)
            ],
        }


def find_instances(
    labels: Tensor, scores: Tensor, classes: Sequence[str], things: Sequence[str] | None = None
) -> Instances:
    """The instances of a label map.

    Parts below a four-hundredth of the image join the nearest instance of their class, if there is a larger
    one.

    Args:
        labels: int64 [height, width], an index into `classes`, or -1.
        scores: of every pixel, [classes, height, width].
        classes: names.
        things: names of the classes to divide; the others are one instance each. All when None.

    Raises:
        ValueError: one of `things` is not a class; the message lists those there are.
    """
    divided = tuple(classes if things is None else things)
    for name in divided:
        if name not in classes:
            raise ValueError(f"things names {name!r}, which is not among {', '.join(map(repr, classes))}")
    values = labels.cpu().numpy()
    found = np.full(values.shape, -1, np.int64)
    instances: list[Instance] = []
    for index in np.unique(values[values >= 0]).tolist():
        mask = values == index
        parts = _parts(mask) if classes[index] in divided else mask.astype(np.int64)
        of_class = scores[index].cpu().numpy()
        for number in np.unique(parts[mask]):
            inside = parts == number
            found[inside] = len(instances)
            instances.append(Instance(index, float(of_class[inside].mean()), int(inside.sum())))
    return Instances(torch.from_numpy(found), tuple(instances), tuple(classes), divided)


def _parts(mask: np.ndarray) -> np.ndarray:
    """Numbers from 1 of the instances of a class [height, width], 0 outside."""
    of_mask: Any = label(mask)
    components, count = of_mask
    parts = components.astype(np.int64)
    for number, window in enumerate(find_objects(components), start=1):
        inside = components[window] == number
        if inside.sum() >= 2 * _SMALLEST * mask.size:
            divided = outline_parts(inside)[inside]
            parts[window][inside] = np.where(divided > 0, count + divided, number)
            count += divided.max()
    return large_parts(parts)


def large_parts(parts: np.ndarray) -> np.ndarray:
    """Parts of a class [height, width], 0 outside, of which small ones have joined the nearest large one."""
    areas = np.bincount(parts.ravel())
    large = np.flatnonzero(areas >= min(_SMALLEST * parts.size, areas[1:].max()))
    kept = np.isin(parts, large[large > 0])
    nearest: Any = distance_transform_edt(~kept, return_distances=False, return_indices=True)
    return np.where(parts > 0, parts[tuple(nearest)], 0)


def outline_parts(mask: np.ndarray) -> np.ndarray:
    """Numbers from 0 of the parts of one component [height, width], int64; outside of it, any.

    Watershed by a minimum spanning tree (Cousty et al., IEEE TPAMI 2009): neighbours are joined, deepest
    first, unless that connected two peaks. A root that is joined with all peaks beforehand prevents it.
    """
    around = np.pad(mask, 1)
    depth = gaussian_filter(distance_transform_edt(around), _SMOOTHING * np.sqrt(mask.sum())) * around
    peaks = _peaks(depth)
    if len(peaks) < 2:
        return np.zeros(mask.shape, np.int64)
    places = np.arange(depth.size).reshape(depth.shape)
    first = np.concatenate([places[:, :-1].ravel(), places[:-1].ravel()])
    second = np.concatenate([places[:, 1:].ravel(), places[1:].ravel()])
    shallower = np.minimum(depth.ravel()[first], depth.ravel()[second])
    inside = shallower > 0
    root = depth.size
    ends = np.r_[first[inside], np.full(len(peaks), root)], np.r_[second[inside], peaks]
    weights = np.r_[depth.max() + 1 - shallower[inside], np.full(len(peaks), 0.5)]
    tree = minimum_spanning_tree(coo_array((weights, ends), shape=(root + 1, root + 1))).tocoo()
    kept = (tree.row != root) & (tree.col != root)
    forest = coo_array((tree.data[kept], (tree.row[kept], tree.col[kept])), shape=(root, root))
    _, numbers = connected_components(forest, directed=False)
    _, parts = np.unique(np.where(around, numbers.reshape(depth.shape), -1), return_inverse=True)
    return parts.reshape(depth.shape)[1:-1, 1:-1] - 1


def _peaks(depth: np.ndarray) -> list[int]:
    """The places, in the flattened array, of the peaks that divide a component.

    The depth is cut at falling levels. Where peaks come together, the highest stays, and of the others those
    that rise high enough above the level.
    """
    flat = depth.ravel()
    peaks: list[int] = []
    level = flat.max() * _LEVEL
    while level >= 1:
        found: Any = label(depth > level)
        components, count = found
        above = components.ravel()
        kept: dict[int, int] = {}
        for place in sorted(peaks, key=lambda place: -flat[place]):
            if above[place] not in kept.values() or _NECK * flat[place] > level:
                kept[place] = above[place]
        for new in set(range(1, count + 1)) - set(kept.values()):
            kept[int(np.where(above == new, flat, 0).argmax())] = new
        peaks = list(kept)
        level *= _LEVEL
    return peaks
