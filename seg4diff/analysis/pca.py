"""Principal components of what the image tokens of a layer hold (Seg4Diff, appendix D.4)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor


def principal_components(features: Tensor, count: int = 3) -> Tensor:
    """Scores of the first principal components, largest variance first.

    Deterministic: each component's sign is such that its largest loading is positive.

    Args:
        features: [N, C], any floating dtype and device; heads are concatenated in C.
        count: number of components; zeros follow where C or N has fewer.

    Returns:
        [N, count], float32, on the CPU; every column has mean zero.
    """
    centred = features.detach().to(torch.promote_types(features.dtype, torch.float32), copy=True)
    centred -= centred.mean(dim=0)
    covariance = (centred.T @ centred).cpu().double().numpy() / max(len(centred), 1)
    width = len(covariance)
    if width > 4 * count:
        # A fixed start, so that the answer repeats.
        _, vectors = eigsh(covariance, k=count, which="LA", v0=np.ones(width))
    else:
        vectors = np.linalg.eigh(covariance)[1][:, -count:]
    vectors = np.ascontiguousarray(vectors[:, ::-1])
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.sign(vectors[largest, np.arange(vectors.shape[1])])
    scores = centred @ torch.from_numpy(vectors).to(centred)
    missing = count - scores.shape[1]
    return torch.nn.functional.pad(scores, (0, missing)).float().cpu()
