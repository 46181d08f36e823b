"""The demonstration counts right and writes its images; the model's own numbers are tested elsewhere."""

from __future__ import annotations

import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from seg4diff import loading
from seg4diff.demo import CLASSES, HELD_OUT, scene
from seg4diff.evaluation import showcase
from seg4diff.segmentation import zero_shot
from seg4diff.segmentation.result import Segmentation


def test_compare_is_intersection_over_union_over_all_scenes():
    truth = [np.array([[0, 0, 1, 1]]), np.array([[1, 1, 2, 2]])]
    found = [np.array([[0, 1, 1, 1]]), np.array([[1, 1, 2, 0]])]
    # class 0: 1 of 3 pixels in the union; class 1: 4 of 5; class 2: 1 of 2; no other occurs
    score = showcase.compare(truth, found)
    assert score.miou == pytest.approx((1 / 3 + 4 / 5 + 1 / 2) / 3)
    assert score.accuracy == pytest.approx(6 / 8)
    assert showcase.compare(truth, truth) == showcase.Score(1.0, 1.0)


@pytest.fixture
def model(monkeypatch):
    """Stands in for the model: right at layer 1, all of one class at layer 0 and on hard scenes; by default
    layer 1. The preset "best" is right everywhere."""
    pipe = SimpleNamespace(transformer=SimpleNamespace(transformer_blocks=[None] * 2), device="cpu")
    truths, hard = {}, {}
    for number in range(10):
        item = scene(HELD_OUT + number)
        truths[item.image.tobytes()] = showcase.in_vocabulary(item.labels, item.classes)
        hard[scene(HELD_OUT + number, "hard").image.tobytes()] = truths[item.image.tobytes()]

    def segment(pipe, images, names, *, layers=None, preset="default", **_):
        single = isinstance(images, Image.Image)
        results = []
        for image, own in zip([images], [names], strict=True) if single else zip(images, names, strict=True):
            labels = np.zeros((image.height, image.width), np.int64)
            known = truths | hard if preset == "best" else truths
            if (layers is None or layers == [1]) and image.tobytes() in known:
                for index, name in enumerate(own):
                    labels[known[image.tobytes()] == CLASSES.index(name)] = index
            scores = torch.from_numpy(labels)[None].eq(torch.arange(len(own))[:, None, None]).float()
            results.append(
                Segmentation(torch.from_numpy(labels), scores, tuple(own), image, {"layers": (1,)})
            )
        return results[0] if single else results

    monkeypatch.setattr(loading, "load_pipeline", lambda model, device, dtype: pipe)
    monkeypatch.setattr(zero_shot, "segment", segment)


def test_show(model, tmp_path):
    text = io.StringIO()
    report = showcase.show(10, tmp_path / "out", console=Console(file=text, width=120))
    assert report.present == report.everything == report.layers[1] == showcase.Score(1.0, 1.0)
    assert report.layers[0] == report.hard_present
    assert set(report.best) == {"present", "everything", "hard_present", "hard_everything"}
    assert all(score == showcase.Score(1.0, 1.0) for score in report.best.values())
    assert report.hard_everything.accuracy < report.hard_present.accuracy  # apple, which is in no other scene
    assert report.layers[0].miou < 0.5
    assert 0 < report.layers[0].accuracy < 0.5
    assert report.expert_layers == (1,)
    assert report.shuffled.accuracy == 0  # every name has gone to another region
    assert 0 < report.constant.miou < 1 / 10
    assert report.random.accuracy == pytest.approx(
        np.mean([1 / len(scene(HELD_OUT + number).classes) for number in range(10)]), abs=0.01
    )
    printed = text.getvalue()
    assert "10 held-out scenes" in printed
    assert "100.0" in printed
    assert "layer 1 (expert)" in printed

    names = set(os.listdir(tmp_path / "out"))
    assert names == {"scenes.png", "numbers.json"} | {f"scene-{number}.png" for number in range(10)}
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["present"] == {"miou": 1.0, "accuracy": 1.0}
    assert numbers["versions"]["torch"] == torch.__version__
    again = showcase.show(10, tmp_path / "again", console=Console(file=io.StringIO()))
    assert (again.shuffled, again.random) == (report.shuffled, report.random)


def test_sheet_shows_the_same_colours_for_truth_and_result():
    item = scene(HELD_OUT)
    labels = torch.from_numpy(item.labels)
    scores = torch.stack([(labels == index).float() for index in range(len(item.classes))])
    sheet = showcase.sheet([item], [Segmentation(labels, scores, item.classes, item.image)], words=2)
    tile, top = 192, sheet.height - 192 - 6
    tiles = [np.asarray(sheet)[top : top + tile, 6 + k * 198 : 6 + k * 198 + tile] for k in range(5)]
    assert np.array_equal(tiles[1], tiles[2])
    assert not np.array_equal(tiles[0], tiles[1])
    assert not np.array_equal(tiles[3], tiles[4])


def test_needs_a_scene(tmp_path):
    with pytest.raises(ValueError, match="scenes=0"):
        showcase.show(0, tmp_path)
