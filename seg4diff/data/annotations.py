"""JSON annotations: COCO's files, one file of masks per image as SA-1B has them, and captions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from seg4diff.data.items import Mask, UnusableItemError
from seg4diff.files import checked_name
from seg4diff.images import as_rgb
from seg4diff.masks import decode_mask


@dataclass(frozen=True)
class Captions:
    """Captions of a data set.

    Attributes:
        texts: by what names an image: its number in COCO, or its file.
        files: that they were read from.
    """

    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def of(self, *keys: str) -> tuple[str, ...]:
        """Those under the first of these keys that has any."""
        return next((self.texts[key] for key in keys if key in self.texts), ())


@dataclass(frozen=True)
class CocoFile:
    """A file of COCO: panoptic (with a folder of PNGs of the same name), stuff or instances.

    Attributes:
        path: of the file.
        names: of the categories, by number.
        images: entries of the images by the names of their files.
        annotations: of the images, by number.
    """

    path: Path
    names: Mapping[int, str]
    images: Mapping[str, Mapping[str, Any]]
    annotations: Mapping[int, list[Mapping[str, Any]]]

    def masks(self, image: str, height: int, width: int) -> Iterator[Mask]:
        """The masks of an image of this size, one per annotation or panoptic segment."""
        for annotation in self._of(image):
            if "segments_info" in annotation:
                colours = np.asarray(as_rgb(self._segments_file(annotation))).astype(np.int64)
                numbers = colours @ (1, 256, 256 * 256)
                for segment in annotation["segments_info"]:
                    yield Mask(self._name(segment), numbers == int(segment["id"]))
            else:
                mask = decode_mask(annotation.get("segmentation"), height, width)
                yield Mask(self._name(annotation), mask)

    def files(self, image: str) -> tuple[Path, ...]:
        """The files that `masks` reads, and this one."""
        segments = (self._segments_file(a) for a in self._of(image) if "segments_info" in a)
        return (self.path, *segments)

    def _of(self, image: str) -> list[Mapping[str, Any]]:
        return self.annotations.get(int(self.images[image]["id"]), [])

    def _segments_file(self, annotation: Mapping[str, Any]) -> Path:
        return self.path.with_suffix("") / annotation["file_name"]

    def _name(self, annotation: Mapping[str, Any]) -> str:
        number = annotation["category_id"]
        if number not in self.names:
            raise UnusableItemError("unknown category", f"{number!r} in {self.path.name}")
        return self.names[number]


def read_coco(path: Path, names: Mapping[int, str] | None = None) -> CocoFile:
    """Read a file of COCO.

    Args:
        path: the JSON file.
        names: of the categories, in place of the file's own.

    Raises:
        ValueError: it is damaged or not a file of COCO, lists no image, or names a file elsewhere.
    """
    content = read_json(path)
    annotations: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    try:
        if names is None:
            names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        images = {entry["file_name"]: entry for entry in content["images"] if int(entry["id"]) >= 0}
        files = [*images, *(a["file_name"] for a in content["annotations"] if "segments_info" in a)]
        for annotation in content["annotations"]:
            annotations[int(annotation["image_id"])].append(annotation)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{str(path)!r} is not a COCO file, or is damaged ({error!r}): categories, images and "
            "annotations expected"
        ) from None
    for name in files:
        checked_name(name, f"{str(path)!r}")
    if not images:
        raise ValueError(f"{str(path)!r} lists no image")
    return CocoFile(path, names, images, annotations)


def read_masks(path: Path, height: int, width: int) -> list[Mask]:
    """Masks of a file `{"annotations": [{"segmentation": run lengths or polygons, "class": name}, ...]}`.

    Names may be missing, as in SA-1B.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged, or a mask does not suit an image of this size.
    """
    masks = []
    for entry in read_json(path)["annotations"]:
        pixels = decode_mask(entry["segmentation"], height, width)
        masks.append(Mask(str(entry.get("class", "")), pixels))
    return masks


def read_captions(path: Path) -> Captions:
    """Read COCO's file of captions, or a JSON object of name -> text or texts.

    Raises:
        ValueError: the file is neither.
    """
    content = read_json(path)
    captions: dict[str, list[str]] = defaultdict(list)
    try:
        if "annotations" in content:
            for annotation in content["annotations"]:
                captions[str(annotation["image_id"])].append(" ".join(str(annotation["caption"]).split()))
        else:
            for name, text in content.items():
                captions[name] += [text] if isinstance(text, str) else [str(entry) for entry in text]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is neither COCO's captions nor an object of name -> caption ({error!r})"
        ) from None
    texts = {name: tuple(text for text in several if text.strip()) for name, several in captions.items()}
    return Captions(texts, (path,))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); get a whole copy of it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, not a {type(content).__name__}")
    return content
