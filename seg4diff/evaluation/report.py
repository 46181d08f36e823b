"""What an evaluation leaves behind: JSON with everything, a table, and a sheet of pictures to look at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seg4diff.data.registry import Dataset
from seg4diff.evaluation.published import PAPER_ROWS, PUBLISHED
from seg4diff.evaluation.results import Result, read_results
from seg4diff.evaluation.runner import Evaluator, Report, Speed, answer_again
from seg4diff.files import write_atomically
from seg4diff.metrics import IGNORED
from seg4diff.visualization import contact_sheet, label_overlay

_DESCRIPTIONS = {
    "oracle": "only the classes present in each image are prompted, as in the paper's table 1",
    "full": "every class of the data set is prompted for every image; the paper publishes no such figure",
    "unsupervised": "regions without names, matched to each image's classes, as in the paper's table 2",
}
_NAMED = 10  # failures that a table names


def write_report(report: Report, out: Path) -> None:
    """Write ``report.json`` and ``report.md``.

    Raises:
        OSError: they cannot be written.
    """
    text = json.dumps(_finite(asdict(report)), indent=1, ensure_ascii=False)
    write_atomically(out / "report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    table = markdown([report])
    write_atomically(out / "report.md", lambda path: path.write_text(table, encoding="utf-8"))


def markdown(reports: Sequence[Report]) -> str:
    """A table of ours and the paper's figures, in percent, and below it what must be known to read it."""
    head = ["data set", "protocol", "images", "mIoU", "fw IoU", "pixel acc.", "mean acc.", "boundary IoU"]
    head += [f"paper: {row}" for row in PAPER_ROWS]
    lines = [_row(head), _row(["---", "---", *["---:"] * (len(head) - 2)])]
    for report in reports:
        for protocol, rates in report.rates.items():
            published = PUBLISHED.get(protocol, {}).get(report.dataset, (None,) * len(PAPER_ROWS))
            cells = [report.title, protocol, _images(report), f"**{_percent(rates.miou)}**"]
            cells += [
                _percent(value)
                for value in (
                    rates.frequency_weighted_iou,
                    rates.pixel_accuracy,
                    rates.mean_accuracy,
                    rates.boundary_iou,
                )
            ]
            lines.append(_row(cells + ["-" if value is None else f"{value:.1f}" for value in published]))
    used = dict.fromkeys(protocol for report in reports for protocol in report.rates)
    lines.append("")
    lines += [f"- *{protocol}*: {_DESCRIPTIONS[protocol]}." for protocol in used]
    lines.append("- All figures in percent, from one confusion matrix over all images; 255 is ignored.")
    for report in reports:
        lines += _notes(report)
    return "\n".join(lines) + "\n"


def speed_line(speed: Speed) -> str:
    """One line: images per second."""
    return f"{speed.images} images in {speed.seconds:.1f} s, {speed.images_per_second:.2f} images/s"


def write_contact_sheet(evaluator: Evaluator, dataset: Dataset, out: Path, *, each: int = 3) -> Path | None:
    """A sheet of the best, median and worst pictures by their own mIoU under the first protocol.

    The chosen pictures are evaluated once more, so that nothing but figures need be kept for the others.

    Args:
        evaluator: made for ``dataset``.
        dataset: that was evaluated into ``out``.
        out: the folder with the results; gets ``contact-sheet.png``.
        each: pictures of each kind.

    Returns:
        The path of the sheet, or None if no picture has a score.
    """
    first = next(iter(evaluator.protocols))
    results = read_results(out, len(dataset.classes))
    chosen = choose(list(results.values()), first, each)
    if not chosen:
        return None
    answers = answer_again(evaluator, dataset, list(dict.fromkeys(index for _, index, _ in chosen)))
    names = (*dataset.classes, *("no class",) * (IGNORED - len(dataset.classes)), "ignored")
    rows = []
    for kind, index, score in chosen:
        if index not in answers:
            continue
        answer = answers[index]
        row: list[tuple[str, Image.Image]] = [
            (f"{kind} {100 * score:.0f}: {answer.name}", answer.image),
            ("truth", label_overlay(answer.labels, names, answer.image, legend=False)),
        ]
        for protocol, predicted in answer.predicted.items():
            labels = np.asarray(predicted)
            row.append((protocol, label_overlay(labels, names, answer.image, legend=False)))
        rows.append(row)
    sheet = contact_sheet(rows)
    return write_atomically(out / "contact-sheet.png", lambda path: sheet.save(path, optimize=True))


def choose(results: Sequence[Result], protocol: str, each: int) -> list[tuple[str, int, float]]:
    """The best, median and worst pictures: (kind, index, mIoU of the picture alone), each picture once."""
    scored = sorted(
        (
            (result.tallies[protocol].counts.mean_iou, result.index)
            for result in results
            if protocol in result.tallies
        ),
        key=lambda entry: (-entry[0], entry[1]),
    )
    scored = [entry for entry in scored if not math.isnan(entry[0])]
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


def _notes(report: Report) -> list[str]:
    settings = report.settings
    names = {
        cls: list(prompts) for cls, prompts in zip(settings["classes"], settings["prompts"], strict=True)
    }
    renamed = sum(prompts != [cls] for cls, prompts in names.items())
    parts = [
        f"model {settings.get('model', '?')}",
        f"LoRA {settings.get('lora') or 'none'}",
        f"preset {settings['preset']}",
        f"layers {', '.join(map(str, settings['layers']))}",
        f"seed {settings['seed']}",
        f"labels from {report.source}",
    ]
    if renamed:
        parts.append(f"{renamed} of {len(names)} classes prompted by other names")
    notes = [f"- {report.title}: {'; '.join(parts)}."]
    if report.expected is not None and report.total < report.expected:
        notes.append(f"- {report.title}: **a part**, {report.total} of {report.expected} images.")
    if report.empty:
        notes.append(f"- {report.title}: {report.empty} images have no pixel that counts.")
    if report.failures:
        named = [f"{f.name} ({f.reason})" for f in report.failures[:_NAMED]]
        more = len(report.failures) - len(named)
        notes.append(
            f"- {report.title}: **{len(report.failures)} of {report.total} images could not be evaluated "
            "and are "
            f"left out**: {'; '.join(named)}{f'; and {more} more (report.json names all)' if more else ''}."
        )
    if report.speed is not None:
        notes.append(f"- {report.title}: {speed_line(report.speed)}.")
    return notes


def _images(report: Report) -> str:
    return str(report.images) if report.images == report.total else f"{report.images} of {report.total}"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _finite(value: Any) -> Any:
    """NaN, which JSON does not know, as null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
