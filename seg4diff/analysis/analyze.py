"""Attention mass, value norms and projections of a model's layers (Seg4Diff, sections 3.2 and 3.3).

Everything is reduced to a few numbers per layer as soon as a forward has ended; the attention matrix never
exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from seg4diff.analysis.pca import principal_components
from seg4diff.analysis.report import AnalysisReport, Measures
from seg4diff.analysis.sinks import SinkSums, token_labels
from seg4diff.attention.observer import Forward, Observer, PromptCall, SameText, attach
from seg4diff.attention.patch import Patch, patch_of
from seg4diff.attention.requests import LayerRequest, LayerResult, Projections
from seg4diff.backbones import Pipeline
from seg4diff.images import ImageInput, as_list
from seg4diff.kernels.types import AttentionStatistics, MapRequest
from seg4diff.segmentation.inputs import Noising, check_levels, model_inputs, views_of
from seg4diff.segmentation.maps import progress_bar
from seg4diff.segmentation.presets import find_preset

PROJECTIONS = ("query", "key", "value")


def analyze(
    pipe: Pipeline,
    prompts: str | Sequence[str] | None = None,
    *,
    images: ImageInput | Sequence[ImageInput] | None = None,
    layers: Sequence[int] | int | None = None,
    noise_levels: Sequence[int] = (8, 28),
    steps: int = 28,
    per_head: bool = False,
    projections: bool = False,
    preset: str = "default",
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool | None = None,
    **call: Any,
) -> AnalysisReport:
    """Where the attention of each layer goes and how large its values are, at some noise levels.

    With prompts alone, the pipeline generates an image per prompt and its forwards are measured, as in the
    paper, which samples 50 prompts of DrawBench and measures at t = 8 and t = 28. With images, these are
    noised, and the model runs once per image and level, with the image's prompt.

    Args:
        pipe: a pipeline.
        prompts: one text, or several; with images one for each, or one for all, or None for empty prompts.
        images: an image or several, in any form that `seg4diff.segment` takes.
        layers: the layers to analyse; all when None.
        noise_levels: steps that are left of the schedule, 1 to `steps`: of 28, 28 is pure noise and 8 is
            where the paper segments.
        steps: length of the noise schedule.
        per_head: whether to report single heads as well.
        projections: whether to report principal components of the first image's queries, keys and values.
        preset: how images are fitted to the model, as in `seg4diff.segment`.
        guidance_scale: scale of classifier-free guidance when images are generated; the conditional half is
            reported.
        seed: seed of the noise. Image number i is generated from noise of seed + i; given images all get the
            same noise.
        batch_size: images that run together.
        progress: whether to show the pipeline's progress bar; when None, for more than one image.
        call: more arguments of the pipeline's call, when images are generated.

    Raises:
        NotImplementedError: the model family is not supported.
        TypeError: `pipe` is a bare transformer.
        ValueError: neither prompts nor images, an empty list of either, numbers that do not match, a layer or
            noise level out of range.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "vae"):
        raise TypeError(f"{type(pipe).__name__} has no VAE; analyze takes a whole pipeline")
    chosen = state.layers(layers)
    check_levels(noise_levels, steps)
    texts = None if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    if texts is not None and not texts:
        raise ValueError("prompts is empty: at least one is needed")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a positive integer")
    measurement = _Measurement(state, pipe, chosen, len(noise_levels), projections)
    request = LayerRequest(
        maps=MapRequest(),
        reduce=_mean_over_image_tokens,
        statistics=True,
        observe=measurement.observe if projections else None,
    )
    # Images go to the transformer alone; what encodes their prompts is not a pipeline call.
    target = pipe if images is None else pipe.transformer
    with torch.no_grad(), attach(target, chosen, request, measurement):
        if images is None:
            if texts is None:
                raise ValueError("neither prompts nor images are given; give at least one of them")
            _measure_prompts(
                pipe, measurement, texts, noise_levels, seed=seed, batch_size=batch_size, progress=progress,
                call={"num_inference_steps": steps, "guidance_scale": guidance_scale, **call},
            )  # fmt: skip
        else:
            if call:
                raise ValueError(f"{', '.join(map(repr, call))}: only for drawing, but images are given")
            _measure_images(
                pipe, measurement, images, texts, noise_levels,
                Noising(noise_levels, steps, seed, batch_size=batch_size), preset=preset, progress=progress,
            )  # fmt: skip
    return measurement.report(
        noise_levels,
        per_head,
        {
            "subject": "prompts" if images is None else "images",
            "prompts": texts,
            "steps": steps,
            "guidance_scale": guidance_scale if images is None else None,
            "preset": None if images is None else preset,
            "seed": seed,
            "model": type(state.transformer).__name__,
        },
    )


