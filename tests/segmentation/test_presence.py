"""Which names are in the image, on maps made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seg4diff.backbones.base import Recipe
from seg4diff.segmentation.presence import THRESHOLD, presence_of, threshold_for

RECIPE = Recipe(block=4 / 64)  # 2 x 2 tokens of an 8 x 8 grid


def maps() -> Tensor:
    """Ground everywhere at 0.01; names at 0.03 that win nothing, a row, three tokens of a block, a block."""
    scores = torch.full((5, 8, 8), 0.001)
    scores[0] = 0.01
    scores[2, 3, :] = 0.03
    scores[3, 5, 4:6] = scores[3, 6, 4] = 0.03
    scores[4, 0:2, 6:8] = 0.03
    return scores


def test_a_name_is_present_that_wins_a_whole_block() -> None:
    presence = presence_of(maps(), RECIPE)
    assert (presence >= THRESHOLD).tolist() == [True, False, False, False, True]
    # The share of the worst token of the best block: of 0.01 beside 0.001, and so on.
    torch.testing.assert_close(presence, torch.tensor([10 / 11, 1 / 11, 1 / 11, 1 / 11, 3 / 4]))


def test_the_rule_is_that_of_an_argmax() -> None:
    """Wherever no two names tie, a presence of 1/2 or more is a whole block of the label map."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        smooth = torch.nn.functional.interpolate(
            torch.randn(1, 6, 4, 4, generator=generator), size=(8, 8), mode="bicubic"
        )[0]
        scores = smooth.exp() / 100
        labels = scores.argmax(dim=0)
        blocks = labels.unfold(0, 2, 1).unfold(1, 2, 1).flatten(2)
        whole = [bool((blocks == name).all(dim=-1).any()) for name in range(6)]
        assert (presence_of(scores, RECIPE) >= THRESHOLD).tolist() == whole
        seen |= set(whole)
    assert seen == {True, False}


def test_blocks_are_a_share_of_the_area_within_the_grid() -> None:
    scores = torch.full((2, 8, 8), 0.01)
    scores[1] = 0.005
    scores[1, :3, :3] = 0.02
    assert [
        bool(presence_of(scores, replace(RECIPE, block=side**2 / 64))[1] >= THRESHOLD)
        for side in (1, 2, 3, 4)
    ] == [True, True, True, False]
    scores[1, :3, :3] = 0.005
    scores[1, 0, 0] = 0.02
    assert presence_of(scores, replace(RECIPE, block=0.0))[1] < THRESHOLD  # at least two tokens wide
    narrow = torch.full((2, 1, 64), 0.01)  # lower than a block, which is then one token high and wide
    narrow[1] = 0.005
    narrow[1, 0, 5] = 0.03
    torch.testing.assert_close(presence_of(narrow, RECIPE), torch.tensor([2 / 3, 3 / 4]))


def test_one_name_alone() -> None:
    scores = torch.full((1, 8, 8), 0.0001)
    scores[0, 2:4, 2:4] = 0.009
    assert presence_of(scores, replace(RECIPE, alone=0.003)).tolist() == pytest.approx([0.75])
    scores[0, 3, 3] = 0.0001
    assert presence_of(scores, replace(RECIPE, alone=0.003))[0] < 0.1
    assert math.isnan(float(presence_of(scores, RECIPE)[0]))


def test_thresholds_of_error_rates() -> None:
    calibrated = replace(RECIPE, calibration=((0.3, 0.5, 0.0), (0.5, 0.2, 0.1), (0.9, 0.01, 0.4)))
    rates = {None: THRESHOLD, 0.6: 0.3, 0.5: 0.3, 0.3: 0.5, 0.1: 0.9, 0.01: 0.9}
    assert {rate: threshold_for(rate, calibrated) for rate in rates} == rates
    with pytest.raises(ValueError, match=r"false_names=0.001 is below .* the least is 0.01"):
        threshold_for(0.001, calibrated)
    with pytest.raises(ValueError, match="needs calibrated presence scores"):
        threshold_for(0.1, RECIPE)
