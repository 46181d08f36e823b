"""Words among tokens: case, white space, punctuation, repeats, parts of words, truncation."""

from __future__ import annotations

import pytest

from seg4diff.tokens import TextEncoding, find_words, token_count, words_of
from tests.support import tiny


@pytest.fixture(scope="module")
def clip() -> TextEncoding:
    return TextEncoding("clip", tiny.clip_tokenizer(), 0, 77)


@pytest.fixture(scope="module")
def t5() -> TextEncoding:
    return TextEncoding("t5", tiny.t5_tokenizer(), 77, 24)


@pytest.mark.parametrize(
    ("prompt", "phrase", "columns"),
    [
        ("cat sofa dog", "sofa", [2]),
        ("Cat, SOFA! dog", "sofa", [3]),
        ("cat sofa cat", "CAT", [1, 3]),
        ("red cat sofa", "cat sofa", [2, 3]),
        ("red  cat\nsofa", "cat sofa", [2, 3]),
        ("(cat) dog's tree", "dog's", [4, 5, 6]),
        ("cats cat", "cat", [4]),  # "cats" is ca, t, s
        ("cat café dog", "dog", [6]),  # "café" is ca, f and the two bytes of é
    ],
)
def test_columns(clip: TextEncoding, prompt: str, phrase: str, columns: list[int]) -> None:
    assert find_words([clip], [prompt], phrase) == columns


def test_several_encoders(clip: TextEncoding, t5: TextEncoding) -> None:
    prompt = "a cat on a sofa"
    pieces = t5.tokenizer(prompt).input_ids
    expected = [
        77 + i for i, piece in enumerate(pieces) if t5.tokenizer.convert_ids_to_tokens(piece) == "▁sofa"
    ]
    assert len(expected) == 1
    assert find_words([clip, t5], [prompt, prompt], "sofa") == [6, *expected]  # "on" is two tokens
    assert find_words([clip, t5], ["no such word", prompt], "sofa") == expected


def test_unknown_words(clip: TextEncoding) -> None:
    for phrase in ("dog", "ca", "at", "sofa cat", "", "   "):
        with pytest.raises(ValueError, match="known words: cat, sofa"):
            find_words([clip], ["Cat, sofa - cat"], phrase)
    with pytest.raises(ValueError, match="the prompt is empty"):
        find_words([clip], [""], "cat")


def test_words_beyond_the_end(clip: TextEncoding) -> None:
    with pytest.raises(ValueError, match="beyond the 77 tokens"):
        find_words([clip], ["cat " * 80 + "sofa"], "sofa")
    assert find_words([clip], ["cat " * 80], "cat") == list(range(1, 76))


def test_counts_and_words(clip: TextEncoding) -> None:
    assert token_count(clip.tokenizer, "cat sofa") == 2
    assert token_count(clip.tokenizer, "zebra") == 5
    assert words_of("A cat's tail, a Cat; well-kept") == ["a", "cat's", "tail", "cat", "well-kept"]
