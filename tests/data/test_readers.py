"""Every reader on a miniature of its official download: the class of every pixel, hand-counted matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seg4diff.data.registry import Dataset, class_names, open_dataset
from seg4diff.metrics import confusion_matrix
from tests.support import miniature

Names = list[list[str | None]]


def names_of(dataset: Dataset, labels: np.ndarray) -> Names:
    """The class of every pixel by name, None where it does not count."""
    assert labels.dtype == np.uint8
    return [[None if value == 255 else dataset.classes[value] for value in row] for row in labels]


VOC_NAMES = {0: "background", 1: "aeroplane", 8: "cat", 12: "dog", 15: "person", 20: "tvmonitor", 255: None}


def voc_names(background: bool) -> dict[str, Names]:
    translated = {**VOC_NAMES} if background else {**VOC_NAMES, 0: None}
    return {
        name: [[translated[value] for value in row] for row in values]
        for name, values in miniature.VOC_VALUES.items()
    }


def only_things(names: Names, background: str | None) -> Names:
    return [[name if name in class_names.COCO_THINGS else background for name in row] for row in names]


def with_background(names: Names) -> Names:
    return [[name or "background" for name in row] for row in names]


CASES: list[tuple[str, str, Callable[[Path], None], dict[str, Names]]] = [
    ("voc20", "", miniature.write_voc, voc_names(False)),
    ("voc21", "", miniature.write_voc, voc_names(True)),
    *(
        (
            name,
            source,
            partial(miniature.write_context, labels=source),
            {
                "2008_000002": miniature.CONTEXT_NAMES
                if name == "pc59"
                else with_background(miniature.CONTEXT_NAMES)
            },
        )
        for name in ("pc59", "pc60")
        for source in ("59_context_labels", "trainval", "SegmentationClassContext")
    ),
    (
        "coco-object",
        "pixel maps",
        miniature.write_coco,
        {"000000000139": only_things(miniature.COCO_NAMES, None)},
    ),
    (
        "coco-object-bg",
        "pixel maps",
        miniature.write_coco,
        {"000000000139": only_things(miniature.COCO_NAMES, "background")},
    ),
    *(
        (
            name,
            "instances",
            partial(miniature.write_coco, pixel_maps=False, instances=True),
            {
                "000000000139": [[nothing] * 5] * 3,
                "000000000285": [[n or nothing for n in row] for row in miniature.INSTANCE_NAMES],
            },
        )
        for name, nothing in (("coco-object", None), ("coco-object-bg", "background"))
    ),
    ("coco-stuff171", "", miniature.write_coco, {"000000000139": miniature.COCO_NAMES}),
    ("coco-stuff27", "", miniature.write_coco, {"000000000139": miniature.COCO_COARSE_NAMES}),
    ("ade150", "", miniature.write_ade20k, {"ADE_val_00000001": miniature.ADE_NAMES}),
    (
        "cityscapes19",
        "",
        miniature.write_cityscapes,
        {
            "frankfurt/frankfurt_000000_000294": miniature.CITY_NAMES,
            "munster/munster_000001_000019": miniature.CITY_NAMES,
        },
    ),
]


@pytest.mark.parametrize(
    ("name", "source", "write", "expected"), CASES, ids=[f"{c[0]} {c[1]}".strip() for c in CASES]
)
def test_every_pixel_has_its_class(
    tmp_path: Path, name: str, source: str, write: Callable[[Path], None], expected: dict[str, Names]
) -> None:
    write(tmp_path)
    dataset = open_dataset(name, tmp_path, partial=True)
    assert [item.name for item in dataset.items] == sorted(expected)
    for item in dataset.items:
        labels = item.labels()
        assert names_of(dataset, labels) == expected[item.name]
        assert item.image().size == (labels.shape[1], labels.shape[0])
        assert item.image().mode == "RGB"
    assert dataset.prompts == tuple((cls,) for cls in dataset.classes)


@pytest.mark.parametrize(
    ("name", "write", "count"),
    [
        ("voc20", miniature.write_voc, 20),
        ("voc21", miniature.write_voc, 21),
        ("pc59", partial(miniature.write_context, labels="59_context_labels"), 59),
        ("pc60", partial(miniature.write_context, labels="59_context_labels"), 60),
        ("coco-object", miniature.write_coco, 80),
        ("coco-object-bg", miniature.write_coco, 81),
        ("coco-stuff27", miniature.write_coco, 27),
        ("coco-stuff171", miniature.write_coco, 171),
        ("ade150", miniature.write_ade20k, 150),
        ("cityscapes19", miniature.write_cityscapes, 19),
    ],
)
def test_numbers_of_classes(tmp_path: Path, name: str, write: Callable[[Path], None], count: int) -> None:
    write(tmp_path)
    dataset = open_dataset(name, tmp_path, partial=True)
    assert len(dataset.classes) == len(set(dataset.classes)) == count
    assert dataset.background == (0 if dataset.classes[0] == "background" else None)


def test_voc_matrix_counted_by_hand(tmp_path: Path) -> None:
    """Everything is called a cat: 8 pixels of 3 classes count in the first picture, 6 of 2 in the second."""
    miniature.write_voc(tmp_path)
    dataset = open_dataset("voc20", tmp_path, partial=True)
    total = torch.zeros(20, 20, dtype=torch.int64)
    cat = 7
    for item in dataset.items:
        labels = torch.from_numpy(item.labels())
        total += confusion_matrix(torch.full_like(labels, cat), labels, 20)
    expected = torch.zeros(20, 20, dtype=torch.int64)
    expected[0, cat], expected[14, cat], expected[19, cat] = 4, 2, 2  # aeroplane, person, tvmonitor
    expected[7, cat], expected[11, cat] = 4, 2  # cat, dog
    assert torch.equal(total, expected)


def test_cityscapes_matrix_counted_by_hand(tmp_path: Path) -> None:
    miniature.write_cityscapes(tmp_path)
    dataset = open_dataset("cityscapes19", tmp_path, partial=True)
    labels = torch.from_numpy(dataset.items[0].labels())
    predicted = torch.tensor([[0, 0, 0, 0], [2, 11, 11, 13], [5, 5, 18, 10]])
    matrix = confusion_matrix(predicted, labels, 19)
    counted = {(row, column): int(matrix[row, column]) for row, column in matrix.nonzero().tolist()}
    # road, sidewalk as road, building, person, rider as person, car, bicycle, sky
    assert counted == {
        (0, 0): 1, (1, 0): 1, (2, 2): 1, (11, 11): 1, (12, 11): 1, (13, 13): 1, (18, 18): 1, (10, 10): 1,
    }  # fmt: skip


def test_colour_map_is_pascals() -> None:
    """The colours that the miniature is written in: aeroplane is dark red, person beige, void light."""
    colours = np.frombuffer(miniature.voc_palette(), np.uint8).reshape(256, 3)
    assert colours[[1, 15, 20, 255]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]


def test_own_split_of_pascal_context_is_preferred(tmp_path: Path) -> None:
    miniature.write_context(tmp_path, "59_context_labels")
    base = tmp_path / "VOCdevkit" / "VOC2010"
    (base / "ImageSets" / "Main" / "val.txt").write_text("2008_000002\n2008_000004\n")
    split = base / "ImageSets" / "SegmentationContext" / "val.txt"
    split.parent.mkdir()
    split.write_text("2008_000002\n")
    dataset = open_dataset("pc59", tmp_path, partial=True)
    assert [item.name for item in dataset.items] == ["2008_000002"]
    assert "SegmentationContext" in dataset.source


def test_pascal_context_follows_the_order_of_its_list(tmp_path: Path) -> None:
    """Another numbering in 59_labels.txt, as some copies have it, changes nothing but the values."""
    miniature.write_context(tmp_path, "59_context_labels")
    path = tmp_path / "VOCdevkit" / "VOC2010" / "59_labels.txt"
    names = sorted(line.split(": ")[1] for line in path.read_text().splitlines())
    path.write_text("".join(f"{number}: {name}\n" for number, name in enumerate(names, 1)))
    number = {name: value for value, name in enumerate(names, 1)}
    values = [[number["aeroplane"], number["bedcloth"], 0, number["wood"]]] * 3
    miniature.write_labels(path.parent / "59_context_labels" / "2008_000002.png", values)
    dataset = open_dataset("pc59", tmp_path, partial=True)
    labels = dataset.items[0].labels()
    assert names_of(dataset, labels)[0] == ["aeroplane", "bedclothes", None, "wood"]


def test_folder(tmp_path: Path) -> None:
    root = tmp_path / "kitchen"
    labels = {"a": [[0, 1, 2], [2, 255, 1]], "inside/b": [[1], [0], [2]]}
    miniature.write_folder(root, ["cup", "plate", "tea pot"], labels)
    (root / "images" / "a.png").rename(root / "images" / "a.PNG")
    dataset = open_dataset("folder", root)
    assert dataset.title == "kitchen"
    assert dataset.background is None
    assert [item.name for item in dataset.items] == ["a", "inside/b"]
    assert names_of(dataset, dataset.items[0].labels()) == [
        ["cup", "plate", "tea pot"],
        ["tea pot", None, "plate"],
    ]
    assert dataset.items[1].image().size == (1, 3)


def test_folder_with_background(tmp_path: Path) -> None:
    miniature.write_folder(tmp_path, ["cup", "background"], {"a": [[0, 1]]})
    assert open_dataset("folder", tmp_path).background == 1


@pytest.mark.parametrize(("name", "conditions"), [("scenes", "clean"), ("scenes-hard", "hard")])
def test_scenes_are_the_held_out_ones(name: str, conditions: Any) -> None:
    from seg4diff.demo.scenes import CLASSES, HELD_OUT, scene

    dataset = open_dataset(name)
    assert dataset.classes == CLASSES
    drawn = scene(HELD_OUT + 3, conditions)
    labels = dataset.items[3].labels()
    assert {CLASSES[value] for value in np.unique(labels)} == set(drawn.classes)
    row, column = 100, 20
    assert CLASSES[labels[row, column]] == drawn.classes[drawn.labels[row, column]]
    assert dataset.items[3].image().tobytes() == drawn.image.tobytes()
