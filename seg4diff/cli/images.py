"""What the verbs share that take images and write segmentations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from seg4diff.cli.options import LayersOrAuto, ModelOptions, at_least_one
from seg4diff.files import check_outputs, distinct_stems, save_image

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.segmentation.result import Segmentation

OVERLAY = "-overlay"
PANOPTIC = "-panoptic"


@dataclass(frozen=True, kw_only=True)
class ImageOptions(ModelOptions):
    """Options of a verb that takes images."""

    images: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """The images, in any format that Pillow reads."""
    out: Path
    """Folder for what is written."""
    formats: tuple[Literal["png", "npz", "json"], ...] = ("png",)
    """Labels as palette PNG; labels and scores for numpy; COCO run-length masks as JSON."""
    layers: LayersOrAuto = None
    """Transformer layers whose attention is read; by default the model's expert layers. `auto`: those that
    tell most about each image, for one more forward; the default where no expert is known."""
    batch_size: int = 1
    """Images in one pass through the model."""
    seed: int = 0
    """Seed of the noise; the same seed gives the same result."""

    def checked_images(self) -> list[str]:
        """The images to work on, each once and found to be images before a model is loaded.

        Raises:
            ValueError, FileNotFoundError: there is none, one is missing or is not an image, the batch size is
                wrong, or an output would replace an input.
            OSError: nothing can be written to the folder.
        """
        from seg4diff.images import check_header

        if not self.images:
            raise ValueError("no image given; name at least one, before options that take several words")
        at_least_one(self, "batch_size")
        self.check(self.out)
        paths = list(dict.fromkeys(self.images))
        for path in paths:
            check_header(path)
        outputs = [file for several in self._outputs(paths) for file in several.values()]
        check_outputs(outputs, [*paths, *self.files()])
        return paths

    def _outputs(self, paths: Sequence[str]) -> list[dict[str, Path]]:
        """For each image the files that are written: its overlay, and one in each format."""
        ordered = sorted(paths)  # so that the names do not depend on the order of the arguments
        stems = dict(zip(ordered, distinct_stems(ordered, ("", OVERLAY, PANOPTIC)), strict=True))
        return [
            {"overlay": self.out / f"{stems[path]}{OVERLAY}.png"}
            | {suffix: self.out / f"{stems[path]}.{suffix}" for suffix in self.formats}
            for path in paths
        ]

    def write(
        self,
        paths: Sequence[str],
        segment: Callable[[list[Image.Image]], list[Segmentation]],
        describe: Callable[[Segmentation], str],
    ) -> None:
        """Segment the images batch by batch; save and print each result as it is ready."""
        from tqdm import tqdm

        from seg4diff.images import as_rgb

        outputs = dict(zip(paths, self._outputs(paths), strict=True))
        with tqdm(total=len(paths), unit="image", disable=None) as progress:
            for first in range(0, len(paths), self.batch_size):
                batch = paths[first : first + self.batch_size]
                for path, result in zip(batch, segment([as_rgb(path) for path in batch]), strict=True):
                    self.save(result, outputs[path])
                    progress.write(f"{path}: {describe(result)} -> {outputs[path]['overlay']}")
                    progress.update()

    def save(self, result: Segmentation, files: dict[str, Path]) -> None:
        """Write one result to the files of `_outputs`."""
        for suffix in self.formats:
            result.save(files[suffix])
        save_image(result.overlay(), files["overlay"])
