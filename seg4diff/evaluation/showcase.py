"""The demonstration: the bundled model segments scenes that its training never saw; images and numbers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from seg4diff.demo.scenes import CLASSES, HELD_OUT, Scene, scene
from seg4diff.files import save_image, write_atomically
from seg4diff.metrics import confusion_matrix, counts_of
from seg4diff.visualization import colorize, contact_sheet, heatmap_overlay

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.segmentation.result import Segmentation

_SEED = 0  # of the shuffled names and the random pixels, so that the numbers repeat
_SHOWN = 8  # scenes on the sheet
_BATCH = 8


@dataclass(frozen=True)
class Score:
    """How well predicted labels fit.

    Attributes:
        miou: mean over classes of intersection over union, each accumulated over all scenes; classes that
            neither occur nor are predicted do not count. In [0, 1].
        accuracy: share of pixels with the right label, in [0, 1].
    """

    miou: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """The numbers of a demonstration.

    Attributes:
        scenes: how many held-out scenes, from seed ``HELD_OUT`` on.
        expert_layers: the layers that :func:`seg4diff.segment` reads by default.
        present: the names present in each scene are given (the oracle protocol of the paper).
        everything: all names that a scene can hold are given, for every scene.
        hard_present: as ``present``, on the hard versions of the scenes.
        hard_everything: as ``everything``, on the hard versions of the scenes.
        best: the four before with the preset ``"best"``, under their names.
        shuffled: as ``present``, then the names of each scene change places.
        constant: every pixel gets the most frequent of all classes.
        random: every pixel gets one of the names present, drawn at random.
        layers: as ``present``, reading one transformer layer instead of the expert.
        milliseconds: time of :func:`seg4diff.segment` for one scene, as ``present``, in batches.
        versions: of the packages that matter, and the device.
    """

    scenes: int
    expert_layers: tuple[int, ...]
    present: Score
    everything: Score
    hard_present: Score
    hard_everything: Score
    best: dict[str, Score]
    shuffled: Score
    constant: Score
    random: Score
    layers: tuple[Score, ...]
    milliseconds: float
    versions: dict[str, str] = field(default_factory=dict)


def in_vocabulary(labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Labels that index ``classes`` as labels that index ``CLASSES``."""
    return np.array([CLASSES.index(name) for name in classes])[labels]


def labels_of(result: Segmentation) -> np.ndarray:
    """The labels of a segmentation as indices of ``CLASSES``, [height, width]."""
    return in_vocabulary(result.labels.numpy(), result.classes)


def compare(truth: Iterable[np.ndarray], predicted: Iterable[np.ndarray]) -> Score:
    """Score predicted labels by one int64 confusion matrix over all scenes; both index ``CLASSES``."""
    confusion = torch.stack(
        [
            confusion_matrix(torch.from_numpy(found), torch.from_numpy(expected), len(CLASSES))
            for expected, found in zip(truth, predicted, strict=True)
        ]
    ).sum(dim=0)
    counts = counts_of(confusion)
    return Score(counts.mean_iou, float(counts.true_positive.sum() / confusion.sum()))


def show(
    scenes: int = 24,
    out: str | os.PathLike[str] = "demo-output",
    device: str | None = None,
    console: Console | None = None,
) -> Report:
    """Segment held-out scenes with the bundled model, write images and numbers, print a table.

    Args:
        scenes: how many.
        out: folder for ``scenes.png`` (a sheet with image, truth, result and heat maps), ``scene-N.png``
            (an overlay each) and ``numbers.json``.
        device: where to run; the GPU if there is one by default.
        console: where to print; the terminal by default.

    Raises:
        ValueError: ``scenes`` is not positive or ``device`` is absent.
        OSError: ``out`` cannot be written to.
    """
    if scenes < 1:
        raise ValueError(f"scenes={scenes} must be at least 1")
    out, console = Path(out), console or Console()
    drawn = [scene(HELD_OUT + number) for number in range(scenes)]
    hard = [scene(HELD_OUT + number, "hard") for number in range(scenes)]

    from seg4diff.loading import load_pipeline
    from seg4diff.segmentation.zero_shot import segment

    pipe = load_pipeline("demo", device, "float32")
    blocks = len(pipe.transformer.transformer_blocks)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=scenes * (blocks + 8))

        def run(
            description: str, names: Sequence[Sequence[str]], of: Sequence[Scene] = drawn, **options: Any
        ) -> list[Segmentation]:
            progress.update(task, description=description)
            results: list[Segmentation] = []
            for first in range(0, scenes, _BATCH):
                chunk = slice(first, first + _BATCH)
                images = [item.image for item in of[chunk]]
                results += segment(pipe, images, names[chunk], batch_size=_BATCH, progress=False, **options)
                progress.advance(task, len(images))
            return results

        occurring = [item.classes for item in drawn]
        segment(pipe, drawn[0].image, CLASSES[:2], progress=False)  # the first call is slower
        started = time.perf_counter()
        present = run("names present", occurring)
        milliseconds = 1e3 * (time.perf_counter() - started) / scenes
        asked: dict[str, tuple[str, Sequence[Sequence[str]], Sequence[Scene]]] = {
            "present": ("names present", occurring, drawn),
            "everything": ("all names", [CLASSES] * scenes, drawn),
            "hard_present": ("hard scenes, names present", occurring, hard),
            "hard_everything": ("hard scenes, all names", [CLASSES] * scenes, hard),
        }
        default = {key: run(*of) if key != "present" else present for key, of in asked.items()}
        best = {key: run(*of, preset="best") for key, of in asked.items()}
        layers = [run(f"layer {layer}", occurring, layers=[layer]) for layer in range(blocks)]

    rng = np.random.default_rng(_SEED)
    truth = [in_vocabulary(item.labels, item.classes) for item in drawn]
    report = Report(
        scenes=scenes,
        expert_layers=tuple(present[0].metadata["layers"]),
        **{key: compare(truth, map(labels_of, found)) for key, found in default.items()},
        best={key: compare(truth, map(labels_of, found)) for key, found in best.items()},
        shuffled=compare(truth, [_renamed(result, rng) for result in present]),
        constant=compare(truth, _constant(truth)),
        random=compare(truth, [_random(item, rng) for item in drawn]),
        layers=tuple(compare(truth, map(labels_of, results)) for results in layers),
        milliseconds=milliseconds,
        versions={name: version(name) for name in ("diffusers", "transformers")}
        | {"torch": torch.__version__, "device": str(pipe.device)},
    )
    _write(out, drawn, present, report)
    console.print(_table(report))
    console.print(f"Images: {out / 'scenes.png'} and {out}/scene-*.png. Numbers: {out / 'numbers.json'}.")
    return report


