"""Which attention map is which mask: bipartite matching by mask cost (Seg4Diff, section 4.3).

For candidates without names. The cost has the two terms of the loss, so the matching is the assignment of
lowest loss; no gradient flows through it.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from seg4diff.training.objective.losses import FocalPreset, checked_masks, focal_terms

FOCAL_WEIGHT, DICE_WEIGHT = 0.02, 1.0
"""Weights of the two costs in the public code."""


@torch.no_grad()
def match(
    prediction: Tensor,
    target: Tensor,
    *,
    preset: FocalPreset = "default",
    focal_weight: float = FOCAL_WEIGHT,
    dice_weight: float = DICE_WEIGHT,
) -> tuple[Tensor, Tensor]:
    """Assign masks to the maps that fit them best, each map to one mask at most, at the lowest total cost.

    Args:
        prediction: candidate maps as mask logits, [K, P].
        target: masks [M, P] in [0, 1].
        preset: of the focal cost, see :func:`seg4diff.training.objective.losses.focal_loss`.
        focal_weight: weight of the focal cost.
        dice_weight: weight of the dice cost.

    Returns:
        Rows of ``prediction``, ascending, and the rows of ``target`` that they belong to: two int64 tensors
        [min(K, M)] on the CPU. With fewer candidates than masks the masks that fit worst stay without.

    Raises:
        ValueError: shapes do not fit, the preset is unknown, or a cost is NaN or infinite.
    """
    focal, dice = mask_costs(prediction, target, preset=preset)
    cost = (focal_weight * focal + dice_weight * dice).cpu()
    if not bool(cost.isfinite().all()):
        count = int((~cost.isfinite()).any(dim=1).sum())
        raise ValueError(
            f"{count} of {len(cost)} candidate maps hold NaN or infinite values; lower the learning rate"
        )
    rows, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


def mask_costs(
    prediction: Tensor, target: Tensor, *, preset: FocalPreset = "default"
) -> tuple[Tensor, Tensor]:
    """Focal and dice cost [K, M] of every candidate [K, P] for every mask [M, P], as in the losses.

    Raises:
        ValueError: shapes do not fit or the preset is unknown.
    """
    logits, masks = checked_masks(prediction, target)
    inside, outside = focal_terms(logits, preset=preset)
    focal = ((inside - outside) @ masks.T + outside.sum(dim=1, keepdim=True)) / logits.shape[1]
    share = logits.sigmoid()
    total = share.sum(dim=1)[:, None] + masks.sum(dim=1)[None, :]
    dice = 1.0 - (2.0 * (share @ masks.T) + 1.0) / (total + 1.0)
    return focal, dice
