"""Edits of words against attention matrices that are materialised and edited."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seg4diff
from seg4diff.editing.words import WordEdits, edit
from tests.support import tiny
from tests.support.edits import CALL, assert_same
from tests.support.materialised import materialised
from tests.support.tiny import seeded

# Text columns of the words of the prompt in `CALL`, in CLIP's 77 tokens; filled by `_words`.
COLUMNS: dict[str, list[int]] = {}


def columns(pipe: Any, word: str) -> list[int]:
    """Text columns of a word, by comparing the prompt's token numbers with the word's own."""
    prompt = pipe.tokenizer(CALL["prompt"]).input_ids
    own = pipe.tokenizer(word, add_special_tokens=False).input_ids
    starts = [i for i in range(len(prompt)) if prompt[i : i + len(own)] == own]
    return [start + k for start in starts for k in range(len(own))]


def conditional_half(change: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    """An edit of the probabilities [2, H, N, T] of the second row alone."""

    def apply(probabilities: Tensor) -> Tensor:
        edited = probabilities.clone()
        change(edited[1:])
        return edited

    return apply


def drop_padding(p: Tensor) -> None:
    p[..., COLUMNS["pad"]] = 0


def drop_cat(p: Tensor) -> None:
    p[..., COLUMNS["cat"]] = 0


def double_red(p: Tensor) -> None:
    p[..., COLUMNS["red"]] *= 2.5


def swap_cat_and_dog(p: Tensor) -> None:
    cat, dog = COLUMNS["cat"], COLUMNS["dog"]
    p[..., cat + dog] = p[..., dog + cat]


def swap_cat_and_on(p: Tensor) -> None:
    # "on" is two tokens, "cat" one: what cat had is spread over both, and both are read as cat
    (cat,), on = COLUMNS["cat"], COLUMNS["on"]
    mass = p[..., cat].clone()
    p[..., cat] = p[..., on].sum(dim=-1)
    p[..., on] = mass[..., None] / 2


@pytest.fixture(scope="module", autouse=True)
def _words(pipe: Any) -> None:
    COLUMNS.update({word: columns(pipe, word) for word in ("a", "red", "cat", "dog", "on", "sofa")})
    COLUMNS["pad"] = list(range(len(pipe.tokenizer(CALL["prompt"]).input_ids), 77))


def test_columns_are_as_counted() -> None:
    assert COLUMNS["a"][0] == 1
    assert (len(COLUMNS["a"]), len(COLUMNS["cat"]), len(COLUMNS["on"])) == (3, 1, 2)
    assert not set(COLUMNS["cat"]) & set(COLUMNS["dog"])


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ({"drop": "cat"}, drop_cat),
        ({"drop": seg4diff.Special("pad")}, drop_padding),
        ({"weights": {"red": 2.5}}, double_red),
        ({"swap": {"cat": "dog"}}, swap_cat_and_dog),
        ({"swap": {"cat": "on"}}, swap_cat_and_on),
    ],
    ids=["drop", "drop-padding", "weight", "swap", "swap-unequal"],
)
@torch.no_grad()
def test_edits_equal_brute_force(
    pipe: Any, stock: Tensor, arguments: dict[str, Any], change: Callable[[Tensor], None]
) -> None:
    with edit(pipe, [0, 2], **arguments):
        output = pipe(**CALL, generator=seeded()).images
    brute = conditional_half(change)
    with materialised(pipe.transformer, {0: brute, 2: brute}):
        expected = pipe(**CALL, generator=seeded()).images
    assert_same(output, expected, stock)
    with materialised(pipe.transformer, {1: brute}):
        assert (pipe(**CALL, generator=seeded()).images - output).abs().max() > 1e-4  # other layers


@torch.no_grad()
@pytest.mark.parametrize("several", [1, 2])
def test_edits_of_several_prompts_and_images(pipe: Any, several: int) -> None:
    prompts = ["a cat", "red, a cat on a tree", "a sofa, a dog, a cat"]
    call = {**CALL, "prompt": prompts, "num_images_per_prompt": several}
    with edit(pipe, [1], drop=["cat"]):
        together = pipe(**call, generator=seeded()).images
    stock = pipe(**call, generator=seeded()).images
    noise = torch.randn(3 * several, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    for image, prompt in enumerate(itertools.chain.from_iterable(zip(*[prompts] * several, strict=True))):
        single = {**CALL, "prompt": prompt, "latents": noise[image : image + 1]}
        if not torch.allclose(pipe(**single).images, stock[image : image + 1]):
            assert several > 1
            pytest.skip("this diffusers gives several images of one prompt the pooled text of others")
        with edit(pipe, [1], drop="cat"):
            alone = pipe(**single).images
        assert_same(together[image : image + 1], alone, stock[image : image + 1])


@torch.no_grad()
def test_edits_reach_both_text_encoders() -> None:
    pipe = seg4diff.patch(tiny.pipeline(t5=True).to(torch.float64))
    prompt = "a cat on a sofa"
    call = {**CALL, "prompt": prompt, "max_sequence_length": 20}
    ids = pipe.tokenizer_3(prompt).input_ids
    clip = pipe.tokenizer(prompt).input_ids.index(pipe.tokenizer.convert_tokens_to_ids("cat</w>"))
    dropped = [clip, 77 + ids.index(pipe.tokenizer_3.convert_tokens_to_ids("▁cat"))]

    def change(p: Tensor) -> None:
        assert p.shape[-1] == 97
        p[..., dropped] = 0

    with edit(pipe, [1], drop="cat"):
        output = pipe(**call, generator=seeded()).images
    with materialised(pipe.transformer, {1: conditional_half(change)}):
        expected = pipe(**call, generator=seeded()).images
    assert_same(output, expected, pipe(**call, generator=seeded()).images)


@torch.no_grad()
def test_edits_without_guidance_with_embeddings_and_nested(pipe: Any) -> None:
    call = {**CALL, "guidance_scale": 1.0}

    def change(p: Tensor) -> Tensor:
        edited = p.clone()
        drop_cat(edited)
        double_red(edited)
        return edited

    with edit(pipe, [1], drop="cat"), edit(pipe, [1], weights={"red": 2.5}):
        output = pipe(**call, generator=seeded()).images
    with materialised(pipe.transformer, {1: change}):
        expected = pipe(**call, generator=seeded()).images
    assert_same(output, expected, pipe(**call, generator=seeded()).images)
    encoded = pipe.encode_prompt(CALL["prompt"], None, None, max_sequence_length=77)
    names = [f"{kind}prompt_embeds" for kind in ("", "negative_", "pooled_", "negative_pooled_")]
    embeddings = {**call, "prompt": None, **dict(zip(names, encoded, strict=True))}
    with edit(pipe, [1], drop="cat", weights={"red": 2.5}, prompt=CALL["prompt"]):
        torch.testing.assert_close(pipe(**embeddings, generator=seeded()).images, output)
    with edit(pipe, [1], drop="cat"), pytest.raises(RuntimeError, match="no prompt is known"):
        pipe(**embeddings, generator=seeded())


@torch.no_grad()
def test_skip_layer_guidance_reads_the_edit_too(pipe: Any) -> None:
    """Its second forward holds the conditional rows alone."""
    call = {**CALL, "num_inference_steps": 4, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9}

    def change(p: Tensor) -> Tensor:
        edited = p.clone()
        drop_cat(edited[-1:])  # the last row is conditional in both forwards
        return edited

    with edit(pipe, [1], drop="cat"):
        output = pipe(**call, generator=seeded()).images
    with materialised(pipe.transformer, {1: change}):
        expected = pipe(**call, generator=seeded()).images
    assert_same(output, expected, pipe(**call, generator=seeded()).images)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "nothing to edit"),
        ({"drop": "cat", "layers": -1}, ValueError, "layer -1 is out of range"),
        ({"weights": {"cat": float("inf")}}, ValueError, "'cat': inf"),
        ({"weights": {"cat": "2"}}, TypeError, "'cat': '2'"),
    ],
)
def test_bad_edits_are_named(
    pipe: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), edit(pipe, **arguments):
        pass  # pragma: no cover


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop": "zebra"}, "'zebra' is not in the prompt; known words: a, red, cat, dog, on, sofa"),
        ({"swap": {"cat": "zebra"}}, "'zebra' is not in the prompt.*replace puts a word in another's place"),
        ({"drop": "cat", "weights": {"cat": 2.0}}, "'cat' and 'cat' share a token"),
        ({"drop": " "}, "' ' is not a word"),
    ],
)
def test_bad_words_are_named_and_leave_the_pipeline_usable(
    pipe: Any, arguments: dict[str, Any], message: str
) -> None:
    with edit(pipe, **arguments), pytest.raises(ValueError, match=message):
        pipe(**CALL)
    assert pipe(**CALL, generator=seeded()).images.isfinite().all()


def test_what_cannot_be_edited() -> None:
    pipe = tiny.pipeline()
    with pytest.raises(TypeError, match="bare transformer"), edit(pipe.transformer, drop="cat"):
        pass


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e308, -1e4])
def test_a_weight_that_would_overflow(weight: float) -> None:
    with pytest.raises(ValueError, match="must be a number below 10000"):
        WordEdits(weights=(("cat", weight),))
