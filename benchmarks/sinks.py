"""Attention sinks of the demo model, and whether segmentation gains by taking them out.

    python -m benchmarks.sinks [--scenes 100] [--first SEED] [--out benchmarks/results/sinks.json]

Shares are of `seg4diff.analyze` on images with their captions. Segments are of the preset "default", mIoU
in % of the names present ("oracle") and of all 18 ("full"), with the map of every head changed before heads
are averaged: divided by its text in total ("text alone"), or by its names ("names alone": sinks are
ignored), or with the attention to sinks given to the names in proportion ("redistributed").
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import seg4diff
from seg4diff.attention.patch import patch_of
from seg4diff.demo import CLASSES, HELD_OUT, Scene, scene
from seg4diff.demo.scenes import Conditions
from seg4diff.kernels.types import MapRequest
from seg4diff.loading import load_pipeline
from seg4diff.metrics import confusion_matrix, counts_of, rates_of
from seg4diff.segmentation.inputs import views_of
from seg4diff.segmentation.maps import run_maps
from seg4diff.segmentation.presets import find_preset
from seg4diff.segmentation.prompts import plan_prompts
from seg4diff.segmentation.scores import resize_scores, scores_of_names

NOISE_LEVELS = (8, 28)


def variants(maps: Tensor, names: list[int]) -> dict[str, Tensor]:
    """Maps [N, T] from one of every head, [H, N, T]."""
    text = maps.sum(dim=-1, keepdim=True)
    of_names = maps[..., names].sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    changed = {
        "as it is": maps,
        "text alone": maps / text,
        "names alone": maps / of_names,
        "redistributed": maps * (text / of_names),
    }
    return {name: one.mean(dim=0) for name, one in changed.items()}


@torch.no_grad()
def segmented(pipe: Any, scenes: Sequence[Scene], full: bool) -> dict[str, float]:
    """mIoU in % of every variant, from one confusion matrix over the scenes."""
    span = patch_of(pipe).backbone.name_span(pipe)
    plans = [plan_prompts(CLASSES if full else one.classes, span) for one in scenes]
    totals: dict[str, Tensor] = {}
    found = run_maps(
        pipe,
        views_of(pipe, [one.image for one in scenes], find_preset("default").fit),
        [[prompt.text for prompt in plan] for plan in plans],
        maps=MapRequest(heads="each"),
        batch_size=10,
        progress=False,
    )
    for one in found:
        drawn, plan = scenes[one.index], plans[one.index]
        (prompt,), (maps,) = plan, one.maps  # the names fit into one prompt
        names = CLASSES if full else drawn.classes
        index = torch.tensor([CLASSES.index(name) for name in names])
        truth = torch.tensor([CLASSES.index(name) for name in drawn.classes])[torch.from_numpy(drawn.labels)]
        columns = [column for several in prompt.columns for column in several]
        for name, changed in variants(maps.squeeze(0), columns).items():
            scores = scores_of_names([changed], plan, one.grid)
            labels = resize_scores(scores, drawn.image.size[::-1], "geometric").argmax(dim=0)
            counts = confusion_matrix(index[labels], truth, len(CLASSES))
            totals[name] = totals[name] + counts if name in totals else counts
    return {name: round(100 * rates_of(counts_of(total)).miou, 2) for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=HELD_OUT, help="seed of the first scene")
    parser.add_argument("--analysed", type=int, default=24, help="scenes of which shares are measured")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline("demo", "cpu")
    seeds = range(options.first, options.first + options.scenes)
    figures: dict[str, Any] = {"scenes": options.scenes, "first": options.first}
    for conditions in get_args(Conditions):
        scenes = [scene(seed, conditions) for seed in seeds]
        if conditions == "clean":
            analysed = scenes[: options.analysed]
            report = seg4diff.analyze(
                pipe, [one.caption for one in analysed], images=[one.image for one in analysed],
                noise_levels=NOISE_LEVELS, batch_size=8, progress=False,
            )  # fmt: skip
            figures["analysed"] = len(analysed)
            figures["share of image tokens' attention in %"] = {
                f"{level} steps left": {
                    token: [round(100 * float(share), 3) for share in shares[number]]
                    for token, shares in report.sinks.items()
                }
                for number, level in enumerate(NOISE_LEVELS)
            }
        for names in ("oracle", "full"):
            figures[f"mIoU {conditions} {names}"] = segmented(pipe, scenes, names == "full")
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
