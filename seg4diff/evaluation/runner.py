"""Evaluation of a model on a data set: on one process or many, resumable, with all protocols in one pass.

Images are evaluated in groups of a fixed make-up, whatever was done before and whichever process does it. So
a run that was interrupted, or shared by several processes, has the figures of one that was not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.data.prefetch import Failure, Loaded, load_ahead
from seg4diff.data.registry import Dataset
from seg4diff.evaluation.evaluator import EvaluationSettings, Evaluator
from seg4diff.evaluation.report import EvaluationReport, versions_of
from seg4diff.evaluation.results import Result, add_up, latest, read_results
from seg4diff.files import check_outputs, checked_name, save_image
from seg4diff.jobs import Job, Share, claim
from seg4diff.kernels.api import provider_identity
from seg4diff.metrics import IGNORED, rates_of
from seg4diff.visualization import palette

logger = logging.getLogger(__name__)

_BATCHES_IN_A_GROUP = 4  # images of one size are batched together within a group


def evaluate(
    pipe: Pipeline,
    dataset: Dataset,
    out: Path,
    settings: EvaluationSettings | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    save_predictions: bool = False,
    threads: int = 4,
    overwrite: bool = False,
    progress: bool = True,
) -> EvaluationReport:
    """Evaluate a model on a data set, going on where an earlier run into the same folder stopped.

    Under `accelerate launch` the processes share the images; each image is evaluated once, and every process
    returns the report of all.

    Args:
        pipe: a pipeline, on the device of this process.
        dataset: see `seg4diff.data.registry.open_dataset`.
        out: folder for results and predictions; `seg4diff.evaluation.report.write_report` adds the report.
        settings: defaults to `EvaluationSettings()`.
        about: what else tells this evaluation from others, e.g. the names of model and LoRA.
        save_predictions: write label maps to `out/predictions/PROTOCOL/NAME.png`, at the resolution of the
            image, 255 where the preset does not look.
        threads: threads that read images and write predictions.
        overwrite: forget earlier results in `out`.
        progress: show a bar with the running mIoU.

    Raises:
        ValueError: `out` has results of other settings, label maps would overwrite files of the data set, or
            as `Evaluator`.
        FolderInUseError: another run works in `out`.
        OSError: the disk is full; what is done is kept.
    """
    state = process_state(pipe)
    evaluator = Evaluator(pipe, dataset, settings or EvaluationSettings())
    if save_predictions:
        check_predictions(dataset, out, evaluator.settings.protocols)
    with ExitStack() as stack:
        with state.main_process_first():
            job = stack.enter_context(
                claim(
                    out,
                    _identity(evaluator, dataset, about or {}),
                    [item.name for item in dataset.items],
                    share=Share(state.process_index, state.num_processes),
                    overwrite=overwrite,
                )
            )
        earlier = read_results(out, len(dataset.classes))
        pending = _pending(job, earlier, len(dataset.items), evaluator.settings.batch_size)
        started = time.perf_counter()
        totals = add_up(result.counts for result in earlier.values())
        fresh: list[Result] = []
        bar = stack.enter_context(
            tqdm(
                total=sum(map(len, pending)),
                unit="image",
                disable=not (progress and state.is_main_process),
                desc=dataset.name,
            )
        )
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        for group in load_ahead(dataset.items, pending, threads=threads):
            results = evaluator.results(group)
            if save_predictions:  # before the results, whose presence means that an image is done
                list(pool.map(lambda pair: _save_predictions(out, *pair), zip(group, results, strict=True)))
            job.append(result.to_entry() for result in results)
            fresh += [replace(result, predicted={}) for result in results]
            totals = add_up([totals, *(result.counts for result in results)])
            bar.update(len(results))
            bar.set_postfix_str(" ".join(f"{n} {100 * c.mean_iou:.1f}" for n, c in totals.items()))
    seconds = time.perf_counter() - started
    complete, speed = _gather([*earlier.values(), *fresh], len(fresh), seconds)
    return _report(evaluator, dataset, job, complete, speed)


def process_state(pipe: Pipeline) -> Any:
    """This process among those of `accelerate launch`; alone without it."""
    from accelerate import PartialState

    on_cpu = torch.device(pipe._execution_device).type == "cpu"
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=24))


def check_predictions(dataset: Dataset, out: Path, protocols: Sequence[str]) -> None:
    """Raise ValueError if label maps that are saved would overwrite the data set's files or each other."""
    check_outputs(
        [_prediction_path(out, name, item.name) for name in protocols for item in dataset.items],
        [file for item in dataset.items for file in item.files],
    )


