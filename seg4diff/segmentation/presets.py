"""Presets: complete sets of choices for segmentation, from the paper or its public code.

A preset is one value in `PRESETS`. What it decides stands in its attributes; its name is only for users. The
module imports neither torch nor NumPy, so that the command line can list the presets at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from seg4diff.backbones.base import Recipe

Fit = Literal["aspect", "crop", "squash"]
Upsample = Literal["linear", "geometric", "bicubic", "bilateral"]
Absent = Literal["ignore", "keep", "background"]


@dataclass(frozen=True)
class Grouping:
    """How text tokens become regions, by a greedy merge.

    A token's map is min-max normalised per image token, over the text tokens, and made a probability
    distribution over the image tokens by a softmax. Maps are then merged in token order.

    Attributes:
        threshold: maps whose symmetric Kullback-Leibler divergence (the mean of both directions, in nats)
            from the first of their group is below it are merged. Above 0.
        overlapping: whether a map that was merged into one group may also enter the mean of a later one.

    Raises:
        ValueError: `threshold` is not a number above 0.
    """

    threshold: float
    overlapping: bool = False

    def __post_init__(self) -> None:
        _check_threshold(self.threshold, "nats")


@dataclass(frozen=True)
class Clustering:
    """How image tokens become regions, by Ward's method on their attention outputs.

    Attributes:
        threshold: Ward distance at which the tree is cut, for 256 image tokens. The distance of two halves of
            an image grows with the root of the number of tokens, and so does the cut. Outputs are scaled to
            a mean squared deviation of 1, so that it does not depend on the model. Above 0.
        regions: number of regions, at which the tree is cut instead.
        behind: number of layers behind the expert layer whose outputs are read too.

    Raises:
        ValueError: `threshold` is not a number above 0, or `regions` is below 1.
        TypeError: `regions` is not an integer.
    """

    threshold: float
    regions: int | None = None
    behind: int = 2

    def __post_init__(self) -> None:
        _check_threshold(self.threshold, "Ward distance at 256 image tokens")
        if self.regions is None:
            return
        if isinstance(self.regions, bool) or not isinstance(self.regions, int):
            raise TypeError(f"regions={self.regions!r} must be an integer, not {type(self.regions).__name__}")
        if self.regions < 1:
            raise ValueError(f"regions={self.regions} must be at least 1")


def _check_threshold(threshold: float, unit: str) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        raise ValueError(f"threshold={threshold!r} must be a number above 0 ({unit})")


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
            `"bicubic"`: bicubic on their logarithms. `"bilateral"`: along the edges of the image, see
            `seg4diff.segmentation.bilateral`. None: that of the recipe.
        grouping: how image or text tokens become regions where no names are given.
        cut_at_hyphen: whether `"wall-brick"` enters the prompt as `"wall"`.
        match_disjoint: whether an evaluation may match a region with a class that it has no pixel in common
            with, see `seg4diff.metrics.matched_counts`.
        stray_name: whether an evaluation prompts a data set's name for pixels that do not count, as the
            public code does with "background" for COCO-Object.
        passes: over an image, each with other noise and every other one mirrored, averaged on logarithms.
        measured_level: whether the noise level is the recipe's instead of the family's.
        spread: whether scores are averaged over image tokens with like attention outputs, see
            `seg4diff.segmentation.scores.spread_scores`.
        absent: what becomes of names that are not in the image, see `seg4diff.segment`.
        recipe: what was measured of a model; None: of the model at hand, see
            `seg4diff.backbones.base.Recipe`.

    Raises:
        ValueError: `absent` is unknown, or `passes` is not a positive integer.
    """

    name: str
    fit: Fit
    upsample: Upsample | None
    grouping: Grouping | Clustering
    cut_at_hyphen: bool = False
    match_disjoint: bool = True
    stray_name: bool = False
    passes: int = 1
    measured_level: bool = False
    spread: bool = False
    absent: Absent = "keep"
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.absent not in get_args(Absent):
            accepted = ", ".join(map(repr, get_args(Absent)))
            raise ValueError(f"absent={self.absent!r} is unknown; accepted: {accepted}")
        if isinstance(self.passes, bool) or not isinstance(self.passes, int) or self.passes < 1:
            raise ValueError(f"passes={self.passes!r} must be a positive integer")


_DEFAULT = Preset(
    "default",
    fit="aspect",
    upsample="geometric",
    # Of seven cuts on 200 training scenes of the demo model; 5 to 6 differ by less than a point.
    grouping=Clustering(threshold=5.25),
    match_disjoint=False,
)
_BEST = replace(
    _DEFAULT, name="best", upsample=None, passes=2, measured_level=True, spread=True, absent="ignore"
)

PRESETS = {
    preset.name: preset
    for preset in (
        _DEFAULT,
        _BEST,
        replace(_BEST, name="fast", passes=1),
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

PresetName = Literal["default", "best", "fast", "paper", "reference"]
"""The keys of `PRESETS`, for type checkers and the command line."""


def find_preset(name: str | Preset, *, threshold: float | None = None) -> Preset:
    """The preset of that name.

    Args:
        name: a key of `PRESETS`, or a preset.
        threshold: replaces that of the preset's grouping.

    Raises:
        ValueError: there is no such preset (the message lists those there are), or the threshold is not a
            number above 0.
    """
    if not isinstance(name, Preset) and name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; accepted: {', '.join(map(repr, PRESETS))}")
    preset = name if isinstance(name, Preset) else PRESETS[name]
    if threshold is None:
        return preset
    return replace(preset, grouping=replace(preset.grouping, threshold=threshold))
