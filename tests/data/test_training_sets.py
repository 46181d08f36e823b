"""Pictures, masks and captions from files, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from seg4diff.data.settings import DataSettings
from seg4diff.data.training_sets import UnusableExampleError, open_source, read_captions

WIDTH, HEIGHT = 40, 30


def picture(path: Path) -> Path:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, :20, 0] = 255
    Image.fromarray(pixels).save(path)
    return path


def left() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :20] = 1
    return mask


def encoded(mask: np.ndarray) -> dict[str, Any]:
    found = rle.encode(np.asfortranarray(mask))
    return {"size": found["size"], "counts": found["counts"].decode()}


def test_plain_folder(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    Image.fromarray(left() + 1).save(tmp_path / "one.mask.png")
    (tmp_path / "one.txt").write_text("a red cat\na cat on the left\n")
    (tmp_path / "classes.txt").write_text("sofa\ncat\n")
    (tmp_path / "inner").mkdir()
    picture(tmp_path / "inner" / "two.jpg")
    annotations = [
        {"segmentation": encoded(left()), "class": "cat"},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 600, 600]}},
        {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]], "class": "dog"},
    ]
    (tmp_path / "inner" / "two.mask.json").write_text(json.dumps({"annotations": annotations}))
    source = open_source(DataSettings(images=str(tmp_path)))
    assert [source.name(i) for i in range(len(source))] == ["inner/two.jpg", "one.png"]
    two, one = source.load(0), source.load(1)
    assert one.classes == ("sofa", "cat")
    assert one.captions == ("a red cat", "a cat on the left")
    assert np.array_equal(one.masks[1], left().astype(bool))
    assert two.classes == ("cat", "", "dog")
    assert two.captions == ()
    assert np.array_equal(two.masks[0], two.masks[1])
    assert two.masks[2].sum() == 100


def test_sa1b(tmp_path: Path) -> None:
    picture(tmp_path / "sa_1.jpg")
    (tmp_path / "sa_1.json").write_text(json.dumps({"annotations": [{"segmentation": encoded(left())}]}))
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"sa_1.jpg": "a red half"}))
    source = open_source(DataSettings(kind="sa1b", images=str(tmp_path), captions=str(captions)))
    example = source.load(0)
    assert example.captions == ("a red half",)
    assert example.classes == ("",)


def coco(tmp_path: Path, *, panoptic: bool) -> DataSettings:
    picture(tmp_path / "7.jpg")
    picture(tmp_path / "8.jpg")
    content: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "7.jpg"},
            {"id": 8, "file_name": "8.jpg"},
            {"id": 9, "file_name": "9.jpg"},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "wall-brick"}],
    }
    if panoptic:
        (tmp_path / "masks").mkdir()
        numbers = np.where(left() == 1, 300, 70000)
        numbers[:5] = 301
        colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1)
        Image.fromarray(colours.astype(np.uint8)).save(tmp_path / "masks" / "7.png")
        segments = [
            {"id": 300, "category_id": 1},
            {"id": 301, "category_id": 1},
            {"id": 70000, "category_id": 2},
        ]
        content["annotations"] = [{"image_id": 7, "file_name": "7.png", "segments_info": segments}]
    else:
        content["annotations"] = [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": encoded(left())},
            {"id": 2, "image_id": 7, "category_id": 2, "segmentation": encoded(1 - left())},
            {"id": 3, "image_id": 9, "category_id": 2, "segmentation": encoded(1 - left())},
        ]
    (tmp_path / "masks.json").write_text(json.dumps(content))
    captions = [{"image_id": 7, "caption": "a cat\nby a wall"}, {"image_id": 7, "caption": "cat"}]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    return DataSettings(
        kind="coco",
        images=str(tmp_path),
        masks=str(tmp_path / "masks.json"),
        captions=str(tmp_path / "captions.json"),
    )


@pytest.mark.parametrize("panoptic", [True, False])
def test_coco(panoptic: bool, tmp_path: Path) -> None:
    source = open_source(coco(tmp_path, panoptic=panoptic))
    example = source.load(0)
    assert set(example.classes) == {"cat", "wall"}
    assert example.captions == ("a cat by a wall", "cat")
    masks = dict(zip(example.classes, example.masks, strict=True))
    expected = left().astype(bool)
    if panoptic:
        expected[:5] = True  # two cats are one mask
    assert np.array_equal(masks["cat"], expected)
    assert np.array_equal(masks["wall"], ~expected)
    with pytest.raises(UnusableExampleError, match="no mask"):
        source.load(1)
    with pytest.raises(UnusableExampleError, match="missing file"):
        source.load(2)


@pytest.mark.parametrize("place", ["images", "annotations"])
@pytest.mark.parametrize("name", ["../7.jpg", "/7.jpg", "a\\7.jpg", 7])
def test_coco_names_that_lead_outside(place: str, name: Any, tmp_path: Path) -> None:
    settings = coco(tmp_path, panoptic=True)
    content = json.loads(Path(settings.masks).read_text())
    content[place][-1]["file_name"] = name
    Path(settings.masks).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data.masks=.*could lead out of the data set"):
        open_source(settings)


def test_fingerprints_change_with_the_files(tmp_path: Path) -> None:
    data = coco(tmp_path, panoptic=False)
    before = open_source(data).fingerprint()
    assert open_source(data).fingerprint() == before
    Image.new("RGB", (WIDTH, HEIGHT), "blue").save(tmp_path / "7.jpg", quality=20)
    assert open_source(data).fingerprint() != before


def test_demo_scenes() -> None:
    source = open_source(DataSettings(kind="demo", scenes=3))
    example = source.load(1)
    assert example.name == "scene-5000001"
    assert sum(mask.sum() for mask in example.masks) == example.image.width * example.image.height
    assert all(name in example.captions[0] for name in example.classes)
    with pytest.raises(ValueError, match="which are for evaluation"):
        open_source(DataSettings(kind="demo", first_scene=9_999_999, scenes=2))


def broken(tmp_path: Path, kind: str) -> None:
    """A picture with something wrong about it."""
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    mask = tmp_path / "a.mask.png"
    if kind == "size":
        Image.new("L", (10, 10), 1).save(mask)
    elif kind == "empty":
        Image.new("L", (WIDTH, HEIGHT), 0).save(mask)
    elif kind == "damaged mask":
        mask.write_bytes(b"no picture")
    elif kind == "damaged picture":
        Image.fromarray(left()).save(mask)
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    elif kind == "json":
        (tmp_path / "a.mask.json").write_text("{")
    elif kind == "rle":
        entry = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": 7}}
        (tmp_path / "a.mask.json").write_text(json.dumps({"annotations": [entry]}))
    elif kind == "no text":
        Image.fromarray(left()).save(mask)
        (tmp_path / "a.txt").write_text("\n \n")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("size", "masks of another size than the picture"),
        ("empty", "no mask"),
        ("damaged mask", "unreadable masks"),
        ("damaged picture", "unreadable picture"),
        ("json", "unreadable masks"),
        ("rle", "unreadable masks"),
        ("no text", "no caption and no class names"),
        ("nothing beside it", "no file of masks"),
    ],
)
def test_unusable_pictures_have_a_reason(kind: str, reason: str, tmp_path: Path) -> None:
    broken(tmp_path, kind)
    with pytest.raises(UnusableExampleError) as caught:
        open_source(DataSettings(images=str(tmp_path))).load(0)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"images": ""}, ValueError, "data.images is not set; name a folder"),
        ({"images": "nowhere"}, FileNotFoundError, "data.images='nowhere' is no folder"),
        ({"images": "."}, ValueError, "holds no picture"),
        ({"kind": "coco", "images": "."}, ValueError, "data.captions is not set"),
        (
            {"kind": "coco", "images": ".", "text": "classes"},
            ValueError,
            "data.masks is not set; name a file",
        ),
        ({"kind": "coco", "images": ".", "captions": "x.json"}, FileNotFoundError, "data.captions='x.json'"),
        ({"kind": "coco", "images": ".", "text": "classes", "masks": "bad.json"}, ValueError, "is no JSON"),
        (
            {"kind": "coco", "images": ".", "text": "classes", "masks": "other.json"},
            ValueError,
            "no COCO file",
        ),
        ({"kind": "coco", "images": ".", "text": "classes", "masks": "list.json"}, ValueError, "not a list"),
    ],
)
def test_wrong_sources(
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("other.json").write_text('{"a": 1}')
    Path("list.json").write_text("[]")
    with pytest.raises(error, match=message):
        open_source(DataSettings(**settings))


def test_captions_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text('{"annotations": [{"text": "a"}]}')
    with pytest.raises(ValueError, match="neither COCO's captions nor"):
        read_captions(path)
    path.write_text('{"a.png": ["one", "two"], "b.png": "three", "c.png": " "}')
    assert read_captions(path) == {"a.png": ("one", "two"), "b.png": ("three",), "c.png": ()}
