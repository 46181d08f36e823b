"""Regions without names: clusters of image tokens, or text tokens merged by the places that read them."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from seg4diff.segmentation.presets import Clustering, Grouping

_ROWS = 256  # of a block of distances: 4 MiB for 4096 image tokens
_CUT_TOKENS = 256  # to which `Clustering.threshold` refers


def find_regions(read: Tensor, *, grid: tuple[int, int], grouping: Grouping | Clustering) -> Tensor:
    """The regions of one image, those of most image tokens first.

    Args:
        read: for a `Clustering` attention outputs by layer [L, N, C], see `cluster_tokens`; for a `Grouping`
            image-to-text attention by layer [L, N, T], of which the mean is taken, see `group_attention`.
        grid: height h and width w of the image tokens, N = h * w.
        grouping: how tokens become regions.

    Returns:
        [regions, h, w], float32, on the device of `read`: a region is where its own score is the largest, and
        each is somewhere.

    Raises:
        ValueError, TypeError: as `cluster_tokens` and `group_attention`.
    """
    if isinstance(grouping, Clustering):
        return cluster_tokens(read, grid=grid, clustering=grouping)
    groups = group_attention(read.mean(dim=0), grid=grid, grouping=grouping)
    wins = groups.flatten(1).argmax(dim=0).bincount(minlength=len(groups))
    return groups[wins.argsort(descending=True, stable=True)[: int((wins > 0).sum())]]


def cluster_tokens(outputs: Tensor, *, grid: tuple[int, int], clustering: Clustering) -> Tensor:
    """Ward's clustering of image tokens by their attention outputs.

    The outputs of a layer are centred and scaled to a mean squared norm of 1; layers count alike. Of N image
    tokens it takes N^2 floating-point numbers of memory, whatever C is, and N^2 log N steps: 4096 tokens of
    4608 channels take seconds on one thread.

    Args:
        outputs: attention outputs of one image by layer [L, N, C]; any floating dtype.
        grid: height h and width w of the image tokens, N = h * w.
        clustering: where the tree of clusters is cut.

    Returns:
        [regions, h, w], float32, on the device of `outputs`: 1.0 where a token is of the region, else 0.0;
        the largest region first.

    Raises:
        ValueError: shapes do not fit, values are not finite, or more regions than image tokens are wanted.
    """
    tokens = grid[0] * grid[1]
    if outputs.dim() != 3 or outputs.shape[1] != tokens or 0 in outputs.shape:
        raise ValueError(
            f"outputs have shape {list(outputs.shape)}; [layers, image tokens, channels] expected, with "
            f"{grid[0]} x {grid[1]} = {tokens} image tokens"
        )
    if not bool(outputs.isfinite().all()):
        raise ValueError(f"outputs hold {int((~outputs.isfinite()).sum())} values that are NaN or infinite")
    count = clustering.regions
    if count is not None and count > tokens:
        raise ValueError(f"regions={count} is more than the {grid[0]} x {grid[1]} = {tokens} image tokens")
    labels = np.zeros(tokens, np.int64)
    if tokens > 1:
        tree = linkage(_distances(outputs.detach()), "ward")
        if count is None:
            count = tokens - int((tree[:, 2] <= clustering.threshold * math.sqrt(tokens / _CUT_TOKENS)).sum())
        tree[:, 2] = np.arange(1, tokens)  # the order of the merges, so that equal distances can be cut apart
        labels = fcluster(tree, tokens - count, "distance") - 1
    regions = F.one_hot(torch.from_numpy(labels).long()).T
    regions = regions[regions.sum(dim=1).argsort(descending=True, stable=True)]
    return rearrange(regions, "regions (h w) -> regions h w", h=grid[0]).to(outputs.device, torch.float32)


def _distances(outputs: Tensor) -> np.ndarray:
    """Distances of all pairs of tokens i < j, row by row: root of the mean over layers of their squares."""
    tokens = outputs.shape[1]
    squares = np.zeros(tokens * (tokens - 1) // 2)
    for layer in outputs:
        centred = layer.float() - layer.float().mean(dim=0)
        norms = centred.square().sum(dim=1)
        scale = float(norms.mean().clamp_min(torch.finfo(torch.float32).tiny)) * len(outputs)
        for first in range(0, tokens, _ROWS):
            rows, later = slice(first, first + _ROWS), slice(first, tokens)
            products = centred[rows] @ centred[later].T
            block = (norms[rows, None] + norms[later] - 2 * products).clamp_min(0).cpu().numpy()
            for row, values in enumerate(block, first):
                start = row * tokens - row * (row + 1) // 2
                squares[start : start + tokens - 1 - row] += values[row - first + 1 :] / scale
    return np.sqrt(squares, out=squares)


def group_attention(
    attention: Tensor,
    *,
    grid: tuple[int, int],
    grouping: Grouping,
) -> Tensor:
    """Merge the maps of text tokens that attend to the same places (Seg4Diff, appendix A.4).

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
    exponents = ((exact - low) / (high - low + 1e-6)).T.contiguous()  # [T, N]
    distributions = exponents.softmax(dim=1)
    members = _merge(_divergence(distributions, exponents), grouping)  # [regions, T]
    weights = members / members.sum(dim=1, keepdim=True)
    groups = rearrange(weights @ distributions, "regions (h w) -> regions h w", h=height)
    return groups.to(device=attention.device, dtype=torch.float32)


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
