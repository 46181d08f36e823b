"""The model loop: every image, prompt, layer and noise level gets the maps it would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from seg4diff.kernels.types import MapRequest
from seg4diff.segmentation.inputs import Noising, check_levels, views_of
from seg4diff.segmentation.maps import Reading, run_maps
from tests.support.images import random_image

IMAGES = [Image.fromarray((255 * random_image(*size, seed)).astype("uint8")) for seed, size in
          enumerate([(64, 64), (48, 80), (64, 64)])]  # fmt: skip
PROMPTS = [["a cat"], ["a dog", "a sofa", "a tree"], ["a red dog", "a cat"]]


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_levels_layers_and_prompts_are_those_of_runs_apart(pipe: Any, heads: Any) -> None:
    views = views_of(pipe, IMAGES, "aspect")
    request = MapRequest(heads=heads)
    noising = Noising([20, 8], 28, batch_size=2)
    together = list(run_maps(pipe, views, PROMPTS, Reading(request, [2, 0]), noising, progress=False))
    assert sorted((found.noise_level, found.index) for found in together) == [
        (level, index) for level in (8, 20) for index in range(3)
    ]
    for found in together:
        assert len(found.maps) == len(PROMPTS[found.index])
        for prompt, maps in zip(PROMPTS[found.index], found.maps, strict=True):
            assert maps.shape == (2, *((2,) if heads == "each" else ()), found.grid[0] * found.grid[1], 154)
            for position, layer in enumerate((0, 2)):
                (alone,) = run_maps(
                    pipe, [views[found.index]], [[prompt]], Reading(request, layer),
                    Noising([found.noise_level], 28), progress=False,
                )  # fmt: skip
                assert alone.timestep == found.timestep
                torch.testing.assert_close(maps[position], alone.maps[0][0], rtol=1e-4, atol=0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    for found in together:
        assert found.timestep == pytest.approx(float(scheduler.timesteps[-found.noise_level]), rel=1e-5)
    # The comparison distinguishes them: no two of these maps are within the tolerance.
    one = [found.maps[0] for found in together if found.index == 0]
    other = [found.maps for found in together if found.index == 2]
    for a, b in ((one[0], one[1]), (one[0][0], one[0][1]), (other[0][0], other[0][1])):
        assert (a / b - 1).abs().max() > 1e-2


def test_outputs_and_seeds_are_those_of_runs_apart(pipe: Any) -> None:
    """Outputs of every image, prompt and layer; and images that have seeds of their own."""
    views = views_of(pipe, IMAGES, "aspect")
    reading = Reading(MapRequest(), 1, [0, 2])
    together = {
        found.index: found
        for found in run_maps(pipe, views, PROMPTS, reading, Noising(seed=[3, 4, 5], batch_size=2))
    }
    for index, prompts in enumerate(PROMPTS):
        (alone,) = run_maps(pipe, [views[index]], [prompts], reading, Noising(seed=3 + index))
        (other,) = run_maps(pipe, [views[index]], [prompts], reading, Noising(seed=4 + index))
        outputs, apart, wrong = together[index].outputs, alone.outputs, other.outputs
        assert outputs is not None
        assert apart is not None
        assert wrong is not None
        for number in range(len(prompts)):
            assert outputs[number].shape == (2, outputs[number].shape[1], 16)
            torch.testing.assert_close(outputs[number], apart[number], rtol=1e-4, atol=1e-6)
            assert (outputs[number] - wrong[number]).abs().max() > 1e-3
        torch.testing.assert_close(together[index].maps[0], alone.maps[0], rtol=1e-4, atol=0)
        assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-3
    (without,) = run_maps(pipe, views[:1], PROMPTS[:1], Reading(MapRequest(), 1), progress=False)
    assert without.outputs is None


@pytest.mark.parametrize(
    ("levels", "steps", "message"),
    [
        ([], 28, "at least one level"),
        ([8, 8], 28, "each once"),
        ([29], 28, "noise level 29 is out of range: 1 to 28"),
        ([0], 28, "noise level 0"),
        ([True], 28, "noise level True"),
        ([1], 0, "steps=0 must be a positive integer"),
    ],
)
def test_bad_levels_are_named(levels: list[int], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_levels(levels, steps)
