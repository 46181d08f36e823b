"""Data sets of the papers, each read from its official download under one data root.

:func:`open_dataset` finds one by name and checks that its files are there; pictures and label maps are read
one by one, as they are needed. A new data set is one new reader here and one line in ``_KINDS``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from seg4diff.data import class_names
from seg4diff.data.layout import IncompleteDatasetError, Sample
from seg4diff.data.names import DatasetName

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetName",
    "IncompleteDatasetError",
    "Sample",
    "limit_samples",
    "open_dataset",
    "with_names",
]

DATASETS: tuple[DatasetName, ...] = get_args(DatasetName)
"""Names of all data sets."""


@dataclass(frozen=True)
class Dataset:
    """A data set that is there.

    Attributes:
        name: one of ``DATASETS``.
        title: what tables call it.
        classes: the names of its classes, in the order of the labels.
        prompts: for each class the names to prompt for it, at least one.
        background: position of the class that is all else, or None where all else does not count.
        samples: pictures and labels.
        source: which files the labels are, and which list chooses the pictures.
        expected: how many pictures the whole data set has; None where any number will do.
        stray_name: a name that the paper's public code prompts by mistake, and whose pixels it counts as
            errors, where pictures have pixels that do not count.
        common_vocabulary: whether the classes mean the same in all pictures, so that all can be prompted.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    background: int | None
    samples: tuple[Sample, ...]
    source: str
    expected: int | None = None
    stray_name: str | None = None
    common_vocabulary: bool = True


@dataclass(frozen=True)
class _Kind:
    title: str
    classes: tuple[str, ...]
    background: bool = False
    expected: int | None = None
    stray_name: str | None = None
    common_vocabulary: bool = True


_VOC, _PC, _THINGS = class_names.VOC, class_names.PASCAL_CONTEXT, class_names.COCO_THINGS
_WITH = (class_names.BACKGROUND,)
_KINDS: dict[str, _Kind] = {
    "voc20": _Kind("Pascal VOC 20", _VOC, expected=1449),
    "voc21": _Kind("Pascal VOC 21", _WITH + _VOC, background=True, expected=1449),
    "pc59": _Kind("Pascal Context 59", _PC, expected=5104),
    "pc60": _Kind("Pascal Context 60", _WITH + _PC, background=True, expected=5104),
    "coco-object": _Kind("COCO-Object", _THINGS, expected=5000, stray_name=class_names.BACKGROUND),
    "coco-object-bg": _Kind("COCO-Object with background", _WITH + _THINGS, background=True, expected=5000),
    "coco-stuff27": _Kind("COCO-Stuff-27", class_names.COCO_STUFF_27, expected=5000),
    "coco-stuff171": _Kind("COCO-Stuff-171", _THINGS + class_names.COCO_STUFF, expected=5000),
    "ade150": _Kind("ADE20K-150", class_names.ADE20K, expected=2000),
    "cityscapes19": _Kind("Cityscapes-19", class_names.CITYSCAPES, expected=500),
    "imagenet-seg": _Kind(
        "ImageNet-Segmentation", (*_WITH, "object"), background=True, expected=4276, common_vocabulary=False
    ),
}


