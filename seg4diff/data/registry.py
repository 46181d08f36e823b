"""Data sets by name: those of the papers under one data root, folders of one's own, and the drawn scenes.

A data set is opened with its files found, but none read: items are read one by one, as they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from seg4diff.data import ade20k, cityscapes, class_names, coco, folder, imagenet, pascal, scenes
from seg4diff.data.annotations import Captions, read_captions, read_json
from seg4diff.data.items import Item, Items, Reader
from seg4diff.data.paths import IncompleteDatasetError, read_list
from seg4diff.demo.scenes import CLASSES


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        name: see `open_dataset`.
        title: its name in tables.
        classes: the names of its classes, in the order of the labels.
        prompts: for each class the names to prompt for it, at least one.
        background: position of the class that is all else, or None where all else does not count.
        items: images with labels, masks and captions.
        source: which files the labels are, and which list chooses the images.
        expected: how many images the whole data set has; None where any number will do.
        stray_name: a name that the paper's public code prompts by mistake, and whose pixels it counts as
            errors, where images have pixels that do not count.
        common_vocabulary: whether the classes mean the same in all images, so that all can be prompted.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    background: int | None
    items: Sequence[Item]
    source: str
    expected: int | None = None
    stray_name: str | None = None
    common_vocabulary: bool = True


@dataclass(frozen=True)
class _Kind:
    """A data set of the papers."""

    title: str
    classes: tuple[str, ...]
    read: Reader
    expected: int
    stray_name: str | None = None
    common_vocabulary: bool = True


_VOC, _PC, _THINGS = class_names.VOC, class_names.PASCAL_CONTEXT, class_names.COCO_THINGS
_WITH = (class_names.BACKGROUND,)
_KINDS: dict[str, _Kind] = {
    "voc20": _Kind("Pascal VOC 20", _VOC, pascal.read_voc, 1449),
    "voc21": _Kind("Pascal VOC 21", _WITH + _VOC, pascal.read_voc, 1449),
    "pc59": _Kind("Pascal Context 59", _PC, pascal.read_context, 5104),
    "pc60": _Kind("Pascal Context 60", _WITH + _PC, pascal.read_context, 5104),
    "coco-object": _Kind("COCO-Object", _THINGS, coco.read_coco_object, 5000, class_names.BACKGROUND),
    "coco-object-bg": _Kind("COCO-Object with background", _WITH + _THINGS, coco.read_coco_object, 5000),
    "coco-stuff27": _Kind("COCO-Stuff-27", class_names.COCO_STUFF_27, coco.read_coco_stuff, 5000),
    "coco-stuff171": _Kind("COCO-Stuff-171", _THINGS + class_names.COCO_STUFF, coco.read_coco_stuff, 5000),
    "ade150": _Kind("ADE20K-150", class_names.ADE20K, ade20k.read_ade20k, 2000),
    "cityscapes19": _Kind("Cityscapes-19", class_names.CITYSCAPES, cityscapes.read_cityscapes, 500),
    "imagenet-seg": _Kind(
        "ImageNet-Segmentation", (*_WITH, "object"), imagenet.read_imagenet, 4276, common_vocabulary=False
    ),
}
_OTHERS = ("folder", "scenes", "scenes-hard", "coco", "sa1b", "images")


def open_dataset(
    name: str,
    root: Path | None = None,
    *,
    partial: bool = False,
    annotations: Path | None = None,
    captions: Path | None = None,
    seeds: range = scenes.EVALUATION,
) -> Dataset:
    """A data set, with its files found, but none read.

    Args:
        name: one of `DatasetName`, `"coco"` (any images with a file of COCO's annotations), `"sa1b"`, or
            `"images"` (a folder of images without labels).
        root: the data root, which holds `VOCdevkit`, `coco`, `ADEChallengeData2016` and `cityscapes`; the
            folder itself for `"folder"`, `"coco"`, `"sa1b"` and `"images"`; not needed for scenes.
        partial: accept fewer images than the data set has, and in a `"folder"` images without labels.
        annotations: for `"coco"`, the JSON file of panoptic, stuff or instance annotations.
        captions: for `"folder"`, `"coco"` and `"sa1b"`, a file that `read_captions` reads.
        seeds: of `"scenes"` and `"scenes-hard"`.

    Raises:
        ValueError: no such data set, no `root`, or a list of classes, annotations or captions that is
            damaged.
        IncompleteDatasetError: files are missing; the message says which, and where to download them.
    """
    if name not in _KINDS and name not in _OTHERS:
        raise ValueError(f"data set {name!r} is unknown; known: {', '.join((*_KINDS, *_OTHERS))}")
    if name in ("scenes", "scenes-hard"):
        hard = name == "scenes-hard"
        items, source = scenes.read_scenes(seeds, "hard" if hard else "clean")
        return _dataset(name, "hard demo scenes" if hard else "demo scenes", CLASSES, items, source)
    if root is None:
        raise ValueError(
            f"data set {name!r} needs a data root (--data-root): the folder that holds the downloads"
        )
    if not root.is_dir():
        raise IncompleteDatasetError(f"the data root {str(root)!r} is not a folder; check the path")
    if name in _KINDS:
        kind = _KINDS[name]
        items, source = kind.read(name, root, kind.classes)
        if len(items) < kind.expected and not partial:
            raise IncompleteDatasetError(
                f"data set {name!r} is half unpacked under {str(root)!r}: {len(items)} of {kind.expected} "
                f"images exist ({source}). Unpack the archives again, or say --partial to take what exists"
            )
        return replace(
            _dataset(name, kind.title, kind.classes, items, source),
            expected=kind.expected,
            stray_name=kind.stray_name,
            common_vocabulary=kind.common_vocabulary,
        )
    texts = None if captions is None else read_captions(captions)
    classes: tuple[str, ...] = ()
    source = name
    match name:
        case "folder":
            classes, items, source = folder.read_folder(root, texts, labelled=not partial)
        case "coco":
            if annotations is None:
                raise ValueError("data set 'coco' needs a file of annotations")
            classes, items = coco.read_annotated(root, annotations, texts or Captions())
        case "sa1b":
            items = folder.read_sa1b(root, texts or Captions())
        case _:
            items = folder.read_images(root)
    if not items:
        raise IncompleteDatasetError(f"data set {name!r} holds no image under {str(root)!r}")
    return _dataset(name, root.resolve().name, classes, items, source)


def _dataset(name: str, title: str, classes: tuple[str, ...], items: Items, source: str) -> Dataset:
    background = classes.index(class_names.BACKGROUND) if class_names.BACKGROUND in classes else None
    return Dataset(name, title, classes, _own(classes), background, items, source)


def _own(classes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in classes)


def with_names(dataset: Dataset, names: str | Path | Mapping[str, Sequence[str]]) -> Dataset:
    """The data set with other names to prompt for its classes.

    Args:
        dataset: any.
        names: `"paper"` for the names of the classes; `"better"` for names that say more; or a mapping
            from classes to names (or the JSON file of one) for some of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the mapping names an unknown class, or holds no names for one.
    """
    if names == "paper":
        return replace(dataset, prompts=_own(dataset.classes))
    if names == "better":
        others = {
            name
            for cls in dataset.classes
            if cls != class_names.BACKGROUND
            for name in (cls, *class_names.BETTER.get(cls, ()))
        }
        better = {
            cls: tuple(n for n in prompts if cls != class_names.BACKGROUND or n not in others)
            for cls, prompts in class_names.BETTER.items()
        }
        return replace(dataset, prompts=tuple(better.get(cls, (cls,)) for cls in dataset.classes))
    if not isinstance(names, Mapping):
        path = Path(names)
        if not path.is_file():
            raise FileNotFoundError(f"names {str(names)!r} are neither 'paper' nor 'better' nor a JSON file")
        names = read_json(path)
    unknown = [name for name in names if name not in dataset.classes]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not a class of {dataset.name!r}; its classes: {', '.join(dataset.classes)}"
        )
    chosen: dict[str, tuple[str, ...]] = {}
    for cls, prompts in names.items():
        several = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if not several or not all(isinstance(name, str) and name.strip() for name in several):
            raise ValueError(
                f"class {cls!r} has the names {prompts!r}: at least one, and none blank, expected"
            )
        chosen[cls] = tuple(name.strip() for name in several)
    return replace(dataset, prompts=tuple(chosen.get(cls, (cls,)) for cls in dataset.classes))


def subset(dataset: Dataset, *, limit: int | None = None, listed: Path | None = None) -> Dataset:
    """The data set with fewer images.

    Args:
        dataset: any.
        limit: only the first so many.
        listed: only those that this file names, one per line.

    Raises:
        ValueError: `limit` is not positive, or the file names an image that does not exist.
        FileNotFoundError: no such file.
    """
    items = dataset.items
    if listed is not None:
        if not listed.is_file():
            raise FileNotFoundError(f"the list of images {str(listed)!r} does not exist; check the path")
        positions = {item.name: position for position, item in enumerate(items)}
        wanted = list(dict.fromkeys(read_list(listed)))
        unknown = [name for name in wanted if name not in positions]
        if unknown:
            raise ValueError(
                f"{str(listed)!r} names {unknown[0]!r} and {len(unknown) - 1} more that are not images of "
                f"{dataset.name!r}; a name there is {items[0].name!r}"
            )
        items = [items[positions[name]] for name in wanted]
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        items = items[:limit]
    return replace(dataset, items=items)
