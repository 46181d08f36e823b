"""Regions of the demo model's held-out scenes beside what simpler methods find, in one run.

    python -m benchmarks.unsupervised [--scenes 100] [--out benchmarks/results/unsupervised.json]

The figure is the matched mIoU in %: regions and classes are matched per picture by the Hungarian method,
pixels are counted over all scenes (``seg4diff.metrics.matched_counts``); in brackets without the
pairs that have no pixel in common. "true number" methods are told how many classes each scene has, ours are
not.
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
from seg4diff.demo import CLASSES, HELD_OUT, scene
from seg4diff.kernels.types import MapRequest
from seg4diff.loading import load_pipeline
from seg4diff.metrics import Counts, matched_counts
from seg4diff.segmentation.inputs import views_of
from seg4diff.segmentation.maps import run_maps
from seg4diff.segmentation.presets import find_preset


def clusters(features: Tensor, count: int, grid: tuple[int, int]) -> Tensor:
    """k-means of [N, C] features into ``count`` regions [count, h, w] of zeros and ones."""
    _, labels = kmeans2(features.double().numpy(), count, minit="++", seed=0, iter=30, missing="warn")
    return F.one_hot(torch.from_numpy(labels).long(), count).T.reshape(count, *grid).float()


def label_map(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions [R, h, w] resized bilinearly, and their argmax, numbered without gaps."""
    labels = F.interpolate(regions[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    return torch.unique(labels, return_inverse=True)[1]


def empty_prompt_maps(pipe: Any, images: list[Any], layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Per-head maps [images, H, N, 77] of the empty prompt, layers averaged, and clean latents."""
    views = views_of(pipe, images, find_preset("default").fit)
    request = MapRequest(heads="each", columns=("text", slice(0, 77)))
    found = run_maps(
        pipe, views, [[""]] * len(views), layers=layers, maps=request, batch_size=8, progress=False
    )
    maps = {one.index: one.maps[0].mean(dim=0) for one in found}
    pixels = pipe.image_processor.preprocess([view.pixels for view in views])
    with torch.no_grad():
        latents = torch.cat([patch_of(pipe).backbone.latents(pipe, part) for part in pixels.split(8)])
    return torch.stack([maps[position] for position in range(len(views))]), latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=HELD_OUT, help="seed of the first scene")
    parser.add_argument("--layers", type=int, nargs="+", help="default: the model's expert layer")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    pipe = seg4diff.patch(load_pipeline("demo", "cpu"))
    pipe.set_progress_bar_config(disable=True)
    scenes = [scene(options.first + number) for number in range(options.scenes)]
    images = [one.image for one in scenes]
    numbers = [torch.tensor([CLASSES.index(name) for name in one.classes]) for one in scenes]
    truths = [own[torch.from_numpy(one.labels)] for own, one in zip(numbers, scenes, strict=True)]
    layers = tuple(options.layers or pipe.transformer.config["_seg4diff_expert_layers"])
    maps, latents = empty_prompt_maps(pipe, images, layers)
    grid = (16, 16)
    true_number = [len(one.classes) for one in scenes]

    later = tuple(range(layers[0], pipe.transformer.config.num_layers))

    def ours(**choices: Any) -> list[Tensor]:
        results = seg4diff.segment_unsupervised(
            pipe, images, batch_size=8, progress=False, **{"layers": layers, **choices}
        )
        assert isinstance(results, list)
        return [result.labels for result in results]

    def by_clusters(features: Callable[[int], Tensor], size: tuple[int, int]) -> list[Tensor]:
        found = [clusters(features(p), true_number[p], size) for p in range(len(scenes))]
        return [label_map(regions, truths[p].shape) for p, regions in enumerate(found)]  # type: ignore[arg-type]

    mean_maps = maps.mean(dim=1)
    methods: dict[str, Callable[[], list[Tensor]]] = {
        "one single region": lambda: [torch.zeros_like(truth) for truth in truths],
        "segment_unsupervised, preset default": lambda: ours(),
        "segment_unsupervised, default, later layers too": lambda: ours(layers=later),
        "segment_unsupervised, preset paper": lambda: ours(preset="paper"),
        "segment_unsupervised, preset reference": lambda: ours(preset="reference"),
        "k-means on the same maps, true number": lambda: by_clusters(
            lambda p: mean_maps[p] / mean_maps[p].sum(dim=1, keepdim=True), grid
        ),
        "k-means on the maps of all heads, true number": lambda: by_clusters(
            lambda p: (maps[p] / maps[p].sum(dim=2, keepdim=True)).transpose(0, 1).flatten(1), grid
        ),
        "k-means on clean latents, true number": lambda: by_clusters(
            lambda p: latents[p].flatten(1).T, (latents.shape[2], latents.shape[3])
        ),
    }
    print(f"{len(scenes)} scenes from seed {options.first}, layers {list(layers)}")
    print(f"{np.mean(true_number):.1f} classes a scene")
    figures: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        labels = method()
        together = [sum_of(labels, truths, match_disjoint=disjoint) for disjoint in (True, False)]
        figures[name] = {
            "miou": 100 * together[0].mean_iou,
            "miou_touching": 100 * together[1].mean_iou,
            "regions": float(np.mean([int(one.unique().numel()) for one in labels])),
        }
        row = figures[name]
        both = f"{row['miou']:5.1f} ({row['miou_touching']:5.1f})"
        print(f"{name:47} {both}  {row['regions']:4.1f} regions a scene", flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"scenes": len(scenes), "first": options.first, "layers": layers, "methods": figures}
        options.out.write_text(json.dumps(document, indent=2) + "\n")


def sum_of(labels: list[Tensor], truths: list[Tensor], *, match_disjoint: bool) -> Counts:
    """Matched counts over all pictures."""
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
