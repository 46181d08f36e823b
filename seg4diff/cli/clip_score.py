"""`seg4diff clip-score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from seg4diff.cli.evaluate import digest
from seg4diff.cli.options import ModelOptions, OptionalNumber, at_least_one, end_processes


@dataclass(frozen=True, kw_only=True)
class ClipScore(ModelOptions):
    """Measure how well generated images fit their prompts (CLIPScore), with and without --lora.

    The same command continues an interrupted one. `accelerate launch -m seg4diff clip-score ...` shares the
    images among GPUs. Writes OUT/base and OUT/lora with the images, OUT/report.json and report.md:

        seg4diff clip-score --prompts prompts.txt --lora magnet-coco
        seg4diff clip-score --prompts prompts.txt --seeds 0 1 2 --steps 20 --model demo
    """

    prompts: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Prompts, one to a line (or a JSON list)."""
    out: Path = Path("clip-score-output")
    """Folder for what is written."""
    limit: OptionalNumber = None
    """Only the first N prompts."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (0,)
    """One image of each prompt for each seed."""
    steps: int = 28
    """Denoising steps."""
    guidance_scale: float = 7.0
    """Scale of classifier-free guidance; 1 is none."""
    batch_size: int = 1
    """Images that are generated together."""
    clip_models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = (
        "openai/clip-vit-large-patch14",
    )
    """CLIP models to score with, by their names on the hub."""
    layout: Literal["plain", "compbench"] = "plain"
    """`compbench` names files as the tools of T2I-CompBench++ expect them."""

    def run(self) -> None:
        """Generate the images and score them.

        Raises:
            ValueError, FileNotFoundError: an option makes no sense, or files are missing.
            ModuleNotFoundError: torchmetrics is not installed.
        """
        try:
            self._generate_and_score()
        finally:
            end_processes()

    def _generate_and_score(self) -> None:
        at_least_one(self, "batch_size", "limit", "steps")
        self.check(self.out)

        from seg4diff.evaluation.clip_score import GenerationSettings, check_names, read_prompts

        prompts = read_prompts(self.prompts)[: self.limit]
        settings = GenerationSettings(
            seeds=self.seeds,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=self.batch_size,
            layout=self.layout,
        )
        check_names(prompts, settings)

        import json

        from rich.console import Console
        from rich.markdown import Markdown

        import seg4diff
        from seg4diff.evaluation.clip_score import clip_score, generate, markdown
        from seg4diff.evaluation.report import versions_of
        from seg4diff.evaluation.runner import process_state
        from seg4diff.files import write_atomically
        from seg4diff.jobs import Share

        pipe = self.load(lora=False)
        state = process_state(pipe)
        arms: dict[str, Path | None] = {"base": None}
        if self.lora is not None:
            arms["lora"] = self.lora
        for name, lora in arms.items():
            if lora is not None:
                seg4diff.load_lora(pipe, lora)
            generate(
                pipe,
                prompts,
                self.out / name,
                settings,
                about={"model": self.model, "lora": digest(lora)},
                share=Share(state.process_index, state.num_processes),
                progress=state.is_main_process,
            )
        state.wait_for_everyone()
        if not state.is_main_process:
            return
        device = pipe._execution_device
        scores = {
            name: {
                clip: clip_score(prompts, self.out / name, settings, clip, device=device)
                for clip in self.clip_models
            }
            for name in arms
        }
        table = markdown(scores, len(prompts), settings)
        document = {
            "clip_score": scores,
            "prompts": prompts,
            "settings": json.loads((self.out / "base" / "settings.json").read_text(encoding="utf-8")),
            "lora": digest(self.lora),
            "versions": versions_of(pipe),
        }
        text = json.dumps(document, indent=1, ensure_ascii=False)
        write_atomically(self.out / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(self.out / "report.md", lambda path: path.write_text(table, encoding="utf-8"))
        Console().print(Markdown(table))
