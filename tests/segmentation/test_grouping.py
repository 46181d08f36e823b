"""Grouping: the public code's figures, and the definition in loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from seg4diff.segmentation.grouping import cluster_tokens, find_regions, group_attention
from seg4diff.segmentation.presets import Clustering, Grouping, find_preset
from tests.support.paths import REFERENCE


def grouping(preset: str, threshold: float | None = None) -> Grouping:
    found = find_preset(preset, threshold=threshold).grouping
    assert isinstance(found, Grouping)
    return found


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


def _by_loops(attention: np.ndarray, threshold: float, overlapping: bool) -> np.ndarray:
    """The definition, one pair and one image token at a time."""
    tokens, columns = attention.shape
    scaled = np.empty((columns, tokens))
    for n, row in enumerate(attention):
        scaled[:, n] = (row - row.min()) / (row.max() - row.min() + 1e-6)
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


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize("threshold", [0.03, 0.06])
def test_grouping_is_its_definition(preset: str, threshold: float) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = torch.rand(4, 30, generator=generator)  # four kinds of token, more alike among themselves
    attention = (parts[torch.arange(11) % 4] + 0.5 * torch.rand(11, 30, generator=generator)).T
    regions = group_attention(attention, grid=(5, 6), grouping=grouping(preset, threshold))
    expected = _by_loops(attention.double().numpy(), threshold, grouping(preset).overlapping)
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
        group_attention(attention, grouping=grouping("paper"), **arguments)  # type: ignore[arg-type]


def test_merged_regions_are_ordered_by_the_tokens_they_win() -> None:
    maps = torch.rand(2, 24, 17, generator=torch.Generator().manual_seed(0))
    regions = find_regions(maps, grid=(4, 6), grouping=grouping("paper", 1e-3))
    groups = group_attention(maps.mean(dim=0), grid=(4, 6), grouping=grouping("paper", 1e-3))
    assert 1 < len(regions) < len(groups) == 17
    wins = [int((groups.argmax(dim=0) == number).sum()) for number in range(17)]
    ordered = sorted((number for number in range(17) if wins[number]), key=lambda number: -wins[number])
    assert torch.equal(regions, groups[ordered])


def _ward_by_loops(outputs: np.ndarray, threshold: float | None, count: int | None) -> list[set[int]]:
    """Ward's method by its definition: merge the two clusters of least distance, one merge at a time."""
    layers, tokens, _ = outputs.shape
    centred = outputs - outputs.mean(axis=1, keepdims=True)
    scale = np.sqrt((centred**2).sum(axis=2).mean(axis=1) * layers)
    features = np.concatenate(list(centred / scale[:, None, None]), axis=1)
    clusters = [{token} for token in range(tokens)]
    while len(clusters) > (count or 1):
        best = (np.inf, 0, 0)
        for i, one in enumerate(clusters):
            for j, other in enumerate(clusters[:i]):
                between = features[list(one)].mean(axis=0) - features[list(other)].mean(axis=0)
                weight = 2 * len(one) * len(other) / (len(one) + len(other))
                best = min(best, (float(np.sqrt(weight * (between**2).sum())), i, j))
        if threshold is not None and best[0] > threshold:
            break
        clusters[best[2]] |= clusters.pop(best[1])
    return sorted(clusters, key=lambda cluster: -len(cluster))


@pytest.mark.parametrize(("threshold", "count"), [(0.4, None), (0.8, None), (None, 1), (None, 3), (None, 30)])
def test_clusters_are_wards_by_its_definition(threshold: float | None, count: int | None) -> None:
    """The cut is for 256 tokens: of 30 it lies at sqrt(30 / 256) of it. Layers of any scale count alike."""
    generator = torch.Generator().manual_seed(4)
    kinds = torch.randn(2, 4, 5, generator=generator)
    places = torch.randint(0, 4, (30,), generator=generator)
    outputs = kinds[:, places] + 0.4 * torch.randn(2, 30, 5, generator=generator)
    outputs = outputs * torch.tensor([1.0, 300.0])[:, None, None] + 40.0
    at_256_tokens = 1.0 if threshold is None else threshold * (256 / 30) ** 0.5
    regions = cluster_tokens(outputs, grid=(5, 6), clustering=Clustering(at_256_tokens, regions=count))
    expected = _ward_by_loops(outputs.double().numpy(), threshold, count)
    if count is None:
        assert 2 < len(expected) < 30  # neither all merged nor all apart
    assert regions.shape == (len(expected), 5, 6)
    assert {frozenset(region.flatten().nonzero().flatten().tolist()) for region in regions} == {
        frozenset(cluster) for cluster in expected
    }
    sizes = regions.sum(dim=(1, 2)).tolist()
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("side", [8, 32])
def test_the_cut_grows_with_the_root_of_the_tokens(side: int) -> None:
    """The same image at any number of tokens has the same regions: two halves, one with a faint quarter."""
    outputs = torch.zeros(1, side, side, 3)
    outputs[:, :, : side // 2, 0] = 1.0
    outputs[:, : side // 2, : side // 2, 1] = 0.2
    # deviation 0.51 in all; halves: distance 22.2 at 256 tokens, the two quarters 3.1
    for cut, count in ((2.9, 3), (3.3, 2), (21.5, 2), (23.0, 1)):
        found = cluster_tokens(outputs.flatten(1, 2), grid=(side, side), clustering=Clustering(cut))
        assert len(found) == count, cut


@pytest.mark.parametrize(("tokens", "value"), [((1, 1), 0.0), ((2, 3), 7.0)])
def test_tokens_without_differences_are_one_region(tokens: tuple[int, int], value: float) -> None:
    outputs = torch.full((2, tokens[0] * tokens[1], 4), value)
    assert torch.equal(
        cluster_tokens(outputs, grid=tokens, clustering=Clustering(5.0)), torch.ones(1, *tokens)
    )
    count = tokens[0] * tokens[1]
    apart = cluster_tokens(outputs, grid=tokens, clustering=Clustering(5.0, regions=count))
    assert len(apart) == count  # also where all distances are equal


@pytest.mark.parametrize(
    ("outputs", "regions", "message"),
    [
        (torch.rand(2, 12, 5), 13, "regions=13 is more than the 3 x 4 = 12 image tokens"),
        (torch.rand(2, 13, 5), None, r"\[2, 13, 5\].*3 x 4 = 12"),
        (torch.rand(12, 5), None, r"\[12, 5\]"),
        (torch.full((2, 12, 5), torch.nan), None, "120 values that are NaN"),
    ],
    ids=["regions", "tokens", "layers", "nan"],
)
def test_outputs_that_cannot_be_clustered_are_named(
    outputs: torch.Tensor, regions: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_tokens(outputs, grid=(3, 4), clustering=Clustering(5.0, regions=regions))


def test_clustering_takes_little_memory() -> None:
    """The distances of all pairs once here and once in SciPy, and not the square matrix of them."""
    import tracemalloc

    outputs = torch.randn(3, 1024, 64, generator=torch.Generator().manual_seed(0))
    tracemalloc.start()  # counts NumPy, where the distances are
    cluster_tokens(outputs, grid=(32, 32), clustering=Clustering(5.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 8 * 1024 * 1023 / 2
