"""Draw `steps.png`, what each step of the preset "best" changes: `python docs/figures/steps.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import seg4diff
from seg4diff.demo import CLASSES, HELD_OUT, scene
from seg4diff.evaluation.showcase import in_vocabulary, labels_of
from seg4diff.segmentation.presets import PRESETS
from seg4diff.visualization import palette

SCENE = 31
NAME = 1  # of the scene's names, whose scores are drawn


def draw() -> Figure:
    """Labels of a hard scene after each step, all 18 names asked for; below, the scores of one name."""
    pipe = seg4diff.load_pipeline("demo", "cpu")
    drawn = scene(HELD_OUT + SCENE, "hard")
    name = drawn.classes[NAME]
    preset = PRESETS["default"]
    steps = {"default": preset}
    for title, change in {
        "+ measured level": {"measured_level": True},
        "+ second pass": {"passes": 2},
        "+ feature kernel": {"spread": True},
        "+ presence": {"absent": "ignore"},
        "+ bilateral = best": {"upsample": None},
    }.items():
        preset = replace(preset, **change)  # type: ignore[arg-type]
        steps[title] = preset
    truth = in_vocabulary(drawn.labels, drawn.classes)
    colours = palette(len(CLASSES))
    figure = Figure(figsize=(12, 4.1))
    figure.set_layout_engine("constrained", rect=(0, 0.07, 1, 0.93))  # room for the legend
    axes = figure.subplots(2, len(steps) + 1)
    for ax in axes.flat:
        ax.set_axis_off()
    axes[0, 0].imshow(drawn.image)
    axes[0, 0].set_title("image", fontsize=9)
    axes[1, 0].imshow(colours[truth])
    axes[1, 0].set_title("true labels", fontsize=9)
    shown = set(truth.flat)
    for (above, below), (title, step) in zip(axes.T[1:], steps.items(), strict=True):
        result = seg4diff.segment(pipe, drawn.image, CLASSES, preset=step)
        found = labels_of(result)
        shown |= set(found.flat)
        above.imshow(colours[found])
        above.set_title(f"{title}\n{100 * (found == truth).mean():.0f} % of pixels right", fontsize=9)
        scores = result.pixel_scores()[CLASSES.index(name)]
        below.imshow(torch.log10(scores.clamp_min(1e-6)), cmap="magma", vmin=-4, vmax=-1.5)
        below.set_title(f'"{name}"', fontsize=9)
    names = [Patch(color=colours[label] / 255, label=CLASSES[label]) for label in sorted(shown)]
    figure.legend(
        handles=names, loc="lower center", ncols=len(names), frameon=False, fontsize=9, columnspacing=1
    )
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=82)
