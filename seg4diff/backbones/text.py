"""Where words lie among the text tokens.

Words are found in the prompt as characters, and a tokenizer's own offsets tell which tokens cover them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextSpan:
    """The text tokens of one text encoder.

    Attributes:
        encoder: name of the text encoder, such as `"clip"` or `"t5"`.
        tokenizer: its tokenizer, with character offsets.
        first: text column of its first token.
        length: number of tokens, padding included.
        special: tokens of `length` that every prompt spends on begin and end of text.
    """

    encoder: str
    tokenizer: Any
    first: int
    length: int
    special: int

    @property
    def room(self) -> int:
        """Tokens that are left for words."""
        return self.length - self.special

    def token_count(self, text: str) -> int:
        """Number of tokens of `text` alone, without special tokens."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def offsets(self, prompt: str) -> list[tuple[int, int, int]]:
        """Text column and characters [start, stop) of every token of `prompt` that stands for characters.

        Raises:
            NotImplementedError: the tokenizer has no character offsets.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise NotImplementedError(
                f"{type(self.tokenizer).__name__} has no character offsets; load the pipeline with a fast "
                "tokenizer (transformers 5 does)"
            )
        found = self.tokenizer(
            prompt, max_length=self.length, truncation=True, return_offsets_mapping=True
        ).offset_mapping
        return [
            (self.first + column, start, stop)
            for column, (start, stop) in enumerate(found)
            if start < stop and prompt[start:stop].strip()
        ]

    def columns(self, prompt: str, start: int = 0, stop: int | None = None) -> list[int]:
        """Text columns of the tokens that cover characters [`start`, `stop`) of `prompt`; may be empty."""
        return _covering(self.offsets(prompt), start, len(prompt) if stop is None else stop)


def words_of(prompt: str) -> list[str]:
    """The distinct words of a prompt, in order, lower-cased."""
    return list(dict.fromkeys(word.lower() for word in re.findall(r"\w+(?:['\u2019-]\w+)*", prompt)))


def find_words(spans: Sequence[TextSpan], texts: Mapping[str, str], phrase: str) -> list[int]:
    """Text columns of every occurrence of a word or phrase.

    Case does not matter, white space matches any white space, and only whole words count: "cat" is not found
    in "caterpillar".

    Args:
        spans: the text encoders.
        texts: the prompt that each of them was given, by the encoder's name.
        phrase: a word or several, as they stand in the prompt.

    Raises:
        ValueError: the phrase is blank, not in the prompt (the message lists the words that are), or was cut
            off with the end of a long prompt.
    """
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{phrase!r} is not a word; known words: {_listed(texts)}")
    pattern = r"\s+".join(re.escape(part) for part in phrase.split())
    before = r"(?<!\w)" if re.match(r"\w", phrase.strip()) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase.strip()) else ""
    columns: set[int] = set()
    found = False
    for span in spans:
        prompt = texts[span.encoder]
        matches = list(re.finditer(before + pattern + after, prompt, flags=re.IGNORECASE))
        found = found or bool(matches)
        offsets = span.offsets(prompt) if matches else []
        for match in matches:
            columns.update(_covering(offsets, *match.span()))
    if not found:
        raise ValueError(f"{phrase!r} is not in the prompt; known words: {_listed(texts)}")
    if not columns:
        raise ValueError(
            f"{phrase!r} lies beyond the {spans[0].length} tokens that the text encoder reads; "
            "shorten the prompt"
        )
    return sorted(columns)


def _covering(offsets: Sequence[tuple[int, int, int]], start: int, stop: int) -> list[int]:
    return [column for column, first, last in offsets if first < stop and last > start]


def _listed(texts: Mapping[str, str]) -> str:
    words = list(dict.fromkeys(word for prompt in texts.values() for word in words_of(prompt)))
    return ", ".join(words) if words else "(the prompt is empty)"
