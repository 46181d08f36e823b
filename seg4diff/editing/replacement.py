"""A word in another's place: its tokens get the attention that the other's get in the other's prompt.

After Prompt-to-Prompt (Hertz et al., arXiv 2208.01626), for joint attention. Further rows of the batch run
the prompt with the old word on the same latents, and in image rows of the drawn prompt the probabilities of
the new word's tokens become those that the further rows give to the old word's tokens. All other
probabilities stay, so that a row sums to one but for the difference of the two words' mass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seg4diff.attention.observer import Forward, Observer, PromptCall
from seg4diff.attention.requests import LayerResult, Projections
from seg4diff.backbones import Backbone, Pipeline
from seg4diff.backbones.text import TextSpan, find_words, occurrences
from seg4diff.kernels.api import attention_maps
from seg4diff.kernels.types import MapRequest, wide_dtype

Pair = tuple[list[int], list[int]]
"""Text columns of a word in the old prompt, and of the word that takes its place in the new one."""


class Replacement(Observer):
    """Runs the prompt with the old words beside the pipeline's own, and moves its probabilities.

    Args:
        pipe: the pipeline.
        backbone: its family.
        words: pairs of an old word and the new one, which the prompt holds.
        until: share of the denoising steps, from the first, in which probabilities are moved.
    """

    def __init__(
        self, pipe: Pipeline, backbone: Backbone, words: Sequence[tuple[str, str]], until: float
    ) -> None:
        self._pipe = pipe
        self._backbone = backbone
        self._words = words
        self._until = until
        self._steps = 0  # of the call that runs, in which probabilities are moved
        self._source: dict[str, Any] = {}  # text arguments of the rows that are added
        self._columns = torch.empty(0, dtype=torch.int64)  # [C] text columns of any word, old or new
        self._moved = torch.empty(0)  # [images, C, C]: from an old word's column to a new word's
        self._batch: int | None = None  # rows of the forward that runs before some are added
        self._first = 0  # the conditional ones of them begin here

    def begin_call(self, prompt: PromptCall) -> None:
        if prompt.steps is None and self._until < 1:
            raise ValueError(
                f"replace_until={self._until} is a share of the steps, but this pipeline does not tell their "
                "number (it has no num_timesteps); use replace_until=1"
            )
        self._steps = math.ceil(self._until * (prompt.steps or 1))
        if prompt.steps is None:
            self._steps = 2**63
        spans = self._backbone.text_spans(self._pipe, prompt.text_tokens)
        pairs = [self._pairs(spans, prompt.text_of(image)) for image in range(prompt.images)]
        columns = sorted({column for found in pairs for pair in found for side in pair for column in side})
        place = {column: position for position, column in enumerate(columns)}
        self._columns = torch.tensor(columns)
        self._moved = torch.zeros(prompt.images, len(columns), len(columns))
        for moved, of_image in zip(self._moved, pairs, strict=True):
            for old, new in of_image:
                for position, column in enumerate(new):
                    if len(old) == len(new):
                        moved[place[old[position]], place[column]] = 1
                    else:  # the old word's mass, in equal parts
                        moved[[place[other] for other in old], place[column]] = 1 / len(new)
        self._source = self._backbone.encode_again(
            self._pipe, prompt.conditional, lambda text: _with_old_words(text, self._words)[0]
        )

    def _pairs(self, spans: Sequence[TextSpan], texts: Mapping[str, str]) -> list[Pair]:
        """Columns of every old word and the new one in its place, in every text encoder.

        Raises:
            ValueError: a new word is not in the prompt.
        """
        for _, word in self._words:
            find_words(spans, texts, word)
        pairs = []
        for span in spans:
            text = texts[span.encoder]
            source, places = _with_old_words(text, self._words)
            for old, new in places:
                pair = span.columns(source, *old), span.columns(text, *new)
                if all(pair):  # else cut off with the end of a long prompt
                    pairs.append(pair)
        return pairs

    def end_call(self) -> None:
        self._source = {}

    def before_forward(self, forward: Forward, arguments: dict[str, Any]) -> dict[str, Any]:
        self._batch = None
        rows = forward.rows("conditional")
        count = rows.stop - rows.start
        if forward.prompt is None or forward.step >= self._steps or count != len(self._moved):
            return arguments
        self._batch, self._first = forward.call.batch, rows.start
        arguments = self._backbone.rows_again(arguments, self._batch, rows)
        for name, value in self._source.items():
            own = arguments[name][: self._batch]
            arguments[name] = [*own, *value] if isinstance(own, list) else torch.cat([own, value.to(own)])
        return arguments

    def after_forward(self, forward: Forward, results: Mapping[int, LayerResult], output: Any) -> Any:
        if self._batch is None:
            return None
        batch, self._batch = self._batch, None
        if isinstance(output, tuple):
            return (output[0][:batch], *output[1:])
        return type(output)(sample=output.sample[:batch])

    def edit_image(self, image: Tensor, read: Projections, lse: Tensor, scale: float | None) -> Tensor:
        """The output of image rows, with the probabilities of the new words' tokens exchanged."""
        if self._batch is None:
            return image
        wide = wide_dtype(image.dtype)
        self._columns = columns = self._columns.to(image.device)
        self._moved = moved = self._moved.to(device=image.device, dtype=wide)
        request = MapRequest(heads="each", columns=("text", columns))

        def probabilities(rows: slice) -> Tensor:  # [images, H, N, C]
            return attention_maps(
                read.query[rows],
                read.key[rows],
                None,
                read.text_key[rows],
                scale=scale,
                maps=request,
                text_bias=None if read.text_bias is None else read.text_bias[rows],
                # The log-sum-exp of the attention has no gradient.
                lse=None if torch.is_grad_enabled() else lse[rows, :, : image.shape[1]],
            ).maps

        count = len(moved)
        source = slice(self._batch, self._batch + count)
        given = probabilities(source) @ moved[:, None]
        replaced = (moved.sum(dim=1) > 0)[:, None, None]  # [images, 1, 1, C]
        edited = image.clone()
        # Rows behind those added here are copies of the conditional ones that perturbation guidance adds.
        for first in (self._first, *range(source.stop, len(image), count)):
            rows = slice(first, first + count)
            change = given - probabilities(rows) * replaced
            value = read.text_value[rows][:, columns].to(wide)
            with torch.autocast(image.device.type, enabled=False):
                added = torch.einsum("bhnc,bchd->bnhd", change, value)
            edited[rows] = (image[rows].to(wide) + added).to(image.dtype)
        return edited


def _with_old_words(
    text: str, words: Sequence[tuple[str, str]]
) -> tuple[str, list[tuple[tuple[int, int], tuple[int, int]]]]:
    """The text with old words for the new ones, and the characters [start, stop) of each: old, then new.

    Raises:
        ValueError: two new words overlap.
    """
    found = sorted((place, old) for old, new in words for place in occurrences(text, new))
    source, places, end = "", [], 0
    for (start, stop), old in found:
        if start < end:
            raise ValueError(f"{text[start:stop]!r} in the prompt is replaced twice; name each word once")
        source += text[end:start]
        places.append(((len(source), len(source) + len(old)), (start, stop)))
        source += old
        end = stop
    return source + text[end:], places
