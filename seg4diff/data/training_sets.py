"""Where pictures, masks and captions come from: plain folders, SA-1B, COCO, and the demo scenes.

Called by :mod:`seg4diff.training.data.cache`, which asks for one example at a time; nothing but names and
annotations is held in memory. Paths and formats end here.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from seg4diff.data.settings import DataSettings
from seg4diff.files import checked_name
from seg4diff.images import as_rgb
from seg4diff.masks import decode_mask

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


class UnusableExampleError(ValueError):
    """One example cannot be used; it is skipped and counted under ``reason``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """A picture with its masks and captions.

    Attributes:
        name: unique within its source.
        image: RGB.
        masks: bool, [height, width] of the picture, none of them empty.
        classes: the name of each mask, ``""`` where it has none.
        captions: at least one, unless ``classes`` are named.
    """

    name: str
    image: Image.Image
    masks: tuple[np.ndarray, ...]
    classes: tuple[str, ...]
    captions: tuple[str, ...]


class Source(Protocol):
    """A collection of examples, read one at a time."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The example's name, without reading it."""
        ...

    def load(self, index: int) -> Example:
        """Read one example.

        Raises:
            UnusableExampleError: it is missing, damaged, or of no use.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when the files do."""
        ...


def open_source(data: DataSettings) -> Source:
    """The source that the settings describe.

    Raises:
        FileNotFoundError: a folder or file that they name does not exist; the message names the setting.
        ValueError: a setting is missing, a file is not what it should be, or there is no picture.
    """
    if data.kind == "demo":
        return DemoScenes(data.first_scene, data.scenes)
    images = _existing(data.images, "data.images", folder=True)
    captions = _existing(data.captions, "data.captions") if data.captions else None
    if data.kind == "coco":
        if captions is None and data.text == "captions":
            raise ValueError(
                "data.captions is not set; name COCO's captions_*.json, or set data.text='classes' to "
                "train on class names"
            )
        return Coco(images, _existing(data.masks, "data.masks"), captions)
    return Paired(images, captions, with_png=data.kind == "folder")


class Paired:
    """Pictures with a file of masks beside each.

    Beside ``cat.jpg`` lie ``cat.mask.png`` (every value above 0 is a mask; names in ``classes.txt``, line n
    names value n), or ``cat.mask.json`` / ``cat.json`` as SA-1B has it: ``{"annotations": [{"segmentation":
    RLE}]}``, each with a ``"class"`` if it has a name. Captions come from ``cat.txt``, a line each, or from
    one JSON.
    """

    def __init__(self, folder: Path, captions: Path | None, *, with_png: bool) -> None:
        self._folder = folder
        self._files = picture_files(folder)
        if not self._files:
            raise ValueError(f"data.images={str(folder)!r} holds no picture ({', '.join(_PICTURES)})")
        self._captions_file = captions
        self._captions = None if captions is None else read_captions(captions)
        self._with_png = with_png
        names = folder / "classes.txt"
        self._names = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index].relative_to(self._folder).as_posix()

    def load(self, index: int) -> Example:
        path = self._files[index]
        image = _picture(path)
        annotated = self._annotations(path)
        if annotated is None:
            raise UnusableExampleError("no file of masks", path.name)
        masks, classes = (
            self._from_png(annotated, image) if annotated.suffix == ".png" else _from_json(annotated, image)
        )
        captions = self._captions_of(path, index)
        if not captions and not any(classes):
            raise UnusableExampleError("no caption and no class names", path.name)
        return _example(self.name(index), image, masks, classes, captions)

    def _annotations(self, path: Path) -> Path | None:
        suffixes = (".mask.png", ".mask.json", ".json") if self._with_png else (".json",)
        return next((p for s in suffixes if (p := path.with_name(path.stem + s)).is_file()), None)

    def _from_png(self, path: Path, image: Image.Image) -> tuple[list[np.ndarray], list[str]]:
        try:
            with Image.open(path) as file:
                values = np.asarray(file if file.mode in ("P", "L", "I;16", "I") else file.convert("L"))
        except (OSError, ValueError, SyntaxError) as error:
            raise UnusableExampleError("unreadable masks", f"{path.name}: {error}") from None
        present = [int(value) for value in np.unique(values) if value > 0]
        names = [self._names[v - 1].strip() if v <= len(self._names) else "" for v in present]
        return [_sized(values == value, image, path.name) for value in present], names

    def _captions_of(self, path: Path, index: int) -> tuple[str, ...]:
        if self._captions is not None:
            for key in (self.name(index), path.name, path.stem):
                if key in self._captions:
                    return self._captions[key]
            return ()
        text = path.with_suffix(".txt")
        if not text.is_file():
            return ()
        return tuple(line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip())

    def fingerprint(self) -> str:
        files = [*self._files, *(p for f in self._files if (p := self._annotations(f)) is not None)]
        files += [p for f in self._files if (p := f.with_suffix(".txt")).is_file()]
        extra = [
            p for p in (self._captions_file, self._folder / "classes.txt") if p is not None and p.is_file()
        ]
        return _fingerprint(files + extra, self._folder)


