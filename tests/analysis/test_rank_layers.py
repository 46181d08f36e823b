"""The sweep over layers and noise levels against segmenting layer by layer; the guesses without labels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.analysis import Ranking, analyze, rank_layers
from seg4diff.backbones import find_backbone
from seg4diff.images import as_list
from seg4diff.kernels.types import MapRequest
from seg4diff.metrics import confusion_matrix, counts_of
from tests.support.images import random_image


@pytest.fixture(scope="module")
def scenes() -> dict[str, Any]:
    images = [random_image(64, 64, 1), random_image(48, 80, 2), random_image(64, 64, 3)]
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 2, image.shape[:2]) for image in images]
    labels[0][:5] = 255
    return {
        "images": images,
        "labels": labels,
        "classes": [("cat", "sofa"), ("red dog", "tree"), ("tree", "cat")],
    }


@pytest.mark.parametrize("batch_size", [1, 2])
def test_sweep_is_segmentation_layer_by_layer(pipe: Any, scenes: dict[str, Any], batch_size: int) -> None:
    ranking = rank_layers(pipe, **scenes, noise_levels=[8, 20], batch_size=batch_size, progress=False)
    assert ranking.scores.shape == (2, 3)
    names = ["cat", "sofa", "red dog", "tree"]
    for layer in range(3):
        total = torch.zeros(4, 4, dtype=torch.int64)
        for image, label, classes in zip(*scenes.values(), strict=True):
            own = torch.tensor([names.index(name) for name in classes])
            found = seg4diff.segment(pipe, image, classes, layers=layer).labels
            truth = torch.from_numpy(label)
            actual = torch.where(truth == 255, 255, own[truth * (truth != 255)])
            total += confusion_matrix(own[found], actual, 4)
        assert float(ranking.scores[0, layer]) == pytest.approx(counts_of(total).mean_iou, abs=2e-3)
    assert (
        len(set(ranking.scores.flatten().tolist())) == 6
    )  # all different: layers and levels cannot be mixed up
    assert 0 < ranking.scores.min() < ranking.scores.max() < 1


def test_labels_are_left_as_they_were(pipe: Any, scenes: dict[str, Any]) -> None:
    before = [label.copy() for label in scenes["labels"]]
    rank_layers(pipe, **scenes, layers=1, progress=False)
    for label, kept in zip(scenes["labels"], before, strict=True):
        assert np.array_equal(label, kept)


def test_without_labels_by_value_norms(pipe: Any) -> None:
    ranking = rank_layers(pipe, ["a cat", "a dog"], noise_levels=[2, 3], steps=3)
    report = analyze(pipe, ["a cat", "a dog"], noise_levels=[2, 3], steps=3)
    assert ranking.criterion == "value_norm_ratio"
    assert torch.equal(ranking.scores, report.by_layer.value_norm_ratio)
    best_of_each = ranking.scores.max(dim=0).values
    assert list(ranking.order) == best_of_each.argsort(descending=True).tolist()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_without_labels_by_mutual_information(pipe: Any, scenes: dict[str, Any], batch_size: int) -> None:
    """The mean over images of what `layers="auto"` looks at."""
    from seg4diff.segmentation.inputs import Noising, views_of
    from seg4diff.segmentation.layers import information_of_layers
    from seg4diff.segmentation.maps import Reading, run_maps
    from seg4diff.segmentation.prompts import plan_prompts

    given = {name: scenes[name] for name in ("images", "classes")}
    ranking = rank_layers(pipe, **given, layers=[0, 2], noise_levels=[8, 20], batch_size=batch_size)
    assert ranking.criterion == "mutual_information"
    expected = torch.zeros(2, 2, dtype=torch.float64)
    images, _ = as_list(scenes["images"])
    for view, names in zip(views_of(pipe, images, "aspect"), scenes["classes"], strict=True):
        plan = plan_prompts(names, find_backbone(pipe).name_span(pipe))
        for found in run_maps(
            pipe, [view], [[plan[0].text]], Reading(MapRequest(), [0, 2]), Noising([8, 20])
        ):
            expected[[8, 20].index(found.noise_level)] += information_of_layers(found.maps, plan) / 3
    assert torch.allclose(ranking.scores, expected, rtol=1e-4)
    assert len(set(ranking.scores.flatten().tolist())) == 4


def test_guesses_on_the_demo_model() -> None:
    """Mutual information ranks the expert first; the value-norm ratio does not."""
    from seg4diff.demo import HELD_OUT, scene
    from seg4diff.loading import load_pipeline

    pipe = load_pipeline("demo", "cpu")
    drawn = [scene(HELD_OUT + 700 + number) for number in range(2)]
    ranking = rank_layers(
        pipe, images=[one.image for one in drawn], classes=[one.classes for one in drawn], progress=False
    )
    assert ranking.order[0] == 2
    first, second = ranking.scores[0].sort(descending=True).values[:2]
    assert first > 10 * second
    assert ranking.images == 2


def test_order_and_best() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.4, 0.6]], dtype=torch.float64)
    ranking = Ranking("miou", (3, 7, 9), (8, 28), (515.0, 1000.0), scores, 4)
    assert ranking.order == (9, 7, 3)
    assert ranking.best == (9, 28)


SCORES = torch.tensor([[0.125, 0.5], [0.25, 0.375]], dtype=torch.float64)
RANKING = Ranking("miou", (3, 7), (8, 28), (515.1, 1000.0), SCORES, 4)


@pytest.mark.extra("viz", "matplotlib")
def test_figure() -> None:
    assert list(RANKING.plot().axes[0].lines[1].get_ydata()) == [0.25, 0.375]


def test_table_and_file(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(RANKING.table())
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert lines.index(["7", "50.0", "37.5"]) < lines.index(["3", "12.5", "25.0"])
    document = json.loads(RANKING.save(tmp_path / "ranking.json").read_text())
    assert document["scores"] == SCORES.tolist()
    assert document["order"] == [7, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None, "images": None}, "give images= and classes="),
        ({"labels": None, "prompts": "a cat"}, "leave prompts out"),
        ({"images": None}, "give images= and classes="),
        ({"classes": None}, "give images= and classes="),
        ({"prompts": "a cat"}, "prompts are made of the names"),
        ({"classes": [("cat",)]}, "3 images and 1 lists of classes"),
        ({"labels": []}, "3 images and 0 labels"),
        ({"images": []}, "images is empty"),
        ({"layers": 9}, "layer 9 is out of range"),
        ({"noise_levels": [99]}, "noise level 99"),
        ({"preset": "paper"}, r"labels\[1\] have shape \[48, 80\].*48 x 48"),
        (
            {"classes": [("cat",), ("dog", "tree"), ("tree", "cat")]},
            r"labels\[0\] reach from 0 to 1.* names 1;",
        ),
        ({"classes": [("cat", " "), ("dog", "tree"), ("tree", "cat")]}, "has no tokens"),
    ],
)
def test_bad_requests_are_named(
    pipe: Any, scenes: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rank_layers(pipe, **{**scenes, **changes})
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    assert seg4diff.segment(pipe, image, ["cat", "dog"], layers=0)
