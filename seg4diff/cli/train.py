"""`seg4diff train`, and the configuration that it shares with `seg4diff estimate`."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from seg4diff.cli.options import DebugOptions, OptionalPath, announce
from seg4diff.files import check_folder

if TYPE_CHECKING:
    from seg4diff.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(DebugOptions):
    """The settings of a training run."""

    config: OptionalPath = None
    """Settings, TOML."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE [...]")] = ()
    """Settings that override the file, such as steps=100 mask.weight=2."""

    def settings(self, **more: Any) -> TrainSettings:
        """The settings of the file, overridden by those of the command line and by `more`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: a setting is unknown or makes no sense.
        """
        from seg4diff.training.settings import build_settings, merged, read_table

        values: dict[str, Any] = {} if self.config is None else read_table(self.config)
        values = merged(merged(values, overrides(self.set)), more)
        try:
            return build_settings(values)
        except ValueError as error:
            where = "" if self.config is None else f"configuration {str(self.config)!r}: "
            raise ValueError(f"{where}{error}") from None


@dataclass(frozen=True, kw_only=True)
class Train(ConfigOptions):
    """Fine-tune a model with MAGNET, so that its attention follows masks; writes a LoRA that diffusers loads.

    `seg4diff estimate` predicts the memory; `seg4diff demo --train` needs neither data nor a GPU. The same
    command continues an interrupted one. On several GPUs or machines: `accelerate launch -m seg4diff train
    --config magnet.toml`.

        seg4diff train --config magnet.toml
        seg4diff train --config magnet.toml --set steps=100 mask.weight=2 --out magnet-short

    A configuration holds the settings of seg4diff.training.settings.TrainSettings, for
    example:

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

    out: OptionalPath = None
    """Folder of the run; overrides the file."""

    def run(self) -> None:
        """Train.

        Raises:
            ValueError, FileNotFoundError: a setting makes no sense, or files are missing.
            RuntimeError, OSError: training failed.
        """
        if self.config is None and not self.set:
            raise ValueError("nothing to train on: name a configuration with --config, or try demo --train")
        settings = self.settings(**({} if self.out is None else {"out": str(self.out)}))
        check_folder(Path(settings.out))

        from rich.console import Console

        from seg4diff.training.trainer import train

        announce(f"training {settings.model}")
        result = train(settings)
        console = Console()
        losses = ", ".join(f"{name} {value:.4f}" for name, value in result.held_out.items())
        console.print(f"{result.steps} steps, best at step {result.best_step}: {result.lora}", soft_wrap=True)
        if losses:
            console.print(f"held-out losses after the last step: {losses}")


def overrides(assignments: tuple[str, ...]) -> dict[str, Any]:
    """Nested settings from words such as `mask.weight=2`; values as in TOML, or plain text.

    Raises:
        ValueError: a word is not of this form.
    """
    from seg4diff.training.settings import merged

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
