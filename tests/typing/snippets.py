"""Calls as users write them. `make lint` checks their types; nothing runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import seg4diff

pipe = StableDiffusion3Pipeline.from_pretrained("a model")
seg4diff.patch(pipe)
pipe = seg4diff.unpatch(seg4diff.patch(pipe))
patched: bool = seg4diff.is_patched(pipe)

result: seg4diff.Segmentation = seg4diff.segment(pipe, "kitchen.jpg", ["cat", "sofa"])
labels: torch.Tensor = result.labels
classes: tuple[str, ...] = result.classes
overlay: Image.Image = result.overlay()
result.save("out.png")
result.save(Path("out.npz"))
loaded: seg4diff.Segmentation = seg4diff.Segmentation.load("out.npz")

array = np.zeros((64, 64, 3))
results: list[seg4diff.Segmentation] = seg4diff.segment(
    pipe, [Path("a.png"), Image.new("RGB", (64, 64)), array], ["cat"], layers=[9], seed=1
)
images: list[Image.Image] = [Image.new("RGB", (64, 64))]
drawn: list[seg4diff.Segmentation] = seg4diff.segment(pipe, images, [["cat", "sofa"]], preset="reference")
scores: list[torch.Tensor | None] = [each.scores for each in results]
regions: seg4diff.Segmentation = seg4diff.segment_unsupervised(pipe, images[0], layers=9, preset="paper")
counted: seg4diff.Segmentation = seg4diff.segment_unsupervised(pipe, images[0], layers="auto", regions=5)
both: seg4diff.Segmentation | list[seg4diff.Segmentation] = seg4diff.segment_unsupervised(
    pipe, torch.zeros(3, 64, 64)
)
named: seg4diff.Segmentation = seg4diff.discover(pipe, "kitchen.jpg", "lvis", cache="texts")
several: list[seg4diff.Segmentation] = seg4diff.discover(pipe, images, ["cat", "sofa"], preset="best")
version: str = seg4diff.__version__

with seg4diff.capture(pipe, layers=[9], maps=seg4diff.MapRequest(heads="each")) as captured:
    pipe("a cat on a sofa")
heatmap: torch.Tensor = captured.heatmap("cat")
records: list[seg4diff.Record] = list(captured.records)

with seg4diff.perturb(pipe, layers=[9]), seg4diff.edit(pipe, drop="sofa", weights={"cat": 1.5}):
    pipe("a cat on a sofa")
seg4diff.guide(pipe, "a cat on a sofa", scale=3.0, layers=[9], blur=seg4diff.Blur(sigma=3.0))

report: seg4diff.AnalysisReport = seg4diff.analyze(pipe, ["a cat on a sofa"], steps=4)
mass: torch.Tensor = report.by_layer.image_to_text
ranking: seg4diff.Ranking = seg4diff.rank_layers(pipe, ["a cat"])
layers: tuple[int, ...] = ranking.order
seg4diff.load_lora(pipe, "adapters.safetensors")
demo: seg4diff.Pipeline = seg4diff.load_pipeline("demo")
drawn_image = demo("an apple").images[0]
