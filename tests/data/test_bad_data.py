"""Data sets that are missing, half unpacked or damaged are refused by name, never read wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from seg4diff.data.names import DatasetName
from seg4diff.data.prepare import prepare
from seg4diff.data.registry import (
    IncompleteDatasetError,
    open_dataset,
    subset,
    with_names,
)
from tests.support import miniature


@pytest.mark.parametrize(
    ("name", "missing", "download"),
    [
        ("voc20", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "VOCtrainval_11-May-2012.tar"),
        ("voc21", "VOCdevkit/VOC2012/SegmentationClass", "host.robots.ox.ac.uk"),
        ("pc59", "VOCdevkit/VOC2010/JPEGImages", "pascal-context"),
        ("pc60", "VOCdevkit/VOC2010/JPEGImages", "59_context_labels.tar.gz"),
        ("coco-object", "coco/val2017", "images.cocodataset.org"),
        ("coco-object-bg", "coco/stuffthingmaps/val2017", "annotations_trainval2017.zip"),
        ("coco-stuff27", "coco/stuffthingmaps/val2017", "stuffthingmaps_trainval2017.zip"),
        ("coco-stuff171", "coco/stuffthingmaps/val2017", "nightrome/cocostuff"),
        ("ade150", "ADEChallengeData2016/annotations/validation", "ADEChallengeData2016.zip"),
        ("cityscapes19", "cityscapes/gtFine/val", "gtFine_trainvaltest.zip"),
        ("folder", "classes.txt", "one name per line"),
    ],
)
def test_what_is_missing_and_where_to_get_it(tmp_path: Path, name: str, missing: str, download: str) -> None:
    with pytest.raises(IncompleteDatasetError) as caught:
        open_dataset(name, tmp_path)
    assert missing in str(caught.value)
    assert download in str(caught.value)


@pytest.mark.parametrize("listed", ["../../../../outside", "/OUTSIDE", "..\\x", "a\0b"])
@pytest.mark.parametrize("kind", ["voc20", "voc21", "pc59", "pc60", "coco-object", "--images"])
def test_names_that_lead_out_of_the_data_set(tmp_path: Path, kind: str, listed: str) -> None:
    """A list names a picture elsewhere, which exists: it is neither read nor written."""
    root, out = tmp_path / "root", tmp_path / "out"
    listed = listed.replace("OUTSIDE", f"{tmp_path}/outside"[1:])
    root.mkdir()
    if kind.startswith("pc"):
        miniature.write_context(root, "59_context_labels")
        path = root / "VOCdevkit/VOC2010/ImageSets/Main/val.txt"
    elif kind == "coco-object":
        miniature.write_coco(root, pixel_maps=False, instances=True)
        path = root / "coco/annotations/instances_val2017.json"
    else:
        miniature.write_voc(root)
        path = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    if kind == "coco-object":
        document = json.loads(path.read_text())
        document["images"][0]["file_name"] = f"{listed}.jpg"
        path.write_text(json.dumps(document))
    elif kind == "--images":
        path = tmp_path / "list.txt"
    if path.suffix == ".txt":
        path.write_text(f"{listed}\n")
    for suffix in (".jpg", ".png"):
        miniature.write_labels(tmp_path / f"outside{suffix}", [[0, 1]])
    before = sorted(tmp_path.rglob("*"))

    def run() -> None:
        if kind == "--images":
            subset(open_dataset("voc20", root, partial=True), listed=path)
        else:
            prepare(open_dataset(kind, root, partial=True), out, progress=False)

    with pytest.raises(ValueError, match="could lead out of the data set"):
        run()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "write", "removed", "message"),
    [
        ("voc20", miniature.write_voc, "VOCdevkit/VOC2012/SegmentationClass/2011_003271.png",
         "1 of 2 label maps are missing, the first is VOCdevkit/VOC2012/SegmentationClass/2011_003271.png"),
        ("voc20", miniature.write_voc, "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg",
         "1 of 2 images are missing"),
        ("pc59", partial(miniature.write_context, labels="59_context_labels"),
         "VOCdevkit/VOC2010/59_labels.txt", "missing: VOCdevkit/VOC2010/59_labels.txt"),
        ("pc59", partial(miniature.write_context, labels="trainval"), "VOCdevkit/VOC2010/labels.txt",
         "missing: VOCdevkit/VOC2010/labels.txt"),
        ("pc59", partial(miniature.write_context, labels="trainval"), "VOCdevkit/VOC2010/trainval",
         "missing: VOCdevkit/VOC2010/59_context_labels"),
        ("pc60", partial(miniature.write_context, labels="59_context_labels"), "VOCdevkit/VOC2010/ImageSets",
         "ImageSets/Main/val.txt"),
        ("coco-object", partial(miniature.write_coco, pixel_maps=False, instances=True),
         "coco/val2017/000000000139.jpg",
         "1 of 2 images are missing, the first is coco/val2017/000000000139.jpg"),
        ("cityscapes19", miniature.write_cityscapes, "cityscapes/gtFine/val/munster",
         "the first is cityscapes/gtFine/val/munster/munster_000001_000019_gtFine_labelIds.png"),
        ("cityscapes19", miniature.write_cityscapes, "cityscapes/leftImg8bit/val/munster", "1 of 2 images"),
    ],
)  # fmt: skip
def test_half_unpacked(
    tmp_path: Path, name: str, write: Callable[[Path], None], removed: str, message: str
) -> None:
    write(tmp_path)
    path = tmp_path / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(IncompleteDatasetError, match="(?s).*") as caught:
        open_dataset(name, tmp_path, partial=True)
    assert message in str(caught.value)


def test_fewer_pictures_than_the_data_set_has(tmp_path: Path) -> None:
    miniature.write_ade20k(tmp_path)
    with pytest.raises(IncompleteDatasetError, match="1 of 2000 images exist .* --partial"):
        open_dataset("ade150", tmp_path)


def test_no_root_and_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'voc20' needs a data root"):
        open_dataset("voc20")
    for name in set(get_args(DatasetName)) - {"scenes", "scenes-hard"}:
        with pytest.raises(IncompleteDatasetError, match="is not a folder"):
            open_dataset(name, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'voc' is unknown; known: voc20, voc21"):
        open_dataset("voc", tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "path", "values", "message"),
    [
        ("voc20", miniature.write_voc, "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png",
         [[1, 21], [3, 22]], "holds 21, 22, which stand for no class"),
        ("ade150", miniature.write_ade20k, "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png",
         [[151, 0]], "holds 151, which stands for no class"),
        ("ade150", miniature.write_ade20k, "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png",
         [[300, 0]], "holds 300, which"),
        ("cityscapes19", miniature.write_cityscapes,
         "cityscapes/gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png", [[34]], "holds 34"),
        ("coco-stuff171", miniature.write_coco, "coco/stuffthingmaps/val2017/000000000139.png",
         [[11, 0]], "holds 11, which"),  # the id of "street sign", which no annotation has
        ("coco-object", miniature.write_coco, "coco/stuffthingmaps/val2017/000000000139.png",
         [[182, 0]], "holds 182, which"),
    ],
)  # fmt: skip
def test_values_that_stand_for_no_class(
    tmp_path: Path, name: str, write: Callable[[Path], None], path: str, values: list[list[int]], message: str
) -> None:
    write(tmp_path)
    miniature.write_labels(tmp_path / path, values)
    dataset = open_dataset(name, tmp_path, partial=True)
    with pytest.raises(ValueError, match="(?s).*") as caught:
        dataset.items[0].labels()
    assert message in str(caught.value)
    assert Path(path).name in str(caught.value)


def test_label_maps_of_colours_and_damaged_ones(tmp_path: Path) -> None:
    miniature.write_voc(tmp_path)
    dataset = open_dataset("voc20", tmp_path, partial=True)
    folder = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    Image.new("RGB", (6, 4), (128, 0, 0)).save(folder / "2007_000033.png")
    with pytest.raises(ValueError, match="2007_000033.png' has mode RGB"):
        dataset.items[0].labels()
    whole = (folder / "2011_003271.png").read_bytes()
    (folder / "2011_003271.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="2011_003271.png' is unreadable"):
        dataset.items[1].labels()


def test_damaged_mat_file(tmp_path: Path) -> None:
    miniature.write_context(tmp_path, "trainval")
    (tmp_path / "VOCdevkit" / "VOC2010" / "trainval" / "2008_000002.mat").write_bytes(
        b"MATLAB 5.0 but not really"
    )
    dataset = open_dataset("pc59", tmp_path, partial=True)
    with pytest.raises(ValueError, match="2008_000002.mat' is unreadable"):
        dataset.items[0].labels()


def test_unknown_names_in_lists_of_classes(tmp_path: Path) -> None:
    miniature.write_context(tmp_path, "59_context_labels")
    path = tmp_path / "VOCdevkit" / "VOC2010" / "59_labels.txt"
    listed = path.read_text()
    path.write_text(listed.replace("wood", "lumber"))
    with pytest.raises(ValueError, match="names 'lumber', which is not a class"):
        open_dataset("pc59", tmp_path, partial=True)
    path.write_text("aeroplane\n")
    with pytest.raises(ValueError, match="'number: name' expected"):
        open_dataset("pc59", tmp_path, partial=True)


def test_damaged_instances(tmp_path: Path) -> None:
    miniature.write_coco(tmp_path, pixel_maps=False, instances=True)
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["category_id"] = 12
    path.write_text(json.dumps(document))
    dataset = open_dataset("coco-object", tmp_path, partial=True)
    with pytest.raises(ValueError, match="unknown category .12 in instances_val2017.json"):
        dataset.items[1].labels()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="is not JSON .* get a whole copy"):
        open_dataset("coco-object", tmp_path, partial=True)


@pytest.mark.parametrize(
    ("classes", "message"),
    [("", "names 0 classes"), ("cup\ncup\n", "names 'cup' more than once"), ("c\n" * 256, "256 classes")],
)
def test_folders_with_bad_lists(tmp_path: Path, classes: str, message: str) -> None:
    miniature.write_folder(tmp_path, ["cup"], {"a": [[0]]})
    (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", tmp_path)


def test_folders_with_files_that_do_not_pair(tmp_path: Path) -> None:
    miniature.write_folder(tmp_path, ["cup"], {"a": [[0]], "b": [[0]]})
    (tmp_path / "images" / "b.png").rename(tmp_path / "b.png")
    with pytest.raises(IncompleteDatasetError, match="1 label maps .* the first is labels/b.png"):
        open_dataset("folder", tmp_path)
    shutil.copy(tmp_path / "b.png", tmp_path / "images" / "b.png")
    shutil.copy(tmp_path / "b.png", tmp_path / "images" / "b.jpg")
    with pytest.raises(ValueError, match="holds both .b.jpg. and .b.png."):
        open_dataset("folder", tmp_path)
    (tmp_path / "images" / "b.jpg").unlink()
    (tmp_path / "labels" / "b.png").unlink()
    with pytest.raises(IncompleteDatasetError, match="label maps are missing, the first is labels/b.png"):
        open_dataset("folder", tmp_path)


def test_names_to_prompt(tmp_path: Path) -> None:
    miniature.write_folder(tmp_path, ["tvmonitor", "cup", "background"], {"a": [[0, 1, 2]]})
    dataset = open_dataset("folder", tmp_path)
    better = with_names(dataset, "better")
    assert better.prompts[:2] == (("television", "monitor"), ("cup",))
    assert "background" in better.prompts[2]
    assert with_names(better, "paper").prompts == (("tvmonitor",), ("cup",), ("background",))
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"cup": ["mug", "cup"], "tvmonitor": "screen"}))
    assert with_names(dataset, path).prompts == (("screen",), ("mug", "cup"), ("background",))
    with pytest.raises(ValueError, match="'saucer' is not a class of 'folder'; its classes: tvmonitor, cup"):
        with_names(dataset, {"saucer": ["plate"]})
    with pytest.raises(ValueError, match="'cup' has the names"):
        with_names(dataset, {"cup": [" "]})
    with pytest.raises(FileNotFoundError, match="neither 'paper' nor 'better'"):
        with_names(dataset, "best")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        with_names(dataset, path)


def test_background_does_not_compete_with_classes_of_its_names(tmp_path: Path) -> None:
    miniature.write_folder(tmp_path, ["sky", "grass", "background"], {"a": [[0, 1, 2]]})
    names = with_names(open_dataset("folder", tmp_path), "better").prompts
    assert not {"sky", "grass"} & set(names[2])
    assert "wall" in names[2]


def test_some_of_the_pictures(tmp_path: Path) -> None:
    miniature.write_folder(tmp_path, ["cup"], {name: [[0]] for name in "abcd"})
    dataset = open_dataset("folder", tmp_path)
    assert [item.name for item in subset(dataset, limit=2).items] == ["a", "b"]
    listed = tmp_path / "listed.txt"
    listed.write_text("d\nb\n")
    assert [item.name for item in subset(dataset, listed=listed).items] == ["d", "b"]
    listed.write_text("d\nz\n")
    with pytest.raises(ValueError, match="names 'z'"):
        subset(dataset, listed=listed)
    with pytest.raises(ValueError, match="limit=0"):
        subset(dataset, limit=0)
    with pytest.raises(FileNotFoundError, match="list of images"):
        subset(dataset, listed=tmp_path / "none.txt")


def test_palette_does_not_change_values(tmp_path: Path) -> None:
    values = [[0, 1, 1, 255]]
    miniature.write_folder(tmp_path, ["a", "b"], {"x": values, "y": values})
    miniature.write_labels(tmp_path / "labels" / "y.png", values, palette=True)
    with Image.open(tmp_path / "labels" / "y.png") as stored:
        assert stored.mode == "P"
    grey, coloured = (item.labels() for item in open_dataset("folder", tmp_path).items)
    assert np.array_equal(grey, coloured)
    assert grey.tolist() == values
