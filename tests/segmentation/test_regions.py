"""Regions without names, on tiny pipelines and on scenes of the demo model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import seg4diff
from seg4diff.backbones import find_backbone
from seg4diff.segmentation.grouping import group_attention
from seg4diff.segmentation.presets import find_preset
from seg4diff.segmentation.regions import segment_unsupervised
from tests.support.images import random_image


def test_regions_cover_the_image(pipe: object) -> None:
    result = segment_unsupervised(pipe, random_image(40, 72), layers=1, threshold=1e-4)
    assert isinstance(result, seg4diff.Segmentation)
    assert result.labels.shape == (40, 72)
    assert len(result.classes) > 1
    assert result.classes[0] == "region 1"
    areas = result.labels.flatten().bincount()
    assert areas.tolist() == sorted(areas.tolist(), reverse=True)
    assert 0 not in areas
    assert torch.equal(result.scores.argmax(dim=0), result.labels)


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
    regions = group_attention(
        captured[0][:, :77], grid=(4, 4), grouping=find_preset("paper", threshold=1e-4).grouping
    )
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
    regions = group_attention(
        torch.cat(columns, dim=1), grid=(4, 4), grouping=find_preset("default", threshold=1e-2).grouping
    )
    assert len(result.classes) > 1
    assert same_partition(result.labels, regions)


def test_several_images_and_a_seed(pipe: object) -> None:
    images = [random_image(seed=1), random_image(64, 96, seed=2), random_image(seed=3)]
    together = segment_unsupervised(pipe, images, layers=1, threshold=1e-4, batch_size=2, progress=False)
    assert isinstance(together, list)
    for picture, result in zip(images, together, strict=True):
        alone = segment_unsupervised(pipe, picture, layers=1, threshold=1e-4)
        assert isinstance(alone, seg4diff.Segmentation)
        assert torch.allclose(alone.scores, result.scores, rtol=1e-4)
        assert result.labels.shape == picture.shape[:2]
    other = segment_unsupervised(pipe, images[0], layers=1, threshold=1e-4, seed=9)
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
    """The demo model, on scenes it has not seen: matched mIoU, twelve images."""
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
