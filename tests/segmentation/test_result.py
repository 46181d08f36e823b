"""The result type: checked when made, legible, and the same after it was written and read."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from seg4diff.segmentation.result import Segmentation
from seg4diff.segmentation.scores import resize_scores
from seg4diff.visualization import palette

HEIGHT, WIDTH = 6, 10


def example(classes: int = 3, image: bool = True) -> Segmentation:
    """Class k has k + 1 in every ``sum`` pixels or so; scores that agree with the labels."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(classes, HEIGHT, WIDTH, generator=generator)
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Segmentation(
        labels=scores.argmax(0),
        scores=scores,
        classes=tuple(f"thing {number}" for number in range(classes)),
        image=Image.fromarray(picture) if image else None,
        metadata={"preset": "default", "layers": (9,), "seed": 0},
    )


def test_mask():
    result = example()
    for index, name in enumerate(result.classes):
        assert result.mask(name).dtype == torch.bool
        assert torch.equal(result.mask(name), result.labels == index)
    with pytest.raises(ValueError, match="'dog' is not among 'thing 0', 'thing 1', 'thing 2'"):
        result.mask("dog")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)}, TypeError, "labels is a torch.int32"),
        ({"labels": np.zeros((HEIGHT, WIDTH))}, TypeError, "labels is a ndarray"),
        ({"labels": torch.zeros(1, HEIGHT, WIDTH).long()}, ValueError, "labels has shape"),
        ({"labels": torch.zeros(HEIGHT, WIDTH + 1).long()}, ValueError, "labels are 11 x 6"),
        ({"labels": torch.full((HEIGHT, WIDTH), 3)}, ValueError, "from 3 to 3"),
        ({"labels": torch.full((HEIGHT, WIDTH), -2)}, ValueError, "from -2 to -2"),
        ({"labels": torch.zeros(0, WIDTH).long()}, ValueError, "none of them 0"),
        ({"scores": torch.zeros(3, HEIGHT, WIDTH).double()}, TypeError, "scores is a torch.float64"),
        ({"scores": torch.zeros(2, HEIGHT, WIDTH)}, ValueError, "scores have shape"),
        ({"classes": ("a", "b", "a")}, ValueError, "'a' more than once"),
        ({"classes": ("a", "b")}, ValueError, "2 classes"),
        ({"classes": "abc"}, TypeError, "tuple of names"),
        ({"classes": (1, 2, 3)}, TypeError, "tuple of names"),
        ({"presence": torch.ones(2)}, ValueError, r"presence has shape \[2\]"),
        ({"upsample": "nearest"}, ValueError, "'nearest' is unknown; accepted: 'linear'"),
        ({"image": Image.new("RGB", (HEIGHT, WIDTH))}, ValueError, "image is 6 x 10"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    whole = example()
    fields = {name: getattr(whole, name) for name in ("labels", "scores", "classes", "image")}
    with pytest.raises(error, match=message):
        Segmentation(**{**fields, **change})


def test_is_immutable():
    result = example()
    with pytest.raises(AttributeError):
        result.classes = ("x",)
    assert Segmentation(result.labels, result.scores, list(result.classes)).classes == result.classes


def test_overlay_blends_image_and_colours():
    result = example()
    colours = palette(3)[result.labels.numpy()].astype(float)
    picture = np.asarray(result.image).astype(float)
    for alpha in (0.0, 0.3, 1.0):
        overlay = result.overlay(alpha, legend=False)
        assert overlay.size == (WIDTH, HEIGHT)
        assert np.abs(np.asarray(overlay) - ((1 - alpha) * picture + alpha * colours)).max() <= 1
    alone = example(image=False).overlay(0.3, legend=False)
    assert np.array_equal(np.asarray(alone), colours)
    with pytest.raises(ValueError, match="alpha=1.5"):
        result.overlay(1.5)


def test_legend_shows_the_colours_of_what_occurs_and_nothing_else():
    result = example(4)
    labels = result.labels.clone()
    labels[labels == 2] = 1
    overlay = Segmentation(labels, result.scores, result.classes).overlay()
    assert overlay.width >= 256
    legend = np.asarray(overlay)[overlay.width * HEIGHT // WIDTH :].reshape(-1, 3)
    counts = [int((legend == colour).all(1).sum()) for colour in palette(4)]
    assert counts[2] == 0
    assert all(counts[index] > 100 for index in (0, 1, 3)), counts  # a swatch each
    assert int((legend < 60).all(1).sum()) > 100  # the names' ink


@pytest.mark.parametrize("classes", [1, 40, 300])
def test_legend_of_any_number_of_classes(classes):
    scores = torch.rand(classes, 20, 20)
    labels = torch.arange(400).reshape(20, 20) % classes
    names = tuple(f"a rather long name of class {number}" * (1 + number % 3) for number in range(classes))
    overlay = Segmentation(labels, scores, names).overlay()
    assert overlay.height > 260
    assert overlay.width <= 400


def test_one_pixel():
    result = Segmentation(torch.zeros(1, 1).long(), torch.ones(1, 1, 1), ("dot",))
    assert result.overlay().width >= 160
    assert result.overlay(legend=False).size == (1, 1)


def test_png_holds_labels_and_palette(tmp_path):
    result = example()
    with Image.open(result.save(tmp_path / "labels.PNG")) as read:
        assert read.mode == "P"
        assert np.array_equal(np.asarray(read), result.labels.numpy())
        assert json.loads(read.text["classes"]) == list(result.classes)
        assert np.array_equal(np.asarray(read.convert("RGB")), palette(3)[result.labels.numpy()])


def test_png_of_many_classes_has_16_bits(tmp_path):
    labels = torch.arange(300).reshape(15, 20)
    result = Segmentation(labels, torch.zeros(300, 15, 20), tuple(map(str, range(300))))
    with Image.open(result.save(tmp_path / "labels.png")) as read:
        assert np.array_equal(np.asarray(read), labels.numpy())
        assert len(json.loads(read.text["classes"])) == 300


@pytest.mark.parametrize(("classes", "value"), [(3, 255), (255, 255), (256, 65535)])
def test_background_is_the_largest_value_of_a_png(tmp_path, classes, value):
    labels = torch.arange(300).reshape(15, 20) % (classes + 1) - 1
    result = Segmentation(labels, torch.zeros(classes, 5, 4), tuple(map(str, range(classes))))
    with Image.open(result.save(tmp_path / "labels.png")) as read:
        assert np.array_equal(np.asarray(read), np.where(labels == -1, value, labels))
    document = json.loads(result.save(tmp_path / "result.json").read_text(encoding="utf-8"))
    assert sum(entry["area"] for entry in document["annotations"]) == int((labels >= 0).sum())
    assert min(entry["category_id"] for entry in document["annotations"]) == 1


def test_background_is_shown_as_the_image_and_not_named():
    result = example()
    labels = result.labels.masked_fill(result.labels == 1, -1)
    with_background = Segmentation(labels, result.scores, result.classes, result.image)
    shown = np.asarray(with_background.overlay(0.5, legend=False))
    image, painted = np.asarray(result.image), np.asarray(result.overlay(0.5, legend=False))
    assert np.array_equal(shown, np.where((labels == -1).numpy()[..., None], image, painted))
    legend = np.asarray(with_background.overlay())[256 * HEIGHT // WIDTH + 1 :].reshape(-1, 3)
    counts = [int((legend == colour).all(1).sum()) for colour in palette(3)]
    assert counts[0] > 100
    assert counts[1] == 0
    assert "background" in with_background.shares()
    nothing = Segmentation(torch.full((2, 2), -1), torch.zeros(1, 1, 1), ("cat",))
    assert nothing.overlay().width >= 160
    assert repr(nothing) == "Segmentation(2 x 2: background 100%)"


def test_scores_of_tokens_become_those_of_pixels():
    scores = torch.rand(3, 2, 5)
    labels = torch.zeros(HEIGHT, WIDTH).long()
    result = Segmentation(labels, scores, ("a", "b", "c"), upsample="geometric")
    assert torch.equal(result.pixel_scores(), resize_scores(scores, (HEIGHT, WIDTH), "geometric"))
    whole = example()
    assert torch.equal(whole.pixel_scores(), whole.scores)


def test_npz_comes_back_as_it_was(tmp_path):
    result = example()
    path = result.save(tmp_path / "result.npz")
    with np.load(path, allow_pickle=False) as arrays:
        assert {"labels", "scores", "classes"} <= set(arrays)
    refined = replace(result, presence=torch.rand(3), upsample="bilateral", scores=torch.rand(3, 2, 5))
    for original in (result, example(image=False), refined):
        read = Segmentation.load(original.save(path))
        assert torch.equal(read.labels, original.labels)
        assert torch.equal(read.scores, original.scores)
        assert torch.equal(read.pixel_scores(), original.pixel_scores())
        assert (read.presence is None) == (original.presence is None)
        if original.presence is not None:
            assert torch.equal(read.presence, original.presence)
        assert read.classes == original.classes
        assert read.metadata == {"preset": "default", "layers": [9], "seed": 0}
        assert (read.image is None) == (original.image is None)
        if original.image is not None:
            assert np.array_equal(np.asarray(read.image), np.asarray(original.image))


def test_json_is_coco(tmp_path):
    result = example()
    document = json.loads(result.save(tmp_path / "result.json").read_text(encoding="utf-8"))
    assert document["images"] == [{"id": 1, "height": HEIGHT, "width": WIDTH}]
    names = {category["id"]: category["name"] for category in document["categories"]}
    assert tuple(names[index + 1] for index in range(3)) == result.classes
    assert len(document["annotations"]) == 3
    for annotation in document["annotations"]:
        index = annotation["category_id"] - 1
        mask = result.labels == index
        assert np.array_equal(run_lengths.decode(annotation["segmentation"]), mask.numpy())
        assert annotation["area"] == int(mask.sum())
        rows, columns = np.nonzero(mask.numpy())
        width, height = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
        assert annotation["bbox"] == [columns.min(), rows.min(), width, height]
        assert annotation["score"] == pytest.approx(float(result.scores[index][mask].mean()))


def test_names_in_any_script(tmp_path):
    result = Segmentation(torch.zeros(2, 2).long(), torch.zeros(1, 2, 2), ("猫 café",))
    assert Segmentation.load(result.save(tmp_path / "a.npz")).classes == ("猫 café",)
    assert "猫 café" in result.save(tmp_path / "a.json").read_text(encoding="utf-8")
    with Image.open(result.save(tmp_path / "a.png")) as read:
        assert json.loads(read.text["classes"]) == ["猫 café"]
    assert result.overlay().width >= 160


def test_unknown_suffix(tmp_path):
    for name in ("result.gif", "result"):
        with pytest.raises(ValueError, match=r"use \.png, \.npz, \.json"):
            example().save(tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".png", ".npz", ".json"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, suffix, monkeypatch):
    result = example()
    path = result.save(tmp_path / f"result{suffix}")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        example(4).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.npz"):
        Segmentation.load(tmp_path / "gone.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    path = example().save(tmp_path / "cut.npz")
    path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "object.npz", labels=np.array([{}], dtype=object))
    for name in ("other", "cut", "text", "object"):
        with pytest.raises(ValueError, match=rf"{name}\.npz.*not a segmentation"):
            Segmentation.load(tmp_path / f"{name}.npz")


def test_notebooks_show_the_overlay():
    result = example()
    shown = Image.open(io.BytesIO(result._repr_png_()))
    assert np.array_equal(np.asarray(shown), np.asarray(result.overlay()))


def test_repr_is_short_and_says_the_shares():
    labels = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    result = Segmentation(labels, torch.zeros(3, 2, 4), ("cat", "sofa", "lamp"))
    assert repr(result) == "Segmentation(4 x 2: sofa 88%, cat 12%)"
    many = Segmentation(torch.arange(12).reshape(3, 4), torch.zeros(12, 3, 4), tuple(map(str, range(12))))
    assert repr(many).endswith("7 more)")
