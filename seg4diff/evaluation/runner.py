"""Evaluation of a model on a data set: on one process or many, resumable, with all protocols in one pass.

Pictures are evaluated in groups of a fixed make-up, whatever was done before and whichever process does it.
So a run that was interrupted, or spread over several processes, gives the very figures of one that was not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from seg4diff.attention.patch import patch_of
from seg4diff.backbones import Pipeline
from seg4diff.data.prefetch import Failure, Loaded, load, load_ahead
from seg4diff.data.registry import Dataset
from seg4diff.evaluation.protocols import (
    BackgroundBy,
    Protocol,
    ProtocolName,
    Question,
    predict,
)
from seg4diff.evaluation.results import (
    Result,
    Tally,
    add_up,
    append_results,
    failures_of,
    preferred,
    read_results,
    remove_results,
)
from seg4diff.files import check_outputs, checked_name, no_space, write_atomically
from seg4diff.kernels.api import provider_identity
from seg4diff.kernels.types import MapRequest
from seg4diff.metrics import (
    IGNORED,
    Rates,
    boundary_counts,
    confusion_matrix,
    matched_counts,
)
from seg4diff.segmentation.inputs import View, views_of
from seg4diff.segmentation.maps import run_maps
from seg4diff.segmentation.presets import Clustering, Preset, find_preset
from seg4diff.segmentation.regions import layers_behind
from seg4diff.visualization import palette

logger = logging.getLogger(__name__)

_BATCHES_IN_A_GROUP = 4  # pictures of one size are batched together within a group
_KEPT_PROMPTS = 128  # text embeddings kept; one of SD3 takes 1.3 MB in bfloat16


@dataclass(frozen=True)
class Settings:
    """What decides the figures of an evaluation.

    Attributes:
        protocols: one or several of ``PROTOCOLS``; all are answered in one pass.
        preset: a name in ``seg4diff.segmentation.presets.PRESETS``.
        layers: transformer layers whose maps are averaged; the model's expert layers when None.
        seed: of the noise, the same for every picture.
        batch_size: pictures, and pairs of picture and prompt, that run together.
        background: where a data set has a background class, whether it is named in the prompt or is what no
            name reaches.
        background_threshold: see :class:`seg4diff.evaluation.protocols.Question`.
        boundary: whether to count boundary IoU as well.
    """

    protocols: tuple[ProtocolName, ...] = ("oracle",)
    preset: str = "paper"
    layers: tuple[int, ...] | None = None
    seed: int = 0
    batch_size: int = 1
    background: BackgroundBy = "prompt"
    background_threshold: float = 0.5
    boundary: bool = True

    def __post_init__(self) -> None:
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols={self.protocols!r} must be one or several different ones")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size!r} must be a positive integer")


@dataclass(frozen=True)
class Speed:
    """How fast the pictures of this run were evaluated; earlier ones of a resumed run do not count.

    Attributes:
        images: how many.
        seconds: wall time of the slowest process, without loading the model.
        images_per_second: over all processes.
    """

    images: int
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Report:
    """The outcome of an evaluation.

    Attributes:
        dataset, title, source: of the data set.
        images: how many pictures were evaluated.
        total: how many the evaluation should have, failures included.
        expected: how many the data set has in full, None if that has no meaning.
        empty: pictures without a pixel that counts; among ``images``.
        failures: pictures that could not be evaluated.
        rates: by protocol.
        classes: names of the classes, for ``Rates.iou``.
        settings: all that decides the figures, model and names included.
        versions: of packages and device.
        processes: how many worked on it, in this run.
        speed: of this run, None if nothing was left to do.
    """

    dataset: str
    title: str
    source: str
    images: int
    total: int
    expected: int | None
    empty: int
    failures: tuple[Failure, ...]
    rates: Mapping[str, Rates]
    classes: tuple[str, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    processes: int = 1
    speed: Speed | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """The label maps of one picture.

    Attributes:
        index, name: of the sample.
        image: the part of the picture that was seen, at its own resolution.
        labels: of that part, uint8 [height, width].
        predicted: by protocol, uint8 [height, width].
        whole: width and height of the whole picture.
    """

    index: int
    name: str
    image: Image.Image
    labels: np.ndarray
    predicted: Mapping[str, Tensor]
    whole: tuple[int, int]


@dataclass(frozen=True)
class Evaluator:
    """A model with a data set's protocols: answers pictures. Made by :func:`make_evaluator`.

    Attributes:
        pipe: a patched pipeline.
        settings: see :class:`Settings`.
        preset: that of the settings.
        protocols: by name.
        columns: the text columns that are read.
        output_layers: the layers whose attention outputs are clustered into regions, if any.
        text: embeddings of prompts met lately.
    """

    pipe: Pipeline
    settings: Settings
    preset: Preset
    protocols: Mapping[str, Protocol]
    columns: slice
    output_layers: tuple[int, ...] = ()
    text: OrderedDict[str, dict[str, Tensor]] = field(default_factory=OrderedDict)

    def answer(self, pictures: Sequence[Loaded]) -> Iterator[Answer]:
        """Label maps of pictures that have at least one pixel that counts, in any order."""
        views = views_of(self.pipe, [picture.image for picture in pictures], self.preset.fit)
        labels = [seen_part(p.labels, view) for p, view in zip(pictures, views, strict=True)]
        counted = [i for i, part in enumerate(labels) if (part != IGNORED).any()]
        questions = {
            i: {
                name: protocol.question(labels[i], pictures[i].prompts)
                for name, protocol in self.protocols.items()
            }
            for i in counted
        }
        prompts = {i: list(dict.fromkeys(_texts(questions[i].values()))) for i in counted}
        self._encode(list(dict.fromkeys(text for i in counted for text in prompts[i])))
        for found in run_maps(
            self.pipe,
            [views[i] for i in counted],
            [prompts[i] for i in counted],
            layers=self.settings.layers,
            maps=MapRequest(columns=("text", self.columns)),
            output_layers=self.output_layers,
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
            progress=False,
            known_text=self.text,
        ):
            i = counted[found.index]
            maps = dict(zip(prompts[i], found.maps, strict=True))
            means = {text: m.mean(dim=0) for text, m in maps.items()}
            grouped = maps if found.outputs is None else dict(zip(prompts[i], found.outputs, strict=True))
            image = views[i].image
            predicted = {
                name: predict(
                    question,
                    [(grouped if name == "unsupervised" else means)[p.text] for p in question.prompts],
                    found.grid,
                    (image.height, image.width),
                    self.preset,
                )
                for name, question in questions[i].items()
            }
            picture = pictures[i]
            yield Answer(picture.index, picture.name, image, labels[i], predicted, picture.image.size)
        while len(self.text) > _KEPT_PROMPTS:
            self.text.popitem(last=False)

    def _encode(self, texts: Sequence[str]) -> None:
        """Embed prompts that are not known, one by one: the result must not hang on what else is asked."""
        backbone = patch_of(self.pipe).backbone
        for text in texts:
            if text not in self.text:
                with torch.no_grad():
                    arguments = backbone.encode_text(self.pipe, [text])
                self.text[text] = {key: tensor[0] for key, tensor in arguments.items()}
            self.text.move_to_end(text)


def make_evaluator(pipe: Pipeline, dataset: Dataset, settings: Settings) -> Evaluator:
    """Check all that can be checked before the first picture.

    Raises:
        RuntimeError: ``pipe`` is not patched.
        TypeError: it has no VAE.
        ValueError: unknown preset or protocol, a layer out of range, a class name that cannot be prompted.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; evaluation takes a whole pipeline")
    preset = find_preset(settings.preset)
    named = set(settings.protocols) != {"unsupervised"}
    if named and (preset.passes > 1 or preset.spread or preset.absent != "keep"):
        raise ValueError(
            f"preset={preset.name!r} takes steps that evaluation does not; use 'default', or segment() and "
            "seg4diff.metrics"
        )
    chosen = state.layers_or_experts(settings.layers)
    span = state.backbone.name_span(pipe)
    protocols: dict[str, Protocol] = {
        name: Protocol(
            name,
            dataset,
            preset,
            span,
            background=settings.background,
            threshold=settings.background_threshold,
        )
        for name in settings.protocols
    }
    clustered: tuple[int, ...] = ()
    if "unsupervised" in protocols and isinstance(preset.grouping, Clustering):
        clustered = chosen
        if settings.layers is None:
            clustered = layers_behind(chosen, preset.grouping, len(state.blocks))
    settings = replace(settings, layers=chosen)
    return Evaluator(pipe, settings, preset, protocols, slice(0, span.first + span.length), clustered)


