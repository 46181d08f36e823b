"""Cityscapes, under ``cityscapes``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from seg4diff.data.class_names import CITYSCAPES_IDS
from seg4diff.data.layout import (
    Sample,
    make_samples,
    names_in,
    read_label_map,
    require,
    value_table,
)

_BASE = "cityscapes"
_IMAGE, _LABELS = "_leftImg8bit.png", "_gtFine_labelIds.png"
_DOWNLOAD = (
    "Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
    f"https://www.cityscapes-dataset.com/downloads/ and unpack both in {_BASE}/."
)
_ALL_IDS = range(34)


def read_cityscapes(root: Path) -> tuple[tuple[Sample, ...], str]:
    """The 500 validation pictures with 19 classes, from the ``labelIds`` maps; other ids do not count.

    Returns:
        The samples, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing.
    """
    images, labels = f"{_BASE}/leftImg8bit/val", f"{_BASE}/gtFine/val"
    require("cityscapes19", root, [images, labels], _DOWNLOAD)
    classes = {identity: position for position, identity in enumerate(CITYSCAPES_IDS)}
    table = value_table(classes, ignored=[identity for identity in _ALL_IDS if identity not in classes])
    names = sorted(
        {*names_in(root / images, [_IMAGE], deep=True), *names_in(root / labels, [_LABELS], deep=True)}
    )
    samples = make_samples(
        "cityscapes19",
        root,
        names,
        lambda name: root / images / f"{name}{_IMAGE}",
        lambda name: root / labels / f"{name}{_LABELS}",
        partial(read_label_map, table=table),
        _DOWNLOAD,
    )
    return samples, f"{labels}, all cities"
