"""Prompts packed, names pruned, regions named, captions read: all on values made by hand."""

from __future__ import annotations

import math

import pytest
import torch

import seg4diff
from seg4diff.attention.patch import patch_of
from seg4diff.backbones.text import TextSpan
from seg4diff.data.vocabularies import read_vocabulary
from seg4diff.segmentation.naming import PRUNED, name_regions, names_in, pack_prompts, prune
from tests.support import tiny


def span_of(room: int) -> TextSpan:
    return TextSpan("clip", tiny.clip_tokenizer(), 0, room + 2, special=2)


def test_names_are_packed_into_few_prompts() -> None:
    """Words of 1, 1, 3, 2 and 3 tokens; in their own order they take three prompts of 5 tokens."""
    names = ["cat", "sofa", "abc", "de", "fgh"]
    span = span_of(5)
    assert [span.token_count(name) for name in names] == [1, 1, 3, 2, 3]
    prompts, order = pack_prompts(names, span)
    assert [prompt.text for prompt in prompts] == ["abc de", "fgh cat sofa"]
    assert [names[index] for index in order] == ["abc", "de", "fgh", "cat", "sofa"]
    assert prompts[1].columns == ((1, 2, 3), (4,), (5,))
    with pytest.raises(ValueError, match=r"'abcdef' has 6 tokens, but a prompt holds 5; shorten it"):
        pack_prompts(["cat", "abcdef"], span)


@pytest.mark.parametrize("name", ["lvis", "ade20k", "coco"])
def test_a_vocabulary_takes_no_more_prompts_than_its_tokens_do(name: str) -> None:
    pipe = seg4diff.load_pipeline("demo", "cpu")
    span = patch_of(pipe).backbone.name_span(pipe)
    names = read_vocabulary(name)
    prompts, order = pack_prompts(names, span)
    assert len(prompts) == math.ceil(sum(map(span.token_count, names)) / 75)
    assert sorted(order) == list(range(len(names)))
    assert sum(len(prompt.columns) for prompt in prompts) == len(names)


def test_names_of_little_presence_are_pruned() -> None:
    presence = torch.tensor([0.3, PRUNED / 2, 0.9, PRUNED, 0.4])
    assert prune(presence, [1] * 5, room=75) == [0, 2, 3, 4]
    assert prune(presence, [1] * 5, room=2) == [2, 4]
    assert prune(presence, [1, 1, 2, 1, 2], room=3) == [2]  # 4 does not fit, and 0 is less likely
    assert prune(presence * 0.01, [1] * 5, room=75) == [2]


def test_a_region_has_one_name() -> None:
    """ "kitten" wins a corner of the cat, "rug" the whole floor but is absent: cat and floor are left."""
    names = ["kitten", "rug", "cat", "floor", "fog"]
    scores = torch.full((5, 8, 8), 0.001)
    scores[2, :, :4] = 0.10
    scores[0, :, :4] = 0.05
    scores[0, :3, :3] = 0.20  # 9 tokens of 32: twice the cat there, half of it elsewhere
    scores[3, :, 4:] = 0.10
    scores[1, :, 4:] = 0.11
    scores[4] = 0.01  # the largest sum of no region
    outputs = torch.zeros(8, 8, 2)
    outputs[:, :4, 0] = outputs[:, 4:, 1] = 1.0
    outputs += 0.01 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([True, False, True, True, True])
    assert [names[index] for index in name_regions(scores, outputs, present)] == ["cat", "floor"]
    everywhere = torch.ones(5, dtype=torch.bool)
    assert [names[index] for index in name_regions(scores, outputs, everywhere)] == ["rug", "cat"]


def test_the_mean_is_of_logarithms() -> None:
    """A strong name on a fifth of a region does not name it, though its mean probability is the largest."""
    scores = torch.full((2, 5, 5), 0.01)
    scores[0] = 0.03
    scores[1, 0] = 0.5
    assert scores[1].mean() > scores[0].mean()
    assert name_regions(scores, torch.zeros(5, 5, 3), torch.tensor([True, True])) == [0]


def test_names_in_captions() -> None:
    vocabulary = ["dog", "hot dog", "Cherry", "leaf", "person", "glass", "red sofa", "bus", "cat"]
    for caption, expected in {
        "Two hot dogs on a plate": ["hot dog"],
        "a dog, hot and tired": ["dog"],
        "cherries and leaves": ["Cherry", "leaf"],
        "PEOPLE with glasses in buses": ["person", "glass", "bus"],
        "the red  sofa; the cat": ["red sofa", "cat"],
        "a category of sofas": [],
        "": [],
    }.items():
        assert names_in(caption, vocabulary) == expected, caption
