"""`seg4diff caption`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from seg4diff.cli.options import DebugOptions, Device, OptionalText, announce, at_least_one
from seg4diff.files import check_folder


@dataclass(frozen=True, kw_only=True)
class Caption(DebugOptions):
    """Write captions for a folder of images with an image-to-text model of transformers.

    Images that the file names already are left alone. The same command continues an interrupted one:

        seg4diff caption photos --model Salesforce/blip-image-captioning-base --out captions.json
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The images."""
    model: str
    """A name on the Hugging Face hub, or a folder."""
    out: Path = Path("captions.json")
    """JSON of image name -> caption, as data.captions of `seg4diff train` takes it."""
    prompt: OptionalText = None
    """What to ask a model that chats, or how a caption begins."""
    batch_size: int = 8
    """Images that run together."""
    max_tokens: int = 70
    """Longest caption; CLIP reads 75 tokens."""
    device: Device = None
    """cpu, cuda, cuda:1, mps, ...; by default the GPU if there is one."""

    def run(self) -> None:
        """Write the captions.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or the folder does not exist.
            OSError: the file cannot be written.
        """
        at_least_one(self, "batch_size", "max_tokens")
        check_folder(self.out.parent)

        from seg4diff.data.captioning import write_captions

        announce(f"captioning with {self.model}")
        write_captions(
            self.images,
            self.model,
            self.out,
            prompt=self.prompt,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            device=self.device,
        )