def evaluate(
    pipe: Pipeline,
    dataset: Dataset,
    out: Path,
    settings: Settings | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    save_predictions: bool = False,
    threads: int = 4,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Evaluate a model on a data set, going on where an earlier run into the same folder stopped.

    Under ``accelerate launch`` the processes share the pictures; each picture is evaluated once, and every
    process returns the report of all.

    Args:
        pipe: a patched pipeline, on the device of this process.
        dataset: see :func:`seg4diff.data.open_dataset`.
        out: folder for results, report, and predictions; :func:`seg4diff.evaluation.report.write_report` adds
            the report.
        settings: defaults to ``Settings()``.
        about: what else tells this evaluation from others, e.g. the names of model and LoRA.
        save_predictions: write label maps to ``out/predictions/PROTOCOL/NAME.png``, at the resolution of the
            picture, 255 where the preset does not look.
        threads: that read pictures and write predictions.
        overwrite: forget earlier results in ``out``.
        progress: show a bar with the running mIoU.

    Raises:
        ValueError: ``out`` holds results of other settings, label maps would overwrite files of the data
            set, or as :func:`make_evaluator`.
        OSError: the disk is full; what is done is kept.
    """
    state = process_state(pipe)
    evaluator = make_evaluator(pipe, dataset, settings or Settings())
    if save_predictions:
        check_predictions(dataset, out, evaluator.settings.protocols)
    identity = _identity(evaluator, dataset, about or {})
    if state.is_main_process:
        _claim(out, identity, [item.name for item in dataset.items], overwrite)
    state.wait_for_everyone()
    out.mkdir(parents=True, exist_ok=True)  # on machines that do not share a disk
    classes = len(dataset.classes)
    earlier = _gather(read_results(out, classes))
    size = evaluator.settings.batch_size * _BATCHES_IN_A_GROUP
    everything = range(len(dataset.items))
    groups = [list(everything[first : first + size]) for first in range(0, len(everything), size)]
    open_groups = [
        group for group in groups if not all(_is_done(earlier.get(index), len(group)) for index in group)
    ]
    redone = {index for group in open_groups for index in group}
    kept = {index: result for index, result in earlier.items() if index not in redone}
    if kept and state.is_main_process:
        logger.info("%d of %d pictures were evaluated before", len(kept), len(everything))
    mine = open_groups[state.process_index :: state.num_processes]
    fresh: dict[int, Result] = {}
    started = time.perf_counter()
    names = tuple(evaluator.protocols)
    totals = add_up(kept.values(), names)
    bar = tqdm(
        total=sum(map(len, mine)),
        unit="image",
        disable=not (progress and state.is_main_process),
        desc=dataset.name,
    )
    with bar, ThreadPoolExecutor(max(1, threads)) as pool:
        for group in load_ahead(dataset.items, mine, threads=threads):
            results, answers = _evaluate_group(evaluator, dataset, group)
            if save_predictions:  # before its result, which says that the picture is done
                list(pool.map(partial(_save_predictions, out), answers))
            append_results(out, state.process_index, results)
            fresh |= {result.index: result for result in results}
            for name, tally in add_up(results, names).items():
                totals[name] = totals.get(name, Tally()) + tally
            bar.update(len(results))
            bar.set_postfix_str(" ".join(f"{n} {100 * t.counts.mean_iou:.1f}" for n, t in totals.items()))
    speed = _speed(len(fresh), time.perf_counter() - started)
    complete = kept | _gather(fresh)
    results = [complete[index] for index in sorted(complete)]
    totals = add_up(results, names)
    failures = failures_of(results)
    return Report(
        dataset=dataset.name,
        title=dataset.title,
        source=dataset.source,
        images=len(results) - len(failures),
        total=len(everything),
        expected=dataset.expected,
        empty=sum(not result.tallies and result.failure is None for result in results),
        failures=failures,
        rates={name: tally.rates for name, tally in totals.items()},
        classes=dataset.classes,
        settings=identity,
        versions=versions_of(pipe),
        processes=state.num_processes,
        speed=speed,
    )


def process_state(pipe: Pipeline) -> Any:
    """This process among those of ``accelerate launch``; alone without it."""
    from accelerate import PartialState

    on_cpu = torch.device(pipe._execution_device).type == "cpu"
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=24))


def seen_part(labels: np.ndarray, view: View) -> np.ndarray:
    """The labels of the part of a picture that a view covers: all of it, or its centre."""
    height, width = labels.shape
    top, left = (height - view.image.height) // 2, (width - view.image.width) // 2
    return labels[top : top + view.image.height, left : left + view.image.width]


def answer_again(evaluator: Evaluator, dataset: Dataset, indices: Sequence[int]) -> dict[int, Answer]:
    """Answers of some pictures, for looking at; those that cannot be read are left out."""
    loaded = [load(dataset.items[index], index) for index in indices]
    return {
        answer.index: answer
        for answer in evaluator.answer([picture for picture in loaded if isinstance(picture, Loaded)])
    }


def _evaluate_group(
    evaluator: Evaluator, dataset: Dataset, group: Sequence[Loaded | Failure]
) -> tuple[list[Result], list[Answer]]:
    results = [
        Result(item.index, item.name, failure=item.reason) for item in group if isinstance(item, Failure)
    ]
    pictures = [item for item in group if isinstance(item, Loaded)]
    answers = []
    for answer in evaluator.answer(pictures):
        answers.append(answer)
        tallies = {
            name: _tally(evaluator, name, predicted, answer.labels, len(dataset.classes))
            for name, predicted in answer.predicted.items()
        }
        results.append(Result(answer.index, answer.name, tallies))
    answered = {answer.index for answer in answers}
    results += [Result(p.index, p.name) for p in pictures if p.index not in answered]
    results = [replace(result, group=len(group)) for result in results]
    return sorted(results, key=lambda result: result.index), answers


def _tally(evaluator: Evaluator, name: str, predicted: Tensor, labels: np.ndarray, classes: int) -> Tally:
    actual = torch.from_numpy(labels.copy())
    if name == "unsupervised":
        disjoint = evaluator.preset.match_disjoint
        return Tally(matched=matched_counts(predicted, actual, classes, match_disjoint=disjoint))
    confusion = confusion_matrix(predicted, actual, classes, predictions=evaluator.protocols[name].labels)
    boundary = boundary_counts(predicted, actual, classes) if evaluator.settings.boundary else None
    return Tally(confusion=confusion.to_sparse(), boundary=boundary)


def check_predictions(dataset: Dataset, out: Path, protocols: Sequence[str]) -> None:
    """Raise ValueError if label maps that are saved would overwrite the data set's files or each other."""
    check_outputs(
        [_prediction_path(out, name, item.name) for name in protocols for item in dataset.items],
        [file for item in dataset.items for file in item.files],
    )


def _prediction_path(out: Path, protocol: str, name: str) -> Path:
    return out / "predictions" / protocol / f"{checked_name(name, 'the data set')}.png"


def _save_predictions(out: Path, answer: Answer) -> None:
    """Palette PNGs of the size of the picture, 255 where it was not looked at."""
    for name, predicted in answer.predicted.items():
        _save_prediction(_prediction_path(out, name, answer.name), predicted, answer.whole)


def _save_prediction(path: Path, predicted: Tensor, whole: tuple[int, int]) -> None:
    height, width = predicted.shape
    labels = np.full((whole[1], whole[0]), IGNORED, np.uint8)
    top, left = (whole[1] - height) // 2, (whole[0] - width) // 2
    labels[top : top + height, left : left + width] = predicted.numpy()
    picture = Image.fromarray(labels)
    picture.putpalette(palette(256).tobytes())
    try:
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
    except OSError as error:
        raise no_space(error, path) from error


def _texts(questions: Any) -> Iterator[str]:
    question: Question
    for question in questions:
        for prompt in question.prompts:
            yield prompt.text


def _is_done(result: Result | None, group: int) -> bool:
    return result is not None and result.failure is None and result.group == group


def _gather(results: dict[int, Result]) -> dict[int, Result]:
    """Results of all processes."""
    from accelerate.utils import gather_object

    gathered: dict[int, Result] = {}
    for result in gather_object(list(results.values())):
        gathered[result.index] = preferred(gathered.get(result.index), result)
    return gathered


def _speed(images: int, seconds: float) -> Speed | None:
    from accelerate.utils import gather_object

    runs = gather_object([(images, seconds)])
    total, slowest = sum(run[0] for run in runs), max(run[1] for run in runs)
    return Speed(total, slowest, total / slowest) if total else None


def _identity(evaluator: Evaluator, dataset: Dataset, about: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the figures, as JSON has it."""
    steps, level = patch_of(evaluator.pipe).backbone.noise
    entries = {
        **asdict(evaluator.settings),
        "preset_details": asdict(evaluator.preset),
        "noise": {"steps": steps, "level": level},
        "dataset": dataset.name,
        "source": dataset.source,
        "pictures": len(dataset.items),
        "pictures_sha256": _digest([item.name for item in dataset.items]),
        "classes": dataset.classes,
        "prompts": dataset.prompts,
        "dtype": str(evaluator.pipe.transformer.dtype).removeprefix("torch."),
        "attention": provider_identity(evaluator.pipe._execution_device),
        **about,
    }
    identity: dict[str, Any] = json.loads(json.dumps(entries))
    return identity


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _claim(out: Path, identity: Mapping[str, Any], names: Sequence[str], overwrite: bool) -> None:
    """Write down what ``out`` is for, unless it is for something else; more pictures may be added to it."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{str(out)!r} is a file; give a folder")
    path = out / "settings.json"
    if overwrite:
        remove_results(out)
    elif path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); say --overwrite to start anew") from error
        same_first = earlier.get("pictures_sha256") == _digest(names[: earlier.get("pictures", 0)])
        if same_first or earlier.get("pictures") != identity["pictures"]:  # the number says enough
            earlier["pictures_sha256"] = identity["pictures_sha256"]
        if same_first:
            earlier["pictures"] = identity["pictures"]
        different = [
            f"{key} was {_short(earlier.get(key))}, is {_short(identity.get(key))}"
            for key in sorted({*earlier, *identity})
            if earlier.get(key) != identity.get(key)
        ]
        if different:
            raise ValueError(
                f"{str(out)!r} holds results of other settings: {'; '.join(different)}. Give another "
                "folder, or say --overwrite to start anew"
            )
    write_atomically(
        path, lambda temporary: temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def versions_of(pipe: Pipeline) -> dict[str, str]:
    """Versions of what the figures were made with, and the device of ``pipe``."""
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
