"""ADE20K's scene parsing challenge, under `ADEChallengeData2016`."""

from __future__ import annotations

from pathlib import Path

from seg4diff.data.items import Items
from seg4diff.data.label_maps import LabelMaps, value_table

_BASE = "ADEChallengeData2016"


def read_ade20k(dataset: str, root: Path, classes: tuple[str, ...]) -> tuple[Items, str]:
    """The 2000 validation images with 150 classes; value 0 does not count. A `Reader`."""
    return LabelMaps(
        images=f"{_BASE}/images/validation",
        labels=f"{_BASE}/annotations/validation",
        classes=classes,
        table=value_table({value: value - 1 for value in range(1, len(classes) + 1)}, ignored=(0,)),
        download=(
            "Get ADEChallengeData2016.zip from "
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip "
            "and unpack it in the data root."
        ),
    ).items(dataset, root)
