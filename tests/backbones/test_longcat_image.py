"""What LongCat-Image alone has: text in quotes is tokenised letter by letter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seg4diff.backbones import find_backbone
from seg4diff.backbones.text import Special, find_words
from tests.support import models


@pytest.fixture(scope="module")
def pipe() -> Any:
    return models.longcat_pipeline()


@pytest.mark.parametrize("prompt", ['a cat "cat" on a tree', "a 'dog' tree", "a dog's tree", 'red "a b"'])
@torch.no_grad()
def test_columns_of_quoted_text(pipe: Any, prompt: str) -> None:
    """By the ids that the pipeline feeds its text encoder."""
    (span,) = find_backbone(pipe).text_spans(pipe)
    with models.fed_ids(pipe.text_encoder) as fed:
        pipe.encode_prompt([prompt])
    prefix = len(pipe.tokenizer(pipe.prompt_template_encode_prefix).input_ids)
    ids = fed[0][0, prefix : prefix + 512].tolist()
    offsets = span.offsets(prompt)
    for column, start, stop in offsets:
        assert ids[column] == pipe.tokenizer(prompt[start:stop]).input_ids[0]
    padding = [column for column, token in enumerate(ids) if token == pipe.tokenizer.pad_token_id]
    assert span.special_columns(prompt, Special("pad")) == padding
    assert span.token_count(prompt) == 512 - len(padding)
    word = "tree" if "tree" in prompt else "a b"
    columns = find_words([span], {"llm": prompt}, word)
    found = "".join(prompt[start:stop] for column, start, stop in offsets if column in columns)
    assert found == word.replace(" ", "")
    if '"cat"' in prompt:
        assert len(find_words([span], {"llm": prompt}, "cat")) == 1 + 3


def test_words_with_apostrophes_that_the_pipeline_garbles(pipe: Any) -> None:
    (span,) = find_backbone(pipe).text_spans(pipe)
    with pytest.raises(ValueError, match="several words in it have an apostrophe"):
        span.offsets("a dog's cat's tree")
