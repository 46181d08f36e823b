"""Edits of single words in what image tokens read from the text: dropped, swapped or weighted.

An edit is a matrix on the text values, as in `seg4diff.editing.blur`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seg4diff.attention.observer import Forward, Observer, PromptCall, attach
from seg4diff.attention.patch import patch_of
from seg4diff.attention.requests import LayerRequest
from seg4diff.backbones import Backbone
from seg4diff.backbones.text import TextSpan, find_words
from seg4diff.editing.blur import edited_text_value
from seg4diff.kernels.types import wide_dtype


@dataclass(frozen=True)
class WordEdits:
    """Changes to how words of a prompt are read.

    Attributes:
        drop: words that image rows no longer read; their mass is lost.
        swap: pairs of words that are read in each other's place.
        weights: words and the factors by which what is read of them is multiplied.

    Raises:
        ValueError: nothing to change, or a weight that is not finite.
        TypeError: an argument of another type.
    """

    drop: tuple[str, ...] = ()
    swap: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not (self.drop or self.swap or self.weights):
            raise ValueError("nothing to edit: name words in drop=, swap= or weights=")
        for word, weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"weights={{{word!r}: {weight!r}}} must hold numbers")
            if not math.isfinite(weight):
                raise ValueError(f"weights={{{word!r}: {weight!r}}} must be finite")

    def matrix(self, spans: Sequence[TextSpan], texts: Mapping[str, str], text_length: int) -> Tensor:
        """G [T, T], float64, for one prompt: row i holds what image rows read in place of token i.

        Args:
            spans: the text encoders.
            texts: the prompt that each of them was given, by the encoder's name.
            text_length: number T of text tokens.

        Raises:
            ValueError: a word is not in the prompt, or two edits share a token.
        """
        matrix = torch.eye(text_length, dtype=torch.float64)
        owner: dict[int, str] = {}

        def columns_of(word: str) -> list[int]:
            columns = find_words(spans, texts, word)
            for column in columns:
                if column in owner:
                    raise ValueError(f"{word!r} and {owner[column]!r} share a token; edit each word once")
            owner.update(dict.fromkeys(columns, word))
            return columns

        for word in self.drop:
            matrix[columns_of(word)] = 0
        for word, weight in self.weights:
            matrix[columns_of(word)] *= weight
        for pair in self.swap:
            one, other = (columns_of(word) for word in pair)
            for span in spans:
                last = span.first + span.length
                here, there = ([c for c in cs if span.first <= c < last] for cs in (one, other))
                if here and there:
                    _read_instead(matrix, here, there)
                    _read_instead(matrix, there, here)
        return matrix


def _read_instead(matrix: Tensor, columns: list[int], others: list[int]) -> None:
    """Make `matrix` read `others` at `columns`: one for one if as many, else the mean of all."""
    matrix[columns] = 0
    if len(columns) == len(others):
        matrix[columns, others] = 1
    else:
        matrix[torch.tensor(columns)[:, None], others] = 1 / len(others)


@contextmanager
def edit(
    pipe: Any,
    layers: Sequence[int] | int | None = None,
    *,
    drop: str | Sequence[str] = (),
    swap: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    prompt: str | Sequence[str] | None = None,
) -> Iterator[None]:
    """Drop, swap or re-weight words of the prompt in what image tokens read, while a pipeline runs.

    Words are found in each image's prompt, all their occurrences and all their tokens, in every text encoder.
    Only the conditional branch is edited, and only what image rows read: text rows, the pooled
    embedding, and the other tokens (which have seen the word in the text encoder) stay as they are. Nesting,
    captures and exceptions are as in `perturb`.

    Args:
        pipe: a pipeline.
        layers: the layers to edit; all when None.
        drop: words that are no longer read. Their probability mass is lost, as the softmax is not repeated.
        swap: `{"cat": "dog"}` makes each be read in the other's place: token for token where they have
            equally many, else each token reads the mean of the other word's.
        weights: `{"red": 2.0}` multiplies what is read of a word.
        prompt: the text (one for each prompt) where the pipeline is called with embeddings instead of text.

    Raises:
        RuntimeError: when the pipeline runs, no prompt is known.
        NotImplementedError: the model family is not supported.
        TypeError: `pipe` is a bare transformer, which has no words.
        ValueError: a layer out of range, nothing to edit; when the pipeline runs, a word that is not in the
            prompt (the message lists those that are), or that two edits name.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "transformer"):
        raise TypeError(f"{type(pipe).__name__} is a bare transformer and has no words; give the pipeline")
    edits = WordEdits(
        drop=(drop,) if isinstance(drop, str) else tuple(drop),
        swap=tuple((swap or {}).items()),
        weights=tuple((weights or {}).items()),
    )
    given = (prompt,) if isinstance(prompt, str) else None if prompt is None else tuple(prompt)
    editor = _Editor(pipe, state.backbone, edits, given)
    with attach(pipe, state.layers(layers), LayerRequest(edit_text_value=editor.edit_text_value), editor):
        yield


class _Editor(Observer):
    """Knows the matrix of every image of the pipeline call that runs."""

    def __init__(
        self, pipe: Any, backbone: Backbone, edits: WordEdits, prompt: tuple[str, ...] | None
    ) -> None:
        self._pipe = pipe
        self._backbone = backbone
        self._edits = edits
        self._given_prompt = prompt
        self._matrices: Tensor | None = None  # [images, T, T]
        self._first_row: int | None = None  # the conditional rows of the forward that runs begin here

    def begin_call(self, prompt: PromptCall) -> None:
        self._matrices = None
        spans = self._backbone.text_spans(self._pipe, prompt.text_tokens)
        found: dict[tuple[str, ...], Tensor] = {}
        matrices = []
        for image in range(prompt.images):
            texts = prompt.text_of(image, self._given_prompt)
            key = tuple(texts[span.encoder] for span in spans)
            if key not in found:
                found[key] = self._edits.matrix(spans, texts, prompt.text_tokens)
            matrices.append(found[key])
        self._matrices = torch.stack(matrices)

    def end_call(self) -> None:
        self._matrices = None

    def before_forward(self, forward: Forward, arguments: dict[str, Any]) -> dict[str, Any]:
        rows = forward.rows("conditional")
        outside = forward.prompt is None or rows.stop == rows.start
        self._first_row = None if outside else rows.start
        return arguments

    def edit_text_value(self, text_value: Tensor) -> Tensor:
        if self._matrices is None or self._first_row is None:  # outside of a pipeline call's own branch
            return text_value
        unchanged, read = text_value[: self._first_row], text_value[self._first_row :]
        # Rows that perturbation guidance adds repeat the conditional ones.
        self._matrices = self._matrices.to(device=read.device, dtype=wide_dtype(read.dtype))
        matrices = self._matrices.repeat(len(read) // len(self._matrices), 1, 1)
        return torch.cat([unchanged, edited_text_value(matrices, read)])