class Coco:
    """COCO: panoptic (JSON and a folder of PNGs of the same name), stuff or instances (JSON), and captions.

    Segments of one class are one mask. Names are cut at the first hyphen: "wall-brick" is a wall.
    """

    def __init__(self, images: Path, masks: Path, captions: Path | None) -> None:
        self._folder, self._masks_file, self._captions_file = images, masks, captions
        content = _json(masks, "data.masks")
        try:
            self._names = {int(c["id"]): str(c["name"]).split("-")[0].strip() for c in content["categories"]}
            self._images = [(int(item["id"]), item["file_name"]) for item in content["images"]]
            self._annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for annotation in content["annotations"]:
                self._annotations[int(annotation["image_id"])].append(annotation)
            names = [name for _, name in self._images]
            names += [a["file_name"] for a in content["annotations"] if "file_name" in a]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"data.masks={str(masks)!r} is no COCO file ({error!r}): categories, images and "
                "annotations expected"
            ) from None
        for name in names:
            checked_name(name, f"data.masks={str(masks)!r}")
        if not self._images:
            raise ValueError(f"data.masks={str(masks)!r} lists no picture")
        self._captions = read_captions(captions) if captions is not None else {}

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images[index][1]

    def load(self, index: int) -> Example:
        number, file_name = self._images[index]
        image = _picture(self._folder / file_name)
        by_name: dict[str, np.ndarray] = {}
        for annotation in self._annotations.get(number, ()):
            for name, mask in self._masks_of(annotation, image):
                by_name[name] = by_name[name] | mask if name in by_name else mask
        captions = self._captions.get(str(number)) or self._captions.get(file_name, ())
        return _example(file_name, image, by_name.values(), by_name, captions)

    def _masks_of(
        self, annotation: Mapping[str, Any], image: Image.Image
    ) -> Iterable[tuple[str, np.ndarray]]:
        if "segments_info" in annotation:
            path = self._masks_file.with_suffix("") / str(annotation["file_name"])
            colours = np.asarray(_picture(path)).astype(np.int64)
            numbers = _sized(
                colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2], image, path.name
            )
            for segment in annotation["segments_info"]:
                yield self._name(segment), numbers == int(segment["id"])
        else:
            mask = _decode(annotation.get("segmentation"), image, f"annotation {annotation.get('id')}")
            yield self._name(annotation), mask

    def _name(self, annotation: Mapping[str, Any]) -> str:
        number = int(annotation["category_id"])
        if number not in self._names:
            raise UnusableExampleError("unknown category", str(number))
        return self._names[number]

    def fingerprint(self) -> str:
        files = [self._masks_file, *([self._captions_file] if self._captions_file is not None else [])]
        files += [path for _, name in self._images if (path := self._folder / name).is_file()]
        pictured = (
            a["file_name"] for listed in self._annotations.values() for a in listed if "file_name" in a
        )
        files += [path for n in pictured if (path := self._masks_file.with_suffix("") / str(n)).is_file()]
        return _fingerprint(files, self._folder)


