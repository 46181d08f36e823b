"""Colours that differ, heat maps that point where the heat is, sheets that hold every tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from seg4diff.visualization import colorize, contact_sheet, heatmap_overlay, label_overlay, palette


def test_palette_is_deterministic_and_extends():
    longest = palette(500)
    assert longest.dtype == np.uint8
    assert longest.shape == (500, 3)
    assert longest[0].tolist() == [0xE6, 0x9F, 0x00]
    for count in (0, 1, 7, 8, 20, 256):
        assert np.array_equal(palette(count), longest[:count])
    assert len(np.unique(palette(256), axis=0)) == 256
    assert np.array_equal(longest[256:], longest[:244])
    with pytest.raises(ValueError, match="count=-1"):
        palette(-1)


def test_colorize():
    labels = torch.tensor([[0, 1], [2, 0]])
    assert np.array_equal(np.asarray(colorize(labels)), palette(3)[labels.numpy()])
    assert np.array_equal(np.asarray(colorize(labels.numpy(), 10)), palette(10)[labels.numpy()])
    with pytest.raises(ValueError, match=r"from 0 to 2, outside \[0, 2\)"):
        colorize(labels, 2)
    with pytest.raises(ValueError, match="integers"):
        colorize(labels.float())


def test_heat_is_bright_where_the_map_is_high():
    image = Image.new("RGB", (40, 20), "black")
    heat = torch.zeros(2, 4)
    heat[0, 3] = 5.0
    shown = np.asarray(heatmap_overlay(image, heat, alpha=1.0).convert("L"), int)
    assert shown.shape == (20, 40)
    assert np.unravel_index(shown.argmax(), shown.shape)[1] >= 34
    assert np.unravel_index(shown.argmax(), shown.shape)[0] <= 5
    assert shown[15:, :20].max() < 40
    scaled = heatmap_overlay(image, heat.numpy() * 7 - 3, alpha=1.0)
    assert np.abs(np.asarray(scaled.convert("L"), int) - shown).max() <= 1
    rising = np.asarray(heatmap_overlay(image, torch.arange(40.0)[None], alpha=1.0).convert("L"), int)
    assert (np.diff(rising[0]) >= 0).all()


def test_heatmap_alpha_and_bad_maps():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    heat = torch.rand(4, 4)
    assert np.array_equal(np.asarray(heatmap_overlay(image, heat, alpha=0.0)), np.asarray(image))
    assert len(np.unique(np.asarray(heatmap_overlay(image, torch.ones(3, 3), alpha=1.0)))) <= 3
    for bad, message in (
        (torch.rand(2, 3, 4), "shape"),
        (torch.zeros(0, 4), "shape"),
        (torch.full((2, 2), float("nan")), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            heatmap_overlay(image, bad)
    with pytest.raises(ValueError, match="alpha=-1"):
        heatmap_overlay(image, heat, alpha=-1)


def test_overlay_sizes_must_agree():
    with pytest.raises(ValueError, match="3 x 3, labels are 2 x 2"):
        label_overlay(np.zeros((2, 2), int), ["a"], Image.new("RGB", (3, 3)))


def test_contact_sheet_holds_every_tile():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)]
    tiles = [
        ("wide", Image.new("RGB", (80, 20), colours[0])),
        ("tall", Image.new("RGB", (10, 400), colours[1])),
        ("grey, with a title that is much too long for its tile", Image.new("L", (5, 5), 77)),
        ("small", Image.new("RGB", (1, 1), colours[3])),
    ]
    sheet = np.asarray(contact_sheet([tiles[:3], tiles[3:]], tile=64))
    for colour, pixels in (
        (colours[0], 64 * 16),
        (colours[1], 64 * 2),
        ((77, 77, 77), 64 * 64),
        (colours[3], 64 * 64),
    ):
        assert int((sheet == colour).all(-1).sum()) == pixels
    assert sheet.shape[1] == 3 * 64 + 4 * 6
    for nothing in ([], [[], []]):
        with pytest.raises(ValueError, match="rows is empty"):
            contact_sheet(nothing)
    with pytest.raises(ValueError, match="tile=0"):
        contact_sheet([tiles], tile=0)
