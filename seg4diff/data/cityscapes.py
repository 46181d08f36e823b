"""Cityscapes, under `cityscapes`."""

from __future__ import annotations

from pathlib import Path

from seg4diff.data.class_names import CITYSCAPES_IDS
from seg4diff.data.items import Items
from seg4diff.data.label_maps import LabelMaps, value_table

_BASE = "cityscapes"
_ALL_IDS = range(34)


def read_cityscapes(dataset: str, root: Path, classes: tuple[str, ...]) -> tuple[Items, str]:
    """The 500 validation images with 19 classes, from the `labelIds` maps. A `Reader`."""
    positions = {identity: position for position, identity in enumerate(CITYSCAPES_IDS)}
    return LabelMaps(
        images=f"{_BASE}/leftImg8bit/val",
        labels=f"{_BASE}/gtFine/val",
        classes=classes,
        table=value_table(positions, ignored=[i for i in _ALL_IDS if i not in positions]),
        download=(
            "Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
            f"https://www.cityscapes-dataset.com/downloads/ and unpack both in {_BASE}/."
        ),
        image_suffix="_leftImg8bit.png",
        label_suffix="_gtFine_labelIds.png",
    ).items(dataset, root)