def open_dataset(name: str, root: Path | None = None, *, partial: bool = False) -> Dataset:
    """A data set, with all its files checked for, but none read.

    Args:
        name: one of ``DATASETS``.
        root: the data root, which holds ``VOCdevkit``, ``coco``, ``ADEChallengeData2016`` and ``cityscapes``;
            for ``"folder"`` the folder itself; not needed for ``"scenes"`` and
            ``"scenes-hard"``.
        partial: accept fewer pictures than the data set has.

    Raises:
        ValueError: no such data set, no ``root``, or a list of classes that makes no sense.
        IncompleteDatasetError: files are missing; the message says which, and where to download them.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; known: {', '.join(DATASETS)}")
    if name in ("scenes", "scenes-hard"):
        from seg4diff.data.scenes import read_scenes
        from seg4diff.demo.scenes import CLASSES

        hard = name == "scenes-hard"
        samples, source = read_scenes("hard" if hard else "clean")
        title = "hard demo scenes" if hard else "demo scenes"
        return Dataset(name, title, CLASSES, _own(CLASSES), None, samples, source)
    if root is None:
        raise ValueError(f"data set {name!r} needs a data root: the folder that holds the downloads")
    root = Path(root)
    if not root.is_dir():
        raise IncompleteDatasetError(f"the data root {str(root)!r} is no folder; check the path")
    if name == "folder":
        from seg4diff.data.folder import read_folder

        classes, samples, source = read_folder(root)
        background = classes.index(class_names.BACKGROUND) if class_names.BACKGROUND in classes else None
        return Dataset(name, root.resolve().name, classes, _own(classes), background, samples, source)
    kind = _KINDS[name]
    samples, source = _read(name, root, kind.background)
    if kind.expected is not None and len(samples) < kind.expected and not partial:
        raise IncompleteDatasetError(
            f"data set {name!r} is half unpacked under {str(root)!r}: {len(samples)} of {kind.expected} "
            "pictures "
            f"are there ({source}). Unpack the archives again, or say --partial to evaluate what there is"
        )
    return Dataset(
        name,
        kind.title,
        kind.classes,
        _own(kind.classes),
        0 if kind.background else None,
        samples,
        source,
        kind.expected,
        kind.stray_name,
        kind.common_vocabulary,
    )


def _read(name: str, root: Path, background: bool) -> tuple[tuple[Sample, ...], str]:
    from seg4diff.data import ade20k, cityscapes, coco, imagenet, pascal

    match name:
        case "voc20" | "voc21":
            return pascal.read_voc(root, background=background)
        case "pc59" | "pc60":
            return pascal.read_context(root, background=background)
        case "coco-object" | "coco-object-bg":
            return coco.read_coco_object(root, background=background)
        case "coco-stuff27" | "coco-stuff171":
            return coco.read_coco_stuff(root, coarse=name == "coco-stuff27")
        case "ade150":
            return ade20k.read_ade20k(root)
        case "cityscapes19":
            return cityscapes.read_cityscapes(root)
        case "imagenet-seg":
            return imagenet.read_imagenet(root)
    raise AssertionError(name)


def _own(classes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in classes)


def with_names(dataset: Dataset, names: str | Path | Mapping[str, Sequence[str]]) -> Dataset:
    """The data set with other names to prompt for its classes.

    Args:
        dataset: any.
        names: ``"paper"`` for the names of the classes; ``"better"`` for names that say more; or a mapping
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
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON ({error})") from error
        if not isinstance(names, dict):
            raise ValueError(f"{str(path)!r} must map classes to lists of names")
    unknown = [name for name in names if name not in dataset.classes]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no class of {dataset.name!r}; its classes: {', '.join(dataset.classes)}"
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


def limit_samples(dataset: Dataset, *, limit: int | None = None, listed: Path | None = None) -> Dataset:
    """The data set with fewer pictures.

    Args:
        dataset: any.
        limit: only the first so many.
        listed: only those that this file names, one to a line.

    Raises:
        ValueError: ``limit`` is not positive, or the file names a picture that is not there.
        FileNotFoundError: no such file.
    """
    samples = dataset.samples
    if listed is not None:
        from seg4diff.data.layout import read_split

        if not listed.is_file():
            raise FileNotFoundError(f"the list of pictures {str(listed)!r} does not exist; check the path")
        by_name = {sample.name: sample for sample in samples}
        wanted = list(dict.fromkeys(read_split(listed)))
        unknown = [name for name in wanted if name not in by_name]
        if unknown:
            raise ValueError(
                f"{str(listed)!r} names {unknown[0]!r} and {len(unknown) - 1} more that are no pictures of "
                f"{dataset.name!r}; a name there is {samples[0].name!r}"
            )
        samples = tuple(by_name[name] for name in wanted)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        samples = samples[:limit]
    return replace(dataset, samples=samples)
