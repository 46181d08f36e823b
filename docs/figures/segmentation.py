"""Draw `segmentation.png`, the first figure of README: `python docs/figures/segmentation.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

import seg4diff
from seg4diff.demo import HELD_OUT, scene
from seg4diff.demo.scenes import CLASSES
from seg4diff.evaluation.showcase import in_vocabulary, labels_of
from seg4diff.visualization import palette

SCENES = (1, 3)
MAPS = 4


def draw() -> Figure:
    """A row per scene: image, truth, what `segment` found, and the attention maps of the names."""
    pipe = seg4diff.load_pipeline("demo", "cpu")
    scenes = [scene(HELD_OUT + number) for number in SCENES]
    results = [seg4diff.segment(pipe, item.image, item.classes) for item in scenes]
    colours = palette(len(CLASSES))
    figure = Figure(figsize=(12, 4.6))
    figure.set_layout_engine("constrained", hspace=0.14, rect=(0, 0.05, 1, 0.95))  # room for the legends
    axes = figure.subplots(len(scenes), 3 + MAPS)
    for ax in axes.flat:
        ax.set_axis_off()
    for row, item, result in zip(axes, scenes, results, strict=True):
        truth, found = in_vocabulary(item.labels, item.classes), labels_of(result)
        panels = {"image": item.image, "true labels": colours[truth], "labels found": colours[found]}
        for ax, (title, pixels) in zip(row, panels.items(), strict=False):
            ax.imshow(pixels)
            ax.set_title(title, fontsize=10)
        names = [Patch(color=colours[CLASSES.index(name)] / 255, label=name) for name in item.classes]
        legend = row[1].legend(
            handles=names, loc="upper left", bbox_to_anchor=(-0.05, -0.02), ncols=4, frameon=False,
            fontsize=9, handlelength=1, columnspacing=1,
        )  # fmt: skip
        legend.set_in_layout(False)
        scores_of_all = result.pixel_scores()
        top = float(scores_of_all.max())
        for ax, name, scores in zip(row[3:], result.classes, scores_of_all, strict=False):
            shown = ax.imshow(scores, cmap="magma", vmin=0, vmax=top)
            ax.set_axis_on()
            ax.set(xticks=(), yticks=())
            ax.set_title(f'"{name}"', fontsize=10)
        bar = figure.colorbar(shown, ax=list(row[3:]), shrink=0.8, pad=0.01)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("attention to the name", fontsize=8)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=100)
