"""Pascal VOC 2012 and Pascal Context, under `VOCdevkit` as their archives unpack."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seg4diff.data.class_names import BACKGROUND, PASCAL_CONTEXT
from seg4diff.data.items import Items
from seg4diff.data.label_maps import LabelMaps, look_up, value_table
from seg4diff.data.paths import first_present, require
from seg4diff.metrics import IGNORED

_VOC = "VOCdevkit/VOC2012"
_VOC_DOWNLOAD = (
    "Get VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and unpack it in "
    "the data root."
)
_CONTEXT = "VOCdevkit/VOC2010"
_CONTEXT_DOWNLOAD = (
    "Get VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ and unpack it in "
    "the data root; get 59_context_labels.tar.gz and 59_labels.txt (or trainval.tar.gz, labels.txt and "
    f"59_labels.txt) from https://cs.stanford.edu/~roozbeh/pascal-context/ and unpack them in {_CONTEXT}."
)
_SPLITS = (f"{_CONTEXT}/ImageSets/SegmentationContext/val.txt", f"{_CONTEXT}/ImageSets/Main/val.txt")
# Names that the full list of labels.txt has for classes of 59_labels.txt.
_FULL_NAMES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
# Names that this package has for them.
_OWN_NAMES = {"table": "diningtable", "bedcloth": "bedclothes", "clothes": "cloth"}


def read_voc(dataset: str, root: Path, classes: tuple[str, ...]) -> tuple[Items, str]:
    """The 1449 validation images of Pascal VOC 2012; a `Reader`."""
    return LabelMaps(
        images=f"{_VOC}/JPEGImages",
        labels=f"{_VOC}/SegmentationClass",
        classes=classes,
        table=_table(classes),
        download=_VOC_DOWNLOAD,
        split=f"{_VOC}/ImageSets/Segmentation/val.txt",
    ).items(dataset, root)


def read_context(dataset: str, root: Path, classes: tuple[str, ...]) -> tuple[Items, str]:
    """The validation images of Pascal Context, with its 59 frequent classes; a `Reader`.

    Labels are, whichever exists: `59_context_labels/*.png`; `trainval/*.mat` of all 459 classes; or
    `SegmentationClassContext/*.png` as the detail API converts them. The split is VOC 2010's own list of
    validation images, or `ImageSets/SegmentationContext/val.txt` if it exists.
    """
    require(dataset, root, [f"{_CONTEXT}/JPEGImages"], _CONTEXT_DOWNLOAD)
    folder = first_present(
        root, [f"{_CONTEXT}/{f}" for f in ("59_context_labels", "trainval", "SegmentationClassContext")]
    )
    lists = {"59_context_labels": ["59_labels.txt"], "trainval": ["labels.txt", "59_labels.txt"]}
    kind = "59_context_labels" if folder is None else Path(folder).name
    split = first_present(root, _SPLITS) or _SPLITS[-1]
    required = [f"{_CONTEXT}/{name}" for name in (kind, *lists.get(kind, []))]
    require(dataset, root, [split, *required], _CONTEXT_DOWNLOAD)
    table = _table(classes)
    if kind == "59_context_labels":
        table = _numbered_table(root / _CONTEXT, table)
    elif kind == "trainval":
        table = _full_table(root / _CONTEXT, table)
    return LabelMaps(
        images=f"{_CONTEXT}/JPEGImages",
        labels=f"{_CONTEXT}/{kind}",
        classes=classes,
        table=table,
        download=_CONTEXT_DOWNLOAD,
        split=split,
        label_suffix=".mat" if kind == "trainval" else ".png",
        read=_read_mat if kind == "trainval" else None,
    ).items(dataset, root)


def _table(classes: tuple[str, ...]) -> np.ndarray:
    """Value 0 is background, values from 1 on the other classes."""
    if classes[0] == BACKGROUND:
        return value_table({value: value for value in range(len(classes))})
    return value_table({value + 1: value for value in range(len(classes))}, ignored=(0, IGNORED))


def _numbered_table(base: Path, own: np.ndarray) -> np.ndarray:
    """For the values that 59_labels.txt gives, with `own` for background and for classes in our order."""
    table = np.full(256, -1, np.int16)
    table[0], table[IGNORED] = own[0], IGNORED
    for value, name in _numbered_names(base / "59_labels.txt").items():
        table[value] = own[_own_position(name) + 1]
    return table


def _full_table(base: Path, own: np.ndarray) -> np.ndarray:
    """For the values that labels.txt gives; what is none of the 59 is background."""
    numbers = {name: value for value, name in _numbered_names(base / "labels.txt").items()}
    table = np.full(max(numbers.values()) + 1, own[0], np.int16)
    for name in _numbered_names(base / "59_labels.txt").values():
        full = name if name in numbers else _FULL_NAMES.get(name, name)
        if full not in numbers:
            raise ValueError(f"{str(base / 'labels.txt')!r} lacks the class {name!r} of 59_labels.txt")
        table[numbers[full]] = own[_own_position(name) + 1]
    return table


def _numbered_names(path: Path) -> dict[int, str]:
    """Lines `12: some name` as number -> name without spaces."""
    names = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            number, separator, name = line.partition(":")
            if not separator or not number.strip().isdigit():
                raise ValueError(f"{str(path)!r} holds the line {line!r}: 'number: name' expected")
            names[int(number)] = name.replace(" ", "").strip()
    return names


def _own_position(name: str) -> int:
    """Position in `PASCAL_CONTEXT` of a name of 59_labels.txt."""
    own = _OWN_NAMES.get(name, name)
    if own not in PASCAL_CONTEXT:
        raise ValueError(f"59_labels.txt names {name!r}, which is not a class of Pascal Context's 59")
    return PASCAL_CONTEXT.index(own)


def _read_mat(path: Path, table: np.ndarray) -> np.ndarray:
    """The `LabelMap` of a MATLAB file."""
    from scipy.io import loadmat

    try:
        values = loadmat(path)["LabelMap"]
    except Exception as error:  # scipy raises many kinds for damaged files
        raise ValueError(
            f"label map {str(path)!r} is unreadable ({error}); get a whole copy of it"
        ) from error
    return look_up(values.astype(np.int64), table, f"label map {str(path)!r}")
