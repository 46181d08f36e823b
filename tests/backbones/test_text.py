"""Words among tokens: case, white space, punctuation, repeats, parts of words, truncation."""

from __future__ import annotations

import copy

import pytest

from seg4diff.backbones.text import Special, TextSpan, find_words, templated_span, words_of
from tests.support import tiny


@pytest.fixture(scope="module")
def clip() -> TextSpan:
    return TextSpan("clip", tiny.clip_tokenizer(), 0, 77, special=2)


@pytest.fixture(scope="module")
def t5() -> TextSpan:
    return TextSpan("t5", tiny.t5_tokenizer(), 77, 24, special=1)


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
def test_columns(clip: TextSpan, prompt: str, phrase: str, columns: list[int]) -> None:
    assert find_words([clip], {"clip": prompt}, phrase) == columns


def test_several_encoders(clip: TextSpan, t5: TextSpan) -> None:
    prompt = "a cat on a sofa"
    pieces = t5.tokenizer(prompt).input_ids
    expected = [
        77 + i for i, piece in enumerate(pieces) if t5.tokenizer.convert_ids_to_tokens(piece) == "▁sofa"
    ]
    assert len(expected) == 1
    both = find_words([clip, t5], {"clip": prompt, "t5": prompt}, "sofa")
    assert both == [6, *expected]  # "on" is two tokens
    assert find_words([clip, t5], {"clip": "no such word", "t5": prompt}, "sofa") == expected


def test_unknown_words(clip: TextSpan) -> None:
    for phrase in ("dog", "ca", "at", "sofa cat", "", "   "):
        with pytest.raises(ValueError, match="known words: cat, sofa"):
            find_words([clip], {"clip": "Cat, sofa - cat"}, phrase)
    with pytest.raises(ValueError, match="the prompt is empty"):
        find_words([clip], {"clip": ""}, "cat")


def test_words_beyond_the_end(clip: TextSpan) -> None:
    with pytest.raises(ValueError, match="beyond the 77 tokens"):
        find_words([clip], {"clip": "cat " * 80 + "sofa"}, "sofa")
    assert find_words([clip], {"clip": "cat " * 80}, "cat") == list(range(1, 76))


def test_counts_and_words(clip: TextSpan) -> None:
    assert clip.token_count("cat sofa") == 2
    assert clip.token_count("zebra") == 5
    assert words_of("A cat's tail, a Cat; well-kept") == ["a", "cat's", "tail", "cat", "well-kept"]


def test_room_is_what_special_tokens_leave(clip: TextSpan, t5: TextSpan) -> None:
    """A prompt of `room` words fills the span, and one word more is cut off."""
    for span in (clip, t5):
        full = " ".join(["cat"] * span.room)
        assert len(span.columns(full)) == span.room
        assert len(span.columns(full + " cat")) == span.room
        assert span.columns("") == []


def test_a_long_prompt_is_tokenised_once(clip: TextSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = TextSpan.offsets
    monkeypatch.setattr(TextSpan, "offsets", lambda self, prompt: calls.append(prompt) or real(self, prompt))
    assert len(find_words([clip], {"clip": "cat " * 400}, "cat")) == 75
    assert len(calls) == 1


def test_a_prompt_that_is_cut_off_keeps_its_end_and_has_no_padding(clip: TextSpan) -> None:
    texts = {"clip": "cat " * 80}
    assert find_words([clip], texts, Special("bos")) == [0]
    assert find_words([clip], texts, Special("eos")) == [76]
    with pytest.raises(ValueError, match="no 'pad' token in the text encoders clip"):
        find_words([clip], texts, Special("pad"))


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_templates_padding_and_dropped_tokens(padding_side: str) -> None:
    """Words of the prompt alone, at the columns of the ids that are padded, cut and then dropped from."""
    tokenizer = copy.deepcopy(tiny.t5_tokenizer())
    tokenizer.padding_side = padding_side
    for length, dropped in ((16, 0), (12, 2), (6, 0)):
        span = templated_span("t5", tokenizer, "tree a {} on tree", length, dropped=dropped)
        assert span.room == length + dropped - 5  # four words and the end of text
        ids = tokenizer(
            "tree a red tree on tree", padding="max_length", truncation=True, max_length=length + dropped
        ).input_ids[dropped:]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        red = pieces.index("▁red")
        assert find_words([span], {"t5": "red tree"}, "tree") == [red + 1]
        assert span.columns("red tree") == [red, red + 1]
        assert span.columns("red tree", 0, 3) == [red]
        pads = [column for column, piece in enumerate(pieces) if piece == "<pad>"]
        assert span.special_columns("red tree", Special("pad")) == pads
        ends = [column for column, piece in enumerate(pieces) if piece == "</s>"]
        assert span.special_columns("red tree", Special("eos")) == ends
