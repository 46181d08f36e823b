"""A folder of one's own: ``images/``, ``labels/`` and ``classes.txt``, as ``seg4diff prepare`` writes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from seg4diff.data.layout import (
    IncompleteDatasetError,
    Sample,
    make_samples,
    names_in,
    read_label_map,
    require,
    value_table,
)
from seg4diff.metrics import IGNORED

IMAGES, LABELS, CLASSES = "images", "labels", "classes.txt"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_FORMAT = (
    f"A folder data set has pictures in {IMAGES}/, for each a PNG of the same name in {LABELS}/ whose "
    "values are "
    f"positions in {CLASSES} (255: does not count), and {CLASSES} with one name to a line."
)


def read_folder(root: Path) -> tuple[tuple[str, ...], tuple[Sample, ...], str]:
    """All pictures of a folder, with folders inside it.

    Returns:
        The classes, the samples, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing, or pictures without labels or the other way round.
        ValueError: the list of classes is empty, repeats a name, or is longer than 255.
    """
    require("folder", root, [IMAGES, LABELS, CLASSES], _FORMAT)
    lines = (root / CLASSES).read_text(encoding="utf-8").splitlines()
    classes = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(classes) <= IGNORED:
        raise ValueError(f"{str(root / CLASSES)!r} names {len(classes)} classes: 1 to {IGNORED} expected")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise ValueError(f"{str(root / CLASSES)!r} names {twice[0]!r} more than once")
    suffix_of: dict[str, str] = {}
    for suffix in _SUFFIXES:
        for name in names_in(root / IMAGES, [suffix], deep=True):
            if name in suffix_of:
                raise ValueError(
                    f"{IMAGES}/{name} has two pictures, {suffix_of[name]} and {suffix}; keep one of them"
                )
            suffix_of[name] = suffix
    labelled = set(names_in(root / LABELS, [".png"], deep=True))
    lonely = sorted(labelled - suffix_of.keys())
    if lonely:
        raise IncompleteDatasetError(
            f"{len(lonely)} label maps under {str(root)!r} have no picture, the first is "
            f"{LABELS}/{lonely[0]}.png. "
            f"{_FORMAT}"
        )
    samples = make_samples(
        "folder",
        root,
        sorted(suffix_of),
        _actual_path(root / IMAGES, suffix_of),
        lambda name: root / LABELS / f"{name}.png",
        partial(read_label_map, table=value_table({value: value for value in range(len(classes))})),
        _FORMAT,
    )
    return classes, samples, f"{LABELS}/, all of it"


def _actual_path(folder: Path, suffix_of: dict[str, str]) -> Callable[[str], Path]:
    """The file of a name; its suffix may be written in capitals."""

    def path_of(name: str) -> Path:
        path = folder / f"{name}{suffix_of[name]}"
        return path if path.exists() else folder / f"{name}{suffix_of[name].upper()}"

    return path_of
