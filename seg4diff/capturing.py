"""Maps and statistics of a model's joint attention while it runs.

Called by users around a pipeline call, and by segmentation and training around transformer calls. It hides
which results and rows of a forward count, and how steps are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from seg4diff.backbones import CallInputs
from seg4diff.kernels.types import AttentionStatistics, MapRequest
from seg4diff.patching import Patch, patch_of
from seg4diff.processors import RESULT_ATTRIBUTE, LayerRequest, LayerResult
from seg4diff.tokens import find_words
from seg4diff.watching import Branch, EncodedPrompt, watching_forwards, watching_pipeline

Steps = Literal["mean", "each"]


@dataclass(frozen=True)
class Record:
    """What one layer's attention did in one forward, or on average over the steps of one pipeline call.

    Attributes:
        layer: number of the block.
        timestep: of the forward; of an average, the tuple of the timesteps averaged. A forward whose rows
            have different timesteps has a tuple with one for each row.
        maps: the map asked for, float32, [B, N, T'] or [B, H, N, T'] (see ``MapRequest``), or None.
        statistics: attention mass and value norms, or None.
        grid: height and width of the image tokens, N = height * width.
        call: number of the pipeline call inside the context, from 0; of the forward on a bare transformer.
    """

    layer: int
    timestep: float | tuple[float, ...]
    maps: Tensor | None
    statistics: AttentionStatistics | None
    grid: tuple[int, int]
    call: int


class Capture:
    """What :func:`capture` yields; read it inside or after the context."""

    def __init__(
        self,
        patch: Patch,
        pipe: Any,
        layers: tuple[int, ...],
        request: LayerRequest,
        steps: Steps,
        branch: Branch,
        prompt: list[str] | None,
    ) -> None:
        self._patch = patch
        self._pipe = pipe
        self._layers = layers
        self._request = request
        self._steps = steps
        self._branch = branch
        self._given_prompt = prompt
        self._sums: list[_Sum] = []
        self._prompts: dict[int, EncodedPrompt] = {}
        self._in_pipeline_call = False
        self._call = -1
        self._inputs: CallInputs | None = None
        self._text_length = 0

    @property
    def records(self) -> tuple[Record, ...]:
        """Oldest first: one a layer and forward, or a layer and pipeline call where steps are averaged."""
        return tuple(entry.record() for entry in self._sums)

    def heatmap(
        self,
        words: str,
        *,
        layers: Sequence[int] | int | None = None,
        image: int = 0,
        encoder: Literal["clip", "t5"] | None = None,
        resize: bool = True,
    ) -> Tensor:
        """How strongly each place of the picture reads a word: mean over steps, layers and the word's tokens.

        Args:
            words: a word or phrase of the prompt; all its occurrences count, case does not matter.
            layers: the layers to average; all that were captured when None.
            image: which picture of the batch.
            encoder: count the tokens of this text encoder only.
            resize: bilinear to the picture's size in pixels (on a bare transformer: to the latent's); else
                the grid of image tokens.

        Returns:
            [height, width], float32, from the latest pipeline call.

        Raises:
            RuntimeError: nothing was captured, or no prompt is known.
            ValueError: the word is not in the prompt; the message lists the words that are.
            IndexError: the batch has no such picture.
        """
        records = [r for r in self.records if r.maps is not None]
        if not records:
            raise RuntimeError("no map was captured: run the pipeline inside the `with` block first")
        wanted = self._patch.layers(layers)
        latest = [r for r in records if r.call == records[-1].call]
        chosen = [r for r in latest if r.layer in wanted]
        if not chosen:
            have = sorted({r.layer for r in latest})
            raise ValueError(f"layers={layers!r} were not captured; captured layers: {have}")
        per_record = [r.maps for r in chosen if r.maps is not None]
        rows = len(per_record[0])
        if not 0 <= image < rows:
            raise IndexError(f"image={image} is out of range: the batch has pictures 0 to {rows - 1}")
        maps = torch.stack([_mean_over_heads(m[image]) for m in per_record]).mean(dim=0)  # [N, T']
        columns = self._columns(words, chosen[0].call, image, rows, encoder)
        grid = chosen[0].grid
        heat = maps[:, columns].mean(dim=-1).reshape(grid)
        if not resize:
            return heat
        height, width = (side * self._pixels_per_token() for side in grid)
        return F.interpolate(heat[None, None], size=(height, width), mode="bilinear", align_corners=False)[
            0, 0
        ]

    def _pixels_per_token(self) -> int:
        return 1 if self._pipe is None else self._patch.backbone.pixel_multiple(self._pipe)

    def _columns(self, words: str, call: int, image: int, rows: int, encoder: str | None) -> list[int]:
        """Columns of the captured map that hold ``words`` in the prompt of row ``image`` of ``rows``."""
        if self._pipe is None:
            raise RuntimeError("a bare transformer has no tokenizer; capture the pipeline to look for words")
        prompt = self._prompts.get(call)
        texts: Sequence[tuple[str, str]]
        if self._given_prompt is not None:
            texts = [(text, text) for text in self._given_prompt]
        elif prompt is not None and prompt.texts:
            texts = prompt.texts
        else:
            raise RuntimeError(
                "no prompt is known (embeddings were given?); name it with capture(..., prompt=)"
            )
        # Several pictures of one prompt follow each other in the batch.
        clip_text, t5_text = texts[image * len(texts) // rows]
        encodings = self._patch.backbone.text_encodings(self._pipe, self._text_length)
        chosen = [e for e in encodings if encoder in (None, e.encoder)]
        if not chosen:
            raise ValueError(f"encoder={encoder!r} is not in this pipeline: {[e.encoder for e in encodings]}")
        found = find_words(chosen, [t5_text if e.encoder == "t5" else clip_text for e in chosen], words)
        assert self._request.maps is not None
        first, last = self._request.maps.columns(self._text_length)
        columns = [column - first for column in found if first <= column < last]
        if not columns:
            raise ValueError(
                f"{words!r} has no token inside text={self._request.maps.text!r}, the columns captured"
            )
        return columns

    # What happens while the model runs

    def _begin_pipeline_call(self, prompt: EncodedPrompt) -> None:
        self._call += 1
        self._prompts[self._call] = prompt
        self._in_pipeline_call = True

    def _end_pipeline_call(self) -> None:
        self._in_pipeline_call = False

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        backbone, transformer = self._patch.backbone, self._patch.transformer
        self._inputs = backbone.read_call(transformer, args, kwargs)
        self._text_length = self._inputs.text_length
        self._patch.clear_results()
        stop = self._patch.stop_after
        return args, kwargs if stop is None else backbone.stop_after(transformer, kwargs, stop)

    def _after_forward(self, _: Any) -> None:
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            return
        stop = self._patch.stop_after
        if any(stop is None or layer <= stop for layer in inputs.skipped_layers):
            return  # a second call in one step, as skip-layer guidance makes it
        if not self._in_pipeline_call:
            self._call += 1
        rows = self._rows(inputs.batch)
        timestep = None if inputs.timestep is None else inputs.timestep.detach().reshape(-1)
        if timestep is not None and len(timestep) == inputs.batch:
            timestep = timestep[rows]
        for layer in self._layers:
            results = getattr(self._patch.attention(layer), RESULT_ATTRIBUTE, None)
            requests = self._patch.requests(layer)
            if results is None or self._request not in requests:
                continue
            entry = next((s for s in self._sums if s.layer == layer and s.call == self._call), None)
            if entry is None or self._steps == "each":
                averaged = self._steps == "mean" and self._in_pipeline_call
                entry = _Sum(layer, inputs.grid, self._call, averaged)
                self._sums.append(entry)
            entry.add(_take_rows(results[requests.index(self._request)], rows), timestep)

    def _rows(self, batch: int) -> slice:
        """The rows that count: those of the branch in a pipeline call, else all."""
        prompt = self._prompts.get(self._call) if self._in_pipeline_call else None
        return slice(0, batch) if prompt is None else prompt.rows_of(self._branch, batch)


@contextmanager
def capture(
    target: Any,
    layers: Sequence[int] | int | None = None,
    *,
    maps: MapRequest | None = MapRequest(),
    statistics: bool = False,
    steps: Steps | None = None,
    branch: Branch = "conditional",
    prompt: str | Sequence[str] | None = None,
    stop_early: bool = False,
) -> Iterator[Capture]:
    """Record the image-to-text attention of some layers while a pipeline or a transformer runs.

    Maps carry gradients where the forward does, with non-reentrant gradient checkpointing too. The model is
    stock again when the context ends, also after an exception.

    Args:
        target: a patched pipeline, or a bare transformer.
        layers: the layers to record; all when None.
        maps: the map to record, see ``MapRequest``; None for statistics alone.
        statistics: also record attention mass and value norms.
        steps: ``"mean"`` keeps one running average a layer and pipeline call, ``"each"`` every step. Default:
            ``"mean"`` for a pipeline, ``"each"`` for a bare transformer.
        branch: which half of a pipeline's batch to keep under classifier-free guidance. Calls of a bare
            transformer always keep every row.
        prompt: the text (one for each picture) where the pipeline is called with embeddings instead of text.
        stop_early: leave out everything that the last of ``layers`` does not need for its map: its values,
            its feed-forward and all later blocks. What the model returns is then meaningless.

    Yields:
        A :class:`Capture`, filled as the model runs.

    Raises:
        RuntimeError: ``target`` is not patched.
        NotImplementedError, TypeError: ``target`` is of no supported model family.
        ValueError: a layer out of range, an unknown name, or a state of the model that cannot be captured.
    """
    state = patch_of(target)
    if maps is None and not statistics:
        raise ValueError("maps=None and statistics=False: nothing to capture")
    for name, value, accepted in (
        ("steps", steps, (*get_args(Steps), None)),
        ("branch", branch, get_args(Branch)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(map(repr, accepted))}")
    pipe = target if hasattr(target, "transformer") else None
    chosen = state.layers(layers)
    request = LayerRequest(maps=maps, statistics=statistics)
    captured = Capture(
        state,
        pipe,
        chosen,
        request,
        steps or ("each" if pipe is None else "mean"),
        branch,
        [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt),
    )
    with ExitStack() as stack:
        stack.enter_context(state.asking(chosen, request, stop_early=stop_early))
        stack.callback(state.clear_results)
        stack.enter_context(watching_forwards(target, captured._before_forward, captured._after_forward))
        if pipe is not None:
            stack.enter_context(
                watching_pipeline(pipe, captured._begin_pipeline_call, captured._end_pipeline_call)
            )
        yield captured


class _Sum:
    """One layer's result in one forward, or the running sum of them over the steps of one call."""

    def __init__(self, layer: int, grid: tuple[int, int], call: int, averaged: bool) -> None:
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
    """Apply ``function`` tensor by tensor."""
    maps = None if results[0].maps is None else function(*(r.maps for r in results))
    statistics = None
    if results[0].statistics is not None:
        names = [field.name for field in fields(AttentionStatistics)]
        columns = {name: [getattr(r.statistics, name) for r in results] for name in names}
        statistics = AttentionStatistics(
            **{name: None if ts[0] is None else function(*ts) for name, ts in columns.items()}  # type: ignore[arg-type]
        )
    return LayerResult(maps, statistics)


def _take_rows(result: LayerResult, rows: slice) -> LayerResult:
    # Cloned, so that the other branch's half is freed.
    return _combine(
        lambda tensor: tensor if len(tensor[rows]) == len(tensor) else tensor[rows].clone(), result
    )


def _mean_over_heads(maps: Tensor) -> Tensor:
    """[N, T'] from one picture's map, [N, T'] or [H, N, T']."""
    return maps if maps.dim() == 2 else maps.mean(dim=0)
