"""Presets: complete sets of choices for segmentation, from the paper or its public code.

A preset is one value in `PRESETS`. What it decides stands in its attributes; its name is only for users. The
module imports neither torch nor NumPy, so that the command line can list the presets at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Fit = Literal["aspect", "crop", "squash"]
Upsample = Literal["linear", "geometric"]


@dataclass(frozen=True)
class Grouping:
    """How text tokens become regions.

    A token's map is min-max normalised per image token, over the text tokens, multiplied by `sharpness` and
    made a probability distribution over the image tokens by a softmax. Maps are then merged in token order.

    Attributes:
        threshold: maps whose symmetric Kullback-Leibler divergence (the mean of both directions, in nats)
            from the first of their group is below it are merged. Above 0.
        sharpness: factor before the softmax. Normalised values lie in [0, 1], so with 1 (the public code) no
            two image tokens differ by more than a factor e.
        overlapping: whether a map that was merged into one group may also enter the mean of a later one.
        heads: `"mean"` averages a token's maps over heads and layers first; `"each"` keeps them apart, as
            if every head of every layer had tokens of its own.

    Raises:
        ValueError: `threshold` is not a number above 0.
    """

    threshold: float
    sharpness: float = 1.0
    overlapping: bool = False
    heads: Literal["mean", "each"] = "mean"

    def __post_init__(self) -> None:
        threshold = self.threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
            raise ValueError(f"threshold={threshold!r} must be a number above 0 (nats)")


@dataclass(frozen=True)
class Preset:
    """A complete set of choices, from the paper (Seg4Diff, section 4.1, appendix A) or its public code.

    Attributes:
        name: the name that users write.
        fit: how an image is fitted to the model. `"aspect"`: the whole image, aspect ratio kept, at the
            model's native area. `"crop"`: its central square; the result then covers that square.
            `"squash"`: short side to 5/8 of the native size first, then a square regardless of the aspect.
        upsample: how scores go from image tokens to pixels. `"linear"`: bilinear, as in the paper.
            `"geometric"`: bilinear on their logarithms, see `seg4diff.segmentation.scores.resize_scores`.
        grouping: how text tokens become regions where no names are given.
        cut_at_hyphen: whether `"wall-brick"` enters the prompt as `"wall"`.
        match_disjoint: whether an evaluation may match a region with a class that it has no pixel in common
            with, see `seg4diff.metrics.matched_counts`.
        stray_name: whether an evaluation prompts a data set's name for pixels that do not count, as the
            public code does with "background" for COCO-Object.
    """

    name: str
    fit: Fit
    upsample: Upsample
    grouping: Grouping
    cut_at_hyphen: bool = False
    match_disjoint: bool = True
    stray_name: bool = False


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "default",
            fit="aspect",
            upsample="geometric",
            # The best on training scenes of the demo model, among seven thresholds and four sharpnesses.
            # Heads attend to different things, and their mean blurs that.
            grouping=Grouping(threshold=1.0, sharpness=4.0, heads="each"),
            match_disjoint=False,
        ),
        Preset(
            "paper",
            fit="crop",
            upsample="linear",
            # The paper says "greedy merge" and gives neither normalisation nor threshold: the code's
            # normalisation, the threshold of its configuration files, and every token in one group.
            grouping=Grouping(threshold=0.035),
        ),
        Preset(
            "reference",
            fit="squash",
            upsample="linear",
            # 0.1 is fixed in the public code, whatever its configuration files contain.
            grouping=Grouping(threshold=0.1, overlapping=True),
            cut_at_hyphen=True,
            stray_name=True,
        ),
    )
}

PresetName = Literal["default", "paper", "reference"]
"""The keys of `PRESETS`, for type checkers and the command line."""


def find_preset(name: str, *, threshold: float | None = None) -> Preset:
    """The preset of that name.

    Args:
        name: a key of `PRESETS`.
        threshold: replaces that of the preset's grouping.

    Raises:
        ValueError: there is no such preset (the message lists those there are), or the threshold is not a
            number above 0.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; accepted: {', '.join(map(repr, PRESETS))}")
    preset = PRESETS[name]
    if threshold is None:
        return preset
    return replace(preset, grouping=replace(preset.grouping, threshold=threshold))
