"""`seg4diff prepare`."""

from __future__ import annotations

from dataclasses import dataclass

from seg4diff.cli.options import DataOptions, OptionalPath, at_least_one
from seg4diff.data.names import DatasetName
from seg4diff.files import check_folder


@dataclass(frozen=True, kw_only=True)
class Prepare(DataOptions):
    """Check every file of a data set, and write it as a plain folder where --out is given.

    Prints how many images each class is in, and its share of the pixels:

        seg4diff prepare --dataset voc20 --data-root data
        seg4diff prepare --dataset cityscapes19 --data-root data --out cityscapes-folder
    """

    dataset: DatasetName
    """Which data set; described by `seg4diff evaluate --help`."""
    out: OptionalPath = None
    """Write images/, labels/ and classes.txt here, for `--dataset folder`."""
    threads: int = 4
    """Threads that read images."""

    def run(self) -> None:
        """Check the data set.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or files are missing.
            RuntimeError: some images could not be read.
        """
        at_least_one(self, "threads")
        if self.out is not None:
            check_folder(self.out)

        from rich.console import Console
        from rich.table import Table

        from seg4diff.data.prepare import prepare
        from seg4diff.data.registry import subset
        from seg4diff.evaluation.report import failures_line

        dataset = subset(self.open(self.dataset), limit=self.limit)
        found = prepare(dataset, self.out, threads=self.threads)
        total = max(1, sum(found.pixels) + found.ignored)
        table = Table(title=f"{dataset.title}: {found.images} images, labels from {dataset.source}")
        table.add_column("class")
        table.add_column("images", justify="right")
        table.add_column("pixels %", justify="right")
        for name, occurs, pixels in zip(dataset.classes, found.occurs, found.pixels, strict=True):
            table.add_row(name, str(occurs), f"{100 * pixels / total:.2f}")
        table.add_row("(does not count)", "", f"{100 * found.ignored / total:.2f}")
        Console().print(table)
        if found.failures:
            failures = {failure.name: failure.reason for failure in found.failures}
            raise RuntimeError(failures_line(failures, len(dataset.items)))
