"""The report of an evaluation: JSON with everything, and a table beside the paper's figures."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seg4diff.backbones import Pipeline
from seg4diff.evaluation.published import PAPER_ROWS, PUBLISHED
from seg4diff.files import write_atomically
from seg4diff.metrics import Rates

_DESCRIPTIONS = {
    "oracle": "only the classes present in each image are prompted, as in the paper's table 1",
    "full": "every class of the data set is prompted for every image; the paper publishes no such figure",
    "presence": "every class is prompted, and those that are not found in an image are left out",
    "unsupervised": "regions without names, matched to each image's classes, as in the paper's table 2",
}
_NAMED = 10  # failures that a table names


@dataclass(frozen=True)
class EvaluationReport:
    """The outcome of an evaluation.

    Attributes:
        dataset: name of the data set.
        title: its title in tables.
        source: where its labels are from.
        images: number of images that were evaluated.
        total: number of images that the evaluation should have, failures included.
        expected: number of images of the whole data set, None if that has no meaning.
        empty: images without a pixel that counts; among `images`.
        failures: names of images that could not be evaluated, and why.
        rates: by protocol.
        classes: names of the classes, for `Rates.iou`.
        settings: everything that decides the figures, model and names included.
        versions: of packages and device.
        processes: number of processes of this run.
        images_per_second: of all processes of this run, without loading the model; None if nothing was left
            to do.
    """

    dataset: str
    title: str
    source: str
    images: int
    total: int
    expected: int | None
    empty: int
    failures: Mapping[str, str]
    rates: Mapping[str, Rates]
    classes: tuple[str, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    processes: int = 1
    images_per_second: float | None = None


def write_report(report: EvaluationReport, out: Path) -> None:
    """Write `report.json` and `report.md`.

    Raises:
        OSError: they cannot be written.
    """
    text = json.dumps(_finite(asdict(report)), indent=1, ensure_ascii=False)
    write_atomically(out / "report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    table = markdown([report])
    write_atomically(out / "report.md", lambda path: path.write_text(table, encoding="utf-8"))


def markdown(reports: Sequence[EvaluationReport]) -> str:
    """A table of our figures and the paper's in percent, and notes on how they were measured."""
    head = ["data set", "protocol", "images", "mIoU", "fw IoU", "pixel acc.", "mean acc.", "boundary IoU"]
    head += [f"paper: {row}" for row in PAPER_ROWS]
    lines = [markdown_row(head), markdown_row(["---", "---", *["---:"] * (len(head) - 2)])]
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
            lines.append(
                markdown_row(cells + ["-" if value is None else f"{value:.1f}" for value in published])
            )
    used = dict.fromkeys(protocol for report in reports for protocol in report.rates)
    lines.append("")
    lines += [f"- *{protocol}*: {_DESCRIPTIONS[protocol]}." for protocol in used]
    lines.append("- All figures in percent, from one confusion matrix over all images; 255 is ignored.")
    for report in reports:
        lines += _notes(report)
    return "\n".join(lines) + "\n"


def failures_line(failures: Mapping[str, str], total: int) -> str:
    """How many images could not be evaluated, and the names and reasons of the first."""
    shown = "; ".join(f"{name} ({reason})" for name, reason in list(failures.items())[:_NAMED])
    more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    return f"{len(failures)} of {total} images could not be evaluated and were excluded: {shown}{more}"


def versions_of(pipe: Pipeline) -> dict[str, str]:
    """Versions of Python and packages, and the device of `pipe`."""
    packages = ("seg4diff", "torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "pillow")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    device = torch.device(pipe._execution_device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    found["torch"] = torch.__version__  # with its build, such as +cu130
    return {"python": platform.python_version(), **found, "device": f"{device.type} ({name})"}


def _notes(report: EvaluationReport) -> list[str]:
    settings = report.settings
    names = {
        cls: list(prompts) for cls, prompts in zip(settings["classes"], settings["prompts"], strict=True)
    }
    renamed = sum(prompts != [cls] for cls, prompts in names.items())
    parts = [
        f"model {settings.get('model', '?')}",
        f"LoRA {settings.get('lora') or 'none'}",
        f"preset {settings['preset']}",
        f"layers {_listed(settings['layers'])}",
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
        notes.append(f"- {report.title}: **{failures_line(report.failures, report.total)}**.")
    if report.images_per_second is not None:
        notes.append(f"- {report.title}: {report.images_per_second:.2f} images/s.")
    return notes


def _listed(layers: Sequence[int] | str) -> str:
    return layers if isinstance(layers, str) else ", ".join(map(str, layers))


def _images(report: EvaluationReport) -> str:
    return str(report.images) if report.images == report.total else f"{report.images} of {report.total}"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def markdown_row(cells: Sequence[str]) -> str:
    """One row of a table."""
    return "| " + " | ".join(cells) + " |"


def _finite(value: Any) -> Any:
    """NaN as null, since JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
