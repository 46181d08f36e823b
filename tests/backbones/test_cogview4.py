"""What CogView4 alone has: text of the prompt's own length, padding that is read, an unshifted timestep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import seg4diff
from seg4diff.backbones import find_backbone
from seg4diff.backbones.text import Special
from tests.support import models
from tests.support.tiny import WORDS, seeded

LONG = "a red cat on a red sofa on a red tree on a red dog on a red"  # with the begin of text 19 tokens


@pytest.fixture(scope="module")
def pipe() -> Any:
    return models.cogview4_pipeline()


@torch.no_grad()
def test_prompts_of_different_lengths(pipe: Any) -> None:
    """Alone or in a list, a prompt has the same scores; together they cannot be encoded."""
    images = [np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8) for n in range(2)]
    names = [["cat", "sofa"], [f"red {word}" for word in (*WORDS, "a", "on", *"bcde")]]
    alone = [
        seg4diff.segment(pipe, image, own, layers=1, preset="paper")
        for image, own in zip(images, names, strict=True)
    ]
    together = seg4diff.segment(pipe, images, names, layers=1, preset="paper", batch_size=2)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.scores, other.scores)
    backbone = find_backbone(pipe)
    lengths = [len(text["encoder_hidden_states"]) for text in backbone.encode_each(pipe, ["cat", LONG])]
    assert lengths == [16, 32]
    with pytest.raises(ValueError, match=r"have \[16, 32\] text tokens"):
        backbone.encode_text(pipe, ["cat", LONG])
    with (
        seg4diff.edit(pipe, replace={" ".join(["dog"] * 12): "cat"}),
        pytest.raises(ValueError, match="the changed prompt has 32 text tokens"),
    ):
        pipe("a red cat on a sofa", height=64, width=64, num_inference_steps=1, guidance_scale=1.0)


@torch.no_grad()
def test_columns_of_names_and_of_several_prompts(pipe: Any) -> None:
    """A prompt's columns count its own padding, in a list of prompts that of the longest."""
    backbone = find_backbone(pipe)
    span = backbone.name_span(pipe)
    for prompt, column in (("cat", 15), (LONG, 16)):
        with models.fed_ids(pipe.text_encoder) as fed:
            backbone.encode_text(pipe, [prompt])
        pieces = pipe.tokenizer.convert_ids_to_tokens(fed[0][0])
        assert pieces.index("cat") == column
        assert span.columns(prompt)[0] == pieces.index(prompt.split()[0])
        assert span.special_columns(prompt, Special("pad")) == [
            number for number, piece in enumerate(pieces) if piece == "<pad>"
        ]
    with seg4diff.capture(pipe, 0) as captured:
        pipe(["a cat", LONG], height=64, width=64, num_inference_steps=1, guidance_scale=1.0,
             generator=seeded(), output_type="latent")  # fmt: skip
    assert captured.columns("cat", image=0) == [31]
    assert captured.columns("cat", image=1) == [16]


@torch.no_grad()
def test_padding_on_the_right_is_refused() -> None:
    other = models.cogview4_pipeline()
    other.tokenizer.padding_side = "right"
    with pytest.raises(ValueError, match="pads on the right"):
        find_backbone(other).text_spans(other)
