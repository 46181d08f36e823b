"""Passes over an image: what is averaged, how it is mirrored back, and the layer of the outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

import seg4diff
from seg4diff.attention.patch import patch_of
from seg4diff.backbones.base import Recipe
from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.inputs import Noising, views_of
from seg4diff.segmentation.maps import Reading, run_maps
from seg4diff.segmentation.passes import run_scores
from seg4diff.segmentation.presets import PRESETS, Preset
from seg4diff.segmentation.prompts import plan_prompts
from seg4diff.segmentation.scores import scores_of_names
from tests.segmentation.test_scores import densely
from tests.support import tiny

NAMES = ("cat", "red sofa", "purple unicorn")
PLAIN = replace(PRESETS["default"], passes=1)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return seg4diff.patch(tiny.pipeline(layers=4))


def picture(width: int = 80, height: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def scores_by(pipe: Any, images: list[Image.Image], preset: Preset, **options: Any) -> list[Tensor]:
    plan = plan_prompts(NAMES, patch_of(pipe).backbone.name_span(pipe))
    views = views_of(pipe, images, "aspect")
    layers, noising = options.pop("layers", (1,)), Noising(**options)
    found = run_scores(pipe, views, [plan] * len(images), preset, layers, noising, progress=False)
    return [one.scores for one in sorted(found, key=lambda one: one.index)]


def one_pass(pipe: Any, image: Image.Image, seed: int, layer: int, level: int = 8) -> tuple[Tensor, Tensor]:
    """Scores and outputs of a pass, by `run_maps`."""
    plan = plan_prompts(NAMES, patch_of(pipe).backbone.name_span(pipe))
    (found,) = run_maps(
        pipe, views_of(pipe, [image], "aspect"), [[plan[0].text]],
        Reading(MapRequest(), 1, (layer,)), Noising((level,), seed=seed), progress=False,
    )  # fmt: skip
    assert found.outputs is not None
    height, width = found.grid
    return scores_of_names([found.maps[0][0]], plan, found.grid), found.outputs[0][0].view(height, width, -1)


def test_passes_are_averaged_on_logarithms_and_mirrored_back(pipe: Any) -> None:
    image = picture()
    passes = [
        one_pass(pipe, image, 5, 3),
        one_pass(pipe, ImageOps.mirror(image), 6, 3),
        one_pass(pipe, image, 7, 3),
    ]
    straight = [passes[0][0], passes[1][0].flip(-1), passes[2][0]]
    for count in (1, 2, 3):
        (found,) = scores_by(pipe, [image], replace(PLAIN, passes=count), seed=5)
        expected = torch.stack(straight[:count]).double().log().mean(dim=0).exp()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    (found,) = scores_by(pipe, [image], replace(PLAIN, passes=2), seed=5)
    not_mirrored = (passes[0][0] * passes[1][0]).sqrt()
    of_probabilities = (straight[0] + straight[1]) / 2
    upside_down = (passes[0][0] * passes[1][0].flip(-2)).sqrt()
    same_noise = (passes[0][0] * one_pass(pipe, ImageOps.mirror(image), 5, 3)[0].flip(-1)).sqrt()
    for wrong in (not_mirrored, of_probabilities, upside_down, same_noise):
        assert (found / wrong).log().abs().max() > 1e-3


def test_the_kernel_is_of_outputs_behind_the_expert(pipe: Any) -> None:
    """Two layers behind the last one that is read; the mean of the passes' outputs, mirrored back."""
    image = picture()
    recipe = Recipe(tau=0.3, behind=2)
    first, second = one_pass(pipe, image, 0, 3), one_pass(pipe, ImageOps.mirror(image), 1, 3)
    logs = (first[0].log() + second[0].flip(-1).log()) / 2
    preset = replace(PLAIN, passes=2, spread=True, recipe=recipe)
    (found,) = scores_by(pipe, [image], preset)
    outputs = (first[1] + second[1].flip(1)) / 2
    torch.testing.assert_close(found.double(), densely(logs.exp(), outputs, 0.3), rtol=1e-3, atol=0)
    nearer = one_pass(pipe, image, 0, 2)[1] + one_pass(pipe, ImageOps.mirror(image), 1, 2)[1].flip(1)
    for wrong in (first[1] + second[1], nearer):
        assert (found / densely(logs.exp(), wrong, 0.3)).log().abs().max() > 1e-3
    (last,) = scores_by(
        pipe, [image], replace(preset, recipe=replace(recipe, behind=9))
    )  # there are 4 layers
    torch.testing.assert_close(last, found)


def test_the_model_stops_after_the_last_layer_that_is_read(pipe: Any) -> None:
    ran: list[int] = []
    blocks = patch_of(pipe).blocks
    handles = [
        block.attn.to_q.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
        for n, block in enumerate(blocks)
    ]
    for spread, behind, expected in ((False, 1, [0, 1]), (True, 1, [0, 1, 2]), (True, 2, [0, 1, 2, 3])):
        scores_by(pipe, [picture()], replace(PLAIN, spread=spread, recipe=Recipe(behind=behind)))
        assert ran == expected
        ran.clear()
    for handle in handles:
        handle.remove()


def test_noise_levels(pipe: Any) -> None:
    """A measured level is taken by the presets that ask for it, and by no other."""
    image = picture()
    measured = replace(PLAIN, recipe=Recipe(level=4))
    torch.testing.assert_close(scores_by(pipe, [image], measured)[0], one_pass(pipe, image, 0, 3)[0])
    found = scores_by(pipe, [image], replace(measured, measured_level=True))[0]
    torch.testing.assert_close(found, one_pass(pipe, image, 0, 3, level=4)[0])
    assert (found / one_pass(pipe, image, 0, 3)[0]).log().abs().max() > 1e-2


def test_batches_equal_single_images(pipe: Any) -> None:
    images = [picture(80, 48, 0), picture(48, 80, 1), picture(80, 48, 2)]
    preset = replace(PRESETS["best"], recipe=Recipe())
    together = scores_by(pipe, images, preset, batch_size=4)
    for image, found in zip(images, together, strict=True):
        torch.testing.assert_close(found, scores_by(pipe, [image], preset)[0], rtol=1e-3, atol=0)
    assert (together[0] / together[2]).log().abs().max() > 1e-2


def test_the_recipe_is_the_models_own(pipe: Any) -> None:
    """From the configuration of the transformer, or the defaults; it is written and read with the model."""
    backbone = patch_of(pipe).backbone
    assert backbone.recipe(pipe.transformer) == Recipe()
    demo = seg4diff.load_pipeline("demo", "cpu").transformer
    recipe = backbone.recipe(demo)
    assert (recipe.level, recipe.behind, recipe.tau, recipe.upsample) == (4, 2, 0.1, "bilateral")
    false, missed = ([rates[column] for rates in recipe.calibration] for column in (1, 2))
    assert false == sorted(false, reverse=True)
    assert missed == sorted(missed)
