"""Which of the names that an image was asked for are in it, told by the maps of all of them together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seg4diff.backbones.base import Recipe
from seg4diff.segmentation.scores import log_scores

THRESHOLD = 0.5
"""A name of this presence ties with the best other name on the whole of its best block of tokens."""

UNEXPLAINED = 0.01
"""Share of an image's largest score below which no name explains a pixel, where no floor is known."""


def presence_of(scores: Tensor, recipe: Recipe) -> Tensor:
    """How surely each name is in the image.

    A name's share of a token is its score divided by the sum of it and the best other name's; of one name
    alone, by the sum of it and `recipe.alone`. Its presence is the smallest share within a square block of
    tokens, for the block where that is largest: at least 1/2 exactly where the name wins a whole block.

    Args:
        scores: of image tokens, [names, h, w].
        recipe: gives the size of a block, and the rival of one name alone. A block is at least two tokens
            wide, and at most as wide as the grid.

    Returns:
        [names], float32 in [0, 1]; NaN for one name alone where `recipe.alone` is None.
    """
    logs = log_scores(scores)
    names, height, width = logs.shape
    side = min(max(2, round(math.sqrt(recipe.block * height * width))), height, width)
    if names == 1:
        rivals = torch.full_like(logs, math.nan if recipe.alone is None else math.log(recipe.alone))
    else:
        (first, second), (winner, _) = logs.topk(2, dim=0)
        own = torch.arange(names, device=logs.device)[:, None, None] == winner
        rivals = torch.where(own, second, first)
    lowest = -F.max_pool2d((rivals - logs)[None], side, stride=1)[0]
    return lowest.flatten(1).amax(dim=1).sigmoid()


def threshold_for(false_names: float | None, recipe: Recipe) -> float:
    """The smallest presence of a name that counts as present.

    Args:
        false_names: names per image, among those asked for, that may be found though they are absent;
            `THRESHOLD` when None.
        recipe: gives the calibration of the model.

    Raises:
        ValueError: the model is not calibrated, or no threshold keeps to that rate.
    """
    if false_names is None:
        return THRESHOLD
    rates = {threshold: false for threshold, false, _ in recipe.calibration}
    if not rates:
        raise ValueError(
            f"false_names={false_names!r} needs calibrated presence scores, which this model does not have; "
            "leave it out"
        )
    kept = [threshold for threshold, false in rates.items() if false <= false_names]
    if not kept:
        raise ValueError(
            f"false_names={false_names!r} is below what any threshold of this model reaches; the least is "
            f"{min(rates.values())}"
        )
    return min(kept)
