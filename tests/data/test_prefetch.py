"""Pictures are read while the model runs, in order, and what is wrong with them is told, not raised."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
from PIL import Image

from seg4diff.data.prefetch import Failure, Loaded, load, load_ahead
from seg4diff.data.registry import Sample


def sample(name: str, wait: threading.Event | None = None, size: tuple[int, int] = (3, 2)) -> Sample:
    def read_image() -> Image.Image:
        if wait is not None:
            assert wait.wait(timeout=10)
        return Image.new("RGB", size)

    return Sample(name, read_image, lambda: np.full((2, 3), int(name), np.uint8))


def test_groups_come_in_order_whatever_is_read_first() -> None:
    late = threading.Event()
    samples = [sample("0", late), sample("1"), sample("2"), sample("3"), sample("4")]
    threading.Timer(0.05, late.set).start()
    groups = list(load_ahead(samples, [[0, 1], [3], [4]], threads=3))
    assert [[item.index for item in group] for group in groups] == [[0, 1], [3], [4]]
    for group in groups:
        for item in group:
            assert isinstance(item, Loaded)
            assert (item.labels == item.index).all()


def test_the_next_group_is_read_before_it_is_asked_for() -> None:
    read: list[str] = []
    third = threading.Event()

    def read_image(name: str) -> Image.Image:
        read.append(name)
        if len(read) == 3:
            third.set()
        return Image.new("RGB", (1, 1))

    samples = [
        Sample(str(i), partial(read_image, str(i)), lambda: np.zeros((1, 1), np.uint8)) for i in range(8)
    ]
    loader = load_ahead(samples, [[i] for i in range(8)], threads=1, ahead=2)
    next(loader)
    assert third.wait(timeout=60)
    assert read == ["0", "1", "2"]  # the one asked for and two ahead, no more
    loader.close()
    assert len(read) <= 3


@pytest.mark.parametrize(
    "error", [ValueError("a.png holds 7"), FileNotFoundError("a.png is gone"), OSError("i/o")]
)
def test_what_is_wrong_is_told(error: Exception) -> None:
    def fail() -> Image.Image:
        raise error

    item = load(Sample("a", fail, lambda: np.zeros((1, 1), np.uint8)), 5)
    assert item == Failure(5, "a", str(error))


def test_sizes_must_agree() -> None:
    item = load(sample("1", size=(2, 3)), 0)
    assert isinstance(item, Failure)
    assert item.reason == "the picture is 2 x 3, its label map 3 x 2 (width x height)"


def test_bugs_are_not_taken_for_bad_files() -> None:
    def bug() -> Image.Image:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(load_ahead([Sample("a", bug, lambda: np.zeros((1, 1), np.uint8))], [[0]]))
