"""Instances: components, divided at necks; COCO's panoptic files read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seg4diff.demo.scenes import THINGS, scene
from seg4diff.segmentation.instances import find_instances
from seg4diff.segmentation.result import Segmentation


def drawn(*discs: tuple[float, float, float], height: int = 60, width: int = 100) -> torch.Tensor:
    """Whether a pixel lies in one of the discs (x, y, radius)."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([torch.hypot(x - cx, y - cy) < radius for cx, cy, radius in discs]).any(dim=0)


def of_things(mask: torch.Tensor) -> torch.Tensor:
    """The instances of the class 1 that fills a mask, -1 elsewhere."""
    labels = mask.long()
    found = find_instances(labels, torch.ones(2, *mask.shape), ("ground", "disc"), ["disc"])
    return torch.where(mask, found.map, -1)


def same_parts(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of pixels whose parts agree, parts of `a` numbered as those of `b` that they overlap most."""
    best = {number: b[a == number].mode().values for number in a.unique().tolist()}
    assert len(set(map(int, best.values()))) == len(best)
    return float(
        torch.stack([(a == number) & (b == part) for number, part in best.items()]).any(0).float().mean()
    )


@pytest.mark.parametrize("scale", [1, 4], ids=["small", "large"])
def test_touching_discs_are_divided_at_the_neck(scale: int) -> None:
    discs = [(28 * scale, 30 * scale, 18 * scale), (61 * scale, 30 * scale, 17 * scale)]
    both = drawn(*discs, height=60 * scale, width=100 * scale)
    y, x = torch.meshgrid(torch.arange(60.0 * scale), torch.arange(100.0 * scale), indexing="ij")
    nearer = torch.stack([torch.hypot(x - cx, y - cy) - radius for cx, cy, radius in discs]).argmin(dim=0)
    assert same_parts(of_things(both), torch.where(both, nearer, -1)) > 0.99


@pytest.mark.parametrize(
    "mask",
    [
        drawn((30, 30, 20), (52, 30, 20)),
        torch.ones(60, 100).bool(),
        (torch.arange(100) < 14) | (torch.arange(60)[:, None] > 45),
        torch.eye(100)[:60].bool() | torch.eye(100).roll(1, 1)[:60].bool(),
    ],
    ids=["without a neck", "everything", "L", "line"],
)
def test_one_thing_stays_one(mask: torch.Tensor) -> None:
    assert of_things(mask)[mask].unique().numel() == 1


def test_components_and_small_parts() -> None:
    labels = torch.zeros(40, 60).long()
    labels[5:15, 5:15] = labels[5:15, 40:55] = 1
    labels[30, 50:53] = 1  # below a four-hundredth of the image: with the nearer of the two
    labels[20:22, 0] = 2  # all that there is of its class
    labels[35:, :] = -1
    scores = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    found = find_instances(labels, scores, ("ground", "box", "dot"), ["box", "dot"])
    assert [one.label for one in found.instances] == [0, 1, 1, 2]
    assert torch.equal(found.map == -1, labels == -1)
    assert torch.equal(found.map == 2, (labels == 1) & (torch.arange(60) >= 40))
    for number, one in enumerate(found.instances):
        inside = found.map == number
        assert one.area == int(inside.sum())
        assert one.score == pytest.approx(float(scores[one.label][inside].mean()))
    assert len(find_instances(labels, scores, ("ground", "box", "dot"), []).instances) == 3
    with pytest.raises(ValueError, match="'cat', which is not among 'ground', 'box', 'dot'"):
        find_instances(labels, scores, ("ground", "box", "dot"), ["cat"])


def test_touching_things_of_a_scene() -> None:
    one = scene(5_000_000, "touching")
    labels = torch.from_numpy(one.labels)
    scores = torch.nn.functional.one_hot(labels).permute(2, 0, 1).float()
    things = [name for name in one.classes if name in THINGS]
    found = Segmentation(labels, scores, one.classes).instances(things)
    true = torch.from_numpy(one.instances)
    assert {found.classes[part.label] for part in found.instances} == set(one.classes)
    for number in true[true >= 0].unique():
        iou = max(
            float(
                ((found.map == part) & (true == number)).sum()
                / ((found.map == part) | (true == number)).sum()
            )
            for part in range(len(found.instances))
        )
        assert iou > 0.7


def test_panoptic_files(tmp_path: Path) -> None:
    labels = (torch.arange(20 * 30).reshape(20, 30) // 2) % 300 - 1  # more than 256 segments
    classes = tuple(f"thing {number}" for number in range(299))
    result = Segmentation(labels, torch.rand(299, 20, 30), classes)
    found = result.instances(["thing 7"])
    document = json.loads(found.save(tmp_path / "a.json").read_text(encoding="utf-8"))
    read = np.asarray(Image.open(found.save(tmp_path / "a.png"))).astype(int)
    ids = read[..., 0] + 256 * read[..., 1] + 256**2 * read[..., 2]
    assert np.array_equal(ids == 0, labels == -1)
    (annotation,) = document["annotations"]
    assert annotation["file_name"] == "a.png"
    assert document["images"] == [
        {"id": annotation["image_id"], "height": 20, "width": 30, "file_name": "a.png"}
    ]
    segments = annotation["segments_info"]
    assert {segment["id"] for segment in segments} == set(np.unique(ids[ids > 0]))
    categories = {category["id"]: category for category in document["categories"]}
    assert [c["id"] for c in categories.values() if c["isthing"]] == [8]
    assert len(segments) >= 299
    for segment in segments:
        inside = ids == segment["id"]
        (index,) = np.unique(labels[inside])
        assert categories[segment["category_id"]]["name"] == classes[index]
        assert segment["area"] == inside.sum()
        rows, columns = np.nonzero(inside)
        corner = [columns.min(), rows.min()]
        assert segment["bbox"] == [*corner, columns.max() - corner[0] + 1, rows.max() - corner[1] + 1]
        assert segment["iscrowd"] == 0
        assert segment["score"] == pytest.approx(float(result.scores[index][inside].mean()), rel=1e-5)
    with pytest.raises(ValueError, match=r"use \.png, \.json"):
        found.save(tmp_path / "a.npz")
