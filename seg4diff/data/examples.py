"""What training reads of a data set: images with named masks and captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from seg4diff.data.items import Item, UnusableItemError
from seg4diff.data.registry import Dataset, open_dataset
from seg4diff.data.settings import DataSettings
from seg4diff.demo.scenes import HELD_OUT


@dataclass(frozen=True)
class Example:
    """An image with its masks and captions.

    Attributes:
        name: of the item.
        image: RGB.
        masks: bool, [height, width] of the image, none of them empty.
        classes: the name of each mask, no two equal, or `""` where it has none.
        captions: at least one, unless `classes` are named.
    """

    name: str
    image: Image.Image
    masks: tuple[np.ndarray, ...]
    classes: tuple[str, ...]
    captions: tuple[str, ...]


def open_training_set(data: DataSettings) -> Dataset:
    """The data set that the settings describe.

    Raises:
        FileNotFoundError: a folder or file that they name does not exist; the message names the setting.
        ValueError: a setting is missing, a file is not what it should be, or there is no image.
    """
    if data.kind == "demo":
        if data.first_scene + data.scenes > HELD_OUT:
            raise ValueError(
                f"data.first_scene={data.first_scene} with data.scenes={data.scenes} reaches into those from "
                f"{HELD_OUT} on, which are for evaluation; choose smaller ones"
            )
        return open_dataset("scenes", seeds=range(data.first_scene, data.first_scene + data.scenes))
    images = _existing(data.images, "data.images", folder=True)
    captions = _existing(data.captions, "data.captions") if data.captions else None
    if data.kind == "coco" and captions is None and data.text == "captions":
        raise ValueError(
            "data.captions is not set; name COCO's captions_*.json, or set data.text='classes' to train on "
            "class names"
        )
    masks = _existing(data.masks, "data.masks") if data.kind == "coco" else None
    return open_dataset(data.kind, images, partial=True, annotations=masks, captions=captions)


def read_example(item: Item) -> Example:
    """Read an item; masks of one name become one.

    Raises:
        UnusableItemError: a file is missing or damaged, or the item has no mask or no text.
    """
    image = item.image()
    masks: dict[str | int, np.ndarray] = {}
    for number, (name, pixels) in enumerate(item.masks(image.height, image.width)):
        if pixels.any():
            key = name or number
            masks[key] = masks[key] | pixels if key in masks else pixels
    if not masks:
        raise UnusableItemError("no mask", item.name)
    names = tuple(key if isinstance(key, str) else "" for key in masks)
    captions = item.captions()
    if not captions and not any(names):
        raise UnusableItemError("no caption and no class names", item.name)
    return Example(item.name, image, tuple(masks.values()), names, captions)


def fingerprint(dataset: Dataset) -> str:
    """A hash that changes when the files of a data set do; of drawn images, when the first one does."""
    digest = hashlib.sha256(dataset.source.encode())
    seen: set[Path] = set()
    for item in dataset.items:
        digest.update(f"{item.name}\n".encode())
        for path in item.files:
            if path not in seen and path.exists():
                status = path.stat()
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        seen.update(item.files)
    if not seen:
        first = dataset.items[0]
        digest.update(first.image().tobytes() + "\n".join(first.captions()).encode())
    return digest.hexdigest()


def _existing(name: str, setting: str, *, folder: bool = False) -> Path:
    if not name:
        raise ValueError(f"{setting} is not set; name a {'folder' if folder else 'file'}")
    path = Path(name).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        raise FileNotFoundError(
            f"{setting}={name!r} is not a {'folder' if folder else 'file'}; check the path"
        )
    return path
