"""What the commands share that take pictures and write segmentations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from seg4diff.commands.model_options import ModelOptions, model_files
from seg4diff.files import check_folder, check_outputs, distinct_stems, save_image

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.segmentation.result import Segmentation

_OVERLAY = "-overlay"


@dataclass(frozen=True, kw_only=True)
class PictureOptions(ModelOptions):
    """Options of a command that takes pictures."""

    images: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """The pictures, in any format that Pillow reads."""
    out: Path
    """Folder for what is written."""
    formats: tuple[Literal["png", "npz", "json"], ...] = ("png",)
    """Labels as palette PNG; labels and scores for numpy; COCO run-length masks as JSON."""
    layers: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = (
        None
    )
    """Transformer layers whose attention is read; by default the model's expert layer."""
    batch_size: int = 1
    """Pictures in one pass through the model."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same result."""


def check_pictures(options: PictureOptions) -> list[str]:
    """The pictures to work on, each once and found readable before anything large is loaded.

    Raises:
        ValueError, FileNotFoundError: there is none, one is missing or damaged, the batch size is wrong, or
            an output would replace an input.
        OSError: nothing can be written to the folder.
    """
    from seg4diff.images import as_rgb

    if not options.images:
        raise ValueError("no picture given; name at least one, before options that take several words")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    check_folder(options.out)
    paths = list(dict.fromkeys(options.images))
    for path in paths:
        as_rgb(path)
    outputs = [file for several in _outputs(options, paths) for file in several.values()]
    check_outputs(outputs, [*paths, *model_files(options)])
    return paths


def _outputs(options: PictureOptions, paths: Sequence[str]) -> list[dict[str, Path]]:
    """For each picture the files that are written: its overlay, and one in each format."""
    return [
        {"overlay": options.out / f"{stem}{_OVERLAY}.png"}
        | {suffix: options.out / f"{stem}.{suffix}" for suffix in options.formats}
        for stem in distinct_stems(paths, ("", _OVERLAY))
    ]


def write_segmentations(
    options: PictureOptions,
    paths: Sequence[str],
    segment: Callable[[list[Image.Image]], list[Segmentation]],
    describe: Callable[[Segmentation], str],
) -> None:
    """Segment the pictures batch by batch; write and tell each result as soon as it is there."""
    from tqdm import tqdm

    from seg4diff.images import as_rgb

    outputs = dict(zip(paths, _outputs(options, paths), strict=True))
    with tqdm(total=len(paths), unit="picture", disable=None) as progress:
        for first in range(0, len(paths), options.batch_size):
            batch = paths[first : first + options.batch_size]
            for path, result in zip(batch, segment([as_rgb(path) for path in batch]), strict=True):
                files = outputs[path]
                for suffix in options.formats:
                    result.save(files[suffix])
                overlay = save_image(result.overlay(), files["overlay"])
                progress.write(f"{path}: {describe(result)} -> {overlay}")
                progress.update()
