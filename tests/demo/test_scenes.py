"""The scenes of the demo: drawn from the seed alone, every pixel labelled, every name used."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from typing import Any, get_args

import numpy as np
import pytest
from scipy.ndimage import maximum_filter

from seg4diff.demo.scenes import CLASSES, HELD_OUT, SIZE, THINGS, Conditions, Scene, scene


def _pixels(seed: int, conditions: Conditions = "clean") -> np.ndarray:
    return np.asarray(scene(seed, conditions).image, np.float64)


def _digest(drawn: Scene) -> str:
    text = repr((drawn.classes, drawn.caption)).encode()
    arrays = drawn.labels.tobytes() + drawn.instances.tobytes()
    return sha256(drawn.image.tobytes() + arrays + text).hexdigest()


@pytest.mark.parametrize("seed", [0, 1, HELD_OUT - 1, HELD_OUT, 2**63, 10**40], ids=str)
def test_every_pixel_is_labelled(seed: int) -> None:
    drawn = scene(seed)
    assert (drawn.image.mode, drawn.image.size) == ("RGB", (SIZE, SIZE))
    assert drawn.labels.shape == (SIZE, SIZE)
    assert drawn.labels.dtype == np.int64
    assert np.array_equal(np.unique(drawn.labels), np.arange(len(drawn.classes)))
    assert list(drawn.classes) == [name for name in CLASSES if name in drawn.classes]
    assert all(name in drawn.caption for name in drawn.classes)


@pytest.mark.parametrize("conditions", ["clean", "hard", "touching"])
def test_same_seed_same_scene_in_another_process(conditions: Conditions) -> None:
    code = (
        "import sys; from hashlib import sha256; from seg4diff.demo.scenes import scene;"
        "d = scene(7, sys.argv[1]);"
        "text = repr((d.classes, d.caption)).encode();"
        "arrays = d.labels.tobytes() + d.instances.tobytes();"
        "print(sha256(d.image.tobytes() + arrays + text).hexdigest())"
    )
    command = [sys.executable, "-c", code, conditions]
    other = subprocess.run(command, check=True, capture_output=True, text=True)
    assert other.stdout.strip() == _digest(scene(7, conditions))
    assert _digest(scene(7, conditions)) != _digest(scene(8, conditions))


def test_hard_conditions_change_pixels_and_nothing_else() -> None:
    for seed in range(HELD_OUT, HELD_OUT + 4):
        clean, hard = scene(seed), scene(seed, "hard")
        assert np.array_equal(hard.labels, clean.labels)
        assert (hard.classes, hard.caption) == (clean.classes, clean.caption)
        changed = np.abs(_pixels(seed, "hard") - _pixels(seed)).max(axis=2)
        assert (changed > 3).mean() > 0.9  # everywhere
        assert np.median(changed) < 80  # and it is still that scene


def test_hard_images_are_noisy_blurred_and_shadowed() -> None:
    """What is left after fitting a clean, flat area: noise of sigma 13, and steps where no label changes."""
    flat = scene(1)  # snow: hardly any pattern of its own
    assert flat.classes[-1] == "snow"
    hard = _pixels(1, "hard")
    same = np.ones((SIZE, SIZE), bool)
    same &= flat.labels == flat.classes.index("snow")
    inside = same[1:-1, 1:-1] & same[:-2, 1:-1] & same[2:, 1:-1] & same[1:-1, :-2] & same[1:-1, 2:]
    # second differences along both axes: of white noise of sigma s, their deviation is sqrt(20) s
    curved = 4 * hard[1:-1, 1:-1] - hard[:-2, 1:-1] - hard[2:, 1:-1] - hard[1:-1, :-2] - hard[1:-1, 2:]
    noise = curved[inside].std() / np.sqrt(20)
    assert 11 < noise < 15
    brightness = hard.mean(axis=2)[same]
    assert np.percentile(brightness, 95) / np.percentile(brightness, 5) > 1.25


def test_instances_are_the_things() -> None:
    for seed in range(HELD_OUT, HELD_OUT + 6):
        for conditions in get_args(Conditions):
            drawn = scene(seed, conditions)
            names = np.array(drawn.classes)[drawn.labels]
            assert np.array_equal(drawn.instances >= 0, np.isin(names, THINGS))
            numbers = np.unique(drawn.instances)
            assert np.array_equal(numbers, np.arange(-1, len(numbers) - 1))
            for number in numbers[1:]:
                assert len(np.unique(names[drawn.instances == number])) == 1
            if conditions != "touching":
                assert len(numbers) - 1 == len(np.unique(names[drawn.instances >= 0]))


def test_touching_things_touch() -> None:
    """Each of the most frequent class has a neighbouring pixel of another one of it, and is seen."""
    for seed in range(HELD_OUT, HELD_OUT + 12):
        drawn = scene(seed, "touching")
        of_instance = [
            drawn.labels[drawn.instances == number][0] for number in range(drawn.instances.max() + 1)
        ]
        kind = np.bincount(of_instance).argmax()
        several = [number for number, label in enumerate(of_instance) if label == kind]
        assert 2 <= len(several) <= 3
        for number in several:
            inside = drawn.instances == number
            assert inside.sum() > 300
            near = np.unique(drawn.instances[maximum_filter(inside, 3) & ~inside])
            assert set(near) & (set(several) - {number})
        assert f"{drawn.classes[kind]}" in drawn.caption


def test_unknown_conditions_are_named() -> None:
    with pytest.raises(ValueError, match=r"'foggy'.*'clean', 'hard', 'touching'"):
        scene(1, "foggy")  # type: ignore[arg-type]


def test_numpy_integers_are_seeds() -> None:
    assert _digest(scene(np.int64(7))) == _digest(scene(7))  # type: ignore[arg-type]


def test_every_class_appears() -> None:
    seen = {name for seed in range(120) for name in scene(HELD_OUT + seed).classes}
    assert seen == set(CLASSES)


@pytest.mark.parametrize("seed", [True, np.True_, 1.0, "1", None], ids=repr)
def test_seed_must_be_an_integer(seed: Any) -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        scene(seed)


def test_seed_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="-1"):
        scene(-1)
