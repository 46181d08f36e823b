"""Maps and statistics of a model's joint attention while it runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg4diff.attention.observer import Branch, Forward, Observer, PromptCall, attach
from seg4diff.attention.patch import Patch, patch_of
from seg4diff.attention.requests import LayerRequest, LayerResult
from seg4diff.backbones import Pipeline, TransformerCall
from seg4diff.backbones.text import Words, find_words
from seg4diff.kernels.types import AttentionStatistics, MapRequest, Tokens, wide_dtype

logger = logging.getLogger(__name__)

Steps = Literal["mean", "each", "last"]
_Kept = Literal["mean", "each"] | tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """What one layer's attention did in one forward, or on average over the steps of one pipeline call.

    Attributes:
        layer: number of the block, through all block lists of the model in the order they run.
        timestep: of the forward, in the scheduler's units; of an average, the tuple of the timesteps
            averaged. A forward whose rows have different timesteps has a tuple with one for each row.
        maps: the map asked for, float32, [B, rows, columns] or [B, H, rows, columns] (see `MapRequest`), or
            None. Image tokens are those of the generated image, text tokens are in the model's order, padding
            included.
        statistics: attention mass and value norms, or None.
        grid: tokens of the generated image along each axis, (height, width); N is their product.
        call: number of the pipeline call inside the context, from 0; of the forward on a bare transformer.
    """

    layer: int
    timestep: float | tuple[float, ...]
    maps: Tensor | None
    statistics: AttentionStatistics | None
    grid: tuple[int, ...]
    call: int


class Capture:
    """What `capture` yields; read it inside or after the context."""

    def __init__(self, state: Patch, pipe: Any, recorder: _Recorder, prompt: list[str] | None) -> None:
        self._state = state
        self._pipe = pipe
        self._recorder = recorder
        self._given_prompt = prompt

    @property
    def records(self) -> tuple[Record, ...]:
        """Oldest first: one per layer and forward, or per layer and call where steps are averaged."""
        return self._recorder.records()

    @property
    def gaps(self) -> dict[int, int]:
        """Steps of the latest pipeline call in which a layer left no record, by layer; no entry for none.

        Caches of diffusers (`enable_cache`) skip layers whose outputs they take from an earlier step. A mean
        is over the steps that ran.
        """
        return dict(self._recorder.gaps)

    def columns(self, words: Words, *, image: int = 0, encoder: str | None = None) -> list[int]:
        """Columns of the captured maps that hold a word or phrase of the prompt of the latest call.

        Args:
            words: a word or phrase of the prompt; all its occurrences count, case does not matter. Or
                `seg4diff.Special("bos")`, `"eos"` or `"pad"`: begin and end of text, and padding.
            image: number of the image, from 0.
            encoder: count the tokens of this text encoder only, such as `"clip"` or `"t5"`.

        Raises:
            RuntimeError: no prompt is known.
            ValueError: the word is not in the prompt (the message lists the words that are), it has no token
                among the columns captured, or those are not a range of text tokens.
        """
        if self._pipe is None:
            raise RuntimeError("a bare transformer has no tokenizer; capture the pipeline to look for words")
        prompt = self._recorder.latest_prompt()
        if prompt is None:
            raise RuntimeError("no prompt is known: run the pipeline inside the `with` block first")
        try:
            texts = prompt.text_of(image % prompt.images, self._given_prompt)
        except RuntimeError:
            raise RuntimeError(
                "no prompt is known (embeddings were given?); name it with capture(..., prompt=)"
            ) from None
        spans = self._state.backbone.text_spans(self._pipe, prompt.text_tokens)
        chosen = [span for span in spans if encoder in (None, span.encoder)]
        if not chosen:
            raise ValueError(f"encoder={encoder!r} is not in this pipeline: {[s.encoder for s in spans]}")
        found = find_words(chosen, texts, words)
        request = self._recorder.request.maps
        if request is None:
            raise RuntimeError("no map was captured (maps=None), so words have no columns")
        first, last = request.text_range(prompt.text_tokens)
        columns = [column - first for column in found if first <= column < last]
        if not columns:
            raise ValueError(f"{words!r} has no token inside columns={request.columns!r}, those captured")
        return columns

    def heatmap(
        self,
        words: Words,
        *,
        layers: Sequence[int] | int | None = None,
        image: int = 0,
        encoder: str | None = None,
        resize: bool = True,
    ) -> Tensor:
        """How strongly each place of the image reads a word: mean over steps, layers and the word's tokens.

        Args:
            words: a word or phrase of the prompt, or special tokens, as in `columns`.
            layers: the layers to average; all that were captured when None.
            image: which image of the batch.
            encoder: count the tokens of this text encoder only.
            resize: bilinear to the image's size in pixels; else the grid of image tokens.

        Returns:
            [height, width], float32, from the latest pipeline call.

        Raises:
            RuntimeError: nothing was captured, or no prompt is known.
            ValueError: the word is not in the prompt; the message lists the words that are.
            IndexError: the batch has no such image.
        """
        records = [r for r in self.records if r.maps is not None]
        if not records:
            raise RuntimeError("no map was captured: run the pipeline inside the `with` block first")
        wanted = self._state.layers(layers)
        latest = [r for r in records if r.call == records[-1].call]
        chosen = [r for r in latest if r.layer in wanted]
        if not chosen:
            have = sorted({r.layer for r in latest})
            raise ValueError(f"layers={layers!r} were not captured; captured layers: {have}")
        per_record = [r.maps for r in chosen if r.maps is not None]
        rows = len(per_record[0])
        if not 0 <= image < rows:
            raise IndexError(f"image={image} is out of range: the batch has images 0 to {rows - 1}")
        maps = torch.stack([_mean_over_heads(m[image]) for m in per_record]).mean(dim=0)  # [N, T']
        columns = self.columns(words, image=image, encoder=encoder)
        grid = chosen[0].grid
        if maps.shape[0] != math.prod(grid):
            raise ValueError(
                f"{maps.shape[0]} rows were captured, not the {math.prod(grid)} tokens of the image; "
                'heat maps need rows=("image", slice(None))'
            )
        heat = maps[:, columns].mean(dim=-1).reshape(grid)
        if not resize:
            return heat
        multiple = self._state.backbone.pixel_multiple(self._pipe)
        size = [side * multiple for side in grid]
        return F.interpolate(heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


@contextmanager
def capture(
    target: Pipeline | nn.Module,
    layers: Sequence[int] | int | None = None,
    *,
    maps: MapRequest | None = MapRequest(),
    statistics: bool = False,
    steps: Steps | int | Sequence[int] | None = None,
    branch: Branch = "conditional",
    prompt: str | Sequence[str] | None = None,
    stop_early: bool = False,
    device: torch.device | str | None = None,
    max_bytes: int = 4 * 2**30,
) -> Iterator[Capture]:
    """Record the image-to-text attention of some layers while a pipeline or a transformer runs.

    Maps carry gradients where the forward does, with non-reentrant gradient checkpointing too. The model is
    stock again when the context ends, also after an exception.

    Args:
        target: a pipeline, or a bare transformer, possibly compiled.
        layers: the layers to record, numbered through all block lists of the model; all when None.
        maps: the map to record, see `MapRequest`; None for statistics alone. Image tokens are those of the
            generated image.
        statistics: also record attention mass and value norms.
        steps: `"mean"` keeps one running average per layer and pipeline call, `"each"` every step, `"last"`
            the last one, a number or several those steps: from 0, negative ones from the end. Default:
            `"mean"` for a pipeline, `"each"` for a bare transformer.
        branch: which branch of a pipeline call to keep under classifier-free guidance; `"both"` has the
            unconditional rows first. Calls of a bare transformer always keep every row.
        prompt: the text (one for each image) where the pipeline is called with embeddings instead of text.
        stop_early: leave out everything that the last of `layers` does not need for its map: its values,
            its feed-forward and all later blocks. What the model returns is then meaningless.
        device: where records are kept, such as `"cpu"`; where the model runs when None.
        max_bytes: limit of what the records hold together. A pipeline call that would exceed it is refused
            before its first step, whatever memory is free.

    Yields:
        A `Capture`, filled as the model runs.

    Raises:
        NotImplementedError, TypeError: `target` is not of a supported model family.
        ValueError: a layer out of range, an unknown name, or a state of the model that cannot be captured;
            when the pipeline runs, a step that the call does not have.
        MemoryError: when the pipeline runs, its records would exceed `max_bytes`.
    """
    if maps is None and not statistics:
        raise ValueError("maps=None and statistics=False: nothing to capture")
    if branch not in get_args(Branch):
        raise ValueError(f"branch={branch!r} is unknown; accepted: {', '.join(map(repr, get_args(Branch)))}")
    state = patch_of(target)
    pipe = None if isinstance(target, nn.Module) else target
    kept = _kept_steps(steps, pipe is None)
    chosen = state.layers(layers)
    request = LayerRequest(maps=maps, statistics=statistics)
    heads = tuple(state.backbone.heads(state.transformer, layer) for layer in chosen)
    limit = _Limit(max_bytes, request, heads)
    recorder = _Recorder(
        request, chosen, kept, branch, None if device is None else torch.device(device), limit
    )
    given = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
    with attach(target, chosen, request, recorder, stop_early=stop_early):
        yield Capture(state, pipe, recorder, given)


def _kept_steps(steps: Steps | int | Sequence[int] | None, bare: bool) -> _Kept:
    """`steps` of `capture` checked, with numbers for `"last"`.

    Raises:
        TypeError: something that is neither a name nor an integer.
        ValueError: an unknown name, no step at all, or chosen steps of a bare transformer.
    """
    if steps is None:
        return "each" if bare else "mean"
    if isinstance(steps, str):
        if steps not in get_args(Steps):
            accepted = ", ".join(map(repr, get_args(Steps)))
            raise ValueError(f"steps={steps!r} is unknown; accepted: {accepted}, step numbers")
        if steps != "last":
            return steps
    numbers = (-1,) if steps == "last" else (steps,) if isinstance(steps, int) else tuple(steps)
    if bare:
        raise ValueError(f"steps={steps!r}: a bare transformer has no steps; capture the pipeline")
    if not numbers:
        raise ValueError("steps is empty: nothing to capture")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"steps={steps!r} must hold integers, found {number!r}")
    return numbers


def _numbered(kept: tuple[int, ...], steps: int | None) -> frozenset[int]:
    """Step numbers from 0, of a pipeline call of `steps` steps.

    Raises:
        ValueError: a step that the call does not have, or one from the end where `steps` is None.
    """
    if steps is None:
        if min(kept) < 0:
            raise ValueError(
                f"steps={list(kept)} counts from the end, but this pipeline does not tell its number of "
                "steps (it has no num_timesteps); give numbers from 0"
            )
        return frozenset(kept)
    for number in kept:
        if not -steps <= number < steps:
            raise ValueError(f"step {number} is out of range: this call has the steps 0 to {steps - 1}")
    return frozenset(number % steps for number in kept)


@dataclass
class _Limit:
    """Keeps what a capture holds below a limit: bytes are counted before they are allocated.

    Attributes:
        max_bytes: the limit.
        request: what is recorded of a layer.
        heads: number of heads of every layer.
        counted: bytes of the records so far, and of those to come of the pipeline call that runs.
    """

    max_bytes: int
    request: LayerRequest
    heads: tuple[int, ...]
    counted: int = 0

    def add(self, call: TransformerCall, rows: int, steps: int) -> None:
        """Count the records of `rows` rows of the batch in `steps` steps.

        Raises:
            MemoryError: they do not fit; the message names size, limit and remedies.
        """
        lengths = {"image": call.layout.generated, "text": call.layout.text_tokens}
        entries = 0
        maps = self.request.maps
        if maps is not None:
            heads = sum(self.heads) if maps.heads == "each" else len(self.heads)
            entries += heads * _count(maps.rows, lengths) * _count(maps.columns, lengths)
        if self.request.statistics:
            entries += 2 * sum(self.heads) * sum(lengths.values())
        size = entries * rows * steps * wide_dtype(call.text.dtype).itemsize
        if self.counted + size > self.max_bytes:
            held = f" beside {_gib(self.counted)} recorded before" if self.counted else ""
            raise MemoryError(
                f"this capture would hold {_gib(size)} ({len(self.heads)} layers, {steps} steps, "
                f"{rows} rows){held}, above the limit of {_gib(self.max_bytes)}; choose fewer layers, "
                'MapRequest(heads="mean"), fewer columns or steps="last", or raise max_bytes= '
                '(with device="cpu" if the GPU is too small)'
            )
        self.counted += size


def _count(tokens: Tokens, lengths: Mapping[str, int]) -> int:
    stream, chosen = tokens
    return len(chosen) if isinstance(chosen, Tensor) else len(range(*chosen.indices(lengths[stream])))


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


@dataclass(frozen=True, eq=False)
class _Compiled:
    """A forward of a transformer that was compiled within the context, linked to the one before.

    A chain of objects rather than a list: a graph that appends to a list compiles again for every length.
    """

    call: TransformerCall
    results: Mapping[int, LayerResult]
    before: _Compiled | None


class _Recorder(Observer):
    """Keeps the results of the forwards that count."""

    def __init__(
        self,
        request: LayerRequest,
        layers: tuple[int, ...],
        steps: _Kept,
        branch: Branch,
        device: torch.device | None,
        limit: _Limit,
    ) -> None:
        self.request = request
        self.gaps: dict[int, int] = {}
        self._layers = layers
        self._steps = steps
        self._branch: Branch = branch
        self._device = device
        self._limit = limit
        self._numbers: frozenset[int] | None = None  # steps to keep of the pipeline call; None for all
        self._sums: list[_Sum] = []
        self._prompts: dict[int, PromptCall] = {}
        self._number = -1  # of the pipeline call, or of the forward outside of one
        self._conditional: dict[int, LayerResult] = {}  # of a step whose unconditional forward is to come
        self._compiled: _Compiled | None = None

    def records(self) -> tuple[Record, ...]:
        self._drain()
        return tuple(entry.record() for entry in self._sums)

    def latest_prompt(self) -> PromptCall | None:
        return self._prompts.get(self._number)

    def begin_call(self, prompt: PromptCall) -> None:
        self._drain()
        self.gaps = {}
        self._number += 1
        self._prompts[self._number] = prompt
        self._conditional = {}
        self._numbers = _numbered(self._steps, prompt.steps) if isinstance(self._steps, tuple) else None

    def before_forward(self, forward: Forward, arguments: dict[str, Any]) -> dict[str, Any]:
        """Count what the call will hold, at its first forward; forward by forward where that is not known."""
        prompt = forward.prompt
        if prompt is None:
            self._limit.add(forward.call, forward.call.batch, 1)
            return arguments
        if forward.call.skipped_layers or forward.unconditional:
            return arguments
        guided = prompt.conditional.guided or prompt.unconditional is not None
        rows = prompt.images * (2 if self._branch == "both" and guided else 1)
        if self._steps == "each" and prompt.steps is None:
            self._limit.add(forward.call, rows, 1)
        elif forward.step == 0:
            kept = (prompt.steps or 1) if self._steps == "each" else len(self._numbers or (0,))
            self._limit.add(forward.call, rows, kept)
        return arguments

    def after_forward(self, forward: Forward, results: Mapping[int, LayerResult], output: Any) -> None:
        call = forward.call
        if results and call.skipped_layers and min(call.skipped_layers) <= max(results):
            return  # a second forward in one step, as skip-layer guidance makes it
        if forward.prompt is None:
            self._number += 1
        elif call.skipped_layers or (self._numbers is not None and forward.step not in self._numbers):
            return
        rows = forward.rows(self._branch)
        if rows.stop == rows.start:
            return
        for layer in self._layers:
            if layer not in results:
                self.gaps[layer] = self.gaps.get(layer, 0) + 1
        if self._branch == "both" and forward.prompt is not None and forward.prompt.unconditional is not None:
            if not forward.unconditional:
                self._conditional = {layer: self._take(result, rows) for layer, result in results.items()}
                return
            halves = self._conditional
            results = {
                layer: _combine(lambda *two: torch.cat(two), self._take(result, rows), halves[layer])
                for layer, result in results.items()
                if layer in halves
            }
            rows = slice(0, 2 * (rows.stop - rows.start))
        timestep = None if call.timestep is None else call.timestep.detach().reshape(-1)
        if timestep is not None and len(timestep) == call.batch:
            timestep = timestep[rows]
        prompt = forward.prompt
        for layer, result in sorted(results.items()):
            taken = self._take(result, rows)
            if prompt is not None and prompt.conditional.conditional_first and self._branch == "both":
                taken = _combine(lambda both: both.roll(prompt.images % len(both), dims=0), taken)
            self._add(layer, taken, timestep, forward)

    def end_call(self) -> None:
        if self.gaps:
            logger.warning(
                "layers left no record in some steps (by layer: %s), where a cache took their outputs from "
                "an earlier step; transformer.disable_cache() records every step",
                self.gaps,
            )

    def _take(self, result: LayerResult, rows: slice) -> LayerResult:
        """`rows` of the batch, on the device where records are kept."""

        def take(tensor: Tensor) -> Tensor:
            taken = tensor[rows]
            if self._device is not None and self._device != tensor.device:
                return taken.to(self._device)
            # Cloned, so that the other branch's half is freed.
            return tensor if len(taken) == len(tensor) else taken.clone()

        return _combine(take, result)

    def compiled_forward(self, call: TransformerCall, results: Mapping[int, LayerResult]) -> None:
        self._compiled = _Compiled(call, results, self._compiled)

    def _drain(self) -> None:
        """Record what ran inside of a compiled graph."""
        chain, entry = [], self._compiled
        while entry is not None:
            chain.append(entry)
            entry = entry.before
        self._compiled = None
        for entry in reversed(chain):
            self.after_forward(Forward(entry.call, None), entry.results, None)

    def _add(self, layer: int, result: LayerResult, timestep: Tensor | None, forward: Forward) -> None:
        entry = next((s for s in self._sums if s.layer == layer and s.call == self._number), None)
        if entry is None or self._steps != "mean":
            averaged = self._steps == "mean" and forward.prompt is not None
            entry = _Sum(layer, forward.call.grid, self._number, averaged)
            self._sums.append(entry)
        entry.add(result, timestep)


class _Sum:
    """One layer's result in one forward, or the running sum of them over the steps of one call."""

    def __init__(self, layer: int, grid: tuple[int, ...], call: int, averaged: bool) -> None:
        self.layer = layer
        self.grid = grid
        self.call = call
        self._averaged = averaged
        self._total: LayerResult | None = None
        self._timesteps: list[Tensor | None] = []

    def add(self, result: LayerResult, timestep: Tensor | None) -> None:
        self._total = result if self._total is None else _combine(torch.add, self._total, result)
        self._timesteps.append(timestep)

    def record(self) -> Record:
        assert self._total is not None
        count = len(self._timesteps)
        mean = self._total if count == 1 else _combine(lambda total: total / count, self._total)
        # Timesteps are read here and not while the model runs: reading them waits for the GPU.
        times = [(float("nan"),) if t is None else tuple(t.tolist()) for t in self._timesteps]
        timestep: float | tuple[float, ...]
        if self._averaged:
            timestep = tuple(step[0] for step in times)
        else:
            timestep = times[0][0] if len(set(times[0])) == 1 else times[0]
        return Record(self.layer, timestep, mean.maps, mean.statistics, self.grid, self.call)


def _combine(function: Callable[..., Tensor], *results: LayerResult) -> LayerResult:
    """Apply `function` tensor by tensor."""
    maps = None if results[0].maps is None else function(*(r.maps for r in results))
    statistics = None
    if results[0].statistics is not None:
        names = [field.name for field in fields(AttentionStatistics)]
        columns = {name: [getattr(r.statistics, name) for r in results] for name in names}
        statistics = AttentionStatistics(
            **{name: None if ts[0] is None else function(*ts) for name, ts in columns.items()}  # type: ignore[arg-type]
        )
    return LayerResult(maps, statistics)


def _mean_over_heads(maps: Tensor) -> Tensor:
    """[N, T'] from one image's map, [N, T'] or [H, N, T']."""
    return maps if maps.dim() == 2 else maps.mean(dim=0)
