"""The commands ``seg4diff evaluate`` and ``seg4diff prepare``. Heavy imports wait until one runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from seg4diff.commands.model_options import ModelOptions, load_model, load_patched
from seg4diff.segmentation.presets import PresetName

if TYPE_CHECKING:
    from seg4diff.evaluation.datasets import Dataset
    from seg4diff.evaluation.runner import Report, Settings

_DatasetName = Literal[
    "voc20",
    "voc21",
    "pc59",
    "pc60",
    "coco-object",
    "coco-object-bg",
    "coco-stuff27",
    "coco-stuff171",
    "ade150",
    "cityscapes19",
    "imagenet-seg",
    "folder",
    "scenes",
]
_Datasets = Annotated[tuple[_DatasetName, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
_Root = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelOptions):
    """Measure a model: segmentation on a data set, or, with --generation, pictures from prompts.

        seg4diff evaluate --dataset voc20 ade150 --protocol oracle full --data-root data

    Data sets are read as their official downloads unpack; what is missing is said before anything is loaded.
    The same command goes on where an interrupted one stopped. `accelerate launch -m seg4diff evaluate ...`
    shares the images among GPUs and machines. Writes OUT/DATASET/report.json, report.md, contact-sheet.png
    and results, and OUT/report.md for all data sets.
    """

    dataset: _Datasets = ("scenes",)
    """voc20, voc21, pc59, pc60, coco-object, coco-object-bg, coco-stuff27, coco-stuff171, ade150,
    cityscapes19, imagenet-seg; folder: one of your own; scenes: those of the bundled model."""
    protocol: Annotated[
        tuple[Literal["oracle", "full", "unsupervised"], ...],
        tyro.conf.arg(metavar="{oracle,full,unsupervised} [...]"),
    ] = ("oracle",)
    """oracle: prompt the classes present in each image, as the paper does; full: all classes; unsupervised:
    none. Several are answered in one pass."""
    data_root: _Root = None
    """Folder that holds VOCdevkit, coco, ADEChallengeData2016, cityscapes; of `folder` the folder itself."""
    out: Path = Path("evaluation-output")
    """Folder for what is written."""
    preset: PresetName = "paper"
    """`paper` looks at the central square, `reference` squashes images as the paper's public code does and
    keeps its quirks, `default` keeps them whole."""
    layers: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = (
        None
    )
    """Transformer layers whose attention is read; by default the model's expert layer."""
    names: str = "paper"
    """Names to prompt: `paper` for those of the data set; `better` for names that say more; or a JSON file
    that maps classes to lists of names."""
    background: Literal["prompt", "threshold"] = "prompt"
    """How a background class is found: named in the prompt like the others, or where no name scores high."""
    background_threshold: float = 0.5
    """With `threshold`: pixels below this share of the image's highest score are background."""
    limit: _Number = None
    """Only the first N images."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Only the images that this file names, one to a line."""
    partial: bool = False
    """Accept a data set that is not whole; the report says so."""
    batch_size: int = 1
    """Images, and pairs of image and prompt, in one pass through the model."""
    seed: int = 0
    """Seed of the noise."""
    save_predictions: bool = False
    """Write label maps, at the size of the images."""
    overwrite: bool = False
    """Forget earlier results in OUT."""
    threads: int = 4
    """Threads that read images."""
    generation: bool = False
    """Draw images from --prompts and report CLIPScore instead, with and without --lora."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """With --generation: prompts, one to a line (or a JSON list)."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (0,)
    """With --generation: one image of each prompt for each seed."""
    steps: int = 28
    """With --generation: denoising steps."""
    guidance_scale: float = 7.5
    """With --generation: scale of classifier-free guidance."""
    clip_models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (
        "openai/clip-vit-large-patch14",
    )
    """With --generation: CLIP models to score with, by their names on the hub."""
    layout: Literal["plain", "compbench"] = "plain"
    """With --generation: `compbench` names files as the tools of T2I-CompBench++ expect them."""


@dataclass(frozen=True)
class Prepare:
    """Check every file of a data set, and write it as a plain folder where --out is given."""

    dataset: Annotated[_DatasetName, tyro.conf.Positional]
    """Which data set; see `seg4diff evaluate --help`."""
    data_root: _Root = None
    """Folder that holds VOCdevkit, coco, ADEChallengeData2016, cityscapes; of `folder` the folder itself."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Write images/, labels/ and classes.txt here, for `--dataset folder`."""
    limit: _Number = None
    """Only the first N images."""
    partial: bool = False
    """Accept a data set that is not whole."""
    threads: int = 4
    """Threads that read images."""
    debug: bool = False
    """Show where an error came from."""


