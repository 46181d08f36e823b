"""Which layer carries the words: what is drawn when one layer reads blurred or no text (as Seg4Diff, figure
4).

    python -m benchmarks.causal [--captions 40] [--out benchmarks/results/causal.json]

The demo model draws the captions of held-out scenes, stock and with one layer perturbed at a time. Each
image is segmented by the unperturbed model among all 18 classes, and judged by its caption: pixels that got
a class of the caption are right ("caption share"); the mIoU is that of the perturbed image's label map
against the unperturbed image's, over the caption's classes, from the same noise. "Latent change" is the
root mean square difference from the unperturbed latents, relative to their root mean square.
"""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import seg4diff
from seg4diff.demo import CLASSES, HELD_OUT, scene
from seg4diff.loading import load_pipeline
from seg4diff.metrics import Counts, confusion_matrix, counts_of


def draw(pipe: Any, captions: list[str], steps: int, guidance_scale: float, batch_size: int) -> Tensor:
    """Latents of the captions, image i from noise of seed i."""
    parts = []
    for first in range(0, len(captions), batch_size):
        batch = captions[first : first + batch_size]
        parts.append(
            pipe(
                batch,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                max_sequence_length=77,
                output_type="latent",
                generator=[torch.Generator().manual_seed(first + row) for row in range(len(batch))],
            ).images
        )
    return torch.cat(parts)


def decoded(pipe: Any, latents: Tensor) -> list[Any]:
    """Decoded latents."""
    config = pipe.vae.config
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
    found: list[Any] = pipe.image_processor.postprocess(pixels, output_type="pil")
    return found


def label_maps(pipe: Any, images: list[Any], classes: list[list[int]]) -> list[Tensor]:
    """Segmentation by the unperturbed model among some classes each, as indices into ``CLASSES``."""
    names = [[CLASSES[index] for index in own] for own in classes]
    results = seg4diff.segment(pipe, images, names, batch_size=8, progress=False)
    assert isinstance(results, list)
    return [torch.tensor(own)[result.labels] for own, result in zip(classes, results, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    pipe = seg4diff.patch(load_pipeline("demo", "cpu"))
    pipe.set_progress_bar_config(disable=True)
    scenes = [scene(HELD_OUT + number) for number in range(options.captions)]
    captions = [one.caption for one in scenes]
    present = [[CLASSES.index(name) for name in one.classes] for one in scenes]
    layers = range(pipe.transformer.config.num_layers)
    expert = list(pipe.transformer.config["_seg4diff_expert_layers"])

    def run(context: AbstractContextManager[None]) -> Tensor:
        with context:
            return draw(pipe, captions, options.steps, options.guidance_scale, options.batch_size)

    plain = run(nullcontext())
    settings: dict[str, AbstractContextManager[None]] = {"unperturbed": nullcontext()}
    for layer in layers:
        settings[f"blur, layer {layer}"] = seg4diff.perturb(pipe, layer)
    for layer in layers:
        settings[f"wide blur (77 tokens), layer {layer}"] = seg4diff.perturb(
            pipe, layer, sigma=1e3, kernel_size=77, text=slice(0, 77)
        )
    figures: dict[str, dict[str, float]] = {}
    print(
        f"{len(captions)} captions, {options.steps} steps, guidance {options.guidance_scale}, expert {expert}"
    )
    for name, context in settings.items():
        latents = plain if name == "unperturbed" else run(context)
        images = decoded(pipe, latents)
        among_all = label_maps(pipe, images, [list(range(len(CLASSES)))] * len(images))
        among_own = label_maps(pipe, images, present)
        counts = Counts(*torch.zeros(3, len(CLASSES), dtype=torch.int64))
        for found, own in zip(among_all, among_own, strict=True):
            counts = counts + counts_of(confusion_matrix(found, own, len(CLASSES)))
        shares = [
            torch.isin(f, torch.tensor(w)).double().mean() for f, w in zip(among_all, present, strict=True)
        ]
        change = (latents - plain).square().mean().sqrt() / plain.square().mean().sqrt()
        figures[name] = {
            "miou": 100 * counts.mean_iou,
            "caption_share": 100 * float(torch.stack(shares).mean()),
            "latent_change": 100 * float(change),
        }
        row = figures[name]
        print(
            f"{name:36} mIoU {row['miou']:5.1f} %  caption share {row['caption_share']:5.1f} %  "
            f"latent change {row['latent_change']:5.1f} %",
            flush=True,
        )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "captions": len(captions),
            "steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "expert_layers": expert,
            "runs": figures,
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
