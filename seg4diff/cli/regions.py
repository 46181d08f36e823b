"""`seg4diff regions`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from seg4diff.cli.images import ImageOptions
from seg4diff.cli.options import OptionalNumber, at_least_one
from seg4diff.segmentation.presets import PresetName

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.segmentation.result import Segmentation


@dataclass(frozen=True, kw_only=True)
class Regions(ImageOptions):
    """Divide images into regions without naming anything.

    For each image NAME this writes NAME.png (the labels, with a palette), NAME-overlay.png (to look at) and
    what --formats asks for:

        seg4diff regions kitchen.jpg --regions 5
    """

    out: Path = Path("regions-output")
    """Folder for what is written."""
    preset: PresetName = "default"
    """How images are fitted to the model and tokens are grouped: `default` clusters image tokens, `paper`
    merges text tokens as the paper says, `reference` as its public code does."""
    regions: OptionalNumber = None
    """Number of regions, of presets that cluster image tokens; by default it is found for each image."""
    threshold: Annotated[float | None, tyro.conf.arg(metavar="DISTANCE", help_behavior_hint="")] = None
    """How different tokens of one region may be (`default`: Ward distance at 256 image tokens; others: nats):
    smaller gives more regions. By default that of the preset."""

    def run(self) -> None:
        """Divide the images.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or an image is missing.
        """
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"--threshold {self.threshold} must be a number above 0")
        at_least_one(self, "regions")
        paths = self.checked_images()

        import seg4diff

        pipe = self.load()

        def segment(images: list[Image.Image]) -> list[Segmentation]:
            found = seg4diff.segment_unsupervised(
                pipe,
                images,
                preset=self.preset,
                layers=self.layers,
                threshold=self.threshold,
                regions=self.regions,
                seed=self.seed,
                batch_size=self.batch_size,
                progress=False,
            )
            return found

        self.write(paths, segment, _count)


def _count(result: Segmentation) -> str:
    count = len(result.classes)
    return f"{count} region{'s' if count != 1 else ''}"
