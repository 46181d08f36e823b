"""Images to look at: colours for labels, heat maps over images, sheets of tiles with titles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# 256 colours in RGB: Okabe and Ito's seven, which stay apart for colour-blind eyes, then each as far as
# possible from those before it in OKLab, for eyes with all cones and for eyes without red or green ones.
_COLOURS = np.frombuffer(
    bytes.fromhex(
        "e69f0056b4e9009e73f0e4420072b2d55e00cc79a774000074ffff5d00740000ff5d5d5d2e8bff8bd1a20000b9b91700"
        "b9ffb98bd1e8004646d100a2ff4674464674e800d1ffb95d8bb9b9465dff745d8ba2e8b9d1a274d18b2e2e2ed146a2ff"
        "5d5d2e468b46ffd18b8b0046008bd1d1ff8b8b17005d2e8b1774d18be8e846a2b95d74462e8b745d2e2e742ea2e8d100"
        "742e5db9b9ffa28be82e5d745d175dffa25de817a22e46b94646e8d1a2a2d18bd15d468b465db98b5d748ba28b4600a2"
        "e8b9d1748b17e8465de8b917e8b98b5d74e8a25d008b74b9e8468b46178bb9ffe8ff8b5d5d74a2e8a2d117e8ff74b98b"
        "ffd1d10000e8ff1746d18ba2b9a2ffd1ff00a21700a200745d8b8be8e874465d4646ff5de8745de8d1a2e8b9b9a2745d"
        "2e2eb94646d14674ff2e8be88bb900b9005d465de8b92e8b2e46ffe88be85d462e74e874a22e4674e8a2e8e8a28bd1b9"
        "d1b974ffb9ffb9ffd1e8b9e82eb9ffff5db974175dffd1b90000d1a2e8d18bd18b8b5dd18ba2d146742ed1a28b74a274"
        "8ba200a274468bd117177474b98bb974b974a2b9d1a274e88b5db9a274ffa28bd1008b5d465d17b92e2e2e2ee8b9a246"
        "740046d1ffa217a25d178b2e74465d8be88b00a28bffd1e8a2178b5dd174e8e88b2e2effb9b9a2745d00b9b98b742e17"
        "8b8b46e8d174748bb9b98b5dd1ff5de8e8ffb9b9e8b9d15d7400a2d1a25d8be817e82e2ee8a2462eff2e5d2e74464617"
        "00ff8b465d8be8d1ffff8bb95dffa2a200468ba24600ffe8e8b9a2a22ea2d1175dd1468b8b74d1b974a28bd1ff74b9e8"
        "a28ba2b9a2d1d1ff74e8b94646741717b9a2d18b46a2b9464646468bd1d1e8e85d744674d1d1d174ff74d1d1b98b742e"
        "b98bff5d2e172eb9b917462e175da2b9a22effe846e82ee8ff175d74462e0046742effb9a2a274ff2ee88bb9a2462e74"
        "d1a2b92e5d2e2effd1e8e8e8ff17ffe8e8d1e8e8b9a2e85d2e5d5d8b8b744674b9b92e0000d11700d1e874172e17465d"
        "5d2e5da274a28b17b9d18be8ff74742eb92eff748b8b748bffa246e88b46ff5d8bb900a274d15da25db97417008bd146"
    ),
    np.uint8,
).reshape(-1, 3)

# Dark to bright, for heat maps: lightness rises steadily, so that it also reads in grey.
_HEAT = np.array(
    [[13, 8, 60], [92, 18, 125], [182, 54, 121], [238, 120, 78], [250, 196, 90], [252, 255, 190]]
)

_INK, _PAPER, _MARGIN = (20, 20, 20), (255, 255, 255), 6


def palette(count: int) -> np.ndarray:
    """``count`` colours, uint8 [count, 3] in RGB: always the same, a prefix of any longer palette.

    The first 256 are different, later ones repeat them.

    Raises:
        ValueError: ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count={count} colours are not available; use 0 or more")
    return np.resize(_COLOURS, (count, 3))


def colorize(labels: torch.Tensor | np.ndarray, count: int | None = None) -> Image.Image:
    """Labels [height, width], integers in [0, ``count``), as an RGB image in colours of :func:`palette`.

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
    """A heat map [rows, columns] of floats over an image, at the size of the image.

    The map is stretched to the image's size bilinearly, and its values to the colours from dark (the
    smallest) to bright (the largest). A constant map is dark.

    Args:
        image: the image below.
        heatmap: any finite values.
        alpha: 0 shows only the image, 1 only the map.

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
    """Labels in colours over an image, with the names of those that occur below it.

    Args:
        labels: [height, width] integers that index ``names``; -1 for background, which shows the image
            alone, or black.
        names: a name for each label.
        image: the image below, of the same size; without one the colours are shown alone.
        alpha: 0 shows only the image, 1 only the colours.
        legend: whether to add the names. An image too small for them is enlarged; without legend the result
            has the size of ``labels``.

    Raises:
        ValueError: the sizes differ, a label has no name, or ``alpha`` is outside [0, 1].
    """
    _check_alpha(alpha)
    indices = _integers(labels)
    background = indices == -1
    colours = colorize(np.where(background, 0, indices), len(names))
    canvas = Image.composite(Image.new("RGB", colours.size), colours, Image.fromarray(background))
    if image is not None:
        if image.size != canvas.size:
            raise ValueError(
                f"image is {image.width} x {image.height}, labels are {canvas.width} x {canvas.height}"
            )
        image = image.convert("RGB")
        canvas = Image.composite(image, Image.blend(image, canvas, alpha), Image.fromarray(background))
    if not legend:
        return canvas
    enlarged = -(-256 // max(canvas.size))
    if enlarged > 1:
        canvas = canvas.resize((canvas.width * enlarged, canvas.height * enlarged), Image.Resampling.NEAREST)
    present = [int(index) for index in np.unique(indices[~background])]
    panel = _legend([(names[index], palette(len(names))[index]) for index in present], canvas)
    sheet = Image.new("RGB", (max(canvas.width, panel.width), canvas.height + panel.height), _PAPER)
    sheet.paste(canvas, (0, 0))
    sheet.paste(panel, (0, canvas.height))
    return sheet


def contact_sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], tile: int = 192) -> Image.Image:
    """Rows of images with a title above each, as one image on white.

    Args:
        rows: each a sequence of (title, image); rows may differ in length.
        tile: pixels of the longer side that each image is scaled to. Small ones are enlarged without blur.

    Raises:
        ValueError: ``rows`` is empty, or ``tile`` is not positive.
    """
    if not any(rows):
        raise ValueError("rows is empty: at least one image is needed")
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


def _legend(entries: Sequence[tuple[str, np.ndarray]], canvas: Image.Image) -> Image.Image:
    """Swatches and names in as many columns as the width of the image holds."""
    size = max(14, min(28, canvas.width // 40))
    font = _font(size)
    swatch, line = size, _height(font) + 6
    width = max(canvas.width, 160)
    widest = max((font.getlength(name) for name, _ in entries), default=0.0)
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
