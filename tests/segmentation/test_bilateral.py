"""Joint bilateral upsampling against a loop over pixels and tokens in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from seg4diff.segmentation import bilateral
from seg4diff.segmentation.bilateral import upsample_bilateral

WHITE = (0.950470, 1.0, 1.088830)  # D65, from the primaries of sRGB


def picture(width: int, height: int) -> Image.Image:
    """Two colours with a slanted edge, and noise."""
    rows, columns = np.mgrid[:height, :width]
    left = columns + 0.5 * rows < 0.6 * width
    pixels = np.where(left[..., None], (200, 60, 40), (40, 120, 190)).astype(float)
    pixels += np.random.default_rng(0).normal(0, 12, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def lab(pixel: tuple[int, ...]) -> np.ndarray:
    """CIE Lab / 100 of an sRGB pixel."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in pixel)]
    matrix = np.array(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    x, y, z = (
        t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in matrix @ np.array(linear) / WHITE
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]) / 100


def by_hand(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """One pixel and one token after the other; the image has the same whole number of pixels per token."""
    count, height, width = values.shape
    down, across = image.height // height, image.width // width
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)))
    colours = np.array([[lab(tuple(map(int, pixel))) for pixel in row] for row in blurred])
    tokens = colours.reshape(height, down, width, across, 3).mean(axis=(1, 3))
    out = np.zeros((count, image.height, image.width))
    for y in range(image.height):
        for x in range(image.width):
            row, column = (y + 0.5) / down - 0.5, (x + 0.5) / across - 0.5  # in tokens
            total = 0.0
            for i in range(max(0, y // down - 2), min(height, y // down + 3)):
                for j in range(max(0, x // across - 2), min(width, x // across + 3)):
                    near = ((row - i) ** 2 + (column - j) ** 2) / 2
                    like = ((colours[y, x] - tokens[i, j]) ** 2).sum() / (2 * 0.1**2)
                    weight = math.exp(-near - like)
                    out[:, y, x] += weight * values[:, i, j]
                    total += weight
            out[:, y, x] /= total
    return out


@pytest.mark.parametrize("at_once", [2**20, 300])
def test_it_is_the_loop(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bilateral, "_WEIGHTS_AT_ONCE", at_once)
    values = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    image = picture(20, 18)  # cells of 4 x 3 pixels
    exact = by_hand(values.double().numpy(), image)
    found = upsample_bilateral(values, image, (18, 20)).double().numpy()
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()
    for wrong in (
        by_hand(values.flip(2).double().numpy(), image),
        by_hand(values.double().numpy(), picture(20, 18).transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
    ):
        assert np.abs(found - wrong).max() > 0.1


def test_a_constant_stays_one() -> None:
    found = upsample_bilateral(torch.full((1, 4, 4), -3.0), picture(31, 45), (45, 31))
    torch.testing.assert_close(found, torch.full((1, 45, 31), -3.0))


def test_other_sizes_are_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the grid does not divide, and those beyond the most pixels, go through one that it does."""
    values = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    image = picture(52, 41)
    inner = upsample_bilateral(values, image.resize((50, 40), Image.Resampling.BICUBIC), (40, 50))
    expected = F.interpolate(inner[None], size=(41, 52), mode="bilinear")[0]
    torch.testing.assert_close(upsample_bilateral(values, image, (41, 52)), expected)
    monkeypatch.setattr(bilateral, "_MOST_PIXELS", 20 * 25)
    inner = upsample_bilateral(values, image.resize((25, 20), Image.Resampling.BICUBIC), (20, 25))
    expected = F.interpolate(inner[None], size=(41, 52), mode="bilinear")[0]
    torch.testing.assert_close(upsample_bilateral(values, image, (41, 52)), expected)


def test_more_tokens_than_pixels() -> None:
    assert upsample_bilateral(torch.randn(2, 8, 8), picture(5, 3), (3, 5)).shape == (2, 3, 5)
