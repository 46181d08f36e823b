"""The scenes of the demo: drawn from the seed alone, every pixel labelled, every name used."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from typing import Any

import numpy as np
import pytest

from seg4diff.demo.scenes import CLASSES, HELD_OUT, SIZE, Scene, scene


def _digest(drawn: Scene) -> str:
    content = drawn.image.tobytes() + drawn.labels.tobytes() + repr((drawn.classes, drawn.caption)).encode()
    return sha256(content).hexdigest()


@pytest.mark.parametrize("seed", [0, 1, HELD_OUT - 1, HELD_OUT, 2**63, 10**40], ids=str)
def test_every_pixel_is_labelled(seed: int) -> None:
    drawn = scene(seed)
    assert (drawn.image.mode, drawn.image.size) == ("RGB", (SIZE, SIZE))
    assert drawn.labels.shape == (SIZE, SIZE)
    assert drawn.labels.dtype == np.int64
    assert np.array_equal(np.unique(drawn.labels), np.arange(len(drawn.classes)))
    assert list(drawn.classes) == [name for name in CLASSES if name in drawn.classes]
    assert all(name in drawn.caption for name in drawn.classes)


def test_same_seed_same_scene_in_another_process() -> None:
    code = (
        "from hashlib import sha256; from seg4diff.demo.scenes import scene; d = scene(7);"
        "text = repr((d.classes, d.caption)).encode();"
        "print(sha256(d.image.tobytes() + d.labels.tobytes() + text).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == _digest(scene(7))
    assert _digest(scene(7)) != _digest(scene(8))


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
