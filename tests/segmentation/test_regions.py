"""Regions without names, on tiny pipelines and on scenes of the demo model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import seg4diff
from seg4diff.attention.maps import maps_and_outputs
from seg4diff.backbones import Backbone, find_backbone
from seg4diff.segmentation.grouping import cluster_tokens, group_attention
from seg4diff.segmentation.presets import Clustering, Grouping
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
    regions = group_attention(captured[0][:, :77], grid=(4, 4), grouping=Grouping(threshold=1e-4))
    assert len(result.classes) > 1
    assert same_partition(result.labels, regions)


@pytest.mark.parametrize(("layers", "read"), [([0, 2], [0, 2]), (1, [1]), (None, [0, 1, 2])])
def test_default_preset_clusters_the_outputs_of_its_layers(
    pipe: object, monkeypatch: pytest.MonkeyPatch, layers: list[int] | int | None, read: list[int]
) -> None:
    """Outputs of a hand-made forward with an empty prompt; without layers, of the expert and those behind."""
    monkeypatch.setattr(Backbone, "knows_experts", lambda *_: True)
    monkeypatch.setattr(Backbone, "expert_layers", lambda *_: (0,))
    picture = np.rint(random_image() * 255).astype(np.uint8)
    result = segment_unsupervised(pipe, picture, layers=layers, regions=5)
    assert isinstance(result, seg4diff.Segmentation)
    assert result.metadata["layers"] == tuple(read)
    backbone = find_backbone(pipe)
    with torch.no_grad():
        latents = backbone.latents(pipe, torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))[None]
        sigma = backbone.sigma(pipe, latents, 28, -8)
        noisy = (1 - sigma) * latents + sigma * noise
        arguments = backbone.arguments(
            pipe.transformer,
            noisy,
            sigma,
            backbone.encode_text(pipe, [""]),  # type: ignore[attr-defined]
        )
        _, outputs = maps_and_outputs(pipe.transformer, [0], seg4diff.MapRequest(), arguments, read)
    regions = cluster_tokens(outputs[:, 0], grid=(4, 4), clustering=Clustering(1.0, regions=5))
    assert len(result.classes) == 5
    assert same_partition(result.labels, regions)


@pytest.mark.parametrize("regions", [1, 2, 7, 16])
def test_number_of_regions(pipe: object, regions: int) -> None:
    result = segment_unsupervised(pipe, random_image(), layers=1, regions=regions)
    assert isinstance(result, seg4diff.Segmentation)
    assert len(result.classes) == regions
    assert result.labels.unique().tolist() == list(range(regions))
    assert result.metadata["threshold"] is None
    assert torch.allclose(result.scores.sum(dim=0), torch.ones(()), atol=1e-5)  # membership of each pixel


def test_layers_are_chosen_where_no_expert_is_known(pipe: object) -> None:
    images = [random_image(seed=1), random_image(64, 96, seed=2), random_image(seed=3)]
    chosen = segment_unsupervised(pipe, images, batch_size=2, progress=False)
    automatic = segment_unsupervised(pipe, images, layers="auto", progress=False)
    assert isinstance(chosen, list)
    assert isinstance(automatic, list)
    for image, result, other in zip(images, chosen, automatic, strict=True):
        assert torch.equal(result.labels, other.labels)
        alone = segment_unsupervised(pipe, image, layers=list(result.metadata["layers"]))
        assert isinstance(alone, seg4diff.Segmentation)
        assert torch.equal(alone.labels, result.labels)


def test_several_images_and_a_seed(pipe: object) -> None:
    images = [random_image(seed=1), random_image(64, 96, seed=2), random_image(seed=3)]
    together = segment_unsupervised(pipe, images, layers=1, threshold=1e-4, batch_size=2, progress=False)
    assert isinstance(together, list)
    for picture, result in zip(images, together, strict=True):
        alone = segment_unsupervised(pipe, picture, layers=1, threshold=1e-4)
        assert isinstance(alone, seg4diff.Segmentation)
        assert torch.allclose(alone.scores, result.scores, rtol=1e-4)
        assert len(result.classes) > 1
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
        ({"layers": "atuo"}, "layers='atuo' is unknown; accepted: numbers, \"auto\""),
        ({"layers": 1, "regions": 0}, "regions=0 must be at least 1"),
        ({"layers": 1, "regions": 17}, "regions=17 is more than the 4 x 4 = 16 image tokens"),
        ({"layers": 1, "regions": 2, "threshold": 1.0}, "both given"),
        ({"layers": 1, "regions": 2, "preset": "paper"}, "regions=2: preset 'paper' merges text tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            segment_unsupervised(pipe, random_image(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images is empty"):
        segment_unsupervised(pipe, [], layers=1)
    with pytest.raises(TypeError, match="regions=2.0 must be an integer"):
        segment_unsupervised(pipe, random_image(), layers=1, regions=2.0)  # type: ignore[call-overload]
    assert segment_unsupervised(pipe, random_image(), layers=1)


@pytest.mark.parametrize("conditions", ["clean", "hard"])
def test_regions_of_scenes_are_their_objects(conditions: Any) -> None:
    """The demo model, on scenes it has not seen: matched mIoU of sixteen images, their number unknown."""
    from seg4diff.demo import CLASSES, HELD_OUT, scene
    from seg4diff.loading import load_pipeline
    from seg4diff.metrics import Counts, matched_counts

    scenes = [scene(HELD_OUT + 500 + number, conditions) for number in range(16)]
    pipe = load_pipeline("demo", "cpu")
    results = segment_unsupervised(pipe, [s.image for s in scenes], batch_size=8, progress=False)
    assert isinstance(results, list)

    def miou(label_maps: list[torch.Tensor]) -> float:
        total = Counts(*torch.zeros(3, len(CLASSES), dtype=torch.int64))
        for found, drawn in zip(label_maps, scenes, strict=True):
            own = torch.tensor([CLASSES.index(name) for name in drawn.classes])
            total += matched_counts(found, own[torch.from_numpy(drawn.labels)], len(CLASSES))
        return total.mean_iou

    labels = [result.labels for result in results]
    figure, single = miou(labels), miou([torch.zeros_like(found) for found in labels])
    shuffled = miou([found.flatten()[torch.randperm(found.numel())].reshape(found.shape) for found in labels])
    print(f"{conditions}: {figure:.3f}, one region {single:.3f}, shuffled {shuffled:.3f}")
    assert figure > {"clean": 0.55, "hard": 0.42}[conditions]
    assert figure > max(single, shuffled) + 0.2
