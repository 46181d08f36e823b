"""`seg4diff generate`."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from seg4diff.cli.options import Layers, ModelOptions, at_least_one
from seg4diff.files import save_image, write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.backbones import Pipeline

_Pixels = Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")]
# Options that do nothing unless one of others is given.
_BLUR = ("perturb", "guide")
_NEEDS = {
    "words": ("save_maps",),
    "map_layers": ("save_maps",),
    "guide_layers": ("guide",),
    "replace_until": ("replace",),
    "sigma": _BLUR,
    "kernel_size": _BLUR,
    "padding": _BLUR,
}


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Draw images, and see, perturb or edit what their words do meanwhile.

    Writes OUT/NUMBER.png, with prompt, seed and model in its text chunks, and with --save-maps a sheet
    OUT/NUMBER-maps.png with a heat map for every word, each with colours of its own range, and its highest
    attention beside the word. Numbers go on after those in OUT:

        seg4diff generate "a cat on a sofa" --save-maps
        seg4diff generate "a cat on a sofa" --perturb 9
        seg4diff generate "a cat on a sofa" --guide 3 --guidance-scale 5
        seg4diff generate "a cat and a dog" --swap cat=dog
        seg4diff generate "a dog on a sofa" --replace cat=dog
        seg4diff generate "a cat on a sofa" --drop cat --weight sofa=1.5
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
    """Images of each prompt."""
    steps: int = 28
    """Denoising steps."""
    guidance_scale: float = 7.0
    """Scale of classifier-free guidance; 1 is none."""
    width: _Pixels = None
    """By default that of the model."""
    height: _Pixels = None
    """By default that of the model."""
    seed: int = 0
    """Seed of the noise of the first image; every further one has the next number."""
    save_maps: bool = False
    """Write heat maps: how strongly each place of the image reads each word, averaged over the steps."""
    words: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD [WORD ...]", help_behavior_hint="")] = ()
    """With --save-maps: only these words or phrases; by default every word of the prompt."""
    map_layers: Layers = None
    """With --save-maps: transformer layers that are read; by default the model's expert layers."""
    perturb: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = ()
    """Blur what image tokens read of the text in these layers."""
    guide: Annotated[float | None, tyro.conf.arg(metavar="SCALE", help_behavior_hint="")] = None
    """Guide away from what the model would draw if --guide-layers read blurred text."""
    guide_layers: Layers = None
    """With --guide: by default the model's expert layers."""
    sigma: float = 9.0
    """With --perturb and --guide: standard deviation of the blur, in text tokens."""
    kernel_size: int = 5
    """With --perturb and --guide: number of weights of the blur, odd."""
    padding: Literal["symmetric", "reflect"] = "symmetric"
    """With --perturb and --guide: what lies beyond the first and last token."""
    drop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD [WORD ...]", help_behavior_hint="")] = ()
    """Words that image tokens do not read."""
    swap: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD=WORD [...]", help_behavior_hint="")] = ()
    """Pairs of words of the prompt that exchange their places."""
    replace: Annotated[tuple[str, ...], tyro.conf.arg(metavar="OLD=NEW [...]", help_behavior_hint="")] = ()
    """Draw words of the prompt (NEW) in the layout that it has with other words (OLD)."""
    replace_until: float = 0.5
    """With --replace: share of the steps, from the first, in which the layout is kept."""
    weight: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORD=FACTOR [...]", help_behavior_hint="")] = ()
    """Words that are read more or less strongly."""

    def run(self) -> None:
        """Draw the images.

        Raises:
            ValueError: an option makes no sense.
        """
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("no prompt given; write what to draw")
        at_least_one(self, "images", "steps", "width", "height")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance-scale {self.guidance_scale} must be a finite number, such as 7")
        for entry in fields(self):
            needed = _NEEDS.get(entry.name, ())
            changed = getattr(self, entry.name) != entry.default
            if (
                needed
                and changed
                and not any(getattr(self, name) not in (None, False, ()) for name in needed)
            ):
                others = " or ".join(map(_option, needed))
                raise ValueError(f"{_option(entry.name)} does nothing by itself; add {others}")
        edits = self._edits()
        self.check(self.out)

        from seg4diff.editing.blur import Blur

        blur = Blur(self.sigma, self.kernel_size, self.padding)
        pipe = self.load()
        first = _first_free_number(self.out)
        for position in range(len(self.prompts) * self.images):
            prompt = self.prompts[position // self.images]
            _draw(pipe, self, prompt, self.seed + position, first + position, blur, edits)

    def _edits(self) -> dict[str, Any]:
        """Arguments of `seg4diff.edit`; empty where no word is edited.

        Raises:
            ValueError: an option is not a pair, or its factor not a number.
        """
        pairs = [_pair(text, "--weight cat=1.5") for text in self.weight]
        edits: dict[str, Any] = {
            "drop": self.drop,
            "swap": dict(_pair(text, "--swap cat=dog") for text in self.swap),
            "weights": {word: _number(factor, f"--weight {word}={factor}") for word, factor in pairs},
            "replace": dict(_pair(text, "--replace cat=dog") for text in self.replace),
        }
        return {**edits, "replace_until": self.replace_until} if any(edits.values()) else {}


def _first_free_number(out: Path) -> int:
    """One more than the largest number that a file in the folder starts with, 0 if there is none."""
    found = [re.match(r"(\d+)(-maps)?\.png$", path.name) for path in out.glob("*.png")]
    return max((int(match[1]) + 1 for match in found if match is not None), default=0)


def _draw(
    pipe: Pipeline,
    options: Generate,
    prompt: str,
    seed: int,
    number: int,
    blur: Any,
    edits: dict[str, Any],
) -> None:
    """Draw one image and write it, and the sheet of its heat maps."""
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
        "generator": torch.Generator().manual_seed(seed),
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
        if edits:
            stack.enter_context(seg4diff.edit(pipe, **edits))
        captured = None
        if options.save_maps:
            layers = options.map_layers or state.backbone.expert_layers(state.transformer)
            captured = stack.enter_context(seg4diff.capture(pipe, layers))
        if options.guide is None:
            output = pipe(prompt=prompt, **call)
        else:
            output = seg4diff.guide(
                pipe, prompt, scale=options.guide, layers=options.guide_layers, blur=blur, **call
            )
    image = output.images[0]
    path = options.out / f"{number:03}.png"
    _save_with_origin(image, path, options, prompt, seed)
    written = str(path)
    if captured is not None:
        tiles = [("", image)]
        for word in options.words or words_of(prompt):
            heat = captured.heatmap(word)
            tiles.append((f"{word} {float(heat.max()):.2g}", heatmap_overlay(image, heat)))
        rows = [tiles[first : first + 6] for first in range(0, len(tiles), 6)]
        sheet = save_image(contact_sheet(rows), options.out / f"{number:03}-maps.png")
        written = f"{path}, {sheet}"
    tqdm.write(f"{prompt!r}, seed {seed} -> {written}")


def _save_with_origin(image: Image.Image, path: Path, options: Generate, prompt: str, seed: int) -> None:
    """Write a PNG whose text chunks hold prompt, seed, model, and options that are not at their defaults."""
    from PIL.PngImagePlugin import PngInfo

    made = {"prompt": prompt, "seed": seed, "model": options.model}
    own = {"prompts", "seed", "model", "out", "images", "save_maps", "words", "map_layers", "debug"}
    for entry in fields(options):
        value = getattr(options, entry.name)
        if entry.name not in own and value != entry.default:
            made[entry.name] = value
    chunks = PngInfo()
    for name, value in made.items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        chunks.add_itxt(name, text)
    write_atomically(path, lambda temporary: image.save(temporary, pnginfo=chunks))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _pair(text: str, example: str) -> tuple[str, str]:
    found = re.fullmatch(r"\s*([^=]*[^=\s])\s*=\s*([^=]*[^=\s])\s*", text)
    if found is None:
        raise ValueError(f"{text!r} is not a pair; write it like {example}")
    return found[1], found[2]


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a number") from None
