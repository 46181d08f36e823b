"""The main job end to end on the bundled model: scenes it never saw, segmented by name.

Thresholds stand well below what `seg4diff demo --scenes 200` measures, so that they fail for a broken feature
and not for another version of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import seg4diff
from benchmarks.discover import DISTRACTORS, measure, with_distractors
from seg4diff.demo import CLASSES, HELD_OUT, Scene, scene
from seg4diff.evaluation.showcase import Score, compare, in_vocabulary, labels_of
from seg4diff.kernels.testing import assert_accurate
from tests.support.hooked import hooked_projections, image_to_text

SCENES = 24


@pytest.fixture(scope="module")
def pipe() -> Any:
    return seg4diff.patch(seg4diff.load_pipeline("demo", "cpu"))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(HELD_OUT + 5000 + number) for number in range(SCENES)]


@pytest.fixture(scope="module")
def score(pipe: Any, scenes: list[Scene]) -> Callable[..., Score]:
    def measure(names: Sequence[Sequence[str]], model: Any = pipe, **options: Any) -> Score:
        found = seg4diff.segment(
            model, [s.image for s in scenes], names, batch_size=8, progress=False, **options
        )
        assert isinstance(found, list)
        return compare([in_vocabulary(s.labels, s.classes) for s in scenes], map(labels_of, found))

    return measure


@pytest.fixture(scope="module")
def oracle(score: Callable[..., Score], scenes: list[Scene]) -> Score:
    return score([s.classes for s in scenes])


def test_names_find_their_pixels(oracle: Score) -> None:
    assert oracle.miou >= 0.75
    assert oracle.accuracy >= 0.9


def test_all_names_at_once(score: Callable[..., Score], scenes: list[Scene], oracle: Score) -> None:
    everything = score([CLASSES] * SCENES)
    assert 0.45 <= everything.miou <= oracle.miou


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_all_names_at_once_with_presence(
    pipe: Any, score: Callable[..., Score], scenes: list[Scene], oracle: Score, preset: str
) -> None:
    """All 18 names and others that the model never saw: better than `default` with the names present."""
    names = ["tree", "car", *CLASSES, "house", "dog"]
    found = seg4diff.segment(
        pipe, [s.image for s in scenes], names, preset=preset, batch_size=8, progress=False
    )
    present = torch.stack([result.presence >= 0.5 for result in found])
    true = torch.tensor([[name in s.classes for name in names] for s in scenes])
    assert (present != true).sum() <= 3
    assert all({result.classes[i] for i in result.labels.unique()} <= set(names) for result in found)
    everything = score([CLASSES] * SCENES, preset=preset)
    assert everything.miou >= max(0.9, oracle.miou + 0.05)
    hard = [scene(HELD_OUT + 5000 + number, "hard") for number in range(8)]
    truths = [in_vocabulary(s.labels, s.classes) for s in hard]
    one, other = (
        compare(truths, map(labels_of, seg4diff.segment(
            pipe, [s.image for s in hard], CLASSES, preset=p, batch_size=8, progress=False
        )))
        for p in (preset, "default")
    )  # fmt: skip
    assert one.miou >= other.miou + 0.08


def test_names_are_found_among_distractors(pipe: Any, scenes: list[Scene]) -> None:
    """18 names and 30 that the model never read, in four prompts: `python -m benchmarks.discover`."""
    figures = measure(pipe, scenes[:8], with_distractors(DISTRACTORS))
    assert figures["right"] >= 93
    assert figures["distractor"] < 1
    assert figures["forwards"] == 4


def test_shuffled_names_find_nothing(score: Callable[..., Score], scenes: list[Scene], oracle: Score) -> None:
    """The recipe with wrong names: what is left is what the shape of the regions gives away."""
    rng = np.random.default_rng(0)
    absent = [
        list(rng.permutation([name for name in CLASSES if name not in s.classes]))[: len(s.classes)]
        for s in scenes
    ]
    assert score(absent).miou <= 0.05
    assert oracle.miou > 0.5


@pytest.mark.slow
def test_the_expert_layer_stands_out(pipe: Any, score: Callable[..., Score], scenes: list[Scene]) -> None:
    (expert,) = pipe.transformer.config["_seg4diff_expert_layers"]
    names = [s.classes for s in scenes]
    by_layer = [score(names, layers=layer).miou for layer in range(len(pipe.transformer.transformer_blocks))]
    others = [miou for layer, miou in enumerate(by_layer) if layer != expert]
    assert by_layer[expert] >= max(others) + 0.05, by_layer


def test_random_weights_know_nothing(score: Callable[..., Score], scenes: list[Scene]) -> None:
    pipe = seg4diff.load_pipeline("demo", "cpu")
    torch.manual_seed(0)
    for parameter in pipe.transformer.parameters():
        parameter.data = (
            torch.randn_like(parameter) * parameter.std() if parameter.numel() > 1 else parameter.data
        )
    assert score([s.classes for s in scenes], seg4diff.patch(pipe)).miou <= 0.25


@torch.no_grad()
def test_maps_of_every_layer_equal_hooks(pipe: Any, scenes: list[Scene]) -> None:
    """In a pipeline call with classifier-free guidance, at both text lengths the pipeline has by default."""
    for length in (77, 256):
        with hooked_projections(pipe.transformer) as projections, seg4diff.capture(pipe) as captured:
            pipe(scenes[0].caption, num_inference_steps=1, max_sequence_length=length, output_type="latent",
                 generator=torch.Generator().manual_seed(0))  # fmt: skip
        assert len(captured.records) == len(pipe.transformer.transformer_blocks)
        for record in captured.records:
            conditional = {name: tensor[1:] for name, tensor in projections[record.layer].items()}
            assert record.maps is not None
            exact = image_to_text(conditional).mean(dim=1)
            baseline = image_to_text(conditional, torch.float32).mean(dim=1)
            assert_accurate(record.maps, exact, baseline, name=f"layer {record.layer}")