class DemoScenes:
    """Scenes of the bundled model; those kept for evaluation are refused."""

    def __init__(self, first: int, count: int) -> None:
        from seg4diff.demo import HELD_OUT

        if first + count > HELD_OUT:
            raise ValueError(
                f"data.first_scene={first} with data.scenes={count} reaches into those from {HELD_OUT} on, "
                "which are for evaluation; choose smaller ones"
            )
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"scene-{self._first + index}"

    def load(self, index: int) -> Example:
        from seg4diff.demo import scene

        drawn = scene(self._first + index)
        masks = [drawn.labels == position for position in range(len(drawn.classes))]
        return _example(self.name(index), drawn.image, masks, drawn.classes, (drawn.caption,))

    def fingerprint(self) -> str:
        drawn = self.load(0)
        content = drawn.image.tobytes() + drawn.captions[0].encode()
        return hashlib.sha256(f"{self._first} {self._count} ".encode() + content).hexdigest()


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and those within it, sorted; files of masks are none."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _PICTURES and not path.name.endswith(".mask.png")
    ]


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions by picture: COCO's file (keys are image numbers), or a JSON object of name -> text or texts.

    Raises:
        ValueError: the file is neither.
    """
    content = _json(path, "data.captions")
    captions: dict[str, list[str]] = defaultdict(list)
    try:
        if "annotations" in content:
            for annotation in content["annotations"]:
                captions[str(annotation["image_id"])].append(" ".join(str(annotation["caption"]).split()))
        else:
            for name, text in content.items():
                captions[name] += [text] if isinstance(text, str) else [str(entry) for entry in text]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data.captions={str(path)!r} is neither COCO's captions nor an object of name -> caption "
            f"({error!r})"
        ) from None
    return {name: tuple(text for text in texts if text.strip()) for name, texts in captions.items()}


def _from_json(path: Path, image: Image.Image) -> tuple[list[np.ndarray], list[str]]:
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        entries = [(entry["segmentation"], str(entry.get("class", ""))) for entry in annotations]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableExampleError("unreadable masks", f"{path.name}: {error!r}") from None
    return [_decode(segmentation, image, path.name) for segmentation, _ in entries], [
        name for _, name in entries
    ]


def _decode(segmentation: Any, image: Image.Image, name: str) -> np.ndarray:
    """Bool mask from a run-length encoding, compressed or not, or polygons."""
    try:
        return decode_mask(segmentation, image.height, image.width)
    except ValueError as error:
        raise UnusableExampleError("unreadable masks", f"{name}: {error}") from None


def _sized(mask: np.ndarray, image: Image.Image, name: str) -> np.ndarray:
    if mask.shape[:2] != (image.height, image.width):
        raise UnusableExampleError(
            "masks of another size than the picture",
            f"{name}: {mask.shape[1]} x {mask.shape[0]}, picture {image.width} x {image.height}",
        )
    return mask


def _example(
    name: str,
    image: Image.Image,
    masks: Iterable[np.ndarray],
    classes: Iterable[str],
    captions: Iterable[str],
) -> Example:
    kept = [(mask, label) for mask, label in zip(masks, classes, strict=True) if mask.any()]
    if not kept:
        raise UnusableExampleError("no mask", name)
    return Example(name, image, tuple(m for m, _ in kept), tuple(label for _, label in kept), tuple(captions))


def _picture(path: Path) -> Image.Image:
    try:
        return as_rgb(path)
    except FileNotFoundError:
        raise UnusableExampleError("missing file", path.name) from None
    except ValueError as error:
        raise UnusableExampleError("unreadable picture", str(error)) from None


def _existing(name: str, setting: str, *, folder: bool = False) -> Path:
    if not name:
        raise ValueError(f"{setting} is not set; name a {'folder' if folder else 'file'}")
    path = Path(name).expanduser()
    if folder and not path.is_dir():
        raise FileNotFoundError(f"{setting}={name!r} is no folder; check the path")
    if not folder and not path.is_file():
        raise FileNotFoundError(f"{setting}={name!r} is no file; check the path")
    return path


def _json(path: Path, setting: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{setting}={str(path)!r} is no JSON ({error}); get a whole copy of it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{setting}={str(path)!r} must hold a JSON object, not a {type(content).__name__}")
    return content


def _fingerprint(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
