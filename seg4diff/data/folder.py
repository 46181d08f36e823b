"""Folders of one's own: a data set as `seg4diff prepare` writes it, SA-1B's, and images alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from seg4diff.data.annotations import Captions, read_captions, read_masks
from seg4diff.data.items import Item, Items
from seg4diff.data.label_maps import read_label_map, value_table
from seg4diff.data.paths import (
    IMAGE_SUFFIXES,
    IncompleteDatasetError,
    files_by_name,
    files_in,
    require,
    require_all,
)
from seg4diff.images import as_rgb
from seg4diff.metrics import IGNORED

IMAGES, LABELS, MASKS = "images", "labels", "masks"
CLASSES, CAPTIONS = "classes.txt", "captions.json"
_FORMAT = (
    f"A folder data set has images in {IMAGES}/, for each a PNG of the same name in {LABELS}/ whose values "
    f"are positions in {CLASSES} (255: does not count), and {CLASSES} with one name per line; to train on, "
    f"a JSON of masks in {MASKS}/ will do, and {CAPTIONS} holds the captions."
)


def read_folder(
    root: Path, captions: Captions | None, *, labelled: bool
) -> tuple[tuple[str, ...], Items, str]:
    """All images of a folder and of folders inside it.

    Args:
        root: holds `images/`, and `labels/` with `classes.txt`; perhaps `masks/` and `captions.json`.
        captions: by image, in place of `captions.json`.
        labelled: whether every image must have labels.

    Returns:
        The classes, the items, and what their labels are.

    Raises:
        IncompleteDatasetError: files are missing, or labels or masks are of no image.
        ValueError: the list of classes is empty, repeats a name, or is longer than 255; two images differ in
            their suffix alone; `captions.json` is not a file of captions.
    """
    labels = files_by_name(root / LABELS, [".png"])
    wanted = [IMAGES, *([LABELS] if labelled else []), *([CLASSES] if labelled or labels else [])]
    require("folder", root, wanted, _FORMAT)
    classes = _read_classes(root / CLASSES) if CLASSES in wanted else ()
    images = files_by_name(root / IMAGES, IMAGE_SUFFIXES)
    masks = files_by_name(root / MASKS, [".json"])
    for kind, folder, found in (("label maps", LABELS, labels), ("files of masks", MASKS, masks)):
        lonely = sorted(path for name, path in found.items() if name not in images)
        if lonely:
            raise IncompleteDatasetError(
                f"{len(lonely)} {kind} under {str(root)!r} have no image, the first is {folder}/{lonely[0]}. "
                f"{_FORMAT}"
            )
    if labelled:
        present = {f"{LABELS}/{name}.png" for name in labels}
        require_all("folder", root, "label maps", [f"{LABELS}/{n}.png" for n in images], present, _FORMAT)
    if captions is None and (root / CAPTIONS).is_file():
        captions = read_captions(root / CAPTIONS)
    items = _items(
        (root / IMAGES, images),
        (root / MASKS, masks),
        (root / LABELS, labels),
        classes,
        captions or Captions(),
        (root / CLASSES,) if classes else (),
    )
    return classes, items, f"{LABELS}/, all of it"


def read_sa1b(root: Path, captions: Captions) -> Items:
    """Images with a JSON of masks beside each, as SA-1B unpacks.

    Raises:
        ValueError: two images differ in their suffix alone.
    """
    images, masks = files_by_name(root, IMAGE_SUFFIXES), files_by_name(root, [".json"])
    return _items((root, images), (root, masks), (root, {}), (), captions)


def read_images(root: Path) -> Items:
    """The images of a folder and of folders inside it; names have suffixes."""
    return Items(
        files_in(root, IMAGE_SUFFIXES),
        lambda name: Item(name, partial(as_rgb, root / name), files=(root / name,)),
    )


def _items(
    images: tuple[Path, Mapping[str, str]],
    masks: tuple[Path, Mapping[str, str]],
    labels: tuple[Path, Mapping[str, str]],
    classes: tuple[str, ...],
    captions: Captions,
    shared: tuple[Path, ...] = (),
) -> Items:
    """Items of files, which are given by folder and, inside it, path by name."""
    table = value_table({value: value for value in range(len(classes))})

    def make(name: str) -> Item:
        image, mask, label_map = (
            folder / paths[name] if name in paths else None for folder, paths in (images, masks, labels)
        )
        assert image is not None
        return Item(
            name,
            partial(as_rgb, image),
            partial(read_label_map, label_map, table) if label_map else None,
            partial(read_masks, mask) if mask else None,
            partial(captions.of, images[1][name], image.name, name),
            classes,
            files=(*(path for path in (image, mask, label_map) if path), *shared, *captions.files),
        )

    return Items(sorted(images[1]), make)


def _read_classes(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    classes = tuple(line.strip() for line in lines if line.strip())
    if not 1 <= len(classes) <= IGNORED:
        raise ValueError(f"{str(path)!r} names {len(classes)} classes: 1 to {IGNORED} expected")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise ValueError(f"{str(path)!r} names {twice[0]!r} more than once")
    return classes
