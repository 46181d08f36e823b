"""`seg4diff demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seg4diff.cli.options import DebugOptions, Device, OptionalNumber, announce, at_least_one
from seg4diff.files import check_folder


@dataclass(frozen=True, kw_only=True)
class Demo(DebugOptions):
    """Segment drawn scenes with the small bundled model, or tune it: images to look at, and numbers.

    Nothing is downloaded:

        seg4diff demo --scenes 4
        seg4diff demo --train
    """

    train: bool = False
    """Tune the model with MAGNET, minutes on a CPU, and print its numbers before and after."""
    scenes: OptionalNumber = None
    """How many of the scenes that training never saw: by default 24, each also in bad light, and 64 with
    --train."""
    out: Path = Path("demo-output")
    """Folder for what is written."""
    device: Device = None
    """cpu, cuda, cuda:1, ...; by default the GPU if there is one, and the CPU with --train."""

    def run(self) -> None:
        """Show the demonstration.

        Raises:
            ValueError: an option makes no sense.
            OSError: nothing can be written to the folder.
        """
        at_least_one(self, "scenes")
        check_folder(self.out)
        if self.train:
            from seg4diff.training import demo

            announce("choosing the layer to tune and measuring the bundled model")
            changes = {} if self.device is None else {"device": self.device}
            demo.show(self.out, changes=changes, scenes=self.scenes or demo.TEST_SCENES)
        else:
            from seg4diff.evaluation import showcase

            announce("loading the bundled model")
            showcase.show(self.scenes or 24, self.out, self.device)
