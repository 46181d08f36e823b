"""Grouping and regions: the public code's figures, the definition in loops, and tiny pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import seg4diff
from seg4diff.backbones import find_backbone
from seg4diff.segmentation.regions import group_attention, segment_unsupervised, winning_regions
from tests.support.images import random_image
from tests.support.paths import REFERENCE


@pytest.fixture(scope="module")
def figures() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE)


@pytest.mark.parametrize("tau", ["0.001", "0.01", "0.035", "0.1"])
def test_reference_preset_is_the_public_code(figures: dict[str, torch.Tensor], tau: str) -> None:
    attention = figures["unsup.attention"][0, 0]
    regions = group_attention(attention, grid=(64, 64), threshold=float(tau), preset="reference")
    assert len(regions) == figures[f"unsup.merged_count.tau_{tau}"].item()
    assert torch.equal(regions.argmax(dim=0).int(), figures[f"unsup.labels.tau_{tau}"])
    assert regions.dtype == torch.float32
    assert torch.allclose(regions.sum(dim=(1, 2)), torch.ones(len(regions)), atol=1e-5)


def test_threshold_of_the_reference_preset_is_that_of_the_code(figures: dict[str, torch.Tensor]) -> None:
    attention = figures["unsup.attention"][0, 0]
    assert len(group_attention(attention, grid=(64, 64), preset="reference")) == 1
    assert len(group_attention(attention, grid=(64, 64), preset="paper")) == 4


def _by_loops(attention: np.ndarray, threshold: float, sharpness: float, taken_again: bool) -> np.ndarray:
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
            if divergence < threshold and (taken_again or other not in taken):
                members.append(other)
        groups.append(maps[members].mean(axis=0))
        taken.update(members)
    return np.stack(groups)


@pytest.mark.parametrize("preset", ["default", "paper", "reference"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_grouping_is_its_definition(preset: str, share: float) -> None:
    from seg4diff.segmentation.regions import GROUPINGS

    threshold = share * (1.6 if preset == "default" else 0.1)

    generator = torch.Generator().manual_seed(3)
    parts = torch.rand(4, 30, generator=generator)  # four kinds of token, more alike among themselves
    attention = (parts[torch.arange(11) % 4] + 0.5 * torch.rand(11, 30, generator=generator)).T
    regions = group_attention(attention, grid=(5, 6), threshold=threshold, preset=preset)
    choices = GROUPINGS[preset]
    expected = _by_loops(attention.double().numpy(), threshold, choices.sharpness, choices.taken_again)
    assert 1 < len(expected) < 11  # the case distinguishes merging all from merging none
    assert regions.shape == (len(expected), 5, 6)
    assert np.allclose(regions.flatten(1).numpy(), expected, rtol=1e-5)


def test_taking_maps_again_matters() -> None:
    # token 1 lies between tokens 0 and 2: merged with 0 first, the public code averages it with 2 as well
    left, right = torch.zeros(16), torch.ones(16)
    left[:8], right[:8] = 1.0, 0.0
    attention = torch.stack([left, (left + right) / 2, right], dim=1).double()
    reference = group_attention(attention, grid=(4, 4), threshold=0.2, preset="reference")
    paper = group_attention(attention, grid=(4, 4), threshold=0.2, preset="paper")
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
        (torch.rand(24, 7), {"grid": (4, 6), "threshold": 0}, ValueError, "threshold=0 must be"),
        (torch.rand(24, 7), {"grid": (4, 6), "threshold": float("nan")}, ValueError, "threshold=nan"),
        (
            torch.rand(24, 7),
            {"grid": (4, 6), "preset": "best?"},
            ValueError,
            "'best\\?' is unknown; accepted: 'ref",
        ),
    ],
    ids=["grid", "batch", "dtype", "nan", "zero-threshold", "nan-threshold", "preset"],
)
def test_bad_input_is_named(
    attention: torch.Tensor, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        group_attention(attention, **arguments)  # type: ignore[arg-type]


def test_regions_cover_the_picture(pipe: object) -> None:
    result = segment_unsupervised(pipe, random_image(40, 72), layers=1, threshold=1e-4)
    assert isinstance(result, seg4diff.Segmentation)
    assert result.labels.shape == (40, 72)
    assert len(result.classes) > 1
    assert result.classes[0] == "region 1"
    areas = result.labels.flatten().bincount()
    assert areas.tolist() == sorted(areas.tolist(), reverse=True)
    assert 0 not in areas
    assert torch.equal(result.scores.argmax(dim=0), result.labels)


def test_winning_regions_are_ordered_and_keep_heads_apart() -> None:
    maps = torch.rand(2, 3, 24, 7, generator=torch.Generator().manual_seed(0))
    regions = winning_regions(maps, grid=(4, 6), threshold=1e-3)
    columns = torch.cat([maps[layer, head] for layer in range(2) for head in range(3)], dim=1)
    groups = group_attention(columns, grid=(4, 6), threshold=1e-3)
    assert 1 < len(regions) <= 24 < len(groups) == 42
    wins = [int((groups.argmax(dim=0) == number).sum()) for number in range(42)]
    ordered = sorted((number for number in range(42) if wins[number]), key=lambda number: -wins[number])
    assert torch.equal(regions, groups[ordered])
    assert torch.equal(winning_regions(columns, grid=(4, 6), threshold=1e-3), regions)


def same_partition(labels: torch.Tensor, groups: torch.Tensor) -> bool:
    """Whether labels are the argmax of the groups that win an image token, whatever their numbers."""
    winners = groups[groups.flatten(1).argmax(dim=0).unique()]
    resized = torch.nn.functional.interpolate(winners[None], size=labels.shape, mode="bilinear")[0].argmax(
        dim=0
    )
    return torch.equal(resized[..., None] == resized.flatten(), labels[..., None] == labels.flatten())


def test_regions_are_those_of_the_empty_prompt(pipe: object) -> None:
    """The same maps as a hand-made forward with an empty prompt, and the first 77 of 154 columns."""
    captured: list[torch.Tensor] = []
    picture = random_image()
    result = segment_unsupervised(pipe, picture, layers=[2], threshold=1e-4, seed=5, preset="paper")
    backbone = find_backbone(pipe)
    with torch.no_grad():
        pixels = (
            torch.from_numpy(np.rint(picture.astype(np.float32) * 255)).permute(2, 0, 1)[None].float() / 127.5
            - 1
        )
        latents = backbone.latents(pipe, pixels)
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(5))[None]
        sigma = backbone.sigma(pipe, latents, 28, -8)
        noisy = (1 - sigma) * latents + sigma * noise
        text = backbone.encode_text(pipe, [""])
        with seg4diff.capture(pipe.transformer, layers=[2]) as maps:  # type: ignore[attr-defined]
            pipe.transformer(hidden_states=noisy, timestep=1000 * sigma, **text)  # type: ignore[attr-defined]
        captured.append(maps.records[0].maps[0])  # type: ignore[index]
    assert captured[0].shape == (16, 154)
    regions = group_attention(captured[0][:, :77], grid=(4, 4), threshold=1e-4, preset="paper")
    assert len(result.classes) > 1
    assert same_partition(result.labels, regions)


def test_default_preset_keeps_heads_and_layers_apart(pipe: object) -> None:
    picture = np.rint(random_image() * 255).astype(np.uint8)
    result = segment_unsupervised(pipe, picture, layers=[0, 2], threshold=1e-2)
    assert isinstance(result, seg4diff.Segmentation)
    backbone = find_backbone(pipe)
    with torch.no_grad():
        latents = backbone.latents(pipe, torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))[None]
        sigma = backbone.sigma(pipe, latents, 28, -8)
        noisy = (1 - sigma) * latents + sigma * noise
        request = seg4diff.MapRequest(heads="each", columns=("text", slice(0, 77)))
        with seg4diff.capture(pipe.transformer, layers=[0, 2], maps=request) as captured:  # type: ignore[attr-defined]
            pipe.transformer(hidden_states=noisy, timestep=1000 * sigma, **backbone.encode_text(pipe, [""]))  # type: ignore[attr-defined]
    columns = [record.maps[0, head] for record in captured.records for head in range(2)]  # type: ignore[index]
    regions = group_attention(torch.cat(columns, dim=1), grid=(4, 4), threshold=1e-2)
    assert len(result.classes) > 1
    assert same_partition(result.labels, regions)


def test_several_pictures_and_a_seed(pipe: object) -> None:
    pictures = [random_image(seed=1), random_image(64, 96, seed=2), random_image(seed=3)]
    together = segment_unsupervised(pipe, pictures, layers=1, threshold=1e-4, batch_size=2, progress=False)
    assert isinstance(together, list)
    for picture, result in zip(pictures, together, strict=True):
        alone = segment_unsupervised(pipe, picture, layers=1, threshold=1e-4)
        assert isinstance(alone, seg4diff.Segmentation)
        assert torch.allclose(alone.scores, result.scores, rtol=1e-4)
        assert result.labels.shape == picture.shape[:2]
    other = segment_unsupervised(pipe, pictures[0], layers=1, threshold=1e-4, seed=9)
    assert isinstance(other, seg4diff.Segmentation)
    assert not torch.equal(other.scores, together[0].scores)


def test_refusals_leave_the_pipeline_usable(pipe: object) -> None:
    for arguments, message in (
        ({"layers": 3}, "layer 3 is out of range"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"preset": "beast"}, "'beast'"),
        ({"layers": 1, "batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            segment_unsupervised(pipe, random_image(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images is empty"):
        segment_unsupervised(pipe, [], layers=1)
    with pytest.raises(ValueError, match="no expert layer is known"):
        segment_unsupervised(pipe, random_image())
    assert segment_unsupervised(pipe, random_image(), layers=1)


def test_regions_of_scenes_beat_a_single_one() -> None:
    """The demo model, on scenes it has not seen: matched mIoU, twelve pictures."""
    from seg4diff.demo import CLASSES, HELD_OUT, scene
    from seg4diff.loading import load_pipeline
    from seg4diff.metrics import Counts, matched_counts

    scenes = [scene(HELD_OUT + 500 + number) for number in range(12)]
    pipe = seg4diff.patch(load_pipeline("demo", "cpu"))
    results = segment_unsupervised(pipe, [s.image for s in scenes], batch_size=6, progress=False)
    assert isinstance(results, list)

    def miou(label_maps: list[torch.Tensor]) -> float:
        total = Counts(*torch.zeros(3, len(CLASSES), dtype=torch.int64))
        for found, drawn in zip(label_maps, scenes, strict=True):
            own = torch.tensor([CLASSES.index(name) for name in drawn.classes])
            total += matched_counts(found, own[torch.from_numpy(drawn.labels)], len(CLASSES))
        return total.mean_iou

    labels = [result.labels for result in results]
    single = miou([torch.zeros_like(found) for found in labels])
    shuffled = miou([found.flatten()[torch.randperm(found.numel())].reshape(found.shape) for found in labels])
    assert miou(labels) > single + 0.08
    assert miou(labels) > shuffled + 0.1