def _mean_over_image_tokens(maps: Tensor) -> Tensor:
    """[B, T] of a map [B, N, T]."""
    return maps.mean(dim=1)


def _measure_prompts(
    pipe: Pipeline,
    measurement: _Measurement,
    texts: list[str],
    noise_levels: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    progress: bool | None,
    call: dict[str, Any],
) -> None:
    """Generate images from the prompts and measure the steps at `noise_levels`."""
    steps = call["num_inference_steps"]
    measurement.steps = {steps - level: position for position, level in enumerate(noise_levels)}
    call = {**measurement.call_defaults, **call}
    with progress_bar(pipe, len(texts), progress) as bar:
        for first in range(0, len(texts), batch_size):
            batch = texts[first : first + batch_size]
            generators = [torch.Generator().manual_seed(seed + first + row) for row in range(len(batch))]
            with _without_bar(pipe):
                made = pipe(
                    prompt=batch,
                    generator=generators,
                    **{"output_type": "latent", **call},
                )
            if call.get("output_type") == "pil":
                measurement.generated += made.images
            bar.update(len(batch))


def _measure_images(
    pipe: Pipeline,
    measurement: _Measurement,
    images: ImageInput | Sequence[ImageInput],
    texts: list[str] | None,
    noise_levels: Sequence[int],
    noising: Noising,
    *,
    preset: str,
    progress: bool | None,
) -> None:
    """Noise the images to every level and measure one forward each."""
    fit = find_preset(preset).fit
    given, _ = as_list(images)
    prompts = [""] if texts is None else texts
    if len(prompts) == 1:
        prompts = prompts * len(given)
    if len(prompts) != len(given):
        raise ValueError(f"{len(prompts)} prompts for {len(given)} images; give one for each, or one")
    views = views_of(pipe, given, fit)
    try:
        with progress_bar(pipe, len(given) * len(noise_levels), progress) as bar:
            for inputs in model_inputs(pipe, views, [[prompt] for prompt in prompts], noising):
                level = noise_levels.index(inputs.noise_level)
                measurement.expect(level, inputs.prompts, first_image=inputs.images[0] == 0)
                pipe.transformer(**inputs.arguments)
                bar.update(len(inputs.images))
    finally:
        pipe.maybe_free_model_hooks()


