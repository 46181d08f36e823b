"""Changing what image tokens read from the text: the paper's blur, and edits of single words.

A linear change of the image-to-text probabilities P along the text axis is a matrix on the right, and
(P G) V = P (G V): the layer attends as ever, and image rows read the text values G V. So every change here
costs one small matrix product a layer, is exact on every backend, and leaves the text rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from seg4diff.attention.observer import Forward, Observer, PromptCall, attach
from seg4diff.attention.patch import patch_of
from seg4diff.attention.requests import LayerRequest
from seg4diff.backbones import Backbone
from seg4diff.backbones.text import TextSpan, find_words
from seg4diff.kernels.types import MapRequest

Padding = Literal["symmetric", "reflect"]


@dataclass(frozen=True, eq=False)
class Blur:
    """A Gaussian blur of the image-to-text probabilities along the text axis (Seg4Diff, appendix A.3).

    Attributes:
        sigma: standard deviation in text tokens. With the default 9 and a kernel of 5 it is nearly a box.
        kernel_size: number of weights, odd.
        padding: what lies beyond the first and last token. ``"symmetric"`` is ``b a | a b c`` and preserves
            every row's mass. ``"reflect"`` is ``c b | a b c`` and does not: of 0.8 on the first token and 0.2
            spread over the others, about 0.68 in all are left.
        text: the text columns to blur, a contiguous range; the padding applies at its ends.

    Raises:
        ValueError: sigma is not above 0, the kernel size is not odd, or the padding is unknown.
        TypeError: an argument of another type.
    """

    sigma: float = 9.0
    kernel_size: int = 5
    padding: Padding = "symmetric"
    text: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, (int, float)):
            raise TypeError(f"sigma={self.sigma!r} must be a number of text tokens")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma!r} must be above 0 (text tokens)")
        if isinstance(self.kernel_size, bool) or not isinstance(self.kernel_size, int):
            raise TypeError(f"kernel_size={self.kernel_size!r} must be an odd integer")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd and at least 1, such as 5")
        if self.padding not in get_args(Padding):
            accepted = ", ".join(map(repr, get_args(Padding)))
            raise ValueError(f"padding={self.padding!r} is unknown; accepted: {accepted}")
        MapRequest(columns=("text", self.text))  # checks the range

    def matrix(
        self, text_length: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """G [T, T]: blurred probabilities are P G. The identity outside ``text``.

        A row of probabilities p, as a column vector, becomes A p, where row i of A holds the kernel around
        token i with its ends folded back into the range. So G is the transpose of A, which is not A itself
        where the padding is ``"reflect"``.
        """
        first, last = MapRequest(columns=("text", self.text)).text_range(text_length)
        length, reach = last - first, self.kernel_size // 2
        offsets = torch.arange(-reach, reach + 1, device=device)
        weights = torch.exp(-(offsets.to(dtype) ** 2) / (2 * self.sigma**2))
        weights = weights / weights.sum()
        position = torch.arange(length, device=device)[:, None] + offsets  # [T', kernel_size]
        if self.padding == "symmetric":
            folded = position.remainder(2 * length)
            folded = torch.where(folded < length, folded, 2 * length - 1 - folded)
        else:
            period = max(2 * (length - 1), 1)
            folded = position.remainder(period)
            folded = torch.where(folded < length, folded, period - folded)
        blur = weights.new_zeros(length, length).scatter_add_(1, folded, weights.expand_as(folded))
        matrix = torch.eye(text_length, dtype=dtype, device=device)
        matrix[first:last, first:last] = blur.T
        return matrix

    def __call__(self, text_value: Tensor) -> Tensor:
        """The text values that blurred image rows read, from the text values [B, T, H, D]."""
        matrix = self.matrix(text_value.shape[1], text_value.device, _wide(text_value))
        return edited_text_value(matrix, text_value)


def edited_text_value(matrix: Tensor, text_value: Tensor) -> Tensor:
    """G V, rounded once: ``matrix`` [T, T] or [B, T, T] times ``text_value`` [B, T, H, D], in its dtype."""
    wide = _wide(text_value)
    with torch.autocast(text_value.device.type, enabled=False):
        edited = matrix.to(wide) @ text_value.flatten(2).to(wide)
    return edited.unflatten(2, text_value.shape[2:]).to(text_value.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextmanager
def perturb(
    target: Any,
    layers: Sequence[int] | int | None,
    *,
    sigma: float = 9.0,
    kernel_size: int = 5,
    padding: Padding = "symmetric",
    text: slice = slice(None),
) -> Iterator[None]:
    """Blur the image-to-text attention of some layers while a pipeline or a transformer runs.

    Applies after the softmax, to all rows (both branches under classifier-free guidance). Contexts nest:
    layers of several are changed by each in the order they were opened. Maps and statistics captured
    meanwhile are those of the softmax, before the blur, so only layers after the first blurred one feel it.
    The model is stock again when the context ends, also after an exception.

    Args:
        target: a pipeline or transformer.
        layers: the layers to blur; the paper takes one at a time. None for all.
        sigma, kernel_size, padding, text: see :class:`Blur`; by default the paper's values on all text
            columns, with a padding that preserves the mass, as its text says.

    Raises:
        NotImplementedError, TypeError: ``target`` is not of a supported model family.
        ValueError: a layer out of range, sigma, kernel size or padding that is not accepted; when the model
            runs, ``text`` outside its text tokens.
    """
    blur = Blur(sigma, kernel_size, padding, text)
    with attach(target, patch_of(target).layers(layers), LayerRequest(edit_text_value=blur)):
        yield


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
    """Make ``matrix`` read ``others`` at ``columns``: one for one if as many, else the mean of all."""
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
    captures and exceptions are as in :func:`perturb`.

    Args:
        pipe: a pipeline.
        layers: the layers to edit; all when None.
        drop: words that are no longer read. Their probability mass is lost, as the softmax is not repeated.
        swap: ``{"cat": "dog"}`` makes each be read in the other's place: token for token where they have
            equally many, else each token reads the mean of the other word's.
        weights: ``{"red": 2.0}`` multiplies what is read of a word.
        prompt: the text (one for each prompt) where the pipeline is called with embeddings instead of text.

    Raises:
        RuntimeError: when the pipeline runs, no prompt is known.
        NotImplementedError: the model family is not supported.
        TypeError: ``pipe`` is a bare transformer, which has no words.
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
        self._matrices = self._matrices.to(device=read.device, dtype=_wide(read))
        matrices = self._matrices.repeat(len(read) // len(self._matrices), 1, 1)
        return torch.cat([unchanged, edited_text_value(matrices, read)])
