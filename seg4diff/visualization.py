"""Pictures to look at: colours for labels, heat maps over images, sheets of tiles with titles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which stay apart for colour-blind eyes. All others are found from here.
_FIRST_COLOURS = ("E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7")

# How linear RGB looks without red cones and without green cones (Machado, Oliveira and Fernandes, 2009).
_VISIONS = (
    np.eye(3),
    np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
)

# Linear RGB to OKLab (Ottosson, 2020), in which distances are about those that eyes see.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)

# Dark to bright, for heat maps: lightness rises steadily, so that it also reads in grey.
_HEAT = np.array(
    [[13, 8, 60], [92, 18, 125], [182, 54, 121], [238, 120, 78], [250, 196, 90], [252, 255, 190]]
)

_INK, _PAPER, _MARGIN = (20, 20, 20), (255, 255, 255), 6


@lru_cache(maxsize=16)
def _colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """The first ``count`` colours: each as far from all before as it can be, for three kinds of eyes."""
    steps = np.linspace(0, 255, 12).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lightness = _appearance(candidates)[:, 0, 0]
    candidates = candidates[(lightness > 0.35) & (lightness < 0.95)]
    chosen = np.array([[int(name[i : i + 2], 16) for i in (0, 2, 4)] for name in _FIRST_COLOURS], dtype=float)
    seen, offered = _appearance(chosen), _appearance(candidates)
    nearest = np.min([_distance(offered, colour) for colour in seen], axis=0)
    found = list(chosen)
    while len(found) < min(count, len(candidates)):
        best = int(nearest.argmax())
        found.append(candidates[best])
        nearest = np.minimum(nearest, _distance(offered, offered[best]))
    colours = [(int(red), int(green), int(blue)) for red, green, blue in found]
    taken = set(colours)
    # Beyond the candidates nobody can tell colours apart; they only have to differ.
    for number in range(1 << 24):
        if len(colours) >= count:
            break
        scattered = number * 0x9E3779 & 0xFFFFFF
        colour = (scattered >> 16, scattered >> 8 & 255, scattered & 255)
        if colour not in taken:
            colours.append(colour)
    return tuple(colours[:count])


def _appearance(rgb: np.ndarray) -> np.ndarray:
    """[colours, visions, 3] OKLab from [colours, 3] sRGB in 0..255."""
    scaled = rgb / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    seen = np.stack([linear @ vision.T for vision in _VISIONS], axis=1).clip(0, 1)
    return np.asarray(np.cbrt(seen @ _TO_CONES.T) @ _TO_OKLAB.T)


def _distance(appearances: np.ndarray, appearance: np.ndarray) -> np.ndarray:
    """To one colour, for the eyes that see the least difference: [colours]."""
    return np.asarray(np.sqrt(((appearances - appearance) ** 2).sum(-1)).min(-1))


def palette(count: int) -> np.ndarray:
    """``count`` different colours, uint8 [count, 3] in RGB: always the same, a prefix of any longer palette.

    Each is as far as possible from those before it, also for eyes without red or green cones.

    Raises:
        ValueError: ``count`` is negative or above 2 ** 24.
    """
    if not 0 <= count <= 1 << 24:
        raise ValueError(f"count={count} colours are not available; use 0 to {1 << 24}")
    return np.array(_colours(count), dtype=np.uint8).reshape(-1, 3)


def colorize(labels: torch.Tensor | np.ndarray, count: int | None = None) -> Image.Image:
    """Labels [height, width], integers in [0, ``count``), as an RGB picture in colours of :func:`palette`.

    Args:
        labels: what to paint.
        count: number of classes; the largest label plus one by default. It does not change the colours.

    Raises:
        ValueError: ``labels`` has another shape or leaves [0, ``count``).
    """
    indices = _integers(labels)
    count = int(indices.max()) + 1 if count is None else count
    if indices.min() < 0 or indices.max() >= count:
        raise ValueError(f"labels reach from {indices.min()} to {indices.max()}, outside [0, {count})")
    return Image.fromarray(palette(count)[indices])


def heatmap_overlay(
    image: Image.Image, heatmap: torch.Tensor | np.ndarray, alpha: float = 0.6
) -> Image.Image:
    """A heat map [rows, columns] of floats over a picture, at the size of the picture.

    The map is stretched to the picture's size bilinearly, and its values to the colours from dark (the
    smallest) to bright (the largest). A constant map is dark.

    Args:
        image: the picture below.
        heatmap: any finite values.
        alpha: 0 shows only the picture, 1 only the map.

    Raises:
        ValueError: ``heatmap`` is not two-dimensional, empty or not finite, or ``alpha`` outside [0, 1].
    """
    _check_alpha(alpha)
    values = (
        heatmap.detach().float().cpu().numpy() if isinstance(heatmap, torch.Tensor) else np.asarray(heatmap)
    )
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"heatmap has shape {list(values.shape)}: [rows, columns] expected")
    if not np.isfinite(values).all():
        raise ValueError("heatmap holds NaN or infinite values")
    values = values.astype(np.float32)
    spread = float(values.max() - values.min())
    normalised = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    stretched = np.asarray(Image.fromarray(normalised).resize(image.size, Image.Resampling.BILINEAR))
    position = stretched.clip(0, 1) * (len(_HEAT) - 1)
    channels = [np.interp(position, range(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)]
    colours = np.stack(channels, -1).round().astype(np.uint8)
    return Image.blend(image.convert("RGB"), Image.fromarray(colours), alpha)


def label_overlay(
    labels: torch.Tensor | np.ndarray,
    names: Sequence[str],
    image: Image.Image | None = None,
    *,
    alpha: float = 0.5,
    legend: bool = True,
) -> Image.Image:
    """Labels in colours over a picture, with the names of those that occur below it.

    Args:
        labels: [height, width] integers that index ``names``.
        names: a name for each label.
        image: the picture below, of the same size; without one the colours are shown alone.
        alpha: 0 shows only the picture, 1 only the colours.
        legend: whether to add the names. A picture too small for them is enlarged; without legend the result
            has the size of ``labels``.

    Raises:
        ValueError: the sizes differ, a label has no name, or ``alpha`` is outside [0, 1].
    """
    _check_alpha(alpha)
    indices = _integers(labels)
    picture = colorize(indices, len(names))
    if image is not None:
        if image.size != picture.size:
            raise ValueError(
                f"image is {image.width} x {image.height}, labels are {picture.width} x {picture.height}"
            )
        picture = Image.blend(image.convert("RGB"), picture, alpha)
    if not legend:
        return picture
    enlarged = -(-256 // max(picture.size))
    if enlarged > 1:
        picture = picture.resize(
            (picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST
        )
    panel = _legend([(names[index], palette(len(names))[index]) for index in np.unique(indices)], picture)
    sheet = Image.new("RGB", (max(picture.width, panel.width), picture.height + panel.height), _PAPER)
    sheet.paste(picture, (0, 0))
    sheet.paste(panel, (0, picture.height))
    return sheet


def contact_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], tile: int = 192) -> Image.Image:
    """Rows of pictures with a title above each, as one picture on white.

    Args:
        rows: each a sequence of (title, picture); rows may differ in length.
        tile: pixels of the longer side that each picture is scaled to. Small ones are enlarged without blur.

    Raises:
        ValueError: there is no picture, or ``tile`` is not positive.
    """
    if not any(rows):
        raise ValueError("rows is empty: at least one picture is needed")
    if tile < 1:
        raise ValueError(f"tile={tile} must be a positive number of pixels")
    font = _font(13)
    line = _height(font) + 4
    tiles = [[(title, _scaled(image.convert("RGB"), tile)) for title, image in row] for row in rows if row]
    heights = [max(image.height for _, image in row) + line + _MARGIN for row in tiles]
    width = max(len(row) for row in tiles) * (tile + _MARGIN)
    sheet = Image.new("RGB", (_MARGIN + width, _MARGIN + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, height in zip(tiles, heights, strict=True):
        for position, (title, image) in enumerate(row):
            left = _MARGIN + position * (tile + _MARGIN)
            draw.text((left, top), _fit(title, font, tile), fill=_INK, font=font)
            sheet.paste(image, (left, top + line))
        top += height
    return sheet


def _legend(entries: Sequence[tuple[str, np.ndarray]], picture: Image.Image) -> Image.Image:
    """Swatches and names in as many columns as the width of the picture holds."""
    size = max(14, min(28, picture.width // 40))
    font = _font(size)
    swatch, line = size, _height(font) + 6
    width = max(picture.width, 160)
    widest = max(font.getlength(name) for name, _ in entries)
    column = int(min(widest + swatch + 3 * _MARGIN, width))
    columns = max(1, width // column)
    lines = -(-len(entries) // columns)
    panel = Image.new("RGB", (width, lines * line + 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(panel)
    for position, (name, colour) in enumerate(entries):
        left = _MARGIN + position % columns * column
        top = _MARGIN + position // columns * line
        draw.rectangle((left, top, left + swatch, top + swatch), fill=tuple(map(int, colour)), outline=_INK)
        room = column - swatch - 3 * _MARGIN
        draw.text((left + swatch + _MARGIN, top - 1), _fit(name, font, room), fill=_INK, font=font)
    return panel


def _scaled(image: Image.Image, longest: int) -> Image.Image:
    factor = longest / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(font.getbbox("Ag")[3])


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text on one line, cut with dots where it is too wide."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _integers(labels: torch.Tensor | np.ndarray) -> np.ndarray:
    indices = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if indices.ndim != 2 or indices.size == 0 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"labels have shape {list(indices.shape)} and dtype {indices.dtype}: "
            "integers [height, width] expected"
        )
    return indices


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is outside [0, 1]")
