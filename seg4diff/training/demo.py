"""MAGNET on the small bundled model: minutes on a CPU, numbers before and after."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from seg4diff.backbones import Pipeline, find_backbone
from seg4diff.demo.scenes import CLASSES, HELD_OUT, Scene, scene
from seg4diff.lora.files import load_lora
from seg4diff.training.objective.losses import flow_matching_loss
from seg4diff.training.settings import TrainSettings, build_settings, merged
from seg4diff.training.trainer import train

TEST_SCENES = 64
_CHOICE_SCENES, _CHOICE_FIRST = 24, 4_000_000  # scenes on which the layer to tune is chosen
_BATCH = 8
_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)

SETTINGS: dict[str, Any] = {
    "model": "demo",
    "steps": 120,
    "batch": 8,
    "checkpoint_every": 40,
    "evaluate_every": 40,
    "device": "cpu",
    "mask": {"weight": 0.05},
    "optimizer": {"learning_rate": 2e-3, "warm_up": 10},
    "memory": {"gradient_checkpointing": False, "precision": "float32"},
    "data": {
        "kind": "demo",
        "scenes": 512,
        "resolution": 128,
        "text": "captions",
        "held_out": 0.04,
        "caption_dropout": 0.05,
    },
}
"""Settings of the demonstration; ``mask.layers`` is chosen by measurement."""


@dataclass(frozen=True)
class Measurement:
    """What a pipeline does on scenes it has never seen.

    Attributes:
        zero_shot: mIoU of each layer measured, the names present given, in [0, 1].
        hard: the same on the hard versions of the scenes.
        unsupervised: mIoU of nameless regions of the tuned layer, matched with the truth image by image.
        flow: flow-matching loss, same noise and noise levels for every pipeline.
    """

    zero_shot: Mapping[int, float]
    hard: Mapping[int, float]
    unsupervised: float
    flow: float


@dataclass(frozen=True)
class Demonstration:
    """Numbers of a run.

    Attributes:
        layer: the layer that was tuned.
        expert: the model's expert layer.
        before, after: on the held-out scenes; ``after`` with the saved adapters in a fresh pipeline.
        lora: the adapters.
        seconds: time of training, encoding included.
    """

    layer: int
    expert: int
    before: Measurement
    after: Measurement
    lora: Path
    seconds: float


def show(
    out: str | os.PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    scenes: int = TEST_SCENES,
    console: Console | None = None,
    progress: bool = True,
) -> Demonstration:
    """Tune the bundled model, measure it before and after, print a table.

    Args:
        out: folder of the run.
        changes: settings that override ``SETTINGS``, nested as in TOML.
        scenes: held-out scenes to measure on.
        console: where to print; the terminal by default.
        progress: whether to show progress bars.

    Raises:
        ValueError: settings make no sense, or the run in ``out`` had others.
    """
    from seg4diff.loading import load_pipeline

    console = console or Console()
    values = merged(merged(SETTINGS, changes or {}), {"out": str(out)})
    pipe = load_pipeline("demo", "cpu")
    expert = find_backbone(pipe).expert_layers(pipe.transformer)[0]
    if not values["mask"].get("layers"):
        values = merged(values, {"mask": {"layers": [layer_to_tune(pipe)]}})
    settings = build_settings(values)
    layer = settings.mask.layers[0]
    seeds = range(HELD_OUT, HELD_OUT + scenes)
    drawn, hard = [scene(seed) for seed in seeds], [scene(seed, "hard") for seed in seeds]
    before = measure(pipe, drawn, hard, layer, expert)
    started = time.perf_counter()
    result = train(settings, pipe=pipe, progress=progress)
    seconds = time.perf_counter() - started
    after = measure(load_lora(load_pipeline("demo", "cpu"), result.lora), drawn, hard, layer, expert)
    report = Demonstration(layer, expert, before, after, result.lora, seconds)
    console.print(_table(report, settings, scenes))
    console.print(f"Adapters for pipe.load_lora_weights: {result.lora}", soft_wrap=True)
    return report


def layer_to_tune(pipe: Pipeline) -> int:
    """The best layer after the expert ones, or else before them, by zero-shot mIoU on training scenes."""
    experts = find_backbone(pipe).expert_layers(pipe.transformer)
    others = [n for n in range(len(pipe.transformer.transformer_blocks)) if n not in experts]
    after = [number for number in others if number > max(experts)]
    drawn = [scene(_CHOICE_FIRST + number) for number in range(_CHOICE_SCENES)]
    scores = zero_shot(pipe, drawn, after or others)
    return max(scores, key=lambda layer: scores[layer])


def measure(
    pipe: Pipeline, drawn: Sequence[Scene], hard: Sequence[Scene], layer: int, expert: int
) -> Measurement:
    """Zero-shot mIoU of two layers, on hard scenes too; of clean ones also that of the tuned layer's regions
    and the flow-matching loss."""
    layers = sorted({layer, expert})
    return Measurement(
        zero_shot=zero_shot(pipe, drawn, layers),
        hard=zero_shot(pipe, hard, layers),
        unsupervised=unsupervised(pipe, drawn, layer),
        flow=flow(pipe, drawn),
    )


def zero_shot(pipe: Pipeline, drawn: Sequence[Scene], layers: Sequence[int]) -> dict[int, float]:
    """Zero-shot mIoU of each layer, the names present given; pixels are counted over all scenes."""
    from seg4diff.metrics import confusion_matrix, counts_of
    from seg4diff.segmentation.zero_shot import segment

    scores = {}
    for layer in layers:
        confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
        for first in range(0, len(drawn), _BATCH):
            chunk = drawn[first : first + _BATCH]
            results: Any = segment(
                pipe,
                [item.image for item in chunk],
                [item.classes for item in chunk],
                layers=[layer],
                batch_size=_BATCH,
                progress=False,
            )
            for item, result in zip(chunk, results, strict=True):
                confusion += confusion_matrix(
                    _vocabulary(result.labels, result.classes),
                    _vocabulary(torch.from_numpy(item.labels), item.classes),
                    len(CLASSES),
                )
        scores[layer] = counts_of(confusion).mean_iou
    return scores


def unsupervised(pipe: Pipeline, drawn: Sequence[Scene], layer: int) -> float:
    """mIoU of nameless regions, matched one to one with the classes of each scene."""
    from seg4diff.metrics import Counts, matched_counts
    from seg4diff.segmentation.regions import segment_unsupervised

    total: Counts | None = None
    for first in range(0, len(drawn), _BATCH):
        chunk = drawn[first : first + _BATCH]
        results: Any = segment_unsupervised(
            pipe, [item.image for item in chunk], layers=[layer], batch_size=_BATCH, progress=False
        )
        for item, result in zip(chunk, results, strict=True):
            truth = _vocabulary(torch.from_numpy(item.labels), item.classes)
            counts = matched_counts(result.labels, truth, len(CLASSES))
            total = counts if total is None else total + counts
    assert total is not None
    return total.mean_iou


@torch.no_grad()
def flow(pipe: Pipeline, drawn: Sequence[Scene]) -> float:
    """Flow-matching loss, mean over scenes and noise levels; noise depends on the scene's position alone."""
    import numpy as np

    backbone = find_backbone(pipe)
    losses = []
    for number, item in enumerate(drawn):
        pixels = torch.from_numpy(np.array(item.image)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        latents = backbone.latents(pipe, pixels).float().expand(len(_SIGMAS), -1, -1, -1)
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.tensor(_SIGMAS)
        text = backbone.encode_text(pipe, [item.caption])
        text = {name: tensor.expand(len(_SIGMAS), *tensor.shape[1:]) for name, tensor in text.items()}
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        arguments = backbone.arguments(pipe.transformer, noisy, sigma, text)
        velocity = backbone.prediction(pipe.transformer(**arguments, return_dict=False)[0], latents)
        losses.append(float(flow_matching_loss(velocity, latents, noise)))
    return sum(losses) / len(losses)


def _vocabulary(labels: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
    """Labels that index ``classes`` as labels that index ``CLASSES``."""
    return torch.tensor([CLASSES.index(name) for name in classes])[labels]


def _table(report: Demonstration, settings: TrainSettings, scenes: int) -> Table:
    title = (
        f"MAGNET on layer {report.layer}, {settings.steps} steps, {report.seconds:.0f} s; "
        f"{scenes} held-out scenes"
    )
    table = Table(title=title)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")

    def add(name: str, before: float, after: float, form: str = "{:.1f}", factor: float = 100.0) -> None:
        table.add_row(name, form.format(factor * before), form.format(factor * after))

    for layer in sorted(report.before.zero_shot, key=lambda layer: layer != report.layer):
        kind = "tuned" if layer == report.layer else "expert"
        if report.layer == report.expert:
            kind = "tuned, expert"
        add(
            f"zero-shot mIoU %, layer {layer} ({kind})",
            report.before.zero_shot[layer],
            report.after.zero_shot[layer],
        )
        add("on hard scenes", report.before.hard[layer], report.after.hard[layer])
    add("matched unsupervised mIoU %", report.before.unsupervised, report.after.unsupervised)
    add("flow-matching loss", report.before.flow, report.after.flow, "{:.4f}", 1.0)
    return table
