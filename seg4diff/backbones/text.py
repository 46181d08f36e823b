"""Where words lie among the text tokens.

Words are found in the prompt as characters, and a tokenizer's own offsets tell which tokens cover them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

SpecialToken = Literal["bos", "eos", "pad"]


@dataclass(frozen=True)
class Special:
    """Text tokens that stand for no word of the prompt; given wherever a word is asked for.

    Attributes:
        token: `"bos"` and `"eos"` are the begin and end of text that the tokenizer adds, `"pad"` all columns
            behind them. Not every text encoder has all three.

    Raises:
        ValueError: an unknown token.
    """

    token: SpecialToken

    def __post_init__(self) -> None:
        if self.token not in get_args(SpecialToken):
            accepted = ", ".join(map(repr, get_args(SpecialToken)))
            raise ValueError(f"Special({self.token!r}) is unknown; accepted: {accepted}")


Words = str | Special
"""What a map or an edit is asked for: a word or phrase of the prompt, or special tokens."""


@dataclass(frozen=True)
class TextSpan:
    """The text tokens of one text encoder.

    Attributes:
        encoder: name of the text encoder, such as `"clip"` or `"t5"`.
        tokenizer: its tokenizer, with character offsets.
        first: text column of its first token.
        length: number of tokens, padding included.
        special: tokens of `length` that every prompt spends on begin and end of text, or on its template.
        template: what the tokenizer is given, with `{}` for the prompt.
        dropped: tokens at the begin of that which are not among the text tokens.
        ends: whether the tokens fill `length` to its end, and those of images, of which the tokenizer knows
            nothing, or padding on the left come before them.
        ragged: whether a batch's longest prompt ends the text stream, which may be shorter than `length`.
        adds_special: whether the tokenizer adds begin and end of text to what it is given.
    """

    encoder: str
    tokenizer: Any
    first: int
    length: int
    special: int
    template: str = "{}"
    dropped: int = 0
    ends: bool = False
    ragged: bool = False
    adds_special: bool = True

    @property
    def room(self) -> int:
        """Tokens that are left for words."""
        return self.length - self.special

    @property
    def end(self) -> int | None:
        """The text column behind its last token; None for the end of the text stream."""
        return None if self.ragged else self.first + self.length

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
        found = self._tokenised(prompt, return_offsets_mapping=True).offset_mapping
        origin, begin = self._origin(found), self.template.index("{}")
        placed = (
            (origin + number, max(start - begin, 0), min(stop - begin, len(prompt)))
            for number, (start, stop) in enumerate(found)
        )
        return [
            (column, start, stop)
            for column, start, stop in placed
            if column >= self.first and start < stop and prompt[start:stop].strip()
        ]

    def columns(self, prompt: str, start: int = 0, stop: int | None = None) -> list[int]:
        """Text columns of the tokens that cover characters [`start`, `stop`) of `prompt`; may be empty."""
        return _covering(self.offsets(prompt), start, len(prompt) if stop is None else stop)

    def special_columns(self, prompt: str, special: Special) -> list[int]:
        """Text columns of special tokens; may be empty."""
        ids = self._tokenised(prompt).input_ids
        origin = self._origin(ids)
        if special.token == "pad":  # by place: some tokenizers pad with the end of text
            if getattr(self.tokenizer, "padding_side", None) == "left":
                return list(range(self.first, origin))
            return list(range(origin + len(ids), self.first + self.length))
        wanted = getattr(self.tokenizer, f"{special.token}_token_id")
        columns = (origin + number for number, token in enumerate(ids) if token == wanted)
        return [column for column in columns if column >= self.first]

    def _tokenised(self, prompt: str, **options: Any) -> Any:
        text = self.template.replace("{}", prompt)
        return self.tokenizer(
            text,
            max_length=self.dropped + self.length,
            truncation=True,
            add_special_tokens=self.adds_special,
            **options,
        )

    def _origin(self, tokens: Sequence[Any]) -> int:
        """Text column of the first of all tokens; those before `first` are not among the text tokens."""
        return self.first + (self.length - len(tokens) if self.ends else -self.dropped)


def templated_span(
    encoder: str,
    tokenizer: Any,
    template: str,
    length: int,
    *,
    dropped: int = 0,
    adds_special: bool = True,
) -> TextSpan:
    """The text tokens of an encoder that reads the prompt inside of a template, from column 0 on.

    Args:
        encoder, tokenizer, length, dropped, adds_special: as in `TextSpan`.
        template: as in `TextSpan`; it may hold other braces.
    """
    around = len(tokenizer(template.replace("{}", ""), add_special_tokens=adds_special).input_ids)
    left = tokenizer.padding_side == "left"
    return TextSpan(
        encoder,
        tokenizer,
        0,
        length,
        around - dropped,
        template,
        dropped,
        ends=left,
        adds_special=adds_special,
    )


@dataclass(frozen=True)
class LowerCaseSpan(TextSpan):
    """Of a text encoder whose pipeline lower-cases prompts."""

    def token_count(self, text: str) -> int:
        return super().token_count(text.lower())

    def offsets(self, prompt: str) -> list[tuple[int, int, int]]:
        return super().offsets(prompt.lower())

    def special_columns(self, prompt: str, special: Special) -> list[int]:
        return super().special_columns(prompt.lower(), special)


def words_of(prompt: str) -> list[str]:
    """The distinct words of a prompt, in order, lower-cased."""
    return list(dict.fromkeys(word.lower() for word in re.findall(r"\w+(?:['\u2019-]\w+)*", prompt)))


def occurrences(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """Characters [start, stop) of every occurrence of a word or phrase that is not blank, as whole words."""
    pattern = r"\s+".join(re.escape(part) for part in phrase.split())
    before = r"(?<!\w)" if re.match(r"\w", phrase.strip()) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase.strip()) else ""
    return [match.span() for match in re.finditer(before + pattern + after, prompt, flags=re.IGNORECASE)]


def find_words(spans: Sequence[TextSpan], texts: Mapping[str, str], phrase: Words) -> list[int]:
    """Text columns of every occurrence of a word or phrase, or of special tokens.

    Case does not matter, white space matches any white space, and only whole words count: "cat" is not found
    in "caterpillar".

    Args:
        spans: the text encoders.
        texts: the prompt that each of them was given, by the encoder's name.
        phrase: a word or several, as they stand in the prompt, or special tokens.

    Raises:
        ValueError: the phrase is blank, not in the prompt (the message lists the words that are), or was cut
            off with the end of a long prompt; or no text encoder has such special tokens here.
    """
    if isinstance(phrase, Special):
        special = [c for span in spans for c in span.special_columns(texts[span.encoder], phrase)]
        if not special:
            encoders = ", ".join(span.encoder for span in spans)
            raise ValueError(f"the prompt has no {phrase.token!r} token in the text encoders {encoders}")
        return special
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{phrase!r} is not a word; known words: {_listed(texts)}")
    columns: set[int] = set()
    found = False
    for span in spans:
        prompt = texts[span.encoder]
        places = occurrences(prompt, phrase)
        found = found or bool(places)
        offsets = span.offsets(prompt) if places else []
        for place in places:
            columns.update(_covering(offsets, *place))
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
