"""What training reads: images, masks and captions from files, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from seg4diff.data.annotations import read_captions
from seg4diff.data.examples import Example, fingerprint, open_training_set, read_example
from seg4diff.data.items import Item, Items, UnusableItemError
from seg4diff.data.registry import open_dataset
from seg4diff.data.settings import DataSettings
from tests.support import miniature

WIDTH, HEIGHT = 40, 30


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, :20, 0] = 255
    Image.fromarray(pixels).save(path)


def left() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :20] = 1
    return mask


def encoded(mask: np.ndarray) -> dict[str, Any]:
    found = rle.encode(np.asfortranarray(mask))
    return {"size": found["size"], "counts": found["counts"].decode()}


def examples(settings: DataSettings) -> list[Example]:
    return [read_example(item) for item in open_training_set(settings).items]


def annotate(path: Path, *annotations: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"annotations": annotations}))


def test_folder(tmp_path: Path) -> None:
    """Labels of one image, masks of another, captions of both as `seg4diff caption` names images."""
    write_image(tmp_path / "images" / "one.png")
    write_image(tmp_path / "images" / "inner" / "two.JPG")
    (tmp_path / "labels").mkdir()
    values = np.where(left() == 1, 1, 0).astype(np.uint8)
    values[0], values[1] = 255, 2
    Image.fromarray(values).save(tmp_path / "labels" / "one.png")
    (tmp_path / "classes.txt").write_text("sofa\ncat\nbackground\n")
    annotate(
        tmp_path / "masks" / "inner" / "two.json",
        {"segmentation": encoded(left()), "class": "cat"},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 600, 600]}},
        {"segmentation": [[20, 0, 30, 0, 30, 10, 20, 10]], "class": "cat"},
        {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]},
    )
    captions = {"one.png": ["a red cat", "a cat on the left"], "inner/two.JPG": "a cat"}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    two, one = examples(DataSettings(images=str(tmp_path)))
    assert (two.name, one.name) == ("inner/two", "one")
    assert one.classes == ("sofa", "cat")  # background is what no name is for
    assert one.captions == ("a red cat", "a cat on the left")
    assert np.array_equal(one.masks[1], values == 1)
    assert two.classes == ("cat", "", "")  # two cats are one mask, two things without names are two
    assert two.captions == ("a cat",)
    assert np.array_equal(two.masks[0] ^ two.masks[1], np.pad(np.ones((10, 10), bool), ((0, 20), (20, 10))))
    assert two.masks[2].sum() == 100


def test_the_folder_of_an_evaluation_trains(tmp_path: Path) -> None:
    miniature.write_folder(tmp_path, ["cup", "plate"], {"a": [[0, 1], [255, 1]]})
    evaluated = open_dataset("folder", tmp_path).items[0].labels()
    (example,) = examples(DataSettings(images=str(tmp_path)))
    assert example.classes == ("cup", "plate")
    assert [mask.tolist() for mask in example.masks] == [(evaluated == n).tolist() for n in range(2)]


def test_images_alone(tmp_path: Path) -> None:
    """Labelling reads a folder in which nothing else exists; two images may differ in their suffix alone."""
    for name in (
        "b.png",
        "inner/a.JPG",
        "b.jpg",
        ".hidden.png",
        ".cache/c.png",
        "masks.json",
        "a\\b.png",
        "c:d.png",
    ):
        write_image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.png").rename(tmp_path / name)
    items = open_dataset("images", tmp_path).items
    assert [item.name for item in items] == ["b.jpg", "b.png", "inner/a.JPG"]
    assert items[2].image().size == (WIDTH, HEIGHT)
    assert items[2].captions() == ()
    for read in (items[2].labels, lambda: items[2].masks(HEIGHT, WIDTH)):
        with pytest.raises(UnusableItemError, match=r"no (labels|masks) \(inner/a.JPG\)"):
            read()


def test_items_are_made_when_they_are_asked_for() -> None:
    made = []

    def make(name: str) -> Item:
        made.append(name)
        return Item(name, lambda: Image.new("RGB", (1, 1)))

    items = Items([str(number) for number in range(1000)], make)
    part = items[5:100][3:]
    assert (len(items), len(part), made) == (1000, 92, [])
    assert part[-1].name == "99"
    assert made == ["99"]


def test_sa1b(tmp_path: Path) -> None:
    write_image(tmp_path / "sa_000000" / "sa_1.jpg")
    annotate(tmp_path / "sa_000000" / "sa_1.json", {"segmentation": encoded(left())})
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"sa_1.jpg": "a red half"}))
    (example,) = examples(DataSettings(kind="sa1b", images=str(tmp_path), captions=str(captions)))
    assert example.captions == ("a red half",)
    assert example.classes == ("",)


def coco(tmp_path: Path, *, panoptic: bool) -> DataSettings:
    write_image(tmp_path / "7.jpg")
    write_image(tmp_path / "8.jpg")
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
    items = open_training_set(coco(tmp_path, panoptic=panoptic)).items
    example = read_example(items[0])
    assert set(example.classes) == {"cat", "wall"}
    assert example.captions == ("a cat by a wall", "cat")
    masks = dict(zip(example.classes, example.masks, strict=True))
    expected = left().astype(bool)
    if panoptic:
        expected[:5] = True  # two cats are one mask
    assert np.array_equal(masks["cat"], expected)
    assert np.array_equal(masks["wall"], ~expected)
    with pytest.raises(UnusableItemError, match="no mask"):
        read_example(items[1])
    with pytest.raises(UnusableItemError, match="missing file"):
        read_example(items[2])


@pytest.mark.parametrize("place", ["images", "annotations"])
@pytest.mark.parametrize("name", ["../7.jpg", "/7.jpg", "a\\7.jpg", 7])
def test_coco_names_that_lead_outside(place: str, name: Any, tmp_path: Path) -> None:
    settings = coco(tmp_path, panoptic=True)
    content = json.loads(Path(settings.masks).read_text())
    content[place][-1]["file_name"] = name
    Path(settings.masks).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"masks.json. .*could lead out of the data set"):
        open_training_set(settings)


def test_fingerprints_change_with_the_files(tmp_path: Path) -> None:
    data = coco(tmp_path, panoptic=False)
    found = [fingerprint(open_training_set(data)) for _ in range(2)]
    Image.new("RGB", (WIDTH, HEIGHT), "blue").save(tmp_path / "7.jpg", quality=20)
    found.append(fingerprint(open_training_set(data)))
    Path(data.captions).write_text(json.dumps({"7": "a cat"}))
    found.append(fingerprint(open_training_set(data)))
    (tmp_path / "8.jpg").unlink()
    found.append(fingerprint(open_training_set(data)))
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_demo_scenes() -> None:
    example = examples(DataSettings(kind="demo", scenes=3))[1]
    assert example.name == "scene-5000001"
    assert sum(mask.sum() for mask in example.masks) == example.image.width * example.image.height
    assert all(name in example.captions[0] for name in example.classes)
    with pytest.raises(ValueError, match="which are for evaluation"):
        open_training_set(DataSettings(kind="demo", first_scene=9_999_999, scenes=2))


def broken(root: Path, kind: str) -> None:
    """An image with something wrong about it."""
    write_image(root / "images" / "a.png")
    (root / "captions.json").write_text(json.dumps({"a.png": " " if kind == "no text" else "a cat"}))
    labels, masks = root / "labels" / "a.png", root / "masks" / "a.json"
    if kind in ("size", "empty", "damaged labels", "no class"):
        (root / "classes.txt").write_text("cat\n")
        labels.parent.mkdir()
    if kind == "size":
        Image.new("L", (10, 10)).save(labels)
    elif kind == "empty":
        Image.new("L", (WIDTH, HEIGHT), 255).save(labels)
    elif kind == "no class":
        Image.new("L", (WIDTH, HEIGHT), 1).save(labels)
    elif kind == "damaged labels":
        labels.write_bytes(b"not an image")
    elif kind == "damaged image":
        annotate(masks)
        (root / "images" / "a.png").write_bytes((root / "images" / "a.png").read_bytes()[:60])
    elif kind == "json":
        annotate(masks)
        masks.write_text("{")
    elif kind in ("rle", "no rle", "not entries"):
        wrong = {"rle": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": 7}}, "no rle": {}}
        annotate(masks, wrong.get(kind, "mask"))  # type: ignore[arg-type]
    elif kind == "no text":
        annotate(masks, {"segmentation": encoded(left())})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("size", "masks of another size than the image"),
        ("empty", "no mask"),
        ("no class", "unreadable labels"),
        ("damaged labels", "unreadable labels"),
        ("damaged image", "unreadable image"),
        ("json", "unreadable masks"),
        ("rle", "unreadable masks"),
        ("no rle", "unreadable masks"),
        ("not entries", "unreadable masks"),
        ("no text", "no caption and no class names"),
        ("nothing beside it", "no masks"),
    ],
)
def test_unusable_images_have_a_reason(kind: str, reason: str, tmp_path: Path) -> None:
    broken(tmp_path, kind)
    with pytest.raises(UnusableItemError) as caught:
        examples(DataSettings(images=str(tmp_path)))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"images": ""}, ValueError, "data.images is not set; name a folder"),
        ({"images": "nowhere"}, FileNotFoundError, "data.images='nowhere' is not a folder"),
        ({"images": "."}, FileNotFoundError, "missing: images"),
        ({"kind": "sa1b", "images": "."}, FileNotFoundError, "holds no image"),
        ({"kind": "coco", "images": "."}, ValueError, "data.captions is not set"),
        (
            {"kind": "coco", "images": ".", "text": "classes"},
            ValueError,
            "data.masks is not set; name a file",
        ),
        ({"kind": "coco", "images": ".", "captions": "x.json"}, FileNotFoundError, "data.captions='x.json'"),
        ({"kind": "coco", "images": ".", "text": "classes", "masks": "bad.json"}, ValueError, "is not JSON"),
        (
            {"kind": "coco", "images": ".", "text": "classes", "masks": "other.json"},
            ValueError,
            "is not a COCO file",
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
        open_training_set(DataSettings(**settings))


def test_captions_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text('{"annotations": [{"text": "a"}]}')
    with pytest.raises(ValueError, match="neither COCO's captions nor"):
        read_captions(path)
    path.write_text('{"a.png": ["one", "two"], "b.png": "three", "c.png": " "}')
    assert read_captions(path).texts == {"a.png": ("one", "two"), "b.png": ("three",), "c.png": ()}
