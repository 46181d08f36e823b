"""The losses of MAGNET: flow matching, and focal and dice loss between attention maps and masks.

Seg4Diff, section 4.3: ``L = L_FM + lambda_mask * (lambda_focal * focal + lambda_dice * dice)``.
All compute in float32; float64 stays float64.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

FocalPreset = Literal["default", "reference"]

ALPHA, GAMMA = 0.25, 2.0


def focal_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    preset: FocalPreset = "default",
    alpha: float = ALPHA,
    gamma: float = GAMMA,
) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 5): mean over pixels, mean over masks.

    Args:
        prediction: mask logits [M, P].
        target: masks [M, P] in [0, 1]; a pixel in between counts as that share of a pixel inside.
        preset: ``"default"`` weighs every pixel by the probability that its logit stands for. ``"reference"``
            does as the public code of Seg4Diff: it takes the logit itself for that probability.
        alpha: weight of the pixels inside a mask; those outside have 1 - ``alpha``.
        gamma: how much less pixels count that are right already.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: shapes differ or are not [M, P] with M, P > 0, or the preset is unknown.
    """
    logits, masks = checked_masks(prediction, target)
    if logits.shape != masks.shape:
        raise ValueError(
            f"prediction has shape {list(logits.shape)} and target {list(masks.shape)}; one prediction a mask"
        )
    inside, outside = focal_terms(logits, preset=preset, alpha=alpha, gamma=gamma)
    return (outside + masks * (inside - outside)).mean()


def dice_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Dice loss ``1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)`` with p the sigmoid, mean over masks.

    Args:
        prediction: mask logits [M, P].
        target: masks [M, P] in [0, 1].

    Returns:
        A scalar tensor.

    Raises:
        ValueError: shapes differ or are not [M, P] with M, P > 0.
    """
    logits, masks = checked_masks(prediction, target)
    if logits.shape != masks.shape:
        raise ValueError(
            f"prediction has shape {list(logits.shape)} and target {list(masks.shape)}; one prediction a mask"
        )
    share = logits.sigmoid()
    overlap = (share * masks).sum(dim=1)
    return (1.0 - (2.0 * overlap + 1.0) / (share.sum(dim=1) + masks.sum(dim=1) + 1.0)).mean()


def flow_matching_loss(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error to the velocity ``noise - latents`` of the straight path (Lipman et al. 2023).

    Args:
        velocity: what the model predicts, [B, C, height, width].
        latents: clean latents, same shape.
        noise: same shape.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: shapes differ.
    """
    if not velocity.shape == latents.shape == noise.shape:
        raise ValueError(
            f"velocity {list(velocity.shape)}, latents {list(latents.shape)} and noise {list(noise.shape)} "
            "must have one shape"
        )
    return F.mse_loss(widened(velocity), widened(noise) - widened(latents))


def focal_terms(
    logits: Tensor, *, preset: FocalPreset, alpha: float = ALPHA, gamma: float = GAMMA
) -> tuple[Tensor, Tensor]:
    """Focal loss of every pixel if it lay inside a mask, and if it lay outside; shapes as ``logits``.

    Raises:
        ValueError: the preset is unknown.
    """
    if preset not in get_args(FocalPreset):
        raise ValueError(
            f"preset={preset!r} is unknown; accepted: {', '.join(map(repr, get_args(FocalPreset)))}"
        )
    probability = logits if preset == "reference" else logits.sigmoid()
    inside = alpha * (1.0 - probability).pow(gamma) * F.softplus(-logits)
    outside = (1.0 - alpha) * probability.pow(gamma) * F.softplus(logits)
    return inside, outside


def checked_masks(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions [K, P] and masks [M, P] in a wide dtype.

    Raises:
        ValueError: they are not two-dimensional, are empty, or have different numbers of pixels.
    """
    for name, tensor in (("prediction", prediction), ("target", target)):
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected [masks, pixels], neither of them zero"
            )
    if prediction.shape[1] != target.shape[1]:
        raise ValueError(
            f"prediction has {prediction.shape[1]} pixels, but target has {target.shape[1]}; "
            "resize one to the other"
        )
    logits = widened(prediction)
    return logits, target.to(logits.dtype)


def widened(tensor: Tensor) -> Tensor:
    """float32, or float64 where it was."""
    return tensor if tensor.dtype.itemsize == 8 and tensor.is_floating_point() else tensor.float()