def run_evaluate(options: Evaluate) -> None:
    """Run ``seg4diff evaluate``.

    Raises:
        ValueError, FileNotFoundError: what is asked for makes no sense, or files are missing.
        RuntimeError: some images could not be evaluated; the report is written all the same.
    """
    try:
        if options.generation:
            _generate(options)
        else:
            _segment(options)
    finally:
        if "RANK" in os.environ:  # one of several processes
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def run_prepare(options: Prepare) -> None:
    """Run ``seg4diff prepare``.

    Raises:
        ValueError, FileNotFoundError: what is asked for makes no sense, or files are missing.
        RuntimeError: some images are at fault.
    """
    from rich.console import Console
    from rich.table import Table

    from seg4diff.evaluation.datasets import limit_samples, open_dataset
    from seg4diff.evaluation.preparation import prepare

    dataset = limit_samples(
        open_dataset(options.dataset, options.data_root, partial=options.partial), limit=options.limit
    )
    found = prepare(dataset, options.out, threads=options.threads)
    total = max(1, sum(found.pixels) + found.ignored)
    table = Table(title=f"{dataset.title}: {found.pictures} images, labels from {dataset.source}")
    table.add_column("class")
    table.add_column("images", justify="right")
    table.add_column("pixels %", justify="right")
    for name, occurs, pixels in zip(dataset.classes, found.occurs, found.pixels, strict=True):
        table.add_row(name, str(occurs), f"{100 * pixels / total:.2f}")
    table.add_row("(does not count)", "", f"{100 * found.ignored / total:.2f}")
    Console().print(table)
    if found.failures:
        raise RuntimeError(_failed([(f.name, f.reason) for f in found.failures], len(dataset.samples)))


def _segment(options: Evaluate) -> None:
    from rich.console import Console

    from seg4diff.evaluation.datasets import limit_samples, open_dataset, with_names

    if not options.dataset or len(set(options.dataset)) < len(options.dataset):
        raise ValueError(f"--dataset {' '.join(options.dataset)!r}: one or several different ones expected")
    _check(options)
    datasets = []  # all of them before the model is loaded
    for name in options.dataset:
        dataset = open_dataset(name, options.data_root, partial=options.partial)
        datasets.append(
            limit_samples(with_names(dataset, options.names), limit=options.limit, listed=options.images)
        )

    from seg4diff.evaluation.report import markdown
    from seg4diff.evaluation.runner import Settings, check_predictions, process_state
    from seg4diff.files import write_atomically

    if options.save_predictions:
        for dataset in datasets:
            check_predictions(dataset, options.out / dataset.name, options.protocol)
    settings = Settings(
        protocols=options.protocol,
        preset=options.preset,
        layers=options.layers,
        seed=options.seed,
        batch_size=options.batch_size,
        background=options.background,
        background_threshold=options.background_threshold,
    )
    pipe = load_patched(_on_own_device(options))
    about = {"model": options.model, "lora": _digest(options.lora)}
    reports = [_evaluate(pipe, dataset, options, settings, about) for dataset in datasets]
    if not process_state(pipe).is_main_process:
        return
    table = markdown(reports)
    write_atomically(options.out / "report.md", lambda path: path.write_text(table, encoding="utf-8"))
    _print_table(Console(), reports)
    failures = [(f.name, f.reason) for report in reports for f in report.failures]
    if failures:
        raise RuntimeError(_failed(failures, sum(report.total for report in reports)))


def _evaluate(
    pipe: Any, dataset: Dataset, options: Evaluate, settings: Settings, about: dict[str, Any]
) -> Report:
    from seg4diff.evaluation.report import write_contact_sheet, write_report
    from seg4diff.evaluation.runner import evaluate, make_evaluator, process_state

    out = options.out / dataset.name
    report = evaluate(
        pipe,
        dataset,
        out,
        settings,
        about=about,
        save_predictions=options.save_predictions,
        threads=options.threads,
        overwrite=options.overwrite,
    )
    state = process_state(pipe)
    if state.is_main_process:
        write_report(report, out)
        write_contact_sheet(make_evaluator(pipe, dataset, settings), dataset, out)
    state.wait_for_everyone()
    return report


