"""The choice of layers: mutual information by its definition, hand-made maps, and the demo model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import seg4diff
from seg4diff.segmentation.layers import information_of_layers, informative_layers, mutual_information
from seg4diff.segmentation.prompts import PlannedPrompt
from tests.support.images import random_image


def test_mutual_information_is_its_definition() -> None:
    """Of the joint distribution of place and word, no word included, as entropies."""
    shares = torch.rand(3, 10, 4, generator=torch.Generator().manual_seed(0))
    shares = shares / shares.sum(dim=-1, keepdim=True) * torch.tensor([1.0, 0.5, 1e-3])[:, None, None]
    found = mutual_information(shares)
    assert found.dtype == torch.float64
    for layer, information in zip(shares.double().numpy(), found.tolist(), strict=True):
        joint = np.concatenate([layer, 1 - layer.sum(axis=1, keepdims=True)], axis=1).clip(1e-15) / 10

        def entropy(p: np.ndarray) -> float:
            return float(-(p * np.log(p)).sum())

        expected = entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0)) - entropy(joint.ravel())
        assert information == pytest.approx(expected, rel=1e-6)
        assert information > 0


def test_extremes_of_mutual_information() -> None:
    halves = torch.zeros(8, 2)
    halves[:4, 0] = halves[4:, 1] = 1.0
    single = halves[:, :1]
    alike = torch.full((8, 2), 0.3)
    assert float(mutual_information(halves)) == pytest.approx(math.log(2))
    assert float(mutual_information(single)) == pytest.approx(math.log(2))  # against no word
    assert float(mutual_information(alike)) == pytest.approx(0, abs=1e-12)
    assert 0 < float(mutual_information(0.01 * halves)) < 0.01 * math.log(2) + 1e-9


def layered_maps() -> tuple[torch.Tensor, tuple[PlannedPrompt, ...]]:
    """Four layers, 16 image tokens, names at columns 1 to 2 and 4; layer 2 reads each at its own place."""
    maps = torch.full((4, 16, 6), 0.01)
    maps[0, :, 1] = 0.5  # reads one name everywhere
    maps[1, :8, 0] = maps[1, 8:, 3] = 0.9  # reads other tokens than names, by place
    maps[2, :8, 1:3] = 0.2
    maps[2, 8:, 4] = 0.4
    maps[3, ::2, 1] = 0.05  # as layer 2, and weakly
    maps[3, 1::2, 4] = 0.05
    return maps, (PlannedPrompt("red cat sofa", ((1, 2), (4,))),)


def test_the_layer_that_tells_names_apart_is_found() -> None:
    maps, plan = layered_maps()
    information = information_of_layers([maps[0:4]], plan)
    assert informative_layers(information) == (2,)
    order = torch.tensor([3, 0, 2, 1])
    assert informative_layers(information_of_layers([maps[order]], plan)) == (2,)  # of another order
    assert informative_layers(information_of_layers([maps[[0, 2, 1, 3]]], plan)) == (1,)
    two_prompts = (PlannedPrompt("red cat", ((1, 2),)), PlannedPrompt("sofa", ((4,),)))
    halves = information_of_layers([maps, maps], two_prompts)
    alone = [information_of_layers([maps], (prompt,)) for prompt in two_prompts]
    assert torch.allclose(halves, (alone[0] + alone[1]) / 2)
    assert informative_layers(halves) == (2,)


def test_of_an_empty_prompt_all_tokens_but_the_first_count() -> None:
    maps = torch.full((2, 16, 6), 0.01)
    maps[0, :8, 0] = 0.9  # the first token, by place
    maps[1, :8, 3] = maps[1, 8:, 5] = 0.05
    assert informative_layers(information_of_layers([maps], (PlannedPrompt("", ()),))) == (1,)


@pytest.mark.parametrize(
    ("information", "chosen"),
    [
        ([0.1, 0.9, 0.44, 0.0], (1,)),
        ([0.46, 0.2, 0.9], (0, 2)),
        ([0.8, 0.9, 0.7, 0.6, 1.0], (0, 1, 4)),
        ([0.0, 0.0], (0, 1)),
    ],
)
def test_at_most_three_layers_of_half_the_largest(information: list[float], chosen: tuple[int, ...]) -> None:
    assert informative_layers(torch.tensor(information)) == chosen


def test_segment_with_chosen_layers_is_segment_with_those_layers(pipe: Any) -> None:
    """Also where no expert is known, in batches of several sizes, and with a single name."""
    images = [random_image(seed=1), random_image(64, 96, seed=2), random_image(seed=3)]
    names = [["cat", "sofa"], ["red dog"], ["tree", "cat"]]
    automatic = seg4diff.segment(pipe, images, names, layers="auto", batch_size=2, progress=False)
    assert isinstance(automatic, list)
    unknown = seg4diff.segment(pipe, images, names, progress=False)
    assert isinstance(unknown, list)
    for image, own, result, other in zip(images, names, automatic, unknown, strict=True):
        layers = result.metadata["layers"]
        assert 1 <= len(layers) <= 3
        alone = seg4diff.segment(pipe, image, own, layers=list(layers))
        assert torch.allclose(result.scores, alone.scores, rtol=1e-4)
        assert torch.allclose(other.scores, alone.scores, rtol=1e-4)


@pytest.mark.parametrize("conditions", ["clean", "hard"])
def test_the_expert_of_the_demo_model_is_found(conditions: Any) -> None:
    from seg4diff.demo import CLASSES, HELD_OUT, scene
    from seg4diff.loading import load_pipeline

    pipe = load_pipeline("demo", "cpu")
    scenes = [scene(HELD_OUT + 600 + number, conditions) for number in range(6)]
    names = [list(one.classes) for one in scenes[:2]] + [[one.classes[0]] for one in scenes[2:4]]
    names += [list(CLASSES)] * 2
    results = seg4diff.segment(pipe, [one.image for one in scenes], names, layers="auto", progress=False)
    assert isinstance(results, list)
    assert [result.metadata["layers"] for result in results] == [(2,)] * 6
