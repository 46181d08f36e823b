"""Edits of single words in what image tokens read from the text: dropped, swapped, weighted or replaced.

All but the last are a matrix on the text values, as in `seg4diff.editing.blur`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seg4diff.attention.observer import Forward, Observer, PromptCall, attach
from seg4diff.attention.patch import patch_of
from seg4diff.attention.requests import LayerRequest
from seg4diff.backbones import Backbone, Pipeline
from seg4diff.backbones.text import Special, TextSpan, Words, find_words
from seg4diff.editing.blur import edited_text_value
from seg4diff.editing.replacement import Replacement
from seg4diff.kernels.types import wide_dtype

_LARGEST_WEIGHT = 1e4  # far below where products overflow


@dataclass(frozen=True)
class WordEdits:
    """Changes to how words of a prompt are read.

    Attributes:
        drop: words that image rows no longer read; their mass is lost.
        swap: pairs of words that are read in each other's place.
        weights: words and the factors by which what is read of them is multiplied.

    Raises:
        ValueError: a weight that is not a number below 10000.
        TypeError: an argument of another type.
    """

    drop: tuple[Words, ...] = ()
    swap: tuple[tuple[Words, Words], ...] = ()
    weights: tuple[tuple[Words, float], ...] = ()

    def __post_init__(self) -> None:
        for word, weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"weights={{{word!r}: {weight!r}}} must hold numbers")
            if not abs(weight) < _LARGEST_WEIGHT:  # NaN is not
                raise ValueError(
                    f"weights={{{word!r}: {weight!r}}} must be a number below {_LARGEST_WEIGHT:.0f}; "
                    "1 changes nothing"
                )

    @property
    def any(self) -> bool:
        """Whether there is anything to change."""
        return bool(self.drop or self.swap or self.weights)

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
        owner: dict[int, Words] = {}

        def columns_of(word: Words) -> list[int]:
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
            try:
                one, other = (columns_of(word) for word in pair)
            except ValueError as error:
                raise ValueError(
                    f"{error} (swap exchanges two words of the prompt; replace puts a word in another's "
                    "place)"
                ) from None
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
    pipe: Pipeline,
    layers: Sequence[int] | int | None = None,
    *,
    drop: Words | Sequence[Words] = (),
    swap: Mapping[str, str] | Mapping[Words, Words] | None = None,
    weights: Mapping[str, float] | Mapping[Words, float] | None = None,
    replace: Mapping[str, str] | None = None,
    replace_until: float = 0.5,
    prompt: str | Sequence[str] | None = None,
) -> Iterator[None]:
    """Drop, swap, re-weight or replace words of the prompt in what image tokens read, while a pipeline runs.

    Words are found in each image's prompt, all their occurrences and all their tokens, in every text encoder;
    `seg4diff.Special` names tokens that are not words. Only the conditional branch is edited, and only what
    image rows read: text rows, the pooled embedding, and the other tokens (which have seen the word in the
    text encoder) stay as they are. Nesting, captures and exceptions are as in `perturb`.

    Args:
        pipe: a pipeline.
        layers: the layers to edit; all when None.
        drop: words that are no longer read. Their probability mass is lost, as the softmax is not repeated.
        swap: `{"cat": "dog"}` exchanges two words that are both in the prompt: where the image would read
            "cat" it reads "dog", and the other way round. Token for token where they have equally many, else
            each token reads the mean of the other word's. To put a dog where a cat would be, use `replace`.
        weights: `{"red": 2.0}` multiplies what is read of a word.
        replace: `{"cat": "dog"}` draws a prompt with "dog" in the layout that it has with "cat" (after
            Prompt-to-Prompt): call the pipeline with the new prompt, `pipe("a dog on a sofa")`. In every
            step the prompt with the old word also runs on the same latents, one more row per image, and in
            image rows the probabilities of the new word's tokens are those of the old word's there: token for
            token, or the old word's mass in equal parts where the numbers of tokens differ. Open it outside
            of other edits, which then edit the rows that are drawn alone.
        replace_until: the share of the denoising steps, from the first, in which `replace` acts. The lower,
            the more freely the new word takes its own shape.
        prompt: the text (one for each prompt) where the pipeline is called with embeddings instead of text.

    Raises:
        RuntimeError: when the pipeline runs, no prompt is known, or `replace` of embeddings.
        NotImplementedError: the model family is not supported.
        TypeError: `pipe` is a bare transformer, which has no words.
        ValueError: a layer out of range, nothing to edit, `replace_until` outside (0, 1]; when the pipeline
            runs, a word that is not in the prompt (the message lists those that are), or that two edits name.
    """
    state = patch_of(pipe)
    if not hasattr(pipe, "transformer"):
        raise TypeError(f"{type(pipe).__name__} is a bare transformer and has no words; give the pipeline")
    edits = WordEdits(
        drop=(drop,) if isinstance(drop, (str, Special)) else tuple(drop),
        swap=tuple((swap or {}).items()),
        weights=tuple((weights or {}).items()),
    )
    if not (edits.any or replace):
        raise ValueError("nothing to edit: name words in drop=, swap=, weights= or replace=")
    if not 0 < replace_until <= 1:
        raise ValueError(f"replace_until={replace_until!r} must be a share of the steps: above 0, at most 1")
    chosen = state.layers(layers)
    given = (prompt,) if isinstance(prompt, str) else None if prompt is None else tuple(prompt)
    with ExitStack() as stack:
        if replace:
            replacement = Replacement(pipe, state.backbone, tuple(replace.items()), replace_until)
            request = LayerRequest(edit_image=replacement.edit_image)
            stack.enter_context(attach(pipe, chosen, request, replacement))
        if edits.any:
            editor = _Editor(pipe, state.backbone, edits, given)
            request = LayerRequest(edit_text_value=editor.edit_text_value)
            stack.enter_context(attach(pipe, chosen, request, editor))
        yield


class _Editor(Observer):
    """Knows the matrix of every image of the pipeline call that runs."""

    def __init__(
        self, pipe: Pipeline, backbone: Backbone, edits: WordEdits, prompt: tuple[str, ...] | None
    ) -> None:
        self._pipe = pipe
        self._backbone = backbone
        self._edits = edits
        self._given_prompt = prompt
        self._matrices: Tensor | None = None  # [images, T, T]
        self._rows: slice | None = None  # conditional rows of the forward that runs
        self._batch = 0  # all its rows, but for those that inner contexts add

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
        self._rows, self._batch = None if outside else rows, forward.call.batch
        return arguments

    def edit_text_value(self, text_value: Tensor) -> Tensor:
        if self._matrices is None or self._rows is None:  # outside of a pipeline call's own branch
            return text_value
        self._matrices = self._matrices.to(device=text_value.device, dtype=wide_dtype(text_value.dtype))
        # Rows that perturbation guidance adds behind the batch repeat the conditional ones.
        copies = text_value[self._batch :]
        repeated = self._matrices.repeat(len(copies) // len(self._matrices), 1, 1)
        return torch.cat(
            [
                text_value[: self._rows.start],
                edited_text_value(self._matrices, text_value[self._rows]),
                text_value[self._rows.stop : self._batch],
                edited_text_value(repeated, copies),
            ]
        )
