"""COCO 2017 under ``coco``: its things, and COCO-Stuff with 171 classes or their 27 super-categories."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seg4diff.data import class_names
from seg4diff.data.layout import (
    IncompleteDatasetError,
    Sample,
    first_present,
    make_samples,
    names_in,
    read_label_map,
    require,
    value_table,
)
from seg4diff.files import checked_name
from seg4diff.images import as_rgb
from seg4diff.masks import decode_mask
from seg4diff.metrics import IGNORED

_IMAGES = ("coco/val2017", "coco/images/val2017")
_PIXEL_MAPS = ("coco/stuffthingmaps/val2017", "coco/annotations/val2017")
_INSTANCES = "coco/annotations/instances_val2017.json"
_IMAGES_FROM = "Get val2017.zip from http://images.cocodataset.org/zips/val2017.zip and unpack it in coco/."
_MAPS_FROM = (
    "Get stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff and unpack it in "
    "coco/stuffthingmaps/."
)
_INSTANCES_FROM = (
    "Or get annotations_trainval2017.zip from http://images.cocodataset.org/annotations/"
    "annotations_trainval2017.zip and unpack it in coco/."
)

_THING_IDS = tuple(i for i in range(1, 92) if i not in class_names.COCO_UNUSED_IDS)
_STUFF_IDS = tuple(range(92, 183))


def read_coco_stuff(root: Path, *, coarse: bool) -> tuple[tuple[Sample, ...], str]:
    """The 5000 validation pictures of COCO 2017 with the pixel maps of COCO-Stuff.

    Args:
        root: the data root.
        coarse: whether classes are the 27 super-categories, else all 171.

    Returns:
        The samples, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing.
    """
    dataset = "coco-stuff27" if coarse else "coco-stuff171"
    classes = {
        identity - 1: class_names.COCO_SUPERCATEGORIES[position] if coarse else position
        for position, identity in enumerate(_THING_IDS + _STUFF_IDS)
    }
    return _from_pixel_maps(dataset, root, value_table(classes), f"{_IMAGES_FROM} {_MAPS_FROM}")


def read_coco_object(root: Path, *, background: bool) -> tuple[tuple[Sample, ...], str]:
    """The 5000 validation pictures of COCO 2017 with the 80 things; all else is background.

    Labels are the things of COCO-Stuff's pixel maps, as in the literature since GroupViT; where those are
    missing, the instances of COCO's own annotations, the largest below.

    Args:
        root: the data root.
        background: whether background is class 0; else it does not count.

    Returns:
        The samples, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing.
        ValueError: the annotations are unreadable.
    """
    dataset = "coco-object-bg" if background else "coco-object"
    nothing = 0 if background else IGNORED
    positions = {identity: position + background for position, identity in enumerate(_THING_IDS)}
    download = f"{_IMAGES_FROM} {_MAPS_FROM} {_INSTANCES_FROM}"
    if first_present(root, _PIXEL_MAPS) is None and (root / _INSTANCES).is_file():
        return _from_instances(dataset, root, positions, nothing, download)
    table = value_table({identity - 1: position for identity, position in positions.items()}, ignored=())
    table[[identity - 1 for identity in _STUFF_IDS]] = nothing
    table[IGNORED] = nothing
    return _from_pixel_maps(dataset, root, table, download)


def _from_pixel_maps(
    dataset: str, root: Path, table: np.ndarray, download: str
) -> tuple[tuple[Sample, ...], str]:
    images, maps = first_present(root, _IMAGES), first_present(root, _PIXEL_MAPS)
    require(dataset, root, [images or _IMAGES[0], maps or _PIXEL_MAPS[0]], download)
    assert images is not None
    assert maps is not None
    names = sorted({*names_in(root / images, [".jpg"]), *names_in(root / maps, [".png"])})
    samples = make_samples(
        dataset,
        root,
        names,
        lambda name: root / images / f"{name}.jpg",
        lambda name: root / maps / f"{name}.png",
        partial(read_label_map, table=table),
        download,
    )
    return samples, f"{maps}, all of {images}"


def _from_instances(
    dataset: str, root: Path, positions: dict[int, int], nothing: int, download: str
) -> tuple[tuple[Sample, ...], str]:
    images = first_present(root, _IMAGES)
    require(dataset, root, [images or _IMAGES[0]], download)
    assert images is not None
    path = root / _INSTANCES
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        pictures = {entry["id"]: entry for entry in document["images"]}
        instances: dict[int, list[dict[str, Any]]] = {identity: [] for identity in pictures}
        for entry in document["annotations"]:
            instances[entry["image_id"]].append(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} holds no annotations of COCO, or is damaged ({error!r})") from error
    for entry in pictures.values():
        checked_name(entry.get("file_name"), f"{str(path)!r}")
    present = set(names_in(root / images, [".jpg"]))
    ordered = sorted(pictures.values(), key=lambda entry: entry["file_name"])
    missing = [entry["file_name"] for entry in ordered if Path(entry["file_name"]).stem not in present]
    if missing:
        raise IncompleteDatasetError(
            f"data set {dataset!r} is half unpacked under {str(root)!r}: {len(missing)} of {len(ordered)} "
            "images "
            f"are missing, the first is {images}/{missing[0]}. {download}"
        )
    samples = tuple(
        Sample(
            Path(entry["file_name"]).stem,
            partial(as_rgb, image),
            partial(_draw_instances, image, entry, tuple(instances[entry["id"]]), positions, nothing),
            files=(image, path),
        )
        for entry in ordered
        for image in [root / images / entry["file_name"]]
    )
    return samples, f"instances of {_INSTANCES}, largest below"


def _draw_instances(
    image: Path,
    picture: dict[str, Any],
    instances: tuple[dict[str, Any], ...],
    positions: dict[int, int],
    nothing: int,
) -> np.ndarray:
    """Class of every pixel from instances, the smaller above the larger."""
    height, width = picture["height"], picture["width"]
    with Image.open(image) as file:
        size = file.size
    if (width, height) not in (size, size[::-1]):  # cameras may store it turned
        raise ValueError(
            f"{picture['file_name']!r} is {size[0]} x {size[1]}, its annotations {width!r} x {height!r}"
        )
    labels = np.full((height, width), nothing, np.uint8)
    drawn = []
    for instance in instances:
        identity = instance["category_id"]
        if identity not in positions:
            raise ValueError(f"an annotation of {picture['file_name']!r} has the unknown category {identity}")
        try:
            mask = decode_mask(instance["segmentation"], height, width)
        except ValueError as error:
            raise ValueError(f"an annotation of {picture['file_name']!r} is damaged: {error}") from error
        drawn.append((int(mask.sum()), positions[identity], mask))
    for _, position, mask in sorted(drawn, key=lambda entry: -entry[0]):
        labels[mask] = position
    return labels
