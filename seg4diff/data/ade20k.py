"""ADE20K's scene parsing challenge, under ``ADEChallengeData2016``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from seg4diff.data.class_names import ADE20K
from seg4diff.data.layout import (
    Sample,
    make_samples,
    names_in,
    read_label_map,
    require,
    value_table,
)

_BASE = "ADEChallengeData2016"
_DOWNLOAD = (
    "Get ADEChallengeData2016.zip from "
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip "
    "and unpack it in the data root."
)


def read_ade20k(root: Path) -> tuple[tuple[Sample, ...], str]:
    """The 2000 validation pictures with 150 classes; value 0 does not count.

    Returns:
        The samples, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing.
    """
    images, labels = f"{_BASE}/images/validation", f"{_BASE}/annotations/validation"
    require("ade150", root, [images, labels], _DOWNLOAD)
    table = value_table({value: value - 1 for value in range(1, len(ADE20K) + 1)}, ignored=(0,))
    names = sorted({*names_in(root / images, [".jpg"]), *names_in(root / labels, [".png"])})
    samples = make_samples(
        "ade150",
        root,
        names,
        lambda name: root / images / f"{name}.jpg",
        lambda name: root / labels / f"{name}.png",
        partial(read_label_map, table=table),
        _DOWNLOAD,
    )
    return samples, f"{labels}, all of it"
