"""Each step of the preset "best" alone and left out, on the demo model's held-out scenes.

    OMP_NUM_THREADS=1 python -m benchmarks.segmentation_ablation --out benchmarks/results/segmentation.md

Scenes are clean and hard; names are those present ("oracle") or all 18 ("full"). A cell is mIoU / pixel
accuracy / boundary IoU in %, from one confusion matrix. The tables that follow calibrate the presence score.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import seg4diff
from seg4diff.demo import CLASSES, HELD_OUT, Scene, scene
from seg4diff.loading import load_pipeline
from seg4diff.metrics import boundary_counts, confusion_matrix, counts_of, rates_of
from seg4diff.segmentation.presets import PRESETS, Preset

DISTRACTORS = ("tree", "house", "dog", "car", "road", "cloud", "chair", "boat", "bird", "cat", "rock", "sun")
"""Words that the demo model was not trained on."""

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def variants() -> dict[str, Preset]:
    """The presets of the table, by the names of its rows."""
    default, best, fast = PRESETS["default"], PRESETS["best"], PRESETS["fast"]
    return {
        "`default`": default,
        "`default` + measured level": replace(default, measured_level=True),
        "`default` + 2 passes": replace(default, passes=2),
        "`default` + output-feature kernel": replace(default, spread=True),
        "`default` + presence": replace(default, absent="ignore"),
        "`default` + bilateral": replace(default, upsample="bilateral"),
        "**`best`**": best,
        "**`fast`** (`best` with 1 pass)": fast,
        "`best`, 4 passes": replace(best, passes=4),
        "`best` without measured level": replace(best, measured_level=False),
        "`best` without output-feature kernel": replace(best, spread=False),
        "`best` without presence": replace(best, absent="keep"),
        "`best`, bilinear": replace(best, upsample="geometric"),
        "`best`, bicubic": replace(best, upsample="bicubic"),
    }


def segmented(pipe: Any, scenes: Sequence[Scene], preset: Preset, full: bool) -> list[Any]:
    """Results of all scenes, in batches of 10."""
    results = []
    for first in range(0, len(scenes), 10):
        batch = scenes[first : first + 10]
        names = [CLASSES if full else one.classes for one in batch]
        images = [one.image for one in batch]
        results += seg4diff.segment(pipe, images, names, preset=preset, batch_size=10, progress=False)
    return results


def cell(scenes: Sequence[Scene], results: Sequence[Any]) -> str:
    """mIoU / pixel accuracy / boundary IoU."""
    total, boundary = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64), None
    for one, result in zip(scenes, results, strict=True):
        truth = torch.tensor([CLASSES.index(name) for name in one.classes])[torch.from_numpy(one.labels)]
        found = torch.tensor([CLASSES.index(name) for name in result.classes])[result.labels]
        total += confusion_matrix(found, truth, len(CLASSES))
        counts = boundary_counts(found, truth, len(CLASSES))
        boundary = counts if boundary is None else boundary + counts
    rates = rates_of(counts_of(total), boundary)
    assert rates.boundary_iou is not None
    return " / ".join(f"{100 * r:.1f}" for r in (rates.miou, rates.pixel_accuracy, rates.boundary_iou))


def presence_cell(scenes: Sequence[Scene], results: Sequence[Any]) -> str:
    """Precision / recall of the names that are found."""
    found = torch.stack([result.presence >= result.metadata["threshold"] for result in results])
    true = torch.tensor([[name in one.classes for name in CLASSES] for one in scenes])
    hits = int((found & true).sum())
    return f"{100 * hits / int(found.sum()):.1f} / {100 * hits / int(true.sum()):.1f}"


def ablation(pipe: Any, scenes: dict[str, list[Scene]], chosen: dict[str, Preset]) -> list[str]:
    """Rows of the table, and of CPU times."""
    columns = [f"{condition} {names}" for condition in scenes for names in ("oracle", "full")]
    lines = [
        f"| | {' | '.join(columns)} | presence P / R, {' and '.join(scenes)} | CPU ms |",
        "| --- " * (len(columns) + 3) + "|",
    ]
    for row, preset in chosen.items():
        cells, presence, seconds = [], [], []
        for several in scenes.values():
            for full in (False, True):
                started = time.process_time()
                results = segmented(pipe, several, preset, full)
                if not full:
                    seconds.append((time.process_time() - started) / len(several))
                cells.append(cell(several, results))
            presence.append(presence_cell(several, results) if preset.absent != "keep" else "-")
        time_of = f"{1000 * min(seconds):.0f}"
        lines.append(f"| {row} | {' | '.join(cells)} | {' and '.join(presence)} | {time_of} |")
        print(lines[-1], flush=True)
    return lines


def presence_table(pipe: Any, scenes: dict[str, list[Scene]]) -> list[str]:
    """Absent names found and names missed per image by threshold, with words that the model never saw."""
    names = [*CLASSES, *DISTRACTORS]
    rates: dict[float, list[float]] = {threshold: [] for threshold in THRESHOLDS}
    for several in scenes.values():
        images = [one.image for one in several]
        results = seg4diff.segment(pipe, images, names, preset="best", batch_size=10, progress=False)
        presence = torch.stack([result.presence for result in results])
        true = torch.tensor([[name in one.classes for name in names] for one in several])
        for threshold, row in rates.items():
            found = presence >= threshold
            row += [float((found & ~true).sum()) / len(several), float((true & ~found).sum()) / len(several)]
    columns = " | ".join(f"{condition}: false | missed" for condition in [*scenes, "both"])
    lines = [f"| threshold | {columns} |", "| --- " * (3 + 2 * len(scenes)) + "|"]
    for threshold, row in rates.items():
        both = [sum(row[0::2]) / len(scenes), sum(row[1::2]) / len(scenes)]
        lines.append(f"| {threshold} | " + " | ".join(f"{rate:.3f}" for rate in [*row, *both]) + " |")
    return lines


def alone_table(pipe: Any, scenes: dict[str, list[Scene]]) -> list[str]:
    """Every name alone: share of absent ones that are found, and of present ones that are missed."""
    lines = ["| one name alone | absent, found | present, missed |", "| --- | --- | --- |"]
    for condition, several in scenes.items():
        found: dict[bool, list[bool]] = {False: [], True: []}
        for one in several:
            images, names = [one.image] * len(CLASSES), [[name] for name in CLASSES]
            results = seg4diff.segment(pipe, images, names, preset="best", batch_size=18, progress=False)
            for name, result in zip(CLASSES, results, strict=True):
                found[name in one.classes].append(float(result.presence[0]) >= result.metadata["threshold"])
        false, hits = (sum(found[present]) / len(found[present]) for present in (False, True))
        lines.append(f"| {condition} | {100 * false:.1f} % | {100 * (1 - hits):.1f} % |")
    return lines


PAGE = """# Segmentation by names: the steps of `best`

