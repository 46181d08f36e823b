"""Figures of numbers per layer, with matplotlib, which is imported when the first one is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from seg4diff.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE, TEXT, PROMPT = "#56B4E9", "#D55E00", "#009E73"
"""Colours that stand for image tokens, text tokens and the tokens of the prompt's characters."""


def lines(
    layers: Sequence[int],
    values: Mapping[str, Tensor],
    quantity: str,
    colours: Sequence[str | None] | None = None,
) -> Figure:
    """A line per entry of `values` [L] over the layers."""
    figure = _figure(7, 3.6)
    axes = figure.add_subplot()
    names = [str(layer) for layer in layers]
    for (label, line), colour in zip(values.items(), colours or [None] * len(values), strict=True):
        axes.plot(names, line.tolist(), marker="o", markersize=3, label=label, color=colour)
    axes.set(xlabel="layer", ylabel=quantity)
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=8)
    return figure


def shares(layers: Sequence[int], text_shares: Mapping[str, Tensor], uniform: float) -> Figure:
    """A panel per entry of `text_shares` [L]: bars of the image's and the text's share of attention.

    Args:
        layers: the layers.
        text_shares: by title, the share of attention that text tokens get in each layer.
        uniform: the share that text would get if attention were uniform.
    """
    figure = _figure(10, 3.6)
    names = [str(layer) for layer in layers]
    for position, (title, to_text) in enumerate(text_shares.items(), start=1):
        to_image = (1 - to_text).tolist()
        axes = figure.add_subplot(1, 2, position)
        axes.bar(names, to_image, color=IMAGE, label="image")
        axes.bar(names, to_text.tolist(), bottom=to_image, color=TEXT, label="text")
        axes.axhline(1 - uniform, color="black", linestyle="--", linewidth=1, label="uniform")
        axes.set(title=title, xlabel="layer", ylabel="share of attention", ylim=(0, 1))
        axes.tick_params(axis="x", labelsize=7)
    # Beside the panels, since bars fill them.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def panels(images: Sequence[Mapping[str, Tensor]], columns: int) -> Figure:
    """Images [height, width, 3] in groups: an entry of the list is a column, its images are below each other.

    After `columns` entries a new row of groups begins.
    """
    columns, height = min(columns, len(images)), len(images[0])
    groups = -(-len(images) // columns)
    figure = _figure(1.3 * columns, 1.45 * groups * height)
    axes = figure.subplots(groups * height, columns, squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for position, group in enumerate(images):
        for row, (title, pixels) in enumerate(group.items()):
            panel = axes[position // columns * height + row, position % columns]
            panel.imshow(pixels.numpy())
            panel.set_title(title, fontsize=7, pad=2)
    return figure


def save_figures(figures: Mapping[str, Figure], folder: str | os.PathLike[str]) -> list[Path]:
    """Write figures as NAME.png into a folder."""

    def write(figure: Figure) -> Any:
        return lambda temporary: figure.savefig(temporary, dpi=150)

    return [write_atomically(Path(folder) / f"{name}.png", write(figure)) for name, figure in figures.items()]


def _figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'seg4diff[viz]'") from error
    return Figure(figsize=(width, height), layout="constrained")
