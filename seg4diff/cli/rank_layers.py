"""`seg4diff rank-layers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seg4diff.cli.analyze import NoiseLevels, finish
from seg4diff.cli.options import DataOptions, Layers, ModelOptions, at_least_one
from seg4diff.data.names import DatasetName
from seg4diff.files import check_outputs


@dataclass(frozen=True, kw_only=True)
class RankLayers(DataOptions, ModelOptions):
    """Rank layers by how well the attention of each segments labelled images.

    Prints the mIoU of every layer and writes OUT/ranking.json and, where matplotlib is installed, layers.png:

        seg4diff rank-layers --dataset scenes --model demo --limit 8
        seg4diff rank-layers --dataset voc20 --data-root data --limit 100 --noise-levels 4 8 16
    """

    dataset: DatasetName
    """Labelled images; `folder`: a data set of your own; `scenes`: those of the bundled model."""
    limit: int = 50
    """Only the first N images, which are held in memory."""
    out: Path = Path("rank-layers-output")
    """Folder for what is written."""
    layers: Layers = None
    """Transformer layers to compare; all by default."""
    noise_levels: NoiseLevels = (8, 28)
    """At which noise: steps that are left of the schedule. Of 28, 28 is pure noise, 8 where the paper
    segments."""
    steps: int = 28
    """Length of the noise schedule."""
    batch_size: int = 1
    """Images that run together."""
    seed: int = 0
    """Seed of the noise."""

    def run(self) -> None:
        """Rank the layers.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or files are missing.
        """
        at_least_one(self, "batch_size", "steps")
        self.check(self.out)

        import numpy as np

        import seg4diff
        from seg4diff.analysis.report import print_tables
        from seg4diff.data.registry import subset
        from seg4diff.metrics import IGNORED
        from seg4diff.segmentation.inputs import check_levels

        check_levels(self.noise_levels, self.steps)
        dataset = subset(self.open(self.dataset), limit=self.limit)
        outputs = [self.out / name for name in ("ranking.json", "layers.png")]
        check_outputs(outputs, [*self.files(), *(file for item in dataset.items for file in item.files)])
        images, truths, classes = [], [], []
        for item in dataset.items:
            labels = item.labels().astype(np.int64)
            present = [int(index) for index in np.unique(labels) if index != IGNORED]
            if present:
                position = np.full(IGNORED + 1, IGNORED)
                position[present] = range(len(present))
                images.append(item.image())
                truths.append(position[labels])
                classes.append([dataset.classes[index] for index in present])
        if not images:
            raise ValueError(
                f"--dataset {self.dataset}: none of {len(dataset.items)} images has a labelled pixel"
            )
        ranking = seg4diff.rank_layers(
            self.load(),
            images=images,
            labels=truths,
            classes=classes,
            layers=self.layers,
            noise_levels=self.noise_levels,
            steps=self.steps,
            seed=self.seed,
            batch_size=self.batch_size,
            progress=True,
        )
        ranking.save(self.out / "ranking.json")
        print_tables([ranking.table()])
        finish(self.out, ["ranking.json"], lambda: {"layers": ranking.plot()})
