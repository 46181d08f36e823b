"""Scores spread over like tokens and resized to pixels, against dense float64 computations."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor

from seg4diff.segmentation import scores as room
from seg4diff.segmentation.scores import best_of, resize_scores, spread_scores


def random_scores(names: int = 5, height: int = 6, width: int = 7) -> Tensor:
    """Probabilities over five orders of magnitude."""
    return (-12 * torch.rand(names, height, width, generator=torch.Generator().manual_seed(0))).exp()


def outputs_of(height: int = 6, width: int = 7, channels: int = 12) -> Tensor:
    """Two kinds of tokens, far from the origin, in random places."""
    generator = torch.Generator().manual_seed(1)
    kinds = 3 * torch.randn(2, channels, generator=generator) + 40
    chosen = torch.randint(2, (height, width), generator=generator)
    return kinds[chosen] + torch.randn(height, width, channels, generator=generator)


def densely(scores: Tensor, outputs: Tensor, tau: float) -> Tensor:
    """The whole N x N matrix, in float64."""
    tokens = outputs.double().flatten(0, 1)
    distances = (tokens[:, None] - tokens[None]).square().sum(dim=-1)
    kernel = (-distances / distances.mean() / tau).softmax(dim=1)
    return torch.einsum("ij,cj->ci", kernel, scores.double().flatten(1).log()).exp().view_as(scores)


@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
def test_spreading_is_the_dense_kernel(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from seg4diff.kernels.aten import affinity

    monkeypatch.setattr(affinity, "_BLOCK_ELEMENTS", 5 * 42)  # nine blocks of rows, the last one not full
    scores, outputs = random_scores(), outputs_of()
    exact = densely(scores, outputs, tau)
    found = spread_scores(scores, outputs, tau)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)
    for wrong in (scores, densely(scores, outputs.flip(1), tau), densely(scores, outputs, 1.3 * tau)):
        assert (found.double() / wrong.double()).log().abs().max() > 1e-2


def test_spreading_of_equal_tokens_is_their_mean() -> None:
    scores = random_scores()
    found = spread_scores(scores, torch.full((6, 7, 12), 3.0), 0.1)
    mean = scores.log().mean(dim=(1, 2), keepdim=True).exp().expand_as(scores)
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=0)
    assert torch.isfinite(spread_scores(torch.zeros(1, 6, 7), outputs_of(), 0.1)).all()


def test_bicubic_scores_are_probabilities() -> None:
    steep = torch.full((1, 6, 6), 1e-6)
    steep[:, :, 3:] = 0.99
    found = resize_scores(steep, (60, 60), "bicubic")
    assert found.shape == (1, 60, 60)
    assert float(found.max()) <= 1.0
    assert float(found.min()) > 0.0
    # Interpolation goes through what it is given: at odd factors some pixels lie on the tokens' centres.
    torch.testing.assert_close(
        resize_scores(steep, (18, 18), "bicubic")[:, 1::3, 1::3], steep, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("upsample", ["linear", "geometric", "bicubic", "bilateral"])
def test_the_best_of_parts_is_the_best_of_all(
    upsample: room.Upsample, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = random_scores(7)
    if upsample != "bilateral":  # its matrix products round by the number of names
        scores[4] = scores[1]  # the first of equal ones wins
    image = Image.effect_noise((30, 20), 100).convert("RGB")
    everything = resize_scores(scores, (20, 30), upsample, image)
    monkeypatch.setattr(room, "_VALUES_AT_ONCE", 2 * 20 * 30)
    best, winner = best_of(scores, (20, 30), upsample, image)
    torch.testing.assert_close(best, everything.amax(dim=0))
    assert torch.equal(winner, everything.argmax(dim=0))
    assert (winner == 4).any() == (upsample == "bilateral")
    assert len(winner.unique()) > 3


def test_bilateral_needs_an_image() -> None:
    with pytest.raises(ValueError, match="there is none"):
        resize_scores(random_scores(), (60, 70), "bilateral")
