"""`seg4diff segment`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from seg4diff.cli.images import OVERLAY, PANOPTIC, ImageOptions
from seg4diff.segmentation.presets import Absent, PresetName

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.segmentation.result import Segmentation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Segment(ImageOptions):
    """Find things by name in images.

    For each image NAME this writes NAME.png (the labels, with a palette), NAME-overlay.png (to look at) and
    what --formats asks for. With --instances also NAME-panoptic.png and NAME-panoptic.json, COCO's panoptic
    format. Put the images before --classes:

        seg4diff segment kitchen.jpg --classes cat "wooden table" sofa
        seg4diff segment scene.png --classes apple grass sky --model demo --instances apple
    """

    classes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
    """What to look for, separated by spaces. Every pixel gets the name that fits best, so name the background
    too, or use --absent background."""
    instances: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="")
    ] = ()
    """Those of --classes to divide into single things, where they are apart or joined by a neck."""
    out: Path = Path("segment-output")
    """Folder for what is written."""
    preset: PresetName = "default"
    """`default` keeps the image whole, `best` refines that and drops names that are not in the image, `fast`
    is `best` in one pass, `paper` crops to a square, `reference` squashes to one."""
    absent: Annotated[
        Absent | None, tyro.conf.arg(metavar="{ignore,keep,background}", help_behavior_hint="")
    ] = None
    """Names that are not in the image: `ignore` drops them, `background` drops them and leaves pixels that no
    other explains without a name, `keep` lets all compete. By default as the preset has it."""
    false_names: Annotated[float | None, tyro.conf.arg(metavar="COUNT", help_behavior_hint="")] = None
    """Find a name only if at most this many absent names per image are found at its certainty; the demo model
    is calibrated."""

    def run(self) -> None:
        """Segment the images.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or an image is missing.
        """
        paths = self.checked_images()
        for name in self.classes:
            if "," in name:
                apart = " ".join(f'"{part}"' if " " in part else part for part in _parts(name))
                logger.warning("--classes %r is one name with a comma; for several names: %s", name, apart)
        for name in self.instances:
            if name not in self.classes:
                raise ValueError(f"--instances {name!r} is not among --classes {', '.join(self.classes)}")

        import seg4diff
        from seg4diff.segmentation.result import Segmentation

        pipe = self.load()

        def segment(images: list[Image.Image]) -> list[Segmentation]:
            found = seg4diff.segment(
                pipe,
                images,
                list(self.classes),
                preset=self.preset,
                absent=self.absent,
                false_names=self.false_names,
                layers=self.layers,
                seed=self.seed,
                batch_size=self.batch_size,
                progress=False,
            )
            return found

        self.write(paths, segment, Segmentation.shares)

    def _outputs(self, paths: Sequence[str]) -> list[dict[str, Path]]:
        outputs = super()._outputs(paths)
        if self.instances:
            for files in outputs:
                stem = files["overlay"].name.removesuffix(f"{OVERLAY}.png")
                files["panoptic"] = self.out / f"{stem}{PANOPTIC}.png"
                files["segments"] = self.out / f"{stem}{PANOPTIC}.json"
        return outputs

    def save(self, result: Segmentation, files: dict[str, Path]) -> None:
        super().save(result, files)
        if self.instances:
            instances = result.instances(self.instances)
            instances.save(files["panoptic"])
            instances.save(files["segments"])


def _parts(name: str) -> list[str]:
    return [part.strip() for part in name.split(",") if part.strip()]
