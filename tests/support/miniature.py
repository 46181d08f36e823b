"""Miniature data sets in their official layouts, of a few pixels whose classes are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from seg4diff.data import class_names

VOC_VALUES = {
    "2007_000033": [
        [0, 0, 255, 1, 1, 255],
        [0, 0, 255, 1, 1, 255],
        [0, 0, 255, 15, 20, 255],
        [0, 0, 255, 15, 20, 255],
    ],
    "2011_003271": [[8, 255, 0], [8, 255, 0], [8, 255, 0], [8, 255, 12], [255, 255, 12]],
}
"""Pascal VOC: 0 background, 1 aeroplane, 8 cat, 12 dog, 15 person, 20 tvmonitor, 255 void border."""


def voc_palette() -> bytes:
    """Pascal's colour map: bit j of red, green and blue is bit 3 (7 - j), ... of the index."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                colours[index, channel] |= (
                    (index >> (3 * bit + channel) & 1) << (7 - bit) if 3 * bit < 8 else 0
                )
    return colours.tobytes()


def write_labels(path: Path, values: Sequence[Sequence[int]], *, palette: bool = False) -> None:
    """A label map; with Pascal's colours if ``palette``, else grey, of 16 bits where values need them."""
    array = np.array(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array.astype(np.uint8 if array.max() < 256 else np.uint16))
    if palette:
        picture.putpalette(voc_palette())
    picture.save(path)


def write_image(path: Path, height: int, width: int, seed: int = 0) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_voc(root: Path) -> None:
    base = root / "VOCdevkit" / "VOC2012"
    for name, values in VOC_VALUES.items():
        write_labels(base / "SegmentationClass" / f"{name}.png", values, palette=True)
        write_image(base / "JPEGImages" / f"{name}.jpg", len(values), len(values[0]))
    write_image(base / "JPEGImages" / "2007_000001.jpg", 4, 4)  # not in the list of validation pictures
    split = base / "ImageSets" / "Segmentation" / "val.txt"
    split.parent.mkdir(parents=True)
    split.write_text("2007_000033\n2011_003271\n")


CONTEXT_VALUES = [[0, 1, 11, 52], [28, 59, 47, 0], [9, 21, 40, 15]]
"""Pascal Context by 59_labels.txt: 1 aeroplane, 11 diningtable, 52 bedcloth, 28 clothes, 59 wood, 47 rock,
9 chair, 21 bag, 40 mountain, 15 person."""

CONTEXT_NAMES = [
    [None, "aeroplane", "diningtable", "bedclothes"],
    ["cloth", "wood", "rock", None],
    ["chair", "bag", "mountain", "person"],
]

_OFFICIAL = {"bedclothes": "bedcloth", "cloth": "clothes"}


def write_context(root: Path, labels: str) -> None:
    """Pascal Context with ``"59_context_labels"``, ``"trainval"`` or ``"SegmentationClassContext"``."""
    base = root / "VOCdevkit" / "VOC2010"
    write_image(base / "JPEGImages" / "2008_000002.jpg", 3, 4)
    split = base / "ImageSets" / "Main" / "val.txt"
    split.parent.mkdir(parents=True)
    split.write_text("2008_000002\n")
    short = [_OFFICIAL.get(name, name) for name in class_names.PASCAL_CONTEXT]
    listed = "".join(f"{number}: {name}\n" for number, name in enumerate(short, 1))
    if labels == "59_context_labels":
        (base / "59_labels.txt").write_text(listed)
        write_labels(base / labels / "2008_000002.png", CONTEXT_VALUES, palette=True)
    elif labels == "trainval":
        from scipy.io import savemat

        (base / "59_labels.txt").write_text(listed)
        # The full list has other numbers, other names for three classes, and classes that are none of the 59.
        full = sorted({*class_names.PASCAL_CONTEXT, "table", "accordion", "zebra crossing"} - {"diningtable"})
        (base / "labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(full, 1)))
        number = {name: i for i, name in enumerate(full, 1)} | {None: full.index("accordion") + 1}
        number["diningtable"] = number["table"]
        values = np.array([[number[name] for name in row] for row in CONTEXT_NAMES], np.uint16)
        (base / labels).mkdir()
        savemat(base / labels / "2008_000002.mat", {"LabelMap": values})
    else:
        write_labels(base / labels / "2008_000002.png", CONTEXT_VALUES)


COCO_VALUES = [[0, 1, 16, 12, 255], [91, 181, 123, 156, 89], [0, 0, 95, 24, 255]]
"""COCO-Stuff pixel maps (category id - 1): person, bicycle, cat, stop sign, unlabelled; banner, wood, grass,
sky-other, toothbrush; person, person, building-other, giraffe, unlabelled."""

COCO_NAMES = [
    ["person", "bicycle", "cat", "stop sign", None],
    ["banner", "wood", "grass", "sky-other", "toothbrush"],
    ["person", "person", "building-other", "giraffe", None],
]
COCO_COARSE_NAMES = [
    ["person-things", "vehicle-things", "animal-things", "outdoor-things", None],
    ["textile-stuff", "solid-stuff", "plant-stuff", "sky-stuff", "indoor-things"],
    ["person-things", "person-things", "building-stuff", "animal-things", None],
]


def write_coco(root: Path, *, pixel_maps: bool = True, instances: bool = False) -> None:
    base = root / "coco"
    write_image(base / "val2017" / "000000000139.jpg", 3, 5)
    if pixel_maps:
        write_labels(base / "stuffthingmaps" / "val2017" / "000000000139.png", COCO_VALUES)
    if instances:
        write_image(base / "val2017" / "000000000285.jpg", 4, 6)
        document = {
            "images": [
                {"id": 285, "file_name": "000000000285.jpg", "height": 4, "width": 6},
                {"id": 139, "file_name": "000000000139.jpg", "height": 3, "width": 5},
            ],
            "annotations": [
                _instance(1, 285, 44, [[1, 1, 3, 1, 3, 3, 1, 3]]),  # bottle, columns 1-2, rows 1-2
                _instance(2, 285, 17, [[0, 0, 4, 0, 4, 4, 0, 4]]),  # cat below it, columns 0-3, all rows
                # a crowd of persons: run lengths down the columns; the last column
                _instance(3, 285, 1, {"size": [4, 6], "counts": [20, 4]}, crowd=1),
            ],
            "categories": [],
        }
        path = base / "annotations" / "instances_val2017.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(document))


INSTANCE_NAMES = [
    ["cat", "cat", "cat", "cat", None, "person"],
    ["cat", "bottle", "bottle", "cat", None, "person"],
    ["cat", "bottle", "bottle", "cat", None, "person"],
    ["cat", "cat", "cat", "cat", None, "person"],
]


def _instance(number: int, image: int, category: int, shape: object, crowd: int = 0) -> dict[str, object]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": shape,
        "iscrowd": crowd,
    }


