"""Grouping: the public code's figures, and the definition in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from seg4diff.segmentation.grouping import group_attention, winning_regions
from seg4diff.segmentation.presets import PRESETS, Grouping, find_preset
from tests.support.paths import REFERENCE


def grouping(preset: str, threshold: float | None = None) -> Grouping:
    return find_preset(preset, threshold=threshold).grouping


@pytest.fixture(scope="module")
def figures() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE)


@pytest.mark.parametrize("tau", ["0.001", "0.01", "0.035", "0.1"])
def test_reference_preset_is_the_public_code(figures: dict[str, torch.Tensor], tau: str) -> None:
    attention = figures["unsup.attention"][0, 0]
    regions = group_attention(attention, grid=(64, 64), grouping=grouping("reference", float(tau)))
    assert len(regions) == figures[f"unsup.merged_count.tau_{tau}"].item()
    assert torch.equal(regions.argmax(dim=0).int(), figures[f"unsup.labels.tau_{tau}"])
    assert regions.dtype == torch.float32
    assert torch.allclose(regions.sum(dim=(1, 2)), torch.ones(len(regions)), atol=1e-5)


def test_threshold_of_the_reference_preset_is_that_of_the_code(figures: dict[str, torch.Tensor]) -> None:
    attention = figures["unsup.attention"][0, 0]
    assert len(group_attention(attention, grid=(64, 64), grouping=grouping("reference"))) == 1
    assert len(group_attention(attention, grid=(64, 64), grouping=grouping("paper"))) == 4


def _by_loops(attention: np.ndarray, threshold: float, sharpness: float, overlapping: bool) -> np.ndarray:
    """The definition, one pair and one image token at a time."""
    tokens, columns = attention.shape
    scaled = np.empty((columns, tokens))
    for n, row in enumerate(attention):
        scaled[:, n] = sharpness * (row - row.min()) / (row.max() - row.min() + 1e-6)
    maps = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    groups, taken = [], set()
    for first in range(columns):
        if first in taken:
            continue
        members = []
        for other in range(columns):
            a, b = maps[first], maps[other]
            divergence = (np.sum(a * np.log(a / b)) + np.sum(b * np.log(b / a))) / 2
            if divergence < threshold and (overlapping or other not in taken):
                members.append(other)
        groups.append(maps[members].mean(axis=0))
        taken.update(members)
    return np.stack(groups)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_grouping_is_its_definition(preset: str, share: float) -> None:
    threshold = share * (1.6 if preset == "default" else 0.1)

    generator = torch.Generator().manual_seed(3)
    parts = torch.rand(4, 30, generator=generator)  # four kinds of token, more alike among themselves
    attention = (parts[torch.arange(11) % 4] + 0.5 * torch.rand(11, 30, generator=generator)).T
    regions = group_attention(attention, grid=(5, 6), grouping=grouping(preset, threshold))
    choices = grouping(preset)
    expected = _by_loops(attention.double().numpy(), threshold, choices.sharpness, choices.overlapping)
    assert 1 < len(expected) < 11  # the case distinguishes merging all from merging none
    assert regions.shape == (len(expected), 5, 6)
    assert np.allclose(regions.flatten(1).numpy(), expected, rtol=1e-5)


def test_overlapping_groups_matter() -> None:
    # token 1 lies between tokens 0 and 2: merged with 0 first, the public code averages it with 2 as well
    left, right = torch.zeros(16), torch.ones(16)
    left[:8], right[:8] = 1.0, 0.0
    attention = torch.stack([left, (left + right) / 2, right], dim=1).double()
    reference = group_attention(attention, grid=(4, 4), grouping=grouping("reference", 0.2))
    paper = group_attention(attention, grid=(4, 4), grouping=grouping("paper", 0.2))
    assert len(reference) == len(paper) == 2
    assert torch.equal(reference[0], paper[0])
    assert reference[1].max() < paper[1].max()


@pytest.mark.parametrize(
    ("attention", "arguments", "error", "message"),
    [
        (torch.rand(24, 7), {"grid": (4, 5)}, ValueError, r"\[24, 7\].*4 x 5 = 20"),
        (torch.rand(1, 24, 7), {"grid": (4, 6)}, ValueError, r"\[1, 24, 7\]"),
        (torch.rand(24, 7).int(), {"grid": (4, 6)}, TypeError, "int32"),
        (torch.full((24, 7), torch.nan), {"grid": (4, 6)}, ValueError, "168 values that are NaN"),
    ],
    ids=["grid", "batch", "dtype", "nan"],
)
def test_bad_input_is_named(
    attention: torch.Tensor, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        group_attention(attention, grouping=grouping("default"), **arguments)  # type: ignore[arg-type]


def test_winning_regions_are_ordered_and_keep_heads_apart() -> None:
    maps = torch.rand(2, 3, 24, 7, generator=torch.Generator().manual_seed(0))
    regions = winning_regions(maps, grid=(4, 6), grouping=grouping("default", 1e-3))
    columns = torch.cat([maps[layer, head] for layer in range(2) for head in range(3)], dim=1)
    groups = group_attention(columns, grid=(4, 6), grouping=grouping("default", 1e-3))
    assert 1 < len(regions) <= 24 < len(groups) == 42
    wins = [int((groups.argmax(dim=0) == number).sum()) for number in range(42)]
    ordered = sorted((number for number in range(42) if wins[number]), key=lambda number: -wins[number])
    assert torch.equal(regions, groups[ordered])
    assert torch.equal(
        winning_regions(columns[None], grid=(4, 6), grouping=grouping("default", 1e-3)), regions
    )
