"""Regions of the demo model's held-out scenes beside what simpler methods find, in one run.

    python -m benchmarks.unsupervised [--scenes 100] [--out benchmarks/results/unsupervised.json]

The figure is the matched mIoU in % on clean and on hard scenes: regions and classes are matched per image by
the Hungarian method, pixels are counted over all scenes (`seg4diff.metrics.matched_counts`); in brackets
without the pairs that have no pixel in common. Methods with the "true number" are told how many classes each
scene has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor

import seg4diff
from seg4diff.attention.patch import patch_of
from seg4diff.demo import CLASSES, HELD_OUT, Scene, scene
from seg4diff.demo.scenes import Conditions
from seg4diff.kernels.types import MapRequest
from seg4diff.loading import load_pipeline
from seg4diff.metrics import Counts, matched_counts
from seg4diff.segmentation.inputs import Noising, views_of
from seg4diff.segmentation.maps import Reading, run_maps
from seg4diff.segmentation.presets import find_preset

CONDITIONS: tuple[Conditions, ...] = ("clean", "hard")


def clusters(features: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """k-means of [N, C] features into ``count`` regions [count, h, w] of zeros and ones."""
    _, labels = kmeans2(features.double().numpy(), count, minit="++", seed=0, iter=30, missing="warn")
    return F.one_hot(torch.from_numpy(labels).long(), count).T.reshape(count, *grid).float()


def label_map(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions [R, h, w] resized bilinearly, and their argmax, numbered without gaps."""
    labels = F.interpolate(regions[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    return torch.unique(labels, return_inverse=True)[1]


def outputs_and_latents(pipe: Any, images: list[Any], layers: range) -> tuple[list[Tensor], Tensor]:
    """Of the empty prompt, attention outputs of `layers` side by side [N, C], and clean latents."""
    views = views_of(pipe, images, find_preset("default").fit)
    found = run_maps(
        pipe, views, [[""]] * len(views),
        Reading(MapRequest(columns=("text", slice(0, 1))), layers[0], layers),
        Noising(batch_size=8), progress=False,
    )  # fmt: skip
    outputs = {one.index: one.outputs[0].transpose(0, 1).flatten(1) for one in found if one.outputs}
    pixels = pipe.image_processor.preprocess([view.pixels for view in views])
    with torch.no_grad():
        latents = torch.cat([patch_of(pipe).backbone.latents(pipe, part) for part in pixels.split(8)])
    return [outputs[position] for position in range(len(views))], latents


def measure(pipe: Any, scenes: list[Scene], layers: range) -> dict[str, dict[str, float]]:
    """Figures of every method on these scenes."""
    images = [one.image for one in scenes]
    numbers = [torch.tensor([CLASSES.index(name) for name in one.classes]) for one in scenes]
    truths = [own[torch.from_numpy(one.labels)] for own, one in zip(numbers, scenes, strict=True)]
    outputs, latents = outputs_and_latents(pipe, images, layers)
    coarse = F.avg_pool2d(latents, 2)
    true_number = [len(one.classes) for one in scenes]

    def ours(**choices: Any) -> list[Tensor]:
        results = seg4diff.segment_unsupervised(pipe, images, batch_size=8, progress=False, **choices)
        assert isinstance(results, list)
        return [result.labels for result in results]

    def told() -> list[Tensor]:
        return [
            seg4diff.segment_unsupervised(pipe, image, regions=number).labels
            for image, number in zip(images, true_number, strict=True)
        ]

    def by_clusters(features: Callable[[int], Tensor], size: tuple[int, int]) -> list[Tensor]:
        found = [clusters(features(p), true_number[p], size) for p in range(len(scenes))]
        return [label_map(regions, truths[p].shape) for p, regions in enumerate(found)]  # type: ignore[arg-type]

    methods: dict[str, Callable[[], list[Tensor]]] = {
        "one single region": lambda: [torch.zeros_like(truth) for truth in truths],
        "segment_unsupervised, preset default": ours,
        'segment_unsupervised, layers="auto"': lambda: ours(layers="auto"),
        "segment_unsupervised, true number": told,
        "segment_unsupervised, preset paper": lambda: ours(preset="paper"),
        "segment_unsupervised, preset reference": lambda: ours(preset="reference"),
        "k-means on the same outputs, true number": lambda: by_clusters(lambda p: outputs[p], (16, 16)),
        "k-means on clean latents, true number": lambda: by_clusters(
            lambda p: latents[p].flatten(1).T, (latents.shape[2], latents.shape[3])
        ),
        "k-means on latents at 16 x 16, true number": lambda: by_clusters(
            lambda p: coarse[p].flatten(1).T, (16, 16)
        ),
    }
    figures: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        labels = method()
        together = [sum_of(labels, truths, match_disjoint=disjoint) for disjoint in (True, False)]
        figures[name] = row = {
            "miou": 100 * together[0].mean_iou,
            "miou_touching": 100 * together[1].mean_iou,
            "regions": float(np.mean([int(one.unique().numel()) for one in labels])),
        }
        both = f"{row['miou']:5.1f} ({row['miou_touching']:5.1f})"
        print(f"{name:47} {both}  {row['regions']:4.1f} regions a scene", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=HELD_OUT, help="seed of the first scene")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    pipe = load_pipeline("demo", "cpu")
    expert = pipe.transformer.config["_seg4diff_expert_layers"][0]
    figures = {}
    for conditions in CONDITIONS:
        scenes = [scene(options.first + number, conditions) for number in range(options.scenes)]
        mean = np.mean([len(one.classes) for one in scenes])
        print(f"{len(scenes)} {conditions} scenes from seed {options.first}, {mean:.1f} classes a scene")
        figures[conditions] = measure(pipe, scenes, range(expert, expert + 3))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"scenes": options.scenes, "first": options.first, **figures}
        options.out.write_text(json.dumps(document, indent=2) + "\n")


def sum_of(labels: list[Tensor], truths: list[Tensor], *, match_disjoint: bool) -> Counts:
    """Matched counts over all images."""
    counts = [
        matched_counts(one, truth, len(CLASSES), match_disjoint=match_disjoint)
        for one, truth in zip(labels, truths, strict=True)
    ]
    total = counts[0]
    for one in counts[1:]:
        total = total + one
    return total


if __name__ == "__main__":
    main()
