"""Pictures from prompts at fixed seeds, with and without a LoRA, and how well they fit (CLIPScore).

Pictures are files, so a run that was interrupted goes on where it stopped, and other tools can score them:
:func:`sample_path` also knows the names that T2I-CompBench++ expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from seg4diff.backbones import Pipeline
from seg4diff.evaluation.published import CLIP_SCORE
from seg4diff.files import no_space, write_atomically
from seg4diff.images import as_rgb

Layout = Literal["plain", "compbench"]

CLIP_MODELS = ("openai/clip-vit-large-patch14",)
"""Names on the Hugging Face hub. The paper does not name its CLIP; this is torchmetrics' default."""

_LONGEST_FILE_NAME = 255  # bytes
_PICTURES_SCORED_AT_ONCE = 16


@dataclass(frozen=True)
class GenerationSettings:
    """What decides the pictures.

    Attributes:
        seeds: one picture of each prompt for each; all different.
        steps: of the noise schedule.
        guidance_scale: of classifier-free guidance.
        size: side of the square pictures in pixels; the model's own when None.
        batch_size: pictures that run together.
        layout: ``"plain"``, or ``"compbench"`` for the file names of T2I-CompBench++.
    """

    seeds: tuple[int, ...] = (0,)
    steps: int = 28
    guidance_scale: float = 7.5
    size: int | None = None
    batch_size: int = 1
    layout: Layout = "plain"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds!r} must be one or several different numbers from 0 up")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a file: a JSON list of strings, or text with one to a line, as far as the first tab.

    The prompt files of T2I-CompBench++ are of the second kind.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no prompts, or is unreadable.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the file of prompts {str(path)!r} does not exist; check the path")
    try:
        text = path.read_text(encoding="utf-8")
        found = (
            json.loads(text)
            if path.suffix == ".json"
            else [line.split("\t")[0] for line in text.splitlines()]
        )
    except ValueError as error:
        raise ValueError(f"{str(path)!r} holds no prompts ({error})") from error
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise ValueError(f"{str(path)!r} must be a JSON list of prompts")
    prompts = tuple(prompt.strip() for prompt in found if prompt.strip())
    if not prompts:
        raise ValueError(f"{str(path)!r} holds no prompts")
    return prompts


def sample_path(
    folder: Path, prompts: Sequence[str], number: int, seed_position: int, settings: GenerationSettings
) -> Path:
    """Where the picture of a prompt and a seed is, inside the folder of a model.

    T2I-CompBench++ expects ``samples/PROMPT_NUMBER.png``, numbers in the order of its prompts, ten (or as
    many as there are seeds) of each.
    """
    if settings.layout == "plain":
        return folder / f"{number:05d}-{settings.seeds[seed_position]}.png"
    count = number * len(settings.seeds) + seed_position
    return folder / "samples" / f"{prompts[number]}_{count:06d}.png"


def check_names(prompts: Sequence[str], settings: GenerationSettings) -> None:
    """Check that prompts can be file names, where the layout makes them so.

    Raises:
        ValueError: one cannot; the message names it.
    """
    if settings.layout != "compbench":
        return
    for number, prompt in enumerate(prompts):
        name = sample_path(Path(), prompts, number, 0, settings).name
        if "/" in prompt or "_" in prompt or "\0" in prompt:
            raise ValueError(
                f"prompt {prompt!r} holds '/' or '_', which the file names of T2I-CompBench++ cannot carry"
            )
        if len(name.encode()) > _LONGEST_FILE_NAME:
            raise ValueError(f"prompt {prompt!r} is too long for a file name; use the plain layout")


def generate(
    pipe: Pipeline,
    prompts: Sequence[str],
    folder: Path,
    settings: GenerationSettings,
    *,
    about: Mapping[str, Any] | None = None,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> None:
    """Draw one picture for each prompt and seed, unless its file is there.

    Each picture's noise comes from a generator of its seed on the CPU, so that a model with and without LoRA
    starts from the same noise on every device.

    Args:
        pipe: a pipeline that draws pictures from prompts.
        prompts: see :func:`read_prompts`.
        folder: gets the pictures, and ``settings.json``, which says what they are.
        settings: see :class:`GenerationSettings`.
        about: what else tells these pictures from others.
        process, processes: this one among those that share the work.
        progress: show a bar.

    Raises:
        ValueError: ``folder`` holds pictures of other settings.
        OSError: the disk is full; pictures that are done are kept.
    """
    check_names(prompts, settings)
    if process == 0:
        _claim(folder, {**asdict(settings), "prompts": list(prompts), **(about or {})})
    wanted = [(number, place) for number in range(len(prompts)) for place in range(len(settings.seeds))]
    batches = [wanted[i : i + settings.batch_size] for i in range(0, len(wanted), settings.batch_size)]
    size = {} if settings.size is None else {"height": settings.size, "width": settings.size}
    mine = batches[process::processes]
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for batch in tqdm(mine, unit="batch", desc=folder.name, disable=not progress):
            paths = [sample_path(folder, prompts, number, place, settings) for number, place in batch]
            if all(path.is_file() for path in paths):
                continue
            pictures = pipe(
                prompt=[prompts[number] for number, _ in batch],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(settings.seeds[place]) for _, place in batch],
                **size,
            ).images
            for path, picture in zip(paths, pictures, strict=True):
                _save(path, picture)
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **quiet})


