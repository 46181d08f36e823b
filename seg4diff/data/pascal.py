"""Pascal VOC 2012 and Pascal Context, under ``VOCdevkit`` as their archives unpack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from seg4diff.data import class_names
from seg4diff.data.layout import (
    Sample,
    first_present,
    look_up,
    make_samples,
    read_label_map,
    read_split,
    require,
    value_table,
)
from seg4diff.metrics import IGNORED

_VOC = "VOCdevkit/VOC2012"
_VOC_DOWNLOAD = (
    "Get VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and unpack it in "
    "the "
    "data root."
)
_CONTEXT = "VOCdevkit/VOC2010"
_CONTEXT_DOWNLOAD = (
    "Get VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ and unpack it in "
    "the "
    "data root; get 59_context_labels.tar.gz and 59_labels.txt (or trainval.tar.gz, labels.txt and "
    f"59_labels.txt) from https://cs.stanford.edu/~roozbeh/pascal-context/ and unpack them in {_CONTEXT}."
)
# Names that the full list of labels.txt has for classes of 59_labels.txt.
_FULL_NAMES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
# Names that this package has for them.
_OWN_NAMES = {"table": "diningtable", "bedcloth": "bedclothes", "clothes": "cloth"}


def read_voc(root: Path, *, background: bool) -> tuple[tuple[Sample, ...], str]:
    """The 1449 validation pictures of Pascal VOC 2012.

    Args:
        root: the data root.
        background: whether background is class 0; else it does not count.

    Returns:
        The samples, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing.
    """
    dataset = "voc21" if background else "voc20"
    split = f"{_VOC}/ImageSets/Segmentation/val.txt"
    require(dataset, root, [split, f"{_VOC}/JPEGImages", f"{_VOC}/SegmentationClass"], _VOC_DOWNLOAD)
    table = _with_background(len(class_names.VOC), background)
    samples = make_samples(
        dataset,
        root,
        read_split(root / split),
        lambda name: root / _VOC / "JPEGImages" / f"{name}.jpg",
        lambda name: root / _VOC / "SegmentationClass" / f"{name}.png",
        partial(read_label_map, table=table),
        _VOC_DOWNLOAD,
    )
    return samples, f"{_VOC}/SegmentationClass, {split}"


def read_context(root: Path, *, background: bool) -> tuple[tuple[Sample, ...], str]:
    """The validation pictures of Pascal Context, with its 59 frequent classes.

    Labels are, whichever is there: ``59_context_labels/*.png``; ``trainval/*.mat`` of all 459 classes; or
    ``SegmentationClassContext/*.png`` as the detail API converts them. The split is VOC 2010's own list of
    validation pictures, or ``ImageSets/SegmentationContext/val.txt`` where there is one.

    Args:
        root: the data root.
        background: whether what is none of the 59 is class 0; else it does not count.

    Returns:
        The samples, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing.
        ValueError: the lists of classes are not those of Pascal Context.
    """
    dataset = "pc60" if background else "pc59"
    base = root / _CONTEXT
    require(dataset, root, [f"{_CONTEXT}/JPEGImages"], _CONTEXT_DOWNLOAD)
    splits = ["ImageSets/SegmentationContext/val.txt", "ImageSets/Main/val.txt"]
    split = first_present(base, splits)
    if split is None:
        require(dataset, root, [f"{_CONTEXT}/{splits[-1]}"], _CONTEXT_DOWNLOAD)
    assert split is not None
    own = _with_background(len(class_names.PASCAL_CONTEXT), background)
    read: Callable[[Path], np.ndarray]
    if _has(base, "59_context_labels"):
        require(dataset, root, [f"{_CONTEXT}/59_labels.txt"], _CONTEXT_DOWNLOAD)
        folder, suffix = "59_context_labels", ".png"
        table = np.full(256, -1, np.int16)
        table[0], table[IGNORED] = own[0], IGNORED
        for value, name in _numbered_names(base / "59_labels.txt").items():
            table[value] = own[_own_position(name) + 1]
        read = partial(read_label_map, table=table)
    elif _has(base, "trainval"):
        require(dataset, root, [f"{_CONTEXT}/labels.txt", f"{_CONTEXT}/59_labels.txt"], _CONTEXT_DOWNLOAD)
        folder, suffix = "trainval", ".mat"
        numbers = {name: value for value, name in _numbered_names(base / "labels.txt").items()}
        table = np.full(max(numbers.values()) + 1, own[0], np.int16)
        for name in _numbered_names(base / "59_labels.txt").values():
            full = name if name in numbers else _FULL_NAMES.get(name, name)
            if full not in numbers:
                raise ValueError(f"{str(base / 'labels.txt')!r} lacks the class {name!r} of 59_labels.txt")
            table[numbers[full]] = own[_own_position(name) + 1]
        read = partial(_read_mat, table=table)
    elif _has(base, "SegmentationClassContext"):
        folder, suffix = "SegmentationClassContext", ".png"
        read = partial(read_label_map, table=own)
    else:
        require(
            dataset,
            root,
            [f"{_CONTEXT}/59_context_labels", f"{_CONTEXT}/59_labels.txt"],
            _CONTEXT_DOWNLOAD,
        )
        raise AssertionError("unreachable")
    samples = make_samples(
        dataset,
        root,
        read_split(base / split),
        lambda name: base / "JPEGImages" / f"{name}.jpg",
        lambda name: base / folder / f"{name}{suffix}",
        read,
        _CONTEXT_DOWNLOAD,
    )
    return samples, f"{_CONTEXT}/{folder}, {_CONTEXT}/{split}"


def _has(base: Path, folder: str) -> bool:
    return first_present(base, [folder]) is not None


def _with_background(count: int, background: bool) -> np.ndarray:
    """Value 0 is background, values 1 to ``count`` the classes."""
    if background:
        return value_table({value: value for value in range(count + 1)})
    return value_table({value: value - 1 for value in range(1, count + 1)}, ignored=(0, IGNORED))


def _numbered_names(path: Path) -> dict[int, str]:
    """Lines ``12: some name`` as number -> name without spaces."""
    names = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            number, separator, name = line.partition(":")
            if not separator or not number.strip().isdigit():
                raise ValueError(f"{str(path)!r} holds the line {line!r}: 'number: name' expected")
            names[int(number)] = name.replace(" ", "").strip()
    return names


def _own_position(name: str) -> int:
    """Position in ``PASCAL_CONTEXT`` of a name of 59_labels.txt."""
    own = _OWN_NAMES.get(name, name)
    if own not in class_names.PASCAL_CONTEXT:
        raise ValueError(f"59_labels.txt names {name!r}, which is no class of Pascal Context's 59")
    return class_names.PASCAL_CONTEXT.index(own)


def _read_mat(path: Path, table: np.ndarray) -> np.ndarray:
    """The ``LabelMap`` of a MATLAB file."""
    from scipy.io import loadmat

    try:
        values = loadmat(path)["LabelMap"]
    except Exception as error:  # scipy raises many kinds for damaged files
        raise ValueError(
            f"label map {str(path)!r} is unreadable ({error}); get a whole copy of it"
        ) from error
    return look_up(values.astype(np.int64), table, f"label map {str(path)!r}")
