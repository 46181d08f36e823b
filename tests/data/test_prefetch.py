"""Images are read while the model runs, in order, and what is wrong with them is told, not raised."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
from PIL import Image

from seg4diff.data.items import Item
from seg4diff.data.prefetch import Failure, Loaded, load, load_ahead


def item(name: str, wait: threading.Event | None = None, size: tuple[int, int] = (3, 2)) -> Item:
    def read_image() -> Image.Image:
        if wait is not None:
            assert wait.wait(timeout=10)
        return Image.new("RGB", size)

    return Item(name, read_image, lambda: np.full((2, 3), int(name), np.uint8))


def test_groups_come_in_order_whatever_is_read_first() -> None:
    late = threading.Event()
    items = [item("0", late), item("1"), item("2"), item("3"), item("4")]
    threading.Timer(0.05, late.set).start()
    groups = list(load_ahead(items, [[0, 1], [3], [4]], threads=3))
    assert [[loaded.index for loaded in group] for group in groups] == [[0, 1], [3], [4]]
    for group in groups:
        for loaded in group:
            assert isinstance(loaded, Loaded)
            assert (loaded.labels == loaded.index).all()


def test_the_next_group_is_read_before_it_is_asked_for() -> None:
    read: list[str] = []
    third = threading.Event()

    def read_image(name: str) -> Image.Image:
        read.append(name)
        if len(read) == 3:
            third.set()
        return Image.new("RGB", (1, 1))

    items = [Item(str(i), partial(read_image, str(i)), lambda: np.zeros((1, 1), np.uint8)) for i in range(8)]
    loader = load_ahead(items, [[i] for i in range(8)], threads=1, ahead=2)
    next(loader)
    assert third.wait(timeout=60)
    assert read == ["0", "1", "2"]  # the one asked for and two ahead, no more
    loader.close()
    assert len(read) <= 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("a.png holds 7"), "unreadable image (a: a.png holds 7)"),
        (FileNotFoundError("a.png is gone"), "missing file (a.png is gone)"),
        (OSError("i/o"), "unreadable image (a: i/o)"),
    ],
)
def test_what_is_wrong_is_told(error: Exception, reason: str) -> None:
    def fail() -> Image.Image:
        raise error

    found = load(Item("a", fail, lambda: np.zeros((1, 1), np.uint8)), 5)
    assert found == Failure(5, "a", reason)


def test_sizes_must_agree() -> None:
    found = load(item("1", size=(2, 3)), 0)
    assert isinstance(found, Failure)
    assert found.reason == "the image is 2 x 3, its label map 3 x 2 (width x height)"


def test_bugs_are_not_taken_for_bad_files() -> None:
    def bug() -> Image.Image:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(load_ahead([Item("a", bug, lambda: np.zeros((1, 1), np.uint8))], [[0]]))