class _Measurement(Observer):
    """Sums over images; knows which forwards count, and at which noise level they are."""

    def __init__(
        self, state: Patch, pipe: Pipeline, layers: tuple[int, ...], levels: int, projections: bool
    ) -> None:
        self._backbone = state.backbone
        self._pipe = pipe
        self._layers = layers
        heads = state.backbone.heads(state.transformer, layers[0])
        names = [f.name for f in fields(Measures)]
        self._by_layer = {name: torch.zeros(levels, len(layers), dtype=torch.float64) for name in names}
        self._by_head = {name: torch.zeros(levels, len(layers), heads, dtype=torch.float64) for name in names}
        self._sinks = SinkSums(levels, len(layers))
        self._images = torch.zeros(levels, dtype=torch.float64)
        self._with_prompt = torch.zeros(levels, dtype=torch.float64)
        self._uniform = 0.0
        self._timesteps = [float("nan")] * levels
        self._keeps_projections = projections
        self._projections: dict[tuple[int, int], dict[str, Tensor]] = {}  # by level and layer
        self._grid = (0, 0)
        self.generated: list[Image.Image] = []
        # While drawing: which step of a call is at which level, and how far the call is.
        self.steps: dict[int, int] = {}
        self._step = -1
        # Of the forward that runs:
        self._level: int | None = None
        self._rows = slice(0, 0)
        self._texts: tuple[Mapping[str, str], ...] = ()
        self._first_image = False

    @property
    def call_defaults(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it encode text as segmentation does."""
        return self._backbone.call_defaults(self._pipe)

    def expect(self, level: int, prompts: Sequence[str], *, first_image: bool) -> None:
        """Set what the next forward, of a bare transformer, computes."""
        self._level, self._first_image = level, first_image
        self._rows = slice(0, len(prompts))
        self._texts = tuple(SameText(prompt) for prompt in prompts)

    def begin_call(self, prompt: PromptCall) -> None:
        self._step = -1

    def before_forward(self, forward: Forward, arguments: dict[str, Any]) -> dict[str, Any]:
        if forward.prompt is not None:
            self._level = None
            self._rows = forward.rows("conditional")
            count = self._rows.stop - self._rows.start
            if count and not forward.call.skipped_layers:
                self._step += 1
                self._level = self.steps.get(self._step)
            if self._level is not None:
                self._texts = tuple(forward.prompt.text_of(row) for row in range(count))
                self._first_image = bool(self._images[self._level] == 0)
        if self._level is not None and self._first_image:
            height, width = forward.call.grid
            self._grid = (height, width)
        return arguments

    def observe(self, projections: Projections) -> dict[str, Tensor] | None:
        """Principal components [N, 3] of the first image's tokens, while a layer has them at hand."""
        if self._level is None or not self._first_image:
            return None
        row = self._rows.start
        return {
            name: principal_components(rearrange(getattr(projections, name)[row], "n heads d -> n (heads d)"))
            for name in PROJECTIONS
        }

    def after_forward(self, forward: Forward, results: Mapping[int, LayerResult], output: Any) -> None:
        level, self._level = self._level, None
        if level is None:
            return
        call = forward.call
        spans = self._backbone.text_spans(self._pipe, call.layout.text_tokens)
        prompt_columns = [
            [column for span in spans for column in span.columns(texts[span.encoder])]
            for texts in self._texts
        ]
        labels = [token_labels(spans, texts, call.layout.text_tokens) for texts in self._texts]
        for position, layer in enumerate(self._layers):
            if layer not in results:
                raise RuntimeError(
                    f"layer {layer} did not run in this step: a cache took its output from an earlier one; "
                    "call transformer.disable_cache() before an analysis"
                )
            result = results[layer]
            assert result.statistics is not None
            assert result.maps is not None
            self._sinks.add(level, position, result.maps[self._rows], labels)
            self._add(level, position, result.statistics, prompt_columns)
            if result.observed is not None:
                self._projections[level, position] = result.observed
        count = len(self._texts)
        self._uniform += count * call.layout.text_tokens / call.layout.tokens
        self._images[level] += count
        self._with_prompt[level] += sum(len(columns) > 0 for columns in prompt_columns)
        if call.timestep is not None:
            self._timesteps[level] = float(call.timestep.reshape(-1)[0])

    def _add(
        self,
        level: int,
        position: int,
        statistics: AttentionStatistics,
        prompt_columns: list[list[int]],
    ) -> None:
        """Add one layer's statistics, row by row."""
        assert statistics.image_value_norm is not None
        assert statistics.text_value_norm is not None

        def record(name: str, per_token: Tensor) -> None:
            """`per_token` [rows, H, tokens]: shares, or norms of single heads."""
            exact = per_token.cpu().double()
            together = exact.square().sum(dim=1).sqrt() if name.endswith("norm") else exact
            self._by_head[name][level, position] += exact.mean(dim=-1).sum(dim=0)
            self._by_layer[name][level, position] += together.flatten(1).mean(dim=1).sum()

        text_norm = statistics.text_value_norm[self._rows]
        record("image_to_text", statistics.image_to_text[self._rows])
        record("text_to_text", statistics.text_to_text[self._rows])
        record("image_value_norm", statistics.image_value_norm[self._rows])
        record("text_value_norm", text_norm)
        for row, columns in zip(text_norm, prompt_columns, strict=True):
            if columns:
                record("prompt_value_norm", row[None, :, columns])

    def report(self, noise_levels: Sequence[int], per_head: bool, metadata: dict[str, Any]) -> AnalysisReport:
        def measures(sums: dict[str, Tensor]) -> Measures:
            means = {}
            for name, total in sums.items():
                count = self._with_prompt if name == "prompt_value_norm" else self._images
                means[name] = total / count.reshape(-1, *(1,) * (total.dim() - 1))
            return Measures(**means)

        components: dict[str, Tensor] = {}
        if self._keeps_projections:
            levels, layers = range(len(noise_levels)), range(len(self._layers))
            components = {
                name: torch.stack(
                    [torch.stack([self._projections[n, p][name] for p in layers]) for n in levels]
                )
                for name in PROJECTIONS
            }
        return AnalysisReport(
            layers=self._layers,
            noise_levels=tuple(noise_levels),
            timesteps=tuple(self._timesteps),
            by_layer=measures(self._by_layer),
            by_head=measures(self._by_head) if per_head else None,
            sinks=self._sinks.means(self._images),
            uniform_to_text=self._uniform / float(self._images.sum()),
            images=int(self._images[0]),
            projections=components,
            grid=self._grid,
            metadata=metadata,
            generated=tuple(self.generated),
        )


@contextmanager
def _without_bar(pipe: Pipeline) -> Iterator[None]:
    """No progress bar of single steps, while one of images is shown."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