def _pending(job: Job, earlier: Mapping[int, Result], count: int, batch_size: int) -> list[Sequence[int]]:
    """The groups of this process that are not done: new, with a failure, or grown since."""
    size = batch_size * _BATCHES_IN_A_GROUP
    groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
    done = {
        index
        for group in groups
        for index in group
        if index in earlier and earlier[index].group == len(group)
    }
    if done and job.share.index == 0:
        logger.info("%d of %d images were evaluated before", len(done), count)
    return job.pending(groups, done)


def _gather(results: Sequence[Result], images: int, seconds: float) -> tuple[dict[int, Result], float | None]:
    """Results of all processes, and images per second of all, None if nothing was left to do."""
    from accelerate.utils import gather_object

    complete = latest(gather_object(list(results)))
    runs = gather_object([(images, seconds)])
    total, slowest = sum(run[0] for run in runs), max(run[1] for run in runs)
    return complete, total / slowest if total else None


def _report(
    evaluator: Evaluator, dataset: Dataset, job: Job, results: Mapping[int, Result], speed: float | None
) -> EvaluationReport:
    counts = add_up(result.counts for result in results.values())
    boundary = add_up(result.boundary for result in results.values())
    failures = {result.name: result.failure for result in results.values() if result.failure is not None}
    return EvaluationReport(
        dataset=dataset.name,
        title=dataset.title,
        source=dataset.source,
        images=len(results) - len(failures),
        total=len(dataset.items),
        expected=dataset.expected,
        empty=sum(not result.counts and result.failure is None for result in results.values()),
        failures=failures,
        rates={
            name: rates_of(counts[name], boundary.get(name)) for name in evaluator.protocols if name in counts
        },
        classes=dataset.classes,
        settings=job.settings,
        versions=versions_of(evaluator.pipe),
        processes=job.share.count,
        images_per_second=speed,
    )


def _identity(evaluator: Evaluator, dataset: Dataset, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the figures, but for the images."""
    steps, level = patch_of(evaluator.pipe).backbone.noise
    return {
        **asdict(evaluator.settings),
        "preset": evaluator.preset.name,
        "preset_details": asdict(evaluator.preset),
        "recipe": asdict(evaluator.recipe),
        "noise": {"steps": steps, "level": level},
        "dataset": dataset.name,
        "source": dataset.source,
        "classes": dataset.classes,
        "prompts": dataset.prompts,
        "dtype": str(evaluator.pipe.transformer.dtype).removeprefix("torch."),
        "attention": provider_identity(evaluator.pipe._execution_device),
        **about,
    }


def _prediction_path(out: Path, protocol: str, name: str) -> Path:
    return out / "predictions" / protocol / f"{checked_name(name, 'the data set')}.png"


def _save_predictions(out: Path, item: Loaded | Failure, result: Result) -> None:
    for protocol, predicted in result.predicted.items():
        assert isinstance(item, Loaded)
        _save_prediction(_prediction_path(out, protocol, item.name), predicted, item.image.size)


def _save_prediction(path: Path, predicted: Tensor, whole: tuple[int, int]) -> None:
    """A palette PNG of the size of the whole image, 255 where it was not looked at."""
    height, width = predicted.shape
    labels = np.full((whole[1], whole[0]), IGNORED, np.uint8)
    top, left = (whole[1] - height) // 2, (whole[0] - width) // 2
    labels[top : top + height, left : left + width] = predicted.numpy()
    image = Image.fromarray(labels)
    image.putpalette(palette(256).tobytes())
    save_image(image, path)
