"""Joint bilateral upsampling: from image tokens to pixels along the edges of the image.

Kopf et al., Joint Bilateral Upsampling, SIGGRAPH 2007. A pixel takes the mean of the 5 x 5 tokens around it,
weighted by their distance and by how much their mean colour differs from the pixel's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

_REACH = 2  # tokens to each side
_SPATIAL = 1.0  # standard deviation, in tokens
_RANGE = 0.1  # standard deviation of colours, in CIE Lab / 100
_BLUR = 0.7  # of the image before colours are compared, standard deviation in pixels
_MOST_PIXELS = 2**20
_WEIGHTS_AT_ONCE = 2**20


def upsample_bilateral(values: Tensor, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Values of image tokens at the pixels of an image.

    A token stands for a cell of a whole number of pixels, so the image is brought to a multiple of the grid
    near `size`, and to a megapixel at most; what comes out of that is resized bilinearly.

    The weights of the tokens around a pixel are a softmax: its colour is the query, theirs are the keys, and
    |colour|^2 of a token and its distance the bias.

    Args:
        values: [C, h, w], float32.
        image: RGB, of any size.
        size: height and width of the result.

    Returns:
        [C, height, width], float32, on the device of `values`.
    """
    count, height, width = values.shape
    shrink = min(1.0, math.sqrt(_MOST_PIXELS / (size[0] * size[1])))
    down, across = max(1, round(shrink * size[0] / height)), max(1, round(shrink * size[1] / width))
    colours = _lab(image, (width * across, height * down)).to(values.device)
    cells = colours.view(height, down, width, across, 3).transpose(1, 2).flatten(2, 3)  # [h, w, pixels, 3]
    tokens = cells.mean(dim=2)
    # Tokens outside of the image get the bias -inf.
    bias = F.pad(tokens.square().sum(dim=-1) / (-2 * _RANGE**2), (_REACH,) * 4, value=-math.inf)
    near_bias = _neighbours(bias[None])[..., 0, :]  # [h, w, 25]
    near_tokens = _neighbours(F.pad(tokens.permute(2, 0, 1), (_REACH,) * 4))  # [h, w, 3, 25]
    near_values = _neighbours(F.pad(values, (_REACH,) * 4)).mT  # [h, w, 25, C]
    distances = _distances(down, across).to(values.device)
    found = values.new_empty(height, down, width, across, count)
    rows = max(1, _WEIGHTS_AT_ONCE // (width * distances.numel()))
    for block in (slice(first, first + rows) for first in range(0, height, rows)):
        logits = (cells[block] / _RANGE**2) @ near_tokens[block]  # [rows, w, pixels, 25]
        weights = logits.add_(near_bias[block, :, None]).add_(distances).softmax(dim=-1)
        mixed = weights @ near_values[block]
        found[block] = mixed.unflatten(2, (down, across)).transpose(1, 2)
    found = found.view(height * down, width * across, count).permute(2, 0, 1)
    if found.shape[1:] == size:
        return found.contiguous()
    return F.interpolate(found[None], size=size, mode="bilinear", align_corners=False)[0]


def _neighbours(padded: Tensor) -> Tensor:
    """The 5 x 5 tokens around each, [h, w, C, 25], of [C, h + 4, w + 4]."""
    side = 2 * _REACH + 1
    return padded.unfold(1, side, 1).unfold(2, side, 1).permute(1, 2, 0, 3, 4).flatten(3)


def _distances(down: int, across: int) -> Tensor:
    """Logarithms of the spatial weights, [pixels of a cell, 25]."""
    shifts = torch.arange(-_REACH, _REACH + 1)

    def along(pixels: int) -> Tensor:
        offsets = (torch.arange(pixels) + 0.5) / pixels - 0.5
        return (offsets[:, None] - shifts).square() / (-2 * _SPATIAL**2)  # [pixels, 5]

    vertical, horizontal = along(down)[:, None, :, None], along(across)[None, :, None, :]
    return (vertical + horizontal).reshape(down * across, len(shifts) ** 2)


def _lab(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """CIE Lab / 100 of an image brought to `size` (width, height) and blurred, [height, width, 3]."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image.filter(ImageFilter.GaussianBlur(_BLUR))))
    levels = torch.arange(256) / 255
    linear = torch.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    # From linear sRGB to XYZ, relative to white (D65).
    to_xyz = torch.tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    xyz = linear[pixels.int()] @ (to_xyz / to_xyz.sum(dim=1, keepdim=True)).T
    roots = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = roots.unbind(dim=-1)
    return torch.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)], dim=-1)
