"""Principal components against a float64 decomposition of the whole matrix."""

from __future__ import annotations

import pytest
import torch

from seg4diff.analysis.pca import principal_components


@pytest.mark.parametrize(("tokens", "width"), [(60, 40), (30, 16), (50, 5), (10, 40)])
def test_scores_are_the_singular_vectors(tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    features = torch.randn(tokens, width, generator=generator) * torch.linspace(5, 0.5, width)
    features = features + 100  # a mean that must be taken out
    scores = principal_components(features)
    centred = features.double() - features.double().mean(dim=0)
    left, sizes, right = torch.linalg.svd(centred, full_matrices=False)
    signs = torch.sign(right[range(3), right[:3].abs().argmax(dim=1)])
    expected = left[:, :3] * sizes[:3] * signs
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    variances = scores.var(dim=0)
    assert variances[0] > variances[1] > variances[2] > 0


def test_repeats_and_leaves_its_input_and_the_random_state_alone() -> None:
    features = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    before, state = features.clone(), torch.random.get_rng_state()
    assert torch.equal(principal_components(features), principal_components(features))
    assert torch.equal(features, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_half_precision_and_fewer_dimensions_than_components() -> None:
    features = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = principal_components(features)
    assert scores.shape == (20, 3)
    assert scores[:, 2].abs().max() == 0
    assert scores[:, :2].abs().max() > 0.5
