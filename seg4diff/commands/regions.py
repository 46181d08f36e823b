"""The command ``seg4diff regions``. Heavy imports wait until it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from seg4diff.commands.model_options import load_patched
from seg4diff.commands.pictures import PictureOptions, check_pictures, write_segmentations
from seg4diff.segmentation.presets import PresetName

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.segmentation.result import Segmentation


@dataclass(frozen=True, kw_only=True)
class Regions(PictureOptions):
    """Divide pictures into regions without naming anything.

    For each picture NAME this writes NAME.png (the labels, with a palette), NAME-overlay.png (to look at) and
    what --formats asks for:

        seg4diff regions kitchen.jpg --threshold 0.5
    """

    out: Path = Path("regions-output")
    """Folder for what is written."""
    preset: PresetName = "default"
    """How pictures are fitted to the model and attention is grouped: `default` by single heads, `paper` by
    their mean, as the paper says, `reference` as its public code does."""
    threshold: Annotated[float | None, tyro.conf.arg(metavar="NATS", help_behavior_hint="")] = None
    """How different two attention maps may be that make up one region: smaller gives more regions. By default
    that of the preset."""


def run_regions(options: Regions) -> None:
    """Run ``seg4diff regions``.

    Raises:
        ValueError, FileNotFoundError: what is asked for makes no sense, or a picture is missing.
    """
    paths = check_pictures(options)

    from seg4diff.segmentation.presets import find_preset
    from seg4diff.segmentation.regions import segment_unsupervised

    find_preset(options.preset, threshold=options.threshold)
    pipe = load_patched(options)

    def segment(pictures: list[Image.Image]) -> list[Segmentation]:
        found = segment_unsupervised(
            pipe,
            pictures,
            preset=options.preset,
            layers=options.layers,
            threshold=options.threshold,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=False,
        )
        return found

    write_segmentations(options, paths, segment, _count)


def _count(result: Segmentation) -> str:
    count = len(result.classes)
    return f"{count} region{'s' if count != 1 else ''}"
