"""What `seg4diff.discover` names on drawn scenes, with names that are not in them added to the vocabulary.

    python -m benchmarks.discover [--scenes 100] [--out benchmarks/results/discover.json]

The vocabulary is the demo's 18 names and 30 or more distractors, which are in no scene: the first of COCO's
things that are not among the 18. Figures per vocabulary, on clean and on hard scenes: share of the pixels
with the right name, share with a distractor, both in %, names found per scene, and forwards per scene.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

import seg4diff
from seg4diff.data.class_names import COCO_THINGS
from seg4diff.data.vocabularies import read_vocabulary
from seg4diff.demo import CLASSES, HELD_OUT, Scene, scene
from seg4diff.demo.scenes import Conditions
from seg4diff.loading import load_pipeline
from seg4diff.segmentation.result import BACKGROUND

DISTRACTORS = tuple(name for name in COCO_THINGS if name not in CLASSES)[:30]


def with_distractors(distractors: Sequence[str]) -> list[str]:
    """The 18 names among the distractors, in an order that is drawn once."""
    known = {name.casefold() for name in CLASSES}
    names = [*CLASSES, *(name for name in distractors if name.casefold() not in known)]
    return [names[index] for index in np.random.default_rng(0).permutation(len(names))]


def measure(
    pipe: Any, scenes: Sequence[Scene], vocabulary: Sequence[str], **options: Any
) -> dict[str, float]:
    """Figures of one vocabulary."""
    right = distracted = pixels = found = forwards = 0
    start = time.process_time()
    for one in scenes:
        result = seg4diff.discover(pipe, one.image, vocabulary, **options)
        names = np.array([*result.classes, ""], dtype=object)  # the last stands for the background
        labels = names[np.where(result.labels == BACKGROUND, -1, result.labels)]
        truth = np.array(one.classes, dtype=object)[one.labels]
        right += int((labels == truth).sum())
        distracted += int((~np.isin(labels, (*CLASSES, ""))).sum())
        pixels += labels.size
        found += len(result.classes)
        forwards += sum(result.metadata["forwards"].values())
    figures = {
        "right": 100 * right / pixels,
        "distractor": 100 * distracted / pixels,
        "names": found / len(scenes),
        "forwards": forwards / len(scenes),
        "cpu_seconds": (time.process_time() - start) / len(scenes),
    }
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=HELD_OUT, help="seed of the first scene")
    parser.add_argument("--large", type=int, default=20, help="scenes for LVIS and WordNet")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    pipe = load_pipeline("demo", "cpu")
    few = with_distractors(DISTRACTORS)
    cases: dict[str, tuple[Sequence[str], int, dict[str, Any]]] = {
        "18 names": (CLASSES, options.scenes, {}),
        "18 names and 30 distractors": (few, options.scenes, {}),
        '18 names and 30 distractors, preset="best"': (few, options.scenes, {"preset": "best"}),
        **{
            f"18 names and {title}": (
                with_distractors(read_vocabulary(name)),
                options.large,
                {"batch_size": 8},
            )
            for name, title in (("lvis", "LVIS"), ("wordnet", "WordNet"))
        },
    }
    figures: dict[str, Any] = {"first": options.first}
    for conditions in get_args(Conditions):
        figures[conditions] = {}
        for name, (vocabulary, count, choices) in cases.items():
            scenes = [scene(options.first + number, conditions) for number in range(count)]
            row = measure(pipe, scenes, vocabulary, **choices)
            figures[conditions][name] = {"scenes": count, "vocabulary": len(vocabulary), **row}
            print(conditions, name, count, row, flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