ADE_VALUES = [[0, 1, 2], [13, 150, 3], [8, 91, 0], [4, 5, 6]]
ADE_NAMES = [
    [None, "wall", "building"],
    ["person", "flag", "sky"],
    ["bed", "airplane", None],
    ["floor", "tree", "ceiling"],
]


def write_ade20k(root: Path) -> None:
    base = root / "ADEChallengeData2016"
    write_image(base / "images" / "validation" / "ADE_val_00000001.jpg", 4, 3)
    write_labels(base / "annotations" / "validation" / "ADE_val_00000001.png", ADE_VALUES)


CITY_VALUES = [[0, 3, 7, 8], [11, 24, 25, 26], [29, 30, 33, 23]]
CITY_NAMES = [
    [None, None, "road", "sidewalk"],
    ["building", "person", "rider", "car"],
    [None, None, "bicycle", "sky"],
]


def write_cityscapes(root: Path) -> None:
    base = root / "cityscapes"
    for city, name in (("frankfurt", "frankfurt_000000_000294"), ("munster", "munster_000001_000019")):
        write_image(base / "leftImg8bit" / "val" / city / f"{name}_leftImg8bit.png", 3, 4)
        inside = base / "gtFine" / "val" / city
        write_labels(inside / f"{name}_gtFine_labelIds.png", CITY_VALUES)
        write_labels(inside / f"{name}_gtFine_instanceIds.png", [[24000] * 4] * 3)  # is left alone


IMAGENET_VALUES = {"n02690373_1016": [[0, 1, 1, 0], [0, 0, 1, 0]], "n02123045_7": [[1], [0], [1]]}
"""ImageNet-Segmentation: an airliner and a tabby, 1 where they are."""


def write_imagenet(root: Path) -> None:
    """Cell arrays as MATLAB 7.3 stores them: references, column by column, strings as character codes."""
    import h5py

    (root / "words.txt").write_text("n02690373\tairliner\nn02123045\ttabby, tabby cat\nn00001740\tentity\n")
    with h5py.File(root / "gtsegs_ijcv.mat", "w") as file:
        columns: dict[str, list[object]] = {"img": [], "gt": [], "id": []}
        for number, (name, values) in enumerate(IMAGENET_VALUES.items()):
            labels = np.array(values, np.uint8)
            pixels = np.zeros((*labels.shape, 3), np.uint8)
            pixels[..., 0] = labels * 200 + np.arange(labels.shape[1])  # tells apart width and height
            file[f"#refs#/img{number}"] = pixels.transpose(2, 1, 0)
            file[f"#refs#/inside{number}"] = labels.T
            inside = np.array([[file[f"#refs#/inside{number}"].ref]], h5py.ref_dtype)
            file.create_dataset(f"#refs#/gt{number}", data=inside, dtype=h5py.ref_dtype)
            file[f"#refs#/id{number}"] = np.array([[ord(letter)] for letter in name], np.uint16)
            for column, references in columns.items():
                references.append(file[f"#refs#/{column}{number}"].ref)
        for column, references in columns.items():
            stored = np.array(references, h5py.ref_dtype).reshape(-1, 1)
            file.create_dataset(f"value/{column}", data=stored, dtype=h5py.ref_dtype)


def write_folder(
    root: Path, classes: Sequence[str], labels: dict[str, Sequence[Sequence[int]]], *, painted: bool = False
) -> None:
    """A plain folder; with ``painted`` the red channel of each picture is its label map, 0 for 255."""
    (root / "images").mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for number, (name, values) in enumerate(labels.items()):
        write_labels(root / "labels" / f"{name}.png", values)
        path = root / "images" / f"{name}.png"
        write_image(path, len(values), len(values[0]), seed=number)
        if painted:
            pixels = np.asarray(Image.open(path)).copy()
            pixels[:, :, 0] = np.where(np.array(values) == 255, 0, values)
            Image.fromarray(pixels).save(path)
