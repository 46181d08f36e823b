"""The commands ``seg4diff train`` and ``seg4diff caption``. Heavy imports wait until one runs."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from seg4diff.magnet.settings import TrainSettings

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]


@dataclass(frozen=True)
class Train:
    """Fine-tune a model with MAGNET, so that its attention follows masks; writes a LoRA that diffusers loads.

        seg4diff train --config magnet.toml
        seg4diff train --config magnet.toml --estimate --memory 8
        seg4diff train --demo

    The same command goes on where an interrupted one stopped. On several GPUs or machines:
    `accelerate launch -m seg4diff.magnet --config magnet.toml`. A configuration holds the settings of
    seg4diff.magnet.settings.TrainSettings, for example:

        preset = "default"
        model = "stabilityai/stable-diffusion-3-medium-diffusers"
        out = "magnet-coco"
        steps = 3000

        [data]
        kind = "coco"
        images = "coco/train2017"
        masks = "coco/annotations/panoptic_train2017.json"
        captions = "coco/annotations/captions_train2017.json"
    """

    config: _Path = None
    """Settings, TOML."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE [...]")] = ()
    """Settings that override the file, such as steps=100 mask.weight=2."""
    demo: bool = False
    """Tune the small bundled model on drawn scenes, minutes on a CPU, and show numbers before and after."""
    estimate: bool = False
    """Print the memory that training would take, part by part, and do not train."""
    memory: Annotated[float | None, tyro.conf.arg(metavar="GIB", help_behavior_hint="")] = None
    """With --estimate: GiB that there are; it is an error if no configuration of the table fits."""
    out: _Path = None
    """Folder of the run; overrides the file."""
    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True)
class Caption:
    """Write captions for a folder of pictures with an image-to-text model of transformers.

        seg4diff caption pictures --model Salesforce/blip-image-captioning-base --out captions.json

    Pictures that the file names already are left alone, so the same command goes on where it stopped.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The pictures."""
    model: str
    """A name on the Hugging Face hub, or a folder."""
    out: Path = Path("captions.json")
    """JSON of picture name -> caption, as data.captions of `seg4diff train` takes it."""
    prompt: _Text = None
    """What to ask a model that chats, or how a caption begins."""
    batch_size: int = 8
    """Pictures that run together."""
    max_tokens: int = 70
    """Longest caption; CLIP reads 75 tokens."""
    device: Annotated[str | None, tyro.conf.arg(metavar="DEVICE", help_behavior_hint="")] = None
    """cpu, cuda, cuda:1, ...; by default the GPU if there is one."""
    debug: bool = False
    """Show where an error came from."""


def run_train(options: Train) -> None:
    """Train, estimate, or show the demonstration.

    Raises:
        ValueError, FileNotFoundError: what was asked for makes no sense, see :mod:`seg4diff.magnet.settings`.
        RuntimeError, OSError: training failed.
    """
    from rich.console import Console

    console = Console()
    if options.memory is not None and not options.estimate:
        raise ValueError(f"--memory {options.memory:g} goes with --estimate only")
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise ValueError(f"--memory {options.memory:g} must be a positive number of GiB")
    if options.demo and (options.config is not None or options.estimate):
        raise ValueError("--demo has its own settings; leave out --config and --estimate")
    if options.demo:
        from seg4diff.magnet.demonstration import show

        show(options.out or Path("magnet-demo-output"), changes=overrides(options.set), console=console)
        return
    settings = settings_of(options)
    if options.estimate:
        from seg4diff.magnet.estimate import estimate_variants, report

        found = estimate_variants(settings)
        console.print(report(found))
        smallest, peak = min(((name, e.peak / 2**30) for name, e in found.items()), key=lambda pair: pair[1])
        if options.memory is not None and peak > options.memory:
            raise RuntimeError(
                f"nothing fits in --memory {options.memory:g} GiB: the smallest peak is {peak:.2f} GiB "
                f"({smallest}); lower data.resolution or batch"
            )
        return
    if options.config is None and not options.set:
        raise ValueError("nothing to train on: name a configuration with --config, or try --demo")

    from seg4diff.magnet.trainer import train

    result = train(settings)
    losses = ", ".join(f"{name} {value:.4f}" for name, value in result.held_out.items())
    console.print(f"{result.steps} steps, best at step {result.best_step}: {result.lora}", soft_wrap=True)
    if losses:
        console.print(f"held-out losses after the last step: {losses}")


def run_caption(options: Caption) -> None:
    """Write captions; errors as :func:`seg4diff.magnet.captioning.write_captions`."""
    from seg4diff.magnet.captioning import write_captions

    write_captions(
        options.images,
        options.model,
        options.out,
        prompt=options.prompt,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        device=options.device,
    )


def settings_of(options: Train) -> TrainSettings:
    """The settings of the file, overridden by those of the command line."""
    from seg4diff.magnet.settings import build_settings, merged, read_table

    values: dict[str, Any] = {} if options.config is None else read_table(options.config)
    values = merged(values, overrides(options.set))
    if options.out is not None:
        values["out"] = str(options.out)
    try:
        return build_settings(values)
    except ValueError as error:
        where = "" if options.config is None else f"configuration {str(options.config)!r}: "
        raise ValueError(f"{where}{error}") from None


def overrides(assignments: tuple[str, ...]) -> dict[str, Any]:
    """Nested settings from words such as ``mask.weight=2``; values as in TOML, or plain text.

    Raises:
        ValueError: a word is not of this form.
    """
    from seg4diff.magnet.settings import merged

    values: dict[str, Any] = {}
    for word in assignments:
        name, equals, text = word.partition("=")
        try:
            table = tomllib.loads(word)
        except tomllib.TOMLDecodeError:
            try:  # text without its quotes
                table = tomllib.loads(f"{name} = {json.dumps(text, ensure_ascii=False)}" if equals else "=")
            except tomllib.TOMLDecodeError:
                raise ValueError(f"--set {word!r} is not KEY=VALUE") from None
        values = merged(values, table)
    return values