ClipSource = str | Callable[[], tuple[Any, Any]]
"""A CLIP on the hub by name, or a function that returns model and processor."""


def clip_score(
    prompts: Sequence[str],
    folder: Path,
    settings: GenerationSettings,
    clip: ClipSource,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> float:
    """Mean over all pictures of 100 cos(picture, prompt), not below 0, by torchmetrics' CLIPScore.

    Args:
        prompts, folder, settings: as the pictures were drawn.
        clip: the model to score with.
        device: where to run it.
        progress: show a bar.

    Raises:
        FileNotFoundError: a picture is missing.
        ModuleNotFoundError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("CLIPScore needs torchmetrics: pip install 'seg4diff[eval]'") from error
    metric = CLIPScore(model_name_or_path=lambda: _tensor_clip(clip)).to(device)
    every = [(number, place) for number in range(len(prompts)) for place in range(len(settings.seeds))]
    starts = range(0, len(every), _PICTURES_SCORED_AT_ONCE)
    for first in tqdm(starts, unit="batch", desc=f"CLIPScore {folder.name}", disable=not progress):
        batch = every[first : first + _PICTURES_SCORED_AT_ONCE]
        pictures = [as_rgb(sample_path(folder, prompts, *entry, settings)) for entry in batch]
        tensors = [torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) for picture in pictures]
        with torch.no_grad():
            metric.update([tensor.to(device) for tensor in tensors], [prompts[number] for number, _ in batch])
    return float(metric.compute())


def markdown(scores: Mapping[str, Mapping[str, float]], prompts: int, settings: GenerationSettings) -> str:
    """A table of CLIPScores, ``scores[model][clip]``, with the paper's below."""
    clips = list(next(iter(scores.values())))
    lines = [_row(["model", *clips]), _row(["---", *["---:"] * len(clips)])]
    lines += [_row([model, *(f"{row[clip]:.4f}" for clip in clips)]) for model, row in scores.items()]
    lines += ["", f"{prompts} prompts, seeds {', '.join(map(str, settings.seeds))}, {settings.steps} steps, "]
    lines[-1] += f"guidance scale {settings.guidance_scale:g}."
    lines += ["", "The paper, with a CLIP that it does not name:", ""]
    lines += [_row(["model", "Pick-a-Pic", "COCO", "SA-1B", "mean"]), _row(["---", *["---:"] * 4])]
    lines += [_row([model, *(f"{value:.4f}" for value in row)]) for model, row in CLIP_SCORE.items()]
    return "\n".join(lines) + "\n"


class _TensorClip(torch.nn.Module):
    """A CLIP whose features are tensors, which torchmetrics expects; transformers 5 returns a structure."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return _features(self.model.get_image_features(*args, **kwargs))

    def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return _features(self.model.get_text_features(*args, **kwargs))


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _tensor_clip(clip: ClipSource) -> tuple[Any, Any]:
    if callable(clip):
        model, processor = clip()
    else:
        from transformers import CLIPModel, CLIPProcessor

        model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    return _TensorClip(model).eval(), processor


def _save(path: Path, picture: Image.Image) -> None:
    try:
        write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
    except OSError as error:
        raise no_space(error, path) from error


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write down what the pictures of a folder are, unless they are of other settings."""
    path = folder / "settings.json"
    entries = json.loads(json.dumps(identity))
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            earlier = {}
        changed = [key for key in sorted({*earlier, *entries}) if earlier.get(key) != entries.get(key)]
        if changed:
            raise ValueError(
                f"{str(folder)!r} holds pictures of other settings ({', '.join(changed)} differ); give "
                "another --out"
            )
    write_atomically(
        path, lambda temporary: temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
