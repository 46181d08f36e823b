"""A sheet of the best, median and worst images of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from seg4diff.data.prefetch import Loaded, load
from seg4diff.data.registry import Dataset
from seg4diff.evaluation.evaluator import Evaluator
from seg4diff.evaluation.results import Result, read_results
from seg4diff.files import write_atomically
from seg4diff.metrics import IGNORED
from seg4diff.visualization import contact_sheet, label_overlay


def write_contact_sheet(evaluator: Evaluator, dataset: Dataset, out: Path, *, each: int = 3) -> Path | None:
    """A sheet of the best, median and worst images by their own mIoU under the first protocol.

    These images are evaluated once more, so that only counts need be kept of the others.

    Args:
        evaluator: made for `dataset`.
        dataset: the data set that was evaluated into `out`.
        out: the folder with the results; gets `contact-sheet.png`.
        each: number of images of each kind.

    Returns:
        The path of the sheet, or None if no image has a score.
    """
    results = read_results(out, len(dataset.classes))
    names = (*dataset.classes, *("no class",) * (IGNORED - len(dataset.classes)), "ignored")
    rows = []
    for kind, index, score in choose(results.values(), next(iter(evaluator.protocols)), each):
        item = load(dataset.items[index], index)
        if not isinstance(item, Loaded):
            continue
        ((view, labels),) = evaluator.views([item])
        (result,) = evaluator.results([item])
        row: list[tuple[str, Image.Image]] = [(f"{kind} {100 * score:.0f}: {item.name}", view.image)]
        for title, shown in {"truth": labels, **result.predicted}.items():
            row.append((title, label_overlay(np.asarray(shown), names, view.image, legend=False)))
        rows.append(row)
    if not rows:
        return None
    sheet = contact_sheet(rows)
    return write_atomically(out / "contact-sheet.png", lambda path: sheet.save(path, optimize=True))


def choose(results: Iterable[Result], protocol: str, each: int) -> list[tuple[str, int, float]]:
    """The best, median and worst images: (kind, index, mIoU of the image alone), each image once."""
    scores = [(r.counts[protocol].mean_iou, r.index) for r in results if protocol in r.counts]
    scored = sorted(
        (entry for entry in scores if not math.isnan(entry[0])), key=lambda entry: (-entry[0], entry[1])
    )
    count = len(scored)
    middle = max(0, count // 2 - each // 2)
    kinds = [
        ("best", range(each)),
        ("median", range(middle, middle + each)),
        ("worst", range(count - each, count)),
    ]
    chosen: dict[int, tuple[str, int, float]] = {}
    for kind, places in kinds:
        for place in places:
            if 0 <= place < count and place not in chosen:
                score, index = scored[place]
                chosen[place] = (kind, index, score)
    return [chosen[place] for place in sorted(chosen)]
