"""`seg4diff discover`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from seg4diff.cli.images import ImageOptions
from seg4diff.cli.options import OptionalPath, OptionalText, announce
from seg4diff.files import check_folder

if TYPE_CHECKING:
    from PIL import Image

    from seg4diff.segmentation.result import Segmentation


@dataclass(frozen=True, kw_only=True)
class Discover(ImageOptions):
    """Find out what is in images, and where, by a vocabulary.

    For each image NAME this writes NAME.png (the labels, with a palette), NAME-overlay.png (to look at) and
    what --formats asks for:

        seg4diff discover kitchen.jpg --vocabulary ade20k --cache texts
    """

    vocabulary: Annotated[str, tyro.conf.arg(metavar="{coco,ade20k,lvis,wordnet}|FILE")] = "coco"
    """Names to search for: 171 of COCO, 150 of ADE20K, 1198 things of LVIS, 4424 nouns of WordNet, or a text
    file of one name per line."""
    out: Path = Path("discover-output")
    """Folder for what is written."""
    preset: Literal["fast", "best"] = "fast"
    """`fast`: one pass over the names that are left after the search; `best`: two."""
    background: bool = False
    """Leave pixels without a label that no name explains."""
    captioner: OptionalText = None
    """An image-to-text model of transformers (a name on the Hugging Face hub, or a folder): only names that
    its caption of an image mentions are searched."""
    cache: OptionalPath = None
    """Folder that keeps encoded prompts for the next run."""

    def run(self) -> None:
        """Segment the images.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or an image is missing.
        """
        if isinstance(self.layers, str):
            raise ValueError(f"--layers {self.layers} is not for discover; give numbers, or leave it out")
        layers = self.layers
        paths = self.checked_images()
        if self.cache is not None:
            check_folder(self.cache)

        import seg4diff
        from seg4diff.data.vocabularies import read_vocabulary

        names = read_vocabulary(self.vocabulary)
        pipe = self.load()
        captioner = None
        if self.captioner is not None:
            from seg4diff.data.captioning import Captioner

            announce(f"loading {self.captioner}")
            captioner = Captioner(self.captioner, device=self.device)

        def segment(images: list[Image.Image]) -> list[Segmentation]:
            found = seg4diff.discover(
                pipe,
                images,
                names,
                preset=self.preset,
                background=self.background,
                captioner=captioner,
                cache=cache,
                layers=layers,
                seed=self.seed,
                batch_size=self.batch_size,
                progress=False,
            )
            return found

        with tempfile.TemporaryDirectory() as folder:  # prompts are encoded once for all batches
            cache = self.cache or folder
            self.write(paths, segment, _found)


def _found(result: Segmentation) -> str:
    return f"{result.shares()} ({sum(result.metadata['forwards'].values())} forwards)"
