"""COCO 2017 under `coco`: its things, and COCO-Stuff with 171 classes or their 27 super-categories.

Also any other images with a file of COCO's annotations.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from seg4diff.data import class_names
from seg4diff.data.annotations import Captions, CocoFile, read_coco
from seg4diff.data.items import Item, Items
from seg4diff.data.label_maps import LabelMaps, value_table
from seg4diff.data.paths import files_in, first_present, require, require_all
from seg4diff.images import as_rgb
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


def read_coco_stuff(dataset: str, root: Path, classes: tuple[str, ...]) -> tuple[Items, str]:
    """The 5000 validation images of COCO 2017 with the pixel maps of COCO-Stuff; a `Reader`.

    Classes are the 27 super-categories, or all 171.
    """
    coarse = classes == class_names.COCO_STUFF_27
    positions = {
        identity - 1: class_names.COCO_SUPERCATEGORIES[position] if coarse else position
        for position, identity in enumerate(_THING_IDS + _STUFF_IDS)
    }
    return _pixel_maps(root, classes, value_table(positions), f"{_IMAGES_FROM} {_MAPS_FROM}").items(
        dataset, root
    )


def read_coco_object(dataset: str, root: Path, classes: tuple[str, ...]) -> tuple[Items, str]:
    """The 5000 validation images of COCO 2017 with the 80 things; all else is background. A `Reader`.

    Labels are the things of COCO-Stuff's pixel maps, as in the literature since GroupViT; where those are
    missing, the instances of COCO's own annotations, the largest below.
    """
    background = classes[0] == class_names.BACKGROUND
    nothing = 0 if background else IGNORED
    download = f"{_IMAGES_FROM} {_MAPS_FROM} {_INSTANCES_FROM}"
    if first_present(root, _PIXEL_MAPS) is None and (root / _INSTANCES).is_file():
        return _instances(dataset, root, classes, nothing, download)
    positions = {identity - 1: position + background for position, identity in enumerate(_THING_IDS)}
    table = value_table(positions, ignored=())
    table[[identity - 1 for identity in _STUFF_IDS]] = nothing
    table[IGNORED] = nothing
    return _pixel_maps(root, classes, table, download).items(dataset, root)


def read_annotated(images: Path, annotations: Path, captions: Captions) -> tuple[tuple[str, ...], Items]:
    """The images that a file of COCO lists, with its masks, and their classes.

    Names are cut at the first hyphen: "wall-brick" is a wall.

    Args:
        images: folder of the images.
        annotations: panoptic, stuff or instances.
        captions: by the images' numbers or files.

    Raises:
        ValueError: `annotations` is not a file of COCO.
    """
    content = read_coco(annotations)
    names = {number: name.split("-")[0].strip() for number, name in content.names.items()}
    classes = tuple(dict.fromkeys(names.values()))
    return classes, _items(images, replace(content, names=names), classes, captions)


def _items(
    folder: Path, content: CocoFile, classes: tuple[str, ...], captions: Captions, nothing: int = IGNORED
) -> Items:
    def make(file: str) -> Item:
        image = folder / file
        return Item(
            PurePosixPath(file).with_suffix("").as_posix(),
            partial(as_rgb, image),
            partial(_paint, image, content, file, classes, nothing),
            partial(content.masks, file),
            partial(captions.of, str(content.images[file]["id"]), file),
            classes,
            files=(image, *content.files(file), *captions.files),
        )

    return Items(sorted(content.images), make)


def _pixel_maps(root: Path, classes: tuple[str, ...], table: np.ndarray, download: str) -> LabelMaps:
    images = first_present(root, _IMAGES) or _IMAGES[0]
    return LabelMaps(images, first_present(root, _PIXEL_MAPS) or _PIXEL_MAPS[0], classes, table, download)


def _instances(
    dataset: str, root: Path, classes: tuple[str, ...], nothing: int, download: str
) -> tuple[Items, str]:
    images = first_present(root, _IMAGES) or _IMAGES[0]
    require(dataset, root, [images], download)
    things = dict(zip(_THING_IDS, class_names.COCO_THINGS, strict=True))
    content = read_coco(root / _INSTANCES, things)
    present = {f"{images}/{file}" for file in files_in(root / images, [".jpg"])}
    require_all(dataset, root, "images", [f"{images}/{f}" for f in sorted(content.images)], present, download)
    return _items(
        root / images, content, classes, Captions(), nothing
    ), f"instances of {_INSTANCES}, largest below"


def _paint(image: Path, content: CocoFile, file: str, classes: tuple[str, ...], nothing: int) -> np.ndarray:
    """Class of every pixel from masks, the smaller above the larger."""
    height, width = content.images[file]["height"], content.images[file]["width"]
    with Image.open(image) as opened:
        size = opened.size
    if (width, height) not in (size, size[::-1]):  # cameras may store it turned
        raise ValueError(f"{size[0]} x {size[1]}, its annotations {width!r} x {height!r}")
    labels = np.full((height, width), nothing, np.uint8)
    for mask in sorted(content.masks(file, height, width), key=lambda mask: -int(mask.pixels.sum())):
        labels[mask.pixels] = classes.index(mask.name)
    return labels
