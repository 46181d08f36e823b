"""Scores of names: read from attention maps, and resized from image tokens to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seg4diff.segmentation.presets import Upsample
from seg4diff.segmentation.prompts import PlannedPrompt


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


def resize_scores(scores: Tensor, size: tuple[int, int], upsample: Upsample) -> Tensor:
    """Scores of image tokens [classes, h, w] at the pixels of an image: [classes, height, width], float32.

    Probabilities of two words can differ by orders of magnitude. Halfway between a token that reads a strong
    word at 0.5 and one that does not, the linear mean is still 0.25, above a weaker word's 0.05 on both: the
    strong word's region grows by almost a token. The geometric mean has no such preference.
    """
    scores = scores.float()
    if upsample == "geometric":
        scores = scores.clamp_min(torch.finfo(torch.float32).tiny).log()
    scores = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    return scores.exp() if upsample == "geometric" else scores
