"""Grouping of text tokens by what they attend to: each group is a region (Seg4Diff, appendix A.4)."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from seg4diff.segmentation.presets import Grouping


def group_attention(
    attention: Tensor,
    *,
    grid: tuple[int, int],
    grouping: Grouping,
) -> Tensor:
    """Merge the maps of text tokens that attend to the same places.

    Takes milliseconds. Runs in float64 on the CPU, whatever the device of `attention`, so that every device
    gives the same answer: whether two maps are merged must not depend on rounding.

    Args:
        attention: image-to-text attention of one image [N, T], for every image token its share for each
            text token; any floating dtype.
        grid: height h and width w of the image tokens, N = h * w.
        grouping: how tokens are merged; a smaller threshold means more regions.

    Returns:
        [regions, h, w], float32, on the device of `attention`: the mean distribution over the image of
        each group's tokens, groups in the order of their first token. `argmax(0)` is the label map; a
        region may win nowhere.

    Raises:
        ValueError: shapes do not fit, or values are not finite.
        TypeError: `attention` is not a floating-point tensor.
    """
    if not isinstance(attention, Tensor) or not attention.is_floating_point():
        kind = attention.dtype if isinstance(attention, Tensor) else type(attention).__name__
        raise TypeError(
            f"attention is a {kind}: a floating-point tensor [image tokens, text tokens] expected"
        )
    height, width = grid
    if attention.dim() != 2 or attention.shape[0] != height * width or 0 in attention.shape:
        raise ValueError(
            f"attention has shape {list(attention.shape)}; [image tokens, text tokens] expected, with "
            f"{height} x {width} = {height * width} image tokens"
        )
    exact = attention.detach().cpu().double()  # in this order: MPS has no float64
    if not bool(exact.isfinite().all()):
        raise ValueError(f"attention holds {int((~exact.isfinite()).sum())} values that are NaN or infinite")
    low, high = exact.aminmax(dim=1, keepdim=True)
    exponents = ((exact - low) / (high - low + 1e-6) * grouping.sharpness).T.contiguous()  # [T, N]
    distributions = exponents.softmax(dim=1)
    members = _merge(_divergence(distributions, exponents), grouping)  # [regions, T]
    weights = members / members.sum(dim=1, keepdim=True)
    groups = rearrange(weights @ distributions, "regions (h w) -> regions h w", h=height)
    return groups.to(device=attention.device, dtype=torch.float32)


def winning_regions(maps: Tensor, *, grid: tuple[int, int], grouping: Grouping) -> Tensor:
    """The groups of `group_attention` that win at least one image token; those that win most come first.

    Most groups win nowhere, and of many heads there may be a thousand: not worth a score for every pixel.

    Args:
        maps: by layer [L, N, T], or by layer and head [L, H, N, T] for a grouping that keeps heads apart.
        grid, grouping: as in `group_attention`.

    Returns:
        [regions, h, w], as `group_attention`.

    Raises:
        ValueError, TypeError: as `group_attention`.
    """
    columns = rearrange(maps, "l heads n t -> n (l heads t)") if maps.dim() == 4 else maps.mean(dim=0)
    groups = group_attention(columns, grid=grid, grouping=grouping)
    wins = groups.flatten(1).argmax(dim=0).bincount(minlength=len(groups))
    return groups[wins.argsort(descending=True, stable=True)[: int((wins > 0).sum())]]


def _divergence(distributions: Tensor, exponents: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence [T, T] of `distributions` = softmax(`exponents`), [T, N].

    (KL(a|b) + KL(b|a)) / 2 = <a - b, log a - log b> / 2, in which the logarithms of the softmaxes'
    denominators drop out because a - b sums to zero.
    """
    cross = distributions @ exponents.T
    own = cross.diagonal()
    return (own[:, None] + own[None, :] - cross - cross.T) / 2


def _merge(divergence: Tensor, grouping: Grouping) -> Tensor:
    """Membership [regions, T] of tokens in regions, as 0.0 and 1.0: one pass in token order."""
    close = divergence.numpy() < grouping.threshold
    np.fill_diagonal(close, True)
    taken = np.zeros(len(close), dtype=bool)
    groups = []
    for token, neighbours in enumerate(close):
        if taken[token]:
            continue
        groups.append(neighbours if grouping.overlapping else neighbours & ~taken)
        taken |= neighbours
    return torch.from_numpy(np.stack(groups)).double()