def _renamed(result: Segmentation, rng: np.random.Generator) -> np.ndarray:
    """The labels after every name has gone to another of the regions."""
    count = len(result.classes)
    turn = int(rng.integers(1, count)) if count > 1 else 0
    return in_vocabulary((result.labels.numpy() + turn) % count, result.classes)


def _constant(truth: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every pixel the class that is most frequent in the truth."""
    most = np.bincount(np.concatenate([labels.ravel() for labels in truth])).argmax()
    return [np.full_like(labels, most) for labels in truth]


def _random(item: Scene, rng: np.random.Generator) -> np.ndarray:
    """Every pixel one of the names present."""
    return in_vocabulary(rng.integers(0, len(item.classes), item.labels.shape), item.classes)


def _write(out: Path, drawn: Sequence[Scene], results: Sequence[Segmentation], report: Report) -> None:
    for number, result in enumerate(results):
        save_image(result.overlay(), out / f"scene-{number}.png")
    save_image(sheet(drawn[:_SHOWN], results[:_SHOWN]), out / "scenes.png")
    write_atomically(out / "numbers.json", lambda path: path.write_text(json.dumps(asdict(report), indent=2)))


def sheet(drawn: Sequence[Scene], results: Sequence[Segmentation], words: int = 3) -> Image.Image:
    """A row for each scene: image, truth, result, and heat maps of its ``words`` first names."""
    rows = []
    for item, result in zip(drawn, results, strict=True):
        truth, found = in_vocabulary(item.labels, item.classes), labels_of(result)
        row = [
            (", ".join(item.classes), item.image),
            ("truth", colorize(truth, len(CLASSES))),
            ("found", colorize(found, len(CLASSES))),
        ]
        for name, scores in list(zip(result.classes, result.pixel_scores(), strict=True))[:words]:
            row.append((name, heatmap_overlay(item.image, scores, alpha=0.75)))
        rows.append(row)
    return contact_sheet(rows)


def _table(report: Report) -> Table:
    table = Table(title=f"{report.scenes} held-out scenes, {len(CLASSES)} classes; %")
    table.add_column("")
    for column in ("mIoU", "acc.", "best mIoU", "best acc."):
        table.add_column(column, justify="right")

    def add(title: str, result: Score, style: str | None = None, best: Score | None = None) -> None:
        scores = (result,) if best is None else (result, best)
        cells = [f"{100 * share:.1f}" for score in scores for share in (score.miou, score.accuracy)]
        table.add_row(title, *cells, style=style)

    best = report.best
    add("segment, names present", report.present, "bold", best["present"])
    add("segment, names present, hard scenes", report.hard_present, None, best["hard_present"])
    add("segment, all names", report.everything, "bold", best["everything"])
    add("segment, all names, hard scenes", report.hard_everything, None, best["hard_everything"])
    add("names present, shuffled", report.shuffled)
    add("chance: most frequent class", report.constant)
    add("chance: random name present", report.random)
    table.add_section()
    for layer, result in enumerate(report.layers):
        expert = layer in report.expert_layers
        add(
            f"layer {layer}{' (expert)' if expert else ''}, names present", result, "bold" if expert else None
        )
    table.caption = f"{report.milliseconds:.0f} ms a scene on {report.versions['device']}"
    return table
