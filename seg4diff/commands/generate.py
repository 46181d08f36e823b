"""The command ``seg4diff generate``. Heavy imports wait until it runs."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from seg4diff.commands.model_options import ModelOptions, load_patched, model_files
from seg4diff.files import check_folder, check_outputs, save_image


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Draw pictures, and see, perturb or edit what their words do meanwhile.

    Writes OUT/NUMBER.png, and with --save-maps a sheet OUT/NUMBER-maps.png with a heat map for every word:

        seg4diff generate "a cat on a sofa" --save-maps
        seg4diff generate "a cat on a sofa" --perturb 9
        seg4diff generate "a cat on a sofa" --guide 3 --guidance-scale 5
        seg4diff generate "a cat and a dog" --swap cat=dog --weight sofa=0.5
    """

    prompts: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(required)"),
    ]
    """What to draw."""
    negative_prompt: str = ""
    """What to draw away from."""
    out: Path = Path("generate-output")
    """Folder for what is written."""
    images: int = 1
    """Pictures of each prompt."""
    steps: int = 28
    """Denoising steps."""
    guidance_scale: float = 7.0
    """Scale of classifier-free guidance; 1 is none."""
    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")] = None
    """By default that of the model."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")] = None
    """By default that of the model."""
    seed: int = 0
    """Seed of the noise of the first picture; every further one has the next number."""
    save_maps: bool = False
    """Write heat maps: how strongly each place of the picture reads each word, averaged over the steps."""
    words: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD [WORD ...]", help_behavior_hint="")] = ()
    """With --save-maps: only these words or phrases; by default every word of the prompt."""
    map_layers: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")
    ] = None
    """With --save-maps: transformer layers to look at; by default the model's expert layer."""
    perturb: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = ()
    """Blur what image tokens read of the text in these layers."""
    guide: Annotated[float | None, tyro.conf.arg(metavar="SCALE", help_behavior_hint="")] = None
    """Guide away from what the model would draw if --guide-layers read blurred text."""
    guide_layers: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")
    ] = None
    """With --guide: by default the model's expert layer."""
    sigma: float = 9.0
    """With --perturb and --guide: standard deviation of the blur, in text tokens."""
    kernel_size: int = 5
    """With --perturb and --guide: number of weights of the blur, odd."""
    padding: Literal["symmetric", "reflect"] = "symmetric"
    """With --perturb and --guide: what lies beyond the first and last token."""
    drop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD [WORD ...]", help_behavior_hint="")] = ()
    """Words that image tokens do not read."""
    swap: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD=WORD [...]", help_behavior_hint="")] = ()
    """Words that are read in each other's place."""
    weight: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD=FACTOR [...]", help_behavior_hint="")] = ()
    """Words that are read more or less strongly."""


def run_generate(options: Generate) -> None:
    """Run ``seg4diff generate``.

    Raises:
        ValueError: what is asked for makes no sense.
    """
    if not options.prompts or not all(prompt.strip() for prompt in options.prompts):
        raise ValueError("no prompt given; say what to draw")
    for name, value in (("--images", options.images), ("--steps", options.steps)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if options.words and not options.save_maps:
        raise ValueError("--words chooses among heat maps; add --save-maps")
    swap = dict(_pair(text, "--swap cat=dog") for text in options.swap)
    weights = {word: _number(factor, f"--weight {word}={factor}") for word, factor in
               (_pair(text, "--weight cat=1.5") for text in options.weight)}  # fmt: skip
    check_folder(options.out)
    numbers = range(len(options.prompts) * options.images)
    check_outputs([file for number in numbers for file in _files(options, number)], model_files(options))

    from seg4diff.editing.blur import Blur

    blur = Blur(options.sigma, options.kernel_size, options.padding)
    pipe = load_patched(options)
    number = 0
    for prompt in options.prompts:
        for _ in range(options.images):
            _draw(pipe, options, prompt, number, blur, swap, weights)
            number += 1


def _files(options: Generate, number: int) -> tuple[Path, Path]:
    """Where a picture is written, and the sheet of its heat maps."""
    return options.out / f"{number:03}.png", options.out / f"{number:03}-maps.png"


def _draw(
    pipe: Any,
    options: Generate,
    prompt: str,
    number: int,
    blur: Any,
    swap: dict[str, str],
    weights: dict[str, float],
) -> None:
    """Draw one picture and write what was asked for."""
    import torch
    from tqdm import tqdm

    import seg4diff
    from seg4diff.attention.patch import patch_of
    from seg4diff.backbones.text import words_of
    from seg4diff.visualization import contact_sheet, heatmap_overlay

    state = patch_of(pipe)
    call: dict[str, Any] = {
        "negative_prompt": options.negative_prompt,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "width": options.width,
        "height": options.height,
        "generator": torch.Generator().manual_seed(options.seed + number),
    }
    with ExitStack() as stack:
        if options.perturb:
            stack.enter_context(
                seg4diff.perturb(
                    pipe,
                    options.perturb,
                    sigma=blur.sigma,
                    kernel_size=blur.kernel_size,
                    padding=blur.padding,
                )
            )
        if options.drop or swap or weights:
            stack.enter_context(seg4diff.edit(pipe, drop=options.drop, swap=swap, weights=weights))
        captured = None
        if options.save_maps:
            layers = options.map_layers or state.backbone.expert_layers(state.transformer)
            captured = stack.enter_context(seg4diff.capture(pipe, layers))
        if options.guide is None:
            output = pipe(prompt, **call)
        else:
            output = seg4diff.guide(
                pipe, prompt, scale=options.guide, layers=options.guide_layers, blur=blur, **call
            )
    picture = output.images[0]
    path, sheet = _files(options, number)
    save_image(picture, path)
    if captured is not None:
        tiles = [("", picture)]
        tiles += [
            (word, heatmap_overlay(picture, captured.heatmap(word)))
            for word in options.words or words_of(prompt)
        ]
        rows = [tiles[first : first + 6] for first in range(0, len(tiles), 6)]
        save_image(contact_sheet(rows), sheet)
    tqdm.write(f"{prompt!r}, seed {options.seed + number} -> {path}")


def _pair(text: str, example: str) -> tuple[str, str]:
    found = re.fullmatch(r"\s*([^=]*[^=\s])\s*=\s*([^=]*[^=\s])\s*", text)
    if found is None:
        raise ValueError(f"{text!r} is no pair; write it like {example}")
    return found[1], found[2]


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no number") from None
