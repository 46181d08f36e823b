"""The command ``seg4diff segment``. Heavy imports wait until it runs."""

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


@dataclass(frozen=True, kw_only=True)
class Segment(PictureOptions):
    """Find things by name in pictures.

    For each picture NAME this writes NAME.png (the labels, with a palette), NAME-overlay.png (to look at) and
    what --formats asks for. Put the pictures before --classes:

        seg4diff segment kitchen.jpg --classes cat "wooden table" sofa
    """

    classes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
    """What to look for. Every pixel gets the name that fits best, so name the background too."""
    out: Path = Path("segmentation-output")
    """Folder for what is written."""
    preset: PresetName = "default"
    """`default` keeps the picture whole, `paper` crops it to a square, `reference` squashes it to one."""


def run_segment(options: Segment) -> None:
    """Run ``seg4diff segment``.

    Raises:
        ValueError, FileNotFoundError: what is asked for makes no sense, or a picture is missing.
    """
    paths = check_pictures(options)

    import seg4diff
    from seg4diff.segmentation.result import Segmentation

    pipe = load_patched(options)

    def segment(pictures: list[Image.Image]) -> list[Segmentation]:
        found = seg4diff.segment(
            pipe,
            pictures,
            list(options.classes),
            preset=options.preset,
            layers=options.layers,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=False,
        )
        return found

    write_segmentations(options, paths, segment, Segmentation.shares)
