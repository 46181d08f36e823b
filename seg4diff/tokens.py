"""Where words lie among the text tokens.

Called by :mod:`seg4diff.capturing` (a word of a prompt) and :mod:`seg4diff.segmentation` (the names of a
prompt it made itself). It hides tokenizers: words are found in the prompt as characters, and a tokenizer's
own offsets say which tokens cover them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextEncoding:
    """One text encoder's share of the text tokens.

    Attributes:
        encoder: its name, ``"clip"`` or ``"t5"``.
        tokenizer: its tokenizer.
        first: the text column of its first token.
        length: number of tokens, padding included.
    """

    encoder: str
    tokenizer: Any
    first: int
    length: int


def token_count(tokenizer: Any, text: str) -> int:
    """Number of tokens of ``text`` alone, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def columns_of_characters(encoding: TextEncoding, prompt: str, start: int, stop: int) -> list[int]:
    """Text columns of the tokens that cover characters [``start``, ``stop``) of ``prompt``; may be empty."""
    tokenizer = encoding.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise NotImplementedError(
            f"{type(tokenizer).__name__} has no character offsets; load the pipeline with a fast "
            "tokenizer (transformers 5 does)"
        )
    offsets = tokenizer(
        prompt,
        padding="max_length",
        max_length=encoding.length,
        truncation=True,
        return_offsets_mapping=True,
    ).offset_mapping
    return [
        encoding.first + column
        for column, (first, last) in enumerate(offsets)
        if first < last and first < stop and last > start and prompt[first:last].strip()
    ]


def words_of(prompt: str) -> list[str]:
    """The distinct words of a prompt, in order, lower-cased."""
    return list(dict.fromkeys(word.lower() for word in re.findall(r"\w+(?:['\u2019-]\w+)*", prompt)))


def find_words(encodings: Sequence[TextEncoding], prompts: Sequence[str], phrase: str) -> list[int]:
    """Text columns of every occurrence of a word or phrase.

    Case does not matter, white space matches any white space, and only whole words count: "cat" is not found
    in "caterpillar".

    Args:
        encodings: the text encoders, see :class:`TextEncoding`.
        prompts: the prompt each of them was given.
        phrase: a word or several, as they stand in the prompt.

    Raises:
        ValueError: the phrase is blank, not in the prompt (the message lists the words that are), or was cut
            off with the end of a long prompt.
    """
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{phrase!r} is not a word; known words: {_listed(prompts)}")
    pattern = r"\s+".join(re.escape(part) for part in phrase.split())
    before = r"(?<!\w)" if re.match(r"\w", phrase.strip()) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase.strip()) else ""
    columns: list[int] = []
    found = False
    for encoding, prompt in zip(encodings, prompts, strict=True):
        for match in re.finditer(before + pattern + after, prompt, flags=re.IGNORECASE):
            found = True
            columns += columns_of_characters(encoding, prompt, *match.span())
    if not found:
        raise ValueError(f"{phrase!r} is not in the prompt; known words: {_listed(prompts)}")
    if not columns:
        raise ValueError(
            f"{phrase!r} lies beyond the {encodings[0].length} tokens that the text encoder reads; "
            "shorten the prompt"
        )
    return sorted(set(columns))


def _listed(prompts: Sequence[str]) -> str:
    words = list(dict.fromkeys(word for prompt in prompts for word in words_of(prompt)))
    return ", ".join(words) if words else "(the prompt is empty)"
