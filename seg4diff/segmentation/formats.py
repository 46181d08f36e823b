"""Files of a segmentation: a PNG of labels, all arrays as `.npz`, COCO annotations as JSON."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from seg4diff.visualization import palette

if TYPE_CHECKING:
    from seg4diff.segmentation.result import Segmentation


def write_png(result: Segmentation, path: Path) -> None:
    """The labels, 8 bits with a palette, or 16 bits of grey; the names in a text chunk.

    The largest number of either kind stands for background.
    """
    count = len(result.classes)
    if count > 65535:
        raise ValueError(f"{count} classes do not fit a PNG of 16 bits; save as .npz")
    labels = result.labels.cpu().numpy()  # -1, background, wraps around
    if count <= 255:
        image = Image.fromarray(labels.astype(np.uint8), mode="L")
        colours = np.zeros((256, 3), np.uint8)  # Pillow packs pixels into fewer bits for fewer colours
        colours[:count] = palette(count)
        image.putpalette(colours.tobytes())
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("classes", json.dumps(result.classes, ensure_ascii=False))
    image.save(path, format="PNG", pnginfo=text, optimize=True)


def write_npz(result: Segmentation, path: Path) -> None:
    """All of the result, as arrays that need no pickle."""
    arrays = {
        "labels": result.labels.cpu().numpy(),
        "scores": result.scores.detach().cpu().numpy(),
        "classes": np.array(result.classes, dtype=np.str_),
        "metadata": np.array(json.dumps(result.metadata, default=str)),
        "upsample": np.array(result.upsample),
    }
    if result.presence is not None:
        arrays["presence"] = result.presence.cpu().numpy()
    if result.image is not None:
        arrays["image"] = np.asarray(result.image.convert("RGB"))
    with open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_json(result: Segmentation, path: Path) -> None:
    """COCO annotations, a run-length encoded mask per class that occurs."""
    from pycocotools import mask as run_lengths

    height, width = result.labels.shape
    scores = result.pixel_scores()
    annotations: list[dict[str, Any]] = []
    for index in result.labels[result.labels >= 0].unique().tolist():
        mask = result.labels == index
        encoded = run_lengths.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": 1,
                "category_id": index + 1,
                "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                "area": int(mask.sum()),
                "bbox": [float(number) for number in run_lengths.toBbox(encoded)],
                "iscrowd": 0,
                "score": float(scores[index][mask].mean()),
            }
        )
    document = {
        "info": {"description": "seg4diff segmentation", "metadata": dict(result.metadata)},
        "images": [{"id": 1, "height": height, "width": width}],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(result.classes)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(document, ensure_ascii=False, default=str), encoding="utf-8")


WRITERS: dict[str, Callable[[Segmentation, Path], None]] = {
    ".png": write_png,
    ".npz": write_npz,
    ".json": write_json,
}
"""What writes a segmentation, by the suffix of the file."""


def read_npz(path: Path) -> dict[str, Any]:
    """The fields of the segmentation that `write_npz` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not a segmentation.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {
                "labels": torch.from_numpy(arrays["labels"]),
                "scores": torch.from_numpy(arrays["scores"]),
                "classes": tuple(str(name) for name in arrays["classes"]),
                "image": Image.fromarray(arrays["image"]) if "image" in arrays else None,
                "metadata": json.loads(str(arrays["metadata"])),
                "presence": torch.from_numpy(arrays["presence"]) if "presence" in arrays else None,
                # Files of 0.1 have scores at the pixels, and no such entry.
                "upsample": str(arrays["upsample"]) if "upsample" in arrays else "linear",
            }
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{str(path)!r} is not a segmentation that was saved as .npz, or is damaged ({error})"
        ) from error