`OMP_NUM_THREADS=1 python -m benchmarks.segmentation_ablation --out benchmarks/results/segmentation.md`

The demo model on {count} held-out scenes, each also in its hard version; one thread, one run. mIoU / pixel
accuracy / boundary IoU in %, from one confusion matrix: "oracle" asks for the names present in a scene,
"full" for all 18. P / R: precision and recall of the names found under "full". CPU time is of a whole image
(VAE and text included, batches of 10, the names present).

{ablation}

## Presence

Names per image that are found though absent, and that are missed, of the 18 and 12 that the model never saw
({distractors}), by the threshold on `Segmentation.presence`.
The calibration that comes with the model is the columns "both" of this table on 100 training scenes
(`--first 5000000`).

{presence}

A single name has no other to compete with; {alone_count} scenes, each of the 18 names alone:

{alone}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=HELD_OUT, help="seed of the first scene")
    parser.add_argument("--rows", nargs="*", help="only rows whose name contains one of these")
    parser.add_argument("--alone", type=int, default=25, help="scenes that are asked for one name at a time")
    parser.add_argument("--out", type=Path, help="write the tables here, as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline("demo", "cpu")
    seeds = range(options.first, options.first + options.scenes)
    scenes = {
        "clean": [scene(seed) for seed in seeds],
        "hard": [scene(seed, "hard") for seed in seeds],
    }
    chosen = {
        row: preset
        for row, preset in variants().items()
        if options.rows is None or any(part in row for part in options.rows)
    }
    text = PAGE.format(
        count=options.scenes,
        alone_count=options.alone,
        distractors=", ".join(DISTRACTORS),
        presence="\n".join(presence_table(pipe, scenes)),
        alone="\n".join(alone_table(pipe, {key: some[: options.alone] for key, some in scenes.items()})),
        ablation="\n".join(ablation(pipe, scenes, chosen)),
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
