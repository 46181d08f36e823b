"""`seg4diff analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from seg4diff.cli.options import Layers, ModelOptions, at_least_one
from seg4diff.files import check_outputs, save_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.figure import Figure

NoiseLevels = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")]


@dataclass(frozen=True, kw_only=True)
class Analyze(ModelOptions):
    """Measure what each layer's attention does, while drawing prompts as in the paper, or on images.

    Prints tables and writes OUT/report.json with their numbers, report.safetensors, which Python reads, the
    images drawn, and, where matplotlib is installed, figures:

        seg4diff analyze --prompts "a cat on a sofa" "two zebras"
        seg4diff analyze --images kitchen.jpg --prompts "a kitchen with a sink"
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """What to draw; with --images, what is in them: one text for each, or one for all."""
    prompts_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """More prompts, one to a line (or a JSON list)."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")] = ()
    """Images to measure on."""
    out: Path = Path("analyze-output")
    """Folder for what is written."""
    layers: Layers = None
    """Transformer layers to analyse; all by default."""
    noise_levels: NoiseLevels = (8, 28)
    """At which noise: steps that are left of the schedule. Of 28, 28 is pure noise, 8 where the paper
    segments."""
    steps: int = 28
    """Length of the noise schedule."""
    projections: bool = False
    """Also show the principal components of queries, keys and values of the first image."""
    per_head: bool = False
    """Also report single heads, in the files."""
    guidance_scale: float = 7.5
    """While drawing: scale of classifier-free guidance."""
    batch_size: int = 1
    """Images that run together."""
    seed: int = 0
    """Seed of the noise."""

    def run(self) -> None:
        """Analyse the model.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or files are missing.
        """
        prompts = self._prompts()
        if not prompts and not self.images:
            raise ValueError("nothing to analyse; give --prompts or --images")
        at_least_one(self, "batch_size", "steps")
        self.check(self.out)
        names = ["report.safetensors", "report.json"]
        for figure in ("attention-mass", "value-norms", "projections"):
            names += [f"{figure}-{level}.png" for level in self.noise_levels]
        listed = [] if self.prompts_file is None else [self.prompts_file]
        check_outputs([self.out / name for name in names], [*self.images, *listed, *self.files()])

        from seg4diff.analysis.report import print_tables
        from seg4diff.images import as_rgb
        from seg4diff.segmentation.inputs import check_levels

        check_levels(self.noise_levels, self.steps)
        images = [as_rgb(path) for path in self.images]

        import seg4diff

        report = seg4diff.analyze(
            self.load(),
            prompts or None,
            images=images or None,
            layers=self.layers,
            noise_levels=self.noise_levels,
            steps=self.steps,
            per_head=self.per_head,
            projections=self.projections,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            batch_size=self.batch_size,
            progress=True,
            **({} if images else {"output_type": "pil"}),
        )
        report.save(self.out / "report")
        drawn = {f"image-{number:03d}.png": image for number, image in enumerate(report.generated)}
        for name, image in drawn.items():
            save_image(image, self.out / name)
        print_tables(
            [
                table
                for level in report.noise_levels
                for table in (report.table(level), report.sink_table(level))
            ]
        )

        def figures() -> dict[str, Figure]:
            drawn = {}
            for level in report.noise_levels:
                drawn[f"attention-mass-{level}"] = report.plot_attention_mass(level)
                drawn[f"value-norms-{level}"] = report.plot_value_norms(level)
                if self.projections:
                    drawn[f"projections-{level}"] = report.plot_projections(level)
            return drawn

        finish(self.out, ["report.json", "report.safetensors", *drawn], figures)

    def _prompts(self) -> list[str]:
        if self.prompts_file is None:
            return list(self.prompts)

        from seg4diff.evaluation.clip_score import read_prompts

        return [*self.prompts, *read_prompts(self.prompts_file)]


def finish(out: Path, written: list[str], figures: Callable[[], Mapping[str, Figure]]) -> None:
    """Write figures if matplotlib is installed, and print where everything is."""
    from rich.console import Console

    from seg4diff.analysis.plots import save_figures

    console = Console()
    try:
        written = [*written, *(path.name for path in save_figures(figures(), out))]
    except ImportError as error:
        console.print(f"no figures: {error}", markup=False)
    console.print(f"{out}: {', '.join(written)}", markup=False, soft_wrap=True)
