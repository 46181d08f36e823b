"""The command ``seg4diff analyze``. Heavy imports wait until it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from seg4diff.commands.model_options import ModelOptions, load_patched, model_files
from seg4diff.files import check_folder, check_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Analyze(ModelOptions):
    """Show what each layer's attention does, and which layers segment.

    Drawing prompts, as in the paper; or looking at pictures; or, with --dataset, measuring how well every
    layer segments labelled pictures:

        seg4diff analyze --prompts "a cat on a sofa" "two zebras"
        seg4diff analyze --images kitchen.jpg --prompts "a kitchen with a sink"
        seg4diff analyze --dataset voc20 --data-root data --limit 100 --noise-levels 4 8 16

    Prints tables and writes OUT/report.safetensors and report.json (or ranking.json), and, where matplotlib
    is installed, figures.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")] = ()
    """What to draw; with --images, what is in them: one text for each, or one for all."""
    prompts_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """More prompts, one to a line."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")] = ()
    """Pictures to look at."""
    dataset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Labelled pictures: measure the mIoU of every layer on them. Names as in `seg4diff evaluate --help`;
    `scenes` are those of the bundled model."""
    data_root: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """With --dataset: the folder that holds the downloads."""
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 50
    """With --dataset: only the first N pictures."""
    out: Path = Path("analysis-output")
    """Folder for what is written."""
    layers: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="N [N ...]", help_behavior_hint="")] = (
        None
    )
    """Transformer layers to analyse; all by default."""
    noise_levels: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (8, 28)
    """At which noise: steps that are left of the schedule. Of 28, 28 is pure noise, 8 where the paper
    segments."""
    steps: int = 28
    """Length of the noise schedule."""
    projections: bool = False
    """Also show the principal components of queries, keys and values of the first picture."""
    per_head: bool = False
    """Also report single heads, in the files."""
    guidance_scale: float = 7.5
    """While drawing: scale of classifier-free guidance."""
    batch_size: int = 1
    """Pictures that run together."""
    seed: int = 0
    """Seed of the noise."""


def run_analyze(options: Analyze) -> None:
    """Run ``seg4diff analyze``.

    Raises:
        ValueError, FileNotFoundError: what is asked for makes no sense, or files are missing.
    """
    from seg4diff.segmentation.inputs import check_levels

    prompts = _prompts(options)
    if options.dataset is None and not prompts and not options.images:
        raise ValueError("nothing to analyse; give --prompts, --images or --dataset")
    if options.dataset is not None and (prompts or options.images):
        raise ValueError("--dataset brings its own pictures and names; leave out --prompts and --images")
    check_levels(options.noise_levels, options.steps)
    check_folder(options.out)
    listed = [] if options.prompts_file is None else [options.prompts_file]
    inputs: list[str | Path] = [*options.images, *listed, *model_files(options)]
    names = ["report.safetensors", "report.json", "ranking.json", "layers.png"]
    for figure in ("attention-mass", "value-norms", "projections"):
        names += [f"{figure}-{level}.png" for level in options.noise_levels]
    outputs = [options.out / name for name in names]
    if options.dataset is None:
        check_outputs(outputs, inputs)
        _analyze(options, prompts)
    else:
        _rank(options, options.dataset, outputs, inputs)


def _prompts(options: Analyze) -> list[str]:
    prompts = list(options.prompts)
    if options.prompts_file is not None:
        if not options.prompts_file.is_file():
            raise FileNotFoundError(f"--prompts-file {str(options.prompts_file)!r} does not exist")
        lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts


def _analyze(options: Analyze, prompts: list[str]) -> None:
    from seg4diff.analysis.analyze import analyze
    from seg4diff.analysis.report import print_tables
    from seg4diff.images import as_rgb

    images = [as_rgb(path) for path in options.images]
    report = analyze(
        load_patched(options),
        prompts or None,
        images=images or None,
        layers=options.layers,
        noise_levels=options.noise_levels,
        steps=options.steps,
        per_head=options.per_head,
        projections=options.projections,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=True,
    )
    report.save(options.out / "report")
    print_tables([report.table(level) for level in report.noise_levels])

    def figures() -> dict[str, Figure]:
        drawn = {}
        for level in report.noise_levels:
            drawn[f"attention-mass-{level}"] = report.plot_attention_mass(level)
            drawn[f"value-norms-{level}"] = report.plot_value_norms(level)
            if options.projections:
                drawn[f"projections-{level}"] = report.plot_projections(level)
        return drawn

    _finish(options.out, "report.safetensors", figures)


def _rank(options: Analyze, dataset: str, outputs: list[Path], inputs: list[str | Path]) -> None:
    import numpy as np

    from seg4diff.analysis.rank_layers import expert_layers
    from seg4diff.analysis.report import print_tables
    from seg4diff.evaluation.datasets import limit_samples, open_dataset

    opened = limit_samples(open_dataset(dataset, options.data_root, partial=True), limit=options.limit)
    check_outputs(outputs, [*inputs, *(file for sample in opened.samples for file in sample.files)])
    labelled = []
    for sample in opened.samples:
        labels = sample.read_labels().astype(np.int64)
        present = [int(index) for index in np.unique(labels) if index != 255]
        if present:
            position = np.full(256, 255)
            position[present] = range(len(present))
            names = [opened.classes[index] for index in present]
            labelled.append((sample.read_image(), position[labels], names))
    if not labelled:
        raise ValueError(f"--dataset {dataset}: none of {len(opened.samples)} pictures has a labelled pixel")
    images, truths, classes = (list(column) for column in zip(*labelled, strict=True))
    ranking = expert_layers(
        load_patched(options),
        images=images,
        labels=truths,
        classes=classes,
        layers=options.layers,
        noise_levels=options.noise_levels,
        steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=True,
    )
    ranking.save(options.out / "ranking.json")
    print_tables([ranking.table()])
    _finish(options.out, "ranking.json", lambda: {"layers": ranking.plot()})


def _finish(out: Path, written: str, figures: Any) -> None:
    """Write figures if that is possible, and say where everything is."""
    from rich.console import Console

    from seg4diff.analysis.plots import save_figures

    console = Console()
    names = [written]
    try:
        names += [path.name for path in save_figures(figures(), out)]
    except ImportError as error:
        console.print(f"no figures: {error}", markup=False)
    console.print(f"{out}: {', '.join(names)}", markup=False, soft_wrap=True)
