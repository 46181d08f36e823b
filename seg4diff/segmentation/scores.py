"""Scores of names: read from attention maps, spread over like image tokens, and resized to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from seg4diff.kernels.api import propagate
from seg4diff.segmentation.bilateral import upsample_bilateral
from seg4diff.segmentation.presets import Upsample
from seg4diff.segmentation.prompts import PlannedPrompt

_SMALLEST = torch.finfo(torch.float32).tiny
_VALUES_AT_ONCE = 2**24  # of pixels times names: 64 MiB


def scores_of_names(maps: Sequence[Tensor], plan: Sequence[PlannedPrompt], grid: tuple[int, int]) -> Tensor:
    """The score of every name at every image token: its attention, averaged over the name's tokens.

    Args:
        maps: for each prompt [..., N, T'], whose columns begin with the first text column.
        plan: the prompts.
        grid: height h and width w of the image tokens, N = h * w.

    Returns:
        [..., names, h, w], the names of all prompts in order.
    """
    scores = [
        attention[..., list(columns)].mean(dim=-1)
        for attention, prompt in zip(maps, plan, strict=True)
        for columns in prompt.columns
    ]
    return rearrange(torch.stack(scores, dim=-2), "... (h w) -> ... h w", h=grid[0])


def log_scores(scores: Tensor) -> Tensor:
    """Finite float32 logarithms of scores."""
    return scores.float().clamp_min(_SMALLEST).log()


def spread_scores(scores: Tensor, outputs: Tensor, tau: float) -> Tensor:
    """Scores averaged over image tokens whose attention outputs are alike: exp(W log scores).

    W = softmax_j(-d_ij / tau), d the squared distance of two outputs divided by its mean over all pairs. Row
    by row |o_i|^2 cancels, so it is an attention with query 2 o, key o and bias -|o|^2: no N x N matrix
    exists.

    Args:
        scores: probabilities, [names, h, w].
        outputs: attention outputs of the image tokens, [h, w, C].
        tau: temperature, above 0, in mean distances.

    Returns:
        [names, h, w], float32.
    """
    outputs = outputs.flatten(0, 1)
    centred = outputs.float() - outputs.float().mean(dim=0)  # the same distances, and less rounding
    squared = centred.square().sum(dim=1, keepdim=True)
    mean = 2 * squared.mean()  # of |o_i - o_j|^2 over all pairs
    query = torch.cat([2 * centred, torch.full_like(squared, -1.0)], dim=1)
    key = torch.cat([centred, squared], dim=1)
    scale = 1.0 / max(tau * float(mean), _SMALLEST)
    columns = rearrange(log_scores(scores), "names h w -> 1 (h w) names")
    spread = propagate(query[None, :, None], key[None, :, None], columns, scale=scale)
    return rearrange(spread, "1 (h w) names -> names h w", h=scores.shape[1]).exp()


def resize_scores(
    scores: Tensor, size: tuple[int, int], upsample: Upsample, image: Image.Image | None = None
) -> Tensor:
    """Scores of image tokens [classes, h, w] at the pixels of an image: [classes, height, width], float32.

    Probabilities of two words can differ by orders of magnitude. Halfway between a token that reads a strong
    word at 0.5 and one that does not, the linear mean is still 0.25, above a weaker word's 0.05 on both: the
    strong word's region grows by almost a token. The geometric mean has no such preference.

    Args:
        scores: of image tokens.
        size: height and width.
        upsample: `"linear"`: bilinear. On logarithms: `"geometric"`: bilinear; `"bicubic"`; `"bilateral"`:
            see `seg4diff.segmentation.bilateral`.
        image: what `"bilateral"` needs, RGB of any size.

    Raises:
        ValueError: `"bilateral"` without an image.
    """
    if upsample == "linear":
        return _interpolated(scores.float(), size, "bilinear")
    logs = log_scores(scores)
    if upsample == "bilateral":
        if image is None:
            raise ValueError('upsample="bilateral" follows the edges of an image, but there is none')
        return upsample_bilateral(logs, image, size).exp_()
    if upsample == "bicubic":
        return _interpolated(logs, size, "bicubic").clamp_max_(0.0).exp_()  # cubic polynomials overshoot
    return _interpolated(logs, size, "bilinear").exp_()


def _interpolated(values: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(values[None], size=size, mode=mode, align_corners=False)[0]


def best_of(
    scores: Tensor, size: tuple[int, int], upsample: Upsample, image: Image.Image | None = None
) -> tuple[Tensor, Tensor]:
    """Largest score and its position for every pixel, [height, width], from scores [classes, h, w].

    Scores are resized some classes at a time: a large vocabulary on a large image needs no memory to speak
    of. The first of equal scores wins.
    """
    at_once = max(1, _VALUES_AT_ONCE // (size[0] * size[1]))
    best = winner = None
    for first in range(0, len(scores), at_once):
        values, positions = resize_scores(scores[first : first + at_once], size, upsample, image).max(dim=0)
        if best is None or winner is None:
            best, winner = values, positions
            continue
        better = values > best
        best = torch.where(better, values, best)
        winner = torch.where(better, positions + first, winner)
    assert best is not None
    assert winner is not None
    return best, winner
