"""Images from prompts at fixed seeds, with and without a LoRA, and how well they fit (CLIPScore).

Images are files that other tools can score as well: `sample_path` also has the names that T2I-CompBench++
expects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from seg4diff.backbones import Pipeline
from seg4diff.evaluation.published import CLIP_SCORE
from seg4diff.evaluation.report import markdown_row
from seg4diff.files import save_image
from seg4diff.images import as_rgb
from seg4diff.jobs import ALONE, Share, claim, results_in

Layout = Literal["plain", "compbench"]

CLIP_MODELS = ("openai/clip-vit-large-patch14",)
"""Names on the Hugging Face hub. The paper does not name its CLIP; this is torchmetrics' default."""

_LONGEST_FILE_NAME = 255  # bytes
_IMAGES_SCORED_AT_ONCE = 16


@dataclass(frozen=True)
class GenerationSettings:
    """Settings that decide the images.

    Attributes:
        seeds: seeds of the noise, all different; one image of each prompt for each seed.
        steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
        size: side of the square images in pixels; the model's own when None.
        batch_size: images that are generated together.
        layout: `"plain"`, or `"compbench"` for the file names of T2I-CompBench++.
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
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number")


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
    """Where the image of a prompt and a seed is, inside the folder of a model.

    T2I-CompBench++ expects `samples/PROMPT_NUMBER.png`, numbers in the order of its prompts, ten (or as
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
    share: Share = ALONE,
    progress: bool = True,
) -> None:
    """Generate one image for each prompt and seed, going on where an earlier run into the folder stopped.

    Each image's noise comes from a generator of its seed on the CPU, so that a model with and without LoRA
    starts from the same noise on every device.

    Args:
        pipe: a text-to-image pipeline.
        prompts: see `read_prompts`; a later run may have more of them.
        folder: gets the images, and lists of their names, prompts and seeds.
        settings: see `GenerationSettings`.
        about: what else tells these images from others.
        share: this process among those that share the work.
        progress: show a bar.

    Raises:
        ValueError: `folder` has images of other settings.
        FolderInUseError: another run works in `folder`.
        OSError: the disk is full; images that are done are kept.
    """
    check_names(prompts, settings)
    images = [(number, place) for number in range(len(prompts)) for place in range(len(settings.seeds))]
    paths = {image: sample_path(folder, prompts, *image, settings) for image in images}
    batches = [images[i : i + settings.batch_size] for i in range(0, len(images), settings.batch_size)]
    size = {} if settings.size is None else {"height": settings.size, "width": settings.size}
    quiet = getattr(pipe, "_progress_bar_config", {})
    with claim(folder, {**asdict(settings), **(about or {})}, prompts, share=share) as job:
        listed = {entry["name"] for entry in results_in(folder)}
        done = {image for image, path in paths.items() if path.name in listed and path.is_file()}
        pipe.set_progress_bar_config(disable=True)
        try:
            for batch in tqdm(
                job.pending(batches, done), unit="batch", desc=folder.name, disable=not progress
            ):
                generators = [torch.Generator().manual_seed(settings.seeds[place]) for _, place in batch]
                generated = pipe(
                    prompt=[prompts[number] for number, _ in batch],
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    generator=generators,
                    **size,
                ).images
                for key, image in zip(batch, generated, strict=True):
                    save_image(image, paths[key])
                job.append(
                    {"name": paths[key].name, "prompt": prompts[key[0]], "seed": settings.seeds[key[1]]}
                    for key in batch
                )
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
    """Mean over all images of 100 cos(image, prompt), not below 0, by torchmetrics' CLIPScore.

    Args:
        prompts, folder, settings: as for `generate`.
        clip: the model to score with.
        device: where to run it.
        progress: show a bar.

    Raises:
        FileNotFoundError: an image is missing.
        ModuleNotFoundError: torchmetrics is not installed.
        OSError: the CLIP model cannot be loaded.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("CLIPScore needs torchmetrics: pip install 'seg4diff[eval]'") from error
    try:
        metric = CLIPScore(model_name_or_path=lambda: _tensor_clip(clip)).to(device)
    except OSError as error:  # of transformers, which does not name the model
        raise OSError(
            f"CLIP model {clip!r} cannot be loaded ({error}); the images are kept: run the command again "
            "where the hub can be reached, or give a local folder"
        ) from error
    every = [(number, place) for number in range(len(prompts)) for place in range(len(settings.seeds))]
    starts = range(0, len(every), _IMAGES_SCORED_AT_ONCE)
    for first in tqdm(starts, unit="batch", desc=f"CLIPScore {folder.name}", disable=not progress):
        batch = every[first : first + _IMAGES_SCORED_AT_ONCE]
        images = [as_rgb(sample_path(folder, prompts, *entry, settings)) for entry in batch]
        tensors = [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]
        with torch.no_grad():
            metric.update([tensor.to(device) for tensor in tensors], [prompts[number] for number, _ in batch])
    return float(metric.compute())


def markdown(scores: Mapping[str, Mapping[str, float]], prompts: int, settings: GenerationSettings) -> str:
    """A table of CLIPScores, `scores[model][clip]`, with the paper's below."""
    clips = list(next(iter(scores.values())))
    lines = [markdown_row(["model", *clips]), markdown_row(["---", *["---:"] * len(clips)])]
    lines += [markdown_row([model, *(f"{row[clip]:.4f}" for clip in clips)]) for model, row in scores.items()]
    lines += ["", f"{prompts} prompts, seeds {', '.join(map(str, settings.seeds))}, {settings.steps} steps, "]
    lines[-1] += f"guidance scale {settings.guidance_scale:g}."
    lines += ["", "The paper, with a CLIP model that it does not name:", ""]
    lines += [
        markdown_row(["model", "Pick-a-Pic", "COCO", "SA-1B", "mean"]),
        markdown_row(["---", *["---:"] * 4]),
    ]
    lines += [markdown_row([model, *(f"{value:.4f}" for value in row)]) for model, row in CLIP_SCORE.items()]
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