def _print_table(console: Any, reports: Sequence[Report]) -> None:
    from rich.table import Table

    from seg4diff.evaluation.published import PAPER_ROWS, PUBLISHED
    from seg4diff.evaluation.report import speed_line

    table = Table()
    for column in ("data set", "protocol", "images", "mIoU %", "pixel acc. %", f"paper ({PAPER_ROWS[0]})"):
        table.add_column(column, justify="left" if column in ("data set", "protocol") else "right")
    for report in reports:
        for protocol, rates in report.rates.items():
            published = PUBLISHED.get(protocol, {}).get(report.dataset, (None,))[0]
            table.add_row(
                report.title,
                protocol,
                str(report.images),
                f"{100 * rates.miou:.1f}",
                f"{100 * rates.pixel_accuracy:.1f}",
                "-" if published is None else f"{published:.1f}",
            )
    console.print(table)
    for report in reports:
        if report.speed is not None:
            console.print(f"{report.title}: {speed_line(report.speed)}")


def _generate(options: Evaluate) -> None:
    from seg4diff.evaluation.generation import GenerationSettings, check_names, read_prompts

    if options.prompts is None:
        raise ValueError("--generation needs --prompts FILE: one prompt to a line")
    _check(options)
    prompts = read_prompts(options.prompts)[: options.limit]
    settings = GenerationSettings(
        seeds=options.seeds,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
        layout=options.layout,
    )
    check_names(prompts, settings)

    import json

    from rich.console import Console
    from rich.markdown import Markdown

    import seg4diff
    from seg4diff.evaluation.generation import clip_score, generate, markdown
    from seg4diff.evaluation.runner import process_state, versions_of
    from seg4diff.files import write_atomically

    pipe = load_model(replace(_on_own_device(options), lora=None))
    state = process_state(pipe)
    arms: dict[str, Path | None] = {"base": None}
    if options.lora is not None:
        arms["lora"] = options.lora
    for name, lora in arms.items():
        if lora is not None:
            seg4diff.load_lora(pipe, lora)
        generate(
            pipe,
            prompts,
            options.out / name,
            settings,
            about={"model": options.model, "lora": _digest(lora)},
            process=state.process_index,
            processes=state.num_processes,
            progress=state.is_main_process,
        )
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    device = pipe._execution_device
    scores = {
        name: {
            clip: clip_score(prompts, options.out / name, settings, clip, device=device)
            for clip in options.clip_models
        }
        for name in arms
    }
    table = markdown(scores, len(prompts), settings)
    document = {
        "clip_score": scores,
        "prompts": len(prompts),
        "settings": json.loads((options.out / "base" / "settings.json").read_text(encoding="utf-8")),
        "lora": _digest(options.lora),
        "versions": versions_of(pipe),
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    write_atomically(options.out / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(options.out / "report.md", lambda path: path.write_text(table, encoding="utf-8"))
    Console().print(Markdown(table))


def _check(options: Evaluate) -> None:
    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {str(options.out)!r} is a file; give a folder")
    if options.lora is not None and not options.lora.exists():
        raise FileNotFoundError(f"LoRA {str(options.lora)!r} does not exist; check the path")
    for name in ("batch_size", "threads", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _on_own_device(options: Evaluate) -> Evaluate:
    """The options with the device of this process among several, unless one is named."""
    rank = os.environ.get("LOCAL_RANK")
    if options.device is not None or rank is None:
        return options
    import torch

    return replace(options, device=f"cuda:{rank}" if torch.cuda.is_available() else "cpu")


def _digest(lora: Path | None) -> dict[str, str] | None:
    """Which LoRA it is: its path, and a checksum of its files."""
    if lora is None:
        return None
    files = sorted(lora.glob("*.safetensors")) if lora.is_dir() else [lora]
    checksum = hashlib.sha256()
    for path in files:
        checksum.update(path.read_bytes())
    return {"path": str(lora), "sha256": checksum.hexdigest()}


def _failed(failures: Sequence[tuple[str, str]], total: int) -> str:
    shown = "; ".join(f"{name}: {reason}" for name, reason in failures[:10])
    more = f"; and {len(failures) - 10} more" if len(failures) > 10 else ""
    return f"{len(failures)} of {total} images are at fault and left out of the figures: {shown}{more}"
