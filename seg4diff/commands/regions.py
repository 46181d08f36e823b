"""The command ``seg4diff regions``. Heavy imports wait until it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from seg4diff.commands.model_options import ModelOptions, load_patched
from seg4diff.saving import check_folder, distinct_stems, save_picture


@dataclass(frozen=True, kw_only=True)
class Regions(ModelOptions):
    """Divide pictures into regions without naming anything.

    For each picture NAME this writes NAME.png (the labels, with a palette), NAME-overlay.png (to look at) and
    what --formats asks for:

        seg4diff regions kitchen.jpg --threshold 0.5
    """

    images: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """The pictures, in any format that Pillow reads."""
    out: Path = Path("regions-output")
    """Folder for what is written."""
    formats: tuple[Literal["png", "npz", "json"], ...] = ("png",)
    """Labels as palette PNG; labels and scores for numpy; COCO run-length masks as JSON."""
    preset: Literal["default", "paper", "reference"] = "default"
    """How pictures are fitted to the model and attention is grouped: `default` by single heads, `paper` by
    their mean, as the paper says, `reference` as its public code does."""
    threshold: Annotated[float | None, tyro.conf.arg(metavar="NATS", help_behavior_hint="")] = None
    """How different two attention maps may be that make up one region: smaller gives more regions. By default
    that of the preset."""
    layers: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = (
        None
    )
    """Transformer layers whose attention is read; by default the model's expert layer."""
    batch_size: int = 1
    """Pictures in one pass through the model."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same result."""


def run_regions(options: Regions) -> None:
    """Run ``seg4diff regions``.

    Raises:
        ValueError, FileNotFoundError: what is asked for makes no sense, or a picture is missing.
    """
    if not options.images:
        raise ValueError("no picture given; name at least one")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    check_folder(options.out)

    from seg4diff.images import as_rgb

    paths = list(dict.fromkeys(options.images))
    for path in paths:  # before anything large is loaded
        as_rgb(path)

    from tqdm import tqdm

    from seg4diff.segmentation.unsupervised import find_grouping, segment_unsupervised

    find_grouping(options.preset, options.threshold)
    pipe = load_patched(options)
    stems = dict(zip(paths, distinct_stems(paths), strict=True))
    with tqdm(total=len(paths), unit="picture", disable=None) as progress:
        for first in range(0, len(paths), options.batch_size):
            batch = paths[first : first + options.batch_size]
            results = segment_unsupervised(
                pipe,
                [as_rgb(path) for path in batch],
                preset=options.preset,
                layers=options.layers,
                threshold=options.threshold,
                seed=options.seed,
                batch_size=options.batch_size,
                progress=False,
            )
            assert isinstance(results, list)
            for path, result in zip(batch, results, strict=True):
                for suffix in options.formats:
                    result.save(options.out / f"{stems[path]}.{suffix}")
                overlay = save_picture(result.overlay(), options.out / f"{stems[path]}-overlay.png")
                count = len(result.classes)
                progress.write(f"{path}: {count} region{'s' if count != 1 else ''} -> {overlay}")
                progress.update()
