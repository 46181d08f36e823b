"""`seg4diff evaluate`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from seg4diff.cli.options import (
    DataOptions,
    LayersOrAuto,
    ModelOptions,
    at_least_one,
    end_processes,
)
from seg4diff.data.names import DatasetName
from seg4diff.evaluation import BackgroundBy, ProtocolName
from seg4diff.segmentation.presets import PresetName

if TYPE_CHECKING:
    from seg4diff.backbones import Pipeline
    from seg4diff.data.registry import Dataset
    from seg4diff.evaluation.evaluator import EvaluationSettings
    from seg4diff.evaluation.report import EvaluationReport


@dataclass(frozen=True, kw_only=True)
class Evaluate(DataOptions, ModelOptions):
    """Measure how well a model segments data sets.

    Data sets are read as their official downloads unpack; missing files are reported before a model is
    loaded. The same command continues an interrupted one, and a larger --limit adds images to it.
    `accelerate launch -m seg4diff evaluate ...` shares the images among GPUs and machines. Writes
    OUT/DATASET/report.json, report.md, contact-sheet.png and results, and OUT/report.md for all data sets:

        seg4diff evaluate --dataset scenes --model demo --limit 8
        seg4diff evaluate --dataset voc20 ade150 --protocol oracle full --preset paper --data-root data
    """

    dataset: Annotated[tuple[DatasetName, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
    """voc20, voc21, pc59, pc60, coco-object, coco-object-bg, coco-stuff27, coco-stuff171, ade150,
    cityscapes19, imagenet-seg; folder: one of your own; scenes: those of the bundled model, and scenes-hard
    the same in bad light."""
    protocol: Annotated[
        tuple[ProtocolName, ...], tyro.conf.arg(metavar="{oracle,full,presence,unsupervised} [...]")
    ] = ("oracle",)
    """oracle: prompt the classes present in each image, as the paper does; full: all classes; presence:
    all classes, and those that are not found in an image are left out; unsupervised: none. Several are
    answered in one run."""
    out: Path = Path("evaluate-output")
    """Folder for what is written."""
    preset: PresetName = "default"
    """`default` keeps images whole, `best` refines that and `fast` does so in one pass, `paper` takes the
    central square, `reference` squashes images as the paper's public code does and keeps its quirks."""
    layers: LayersOrAuto = None
    """Transformer layers whose attention is read; by default the model's expert layers. `auto`: those that
    tell most about each image, for one more forward; the default where no expert is known."""
    names: str = "paper"
    """Names to prompt: `paper` for those of the data set; `better` for names that say more; or a JSON file
    that maps classes to lists of names."""
    background: BackgroundBy = "prompt"
    """How a background class is found: named in the prompt like the others, or where no name scores high."""
    background_threshold: float = 0.5
    """With `threshold`: pixels below this share of the image's highest score are background."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Only the images that this file names, one to a line."""
    batch_size: int = 1
    """Images, and pairs of image and prompt, in one pass through the model."""
    seed: int = 0
    """Seed of the noise."""
    save_predictions: bool = False
    """Write label maps, at the size of the images."""
    overwrite: bool = False
    """Discard earlier results in OUT."""
    threads: int = 4
    """Threads that read images."""

    def run(self) -> None:
        """Evaluate the model.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or files are missing.
            RuntimeError: some images could not be evaluated; the report is written all the same.
        """
        try:
            self._evaluate()
        finally:
            end_processes()

    def _evaluate(self) -> None:
        from rich.console import Console

        from seg4diff.data.registry import subset, with_names

        if not self.dataset or len(set(self.dataset)) < len(self.dataset):
            raise ValueError(f"--dataset {' '.join(self.dataset)!r}: one or several different ones expected")
        at_least_one(self, "batch_size", "threads", "limit")
        self.check(self.out)
        datasets = [
            subset(with_names(self.open(name), self.names), limit=self.limit, listed=self.images)
            for name in self.dataset
        ]

        from seg4diff.evaluation.evaluator import EvaluationSettings
        from seg4diff.evaluation.report import failures_line, markdown
        from seg4diff.evaluation.runner import check_predictions, process_state
        from seg4diff.files import write_atomically

        if self.save_predictions:
            for dataset in datasets:
                check_predictions(dataset, self.out / dataset.name, self.protocol)
        settings = EvaluationSettings(
            protocols=self.protocol,
            preset=self.preset,
            layers=self.layers,
            seed=self.seed,
            batch_size=self.batch_size,
            background=self.background,
            background_threshold=self.background_threshold,
        )
        pipe = self.load()
        about = {"model": self.model, "lora": digest(self.lora)}
        reports = [self._one(pipe, dataset, settings, about) for dataset in datasets]
        if not process_state(pipe).is_main_process:
            return
        table = markdown(reports)
        write_atomically(self.out / "report.md", lambda path: path.write_text(table, encoding="utf-8"))
        _print_table(Console(), reports)
        failures = {name: reason for report in reports for name, reason in report.failures.items()}
        if failures:
            raise RuntimeError(failures_line(failures, sum(report.total for report in reports)))

    def _one(
        self, pipe: Pipeline, dataset: Dataset, settings: EvaluationSettings, about: dict[str, Any]
    ) -> EvaluationReport:
        from seg4diff.evaluation.contact_sheet import write_contact_sheet
        from seg4diff.evaluation.evaluator import Evaluator
        from seg4diff.evaluation.report import write_report
        from seg4diff.evaluation.runner import evaluate, process_state

        out = self.out / dataset.name
        report = evaluate(
            pipe,
            dataset,
            out,
            settings,
            about=about,
            save_predictions=self.save_predictions,
            threads=self.threads,
            overwrite=self.overwrite,
        )
        state = process_state(pipe)
        if state.is_main_process:
            write_report(report, out)
            write_contact_sheet(Evaluator(pipe, dataset, settings), dataset, out)
        state.wait_for_everyone()
        return report


def _print_table(console: Any, reports: Sequence[EvaluationReport]) -> None:
    from rich.table import Table

    from seg4diff.evaluation.published import PAPER_ROWS, PUBLISHED

    table = Table(caption=f"preset {reports[0].settings['preset']}")
    for column in (
        "data set",
        "protocol",
        "images",
        "mIoU %",
        "boundary IoU %",
        "pixel acc. %",
        f"paper ({PAPER_ROWS[0]})",
    ):
        table.add_column(column, justify="left" if column in ("data set", "protocol") else "right")
    for report in reports:
        for protocol, rates in report.rates.items():
            published = PUBLISHED.get(protocol, {}).get(report.dataset, (None,))[0]
            table.add_row(
                report.title,
                protocol,
                str(report.images),
                f"{100 * rates.miou:.1f}",
                "-" if rates.boundary_iou is None else f"{100 * rates.boundary_iou:.1f}",
                f"{100 * rates.pixel_accuracy:.1f}",
                "-" if published is None else f"{published:.1f}",
            )
    console.print(table)
    for report in reports:
        if report.images_per_second is not None:
            console.print(f"{report.title}: {report.images_per_second:.2f} images/s")


def digest(lora: Path | None) -> dict[str, str] | None:
    """Identity of a LoRA: its path and a checksum of its files."""
    if lora is None:
        return None
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    checksum = hashlib.sha256()
    for path in files:
        checksum.update(path.read_bytes())
    return {"path": str(lora), "sha256": checksum.hexdigest()}
