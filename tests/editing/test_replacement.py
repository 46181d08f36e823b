"""A word in another's place against attention matrices that are materialised and edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seg4diff
from seg4diff.editing.blur import Blur
from seg4diff.editing.replacement import _with_old_words
from seg4diff.editing.words import edit
from tests.support import tiny
from tests.support.edits import CALL, assert_same
from tests.support.tiny import seeded

PROMPT = "a red dog, on a sofa"
Change = Callable[[Tensor, Tensor], None]
"""In place on the probabilities [1, H, N, T] of the drawn row, from those of the row of the old prompt."""


def columns(tokenizer: Any, prompt: str, word: str) -> list[int]:
    """Text columns of a word in one text encoder, by comparing token numbers."""
    ids, own = tokenizer(prompt).input_ids, tokenizer(word, add_special_tokens=False).input_ids
    starts = [i for i in range(len(ids)) if ids[i : i + len(own)] == own]
    return [start + k for start in starts for k in range(len(own))]


@contextmanager
def brute(
    pipe: Any, old: Sequence[Tensor], text_first: bool, layers: Sequence[int], steps: int, change: Change
) -> Iterator[list[int]]:
    """A stock pipeline of one image whose conditional forwards get a row of the old prompt, edited by hand.

    Yields the number of rows of every forward.
    """
    transformer, stock, attention = pipe.transformer, pipe.transformer.forward, F.scaled_dot_product_attention
    embeddings, pooled, new = old
    rows: list[int] = []
    done = [0, 0]  # conditional forwards, attentions of the forward that runs
    active = [False]

    def forward(**given: Any) -> Any:
        count, done[1] = len(given["hidden_states"]), 0
        conditional = torch.equal(given["encoder_hidden_states"][-1:], new)
        active[0] = conditional and done[0] < steps
        done[0] += conditional
        if active[0]:
            for name in ("hidden_states", "timestep", "guidance"):
                if given.get(name) is not None:
                    given[name] = torch.cat([given[name], given[name][-1:]])
            for name, value in (("encoder_hidden_states", embeddings), ("pooled_projections", pooled)):
                given[name] = torch.cat([given[name], value])
        rows.append(len(given["hidden_states"]))
        return (stock(**given)[0][:count],)

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        text = embeddings.shape[1]
        if not active[0] or query.shape[2] != 16 + text:
            return attention(query, key, value, *args, **kwargs)
        layer, done[1] = done[1], done[1] + 1
        matrix = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        if layer in layers:
            image, words = (
                (slice(text, None), slice(0, text)) if text_first else (slice(0, 16), slice(16, None))
            )
            block = matrix[:, :, image, words].clone()
            change(block[-2:-1], block[-1:].clone())
            matrix = matrix.clone()
            matrix[:, :, image, words] = block
        return matrix @ value

    transformer.forward, F.scaled_dot_product_attention = forward, attend
    try:
        yield rows
    finally:
        del transformer.forward
        F.scaled_dot_product_attention = attention


def encoded(pipe: Any, old: str, new: str, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and pooled embedding of the old prompt, embeddings of the new one."""
    if hasattr(pipe, "tokenizer_3"):
        one, other = (pipe.encode_prompt(text, None, None, max_sequence_length=length) for text in (old, new))
        return one[0], one[2], other[0]
    one, other = (pipe.encode_prompt(text, None, max_sequence_length=length) for text in (old, new))
    return one[0], one[1], other[0]


def moved(old: list[int], new: list[int], factor: float = 1.0) -> Change:
    def change(drawn: Tensor, source: Tensor) -> None:
        if len(old) == len(new):
            drawn[..., new] = factor * source[..., old]
        else:
            drawn[..., new] = factor * source[..., old].sum(dim=-1, keepdim=True) / len(new)

    return change


@pytest.mark.parametrize(
    ("words", "more", "until"),
    [
        (("cat", "dog"), {}, 1.0),
        (("cat", "dog"), {}, 0.4),
        (("sofa on", "dog"), {}, 1.0),
        (("cat", "on"), {}, 1.0),
        (("cat", "dog"), {"weights": {"dog": 2.5}, "drop": "sofa"}, 1.0),
    ],
    ids=["one-for-one", "first-steps", "three-tokens-for-one", "one-token-for-two", "other-edits"],
)
@torch.no_grad()
def test_replacement_equals_brute_force(
    pipe: Any, words: tuple[str, str], more: dict[str, Any], until: float
) -> None:
    old_word, new_word = words
    source = PROMPT.replace(new_word, old_word)
    old, new = columns(pipe.tokenizer, source, old_word), columns(pipe.tokenizer, PROMPT, new_word)
    sofa = columns(pipe.tokenizer, PROMPT, "sofa")
    assert (len(old), len(new)) == {"dog": (3 if " " in old_word else 1, 1), "on": (1, 2)}[new_word]
    change = moved(old, new, 2.5 if more else 1.0)

    def with_drop(drawn: Tensor, given: Tensor) -> None:
        change(drawn, given)
        if more:
            drawn[..., sofa] = 0

    call = {**CALL, "prompt": PROMPT, "num_inference_steps": 3}
    steps = 2 if until < 1 else 3
    with edit(pipe, [0, 2], replace={old_word: new_word}, replace_until=until, **more):
        output = pipe(**call, generator=seeded()).images
    texts = encoded(pipe, source, PROMPT, 77)
    with brute(pipe, texts, False, [0, 2], steps, with_drop) as rows:
        expected = pipe(**call, generator=seeded()).images
    assert rows == [3] * steps + [2] * (3 - steps)
    assert_same(output, expected, pipe(**call, generator=seeded()).images)


@torch.no_grad()
def test_replacement_in_both_text_encoders() -> None:
    pipe = tiny.pipeline(t5=True).to(torch.float64)
    source, length = PROMPT.replace("dog", "cat"), 24
    new, old = (
        columns(pipe.tokenizer, text, word) + [77 + c for c in columns(pipe.tokenizer_3, text, word)]
        for text, word in ((PROMPT, "dog"), (source, "cat"))
    )
    assert len(new) == len(old) == 2
    call = {**CALL, "prompt": PROMPT, "max_sequence_length": length}
    with edit(pipe, [1], replace={"cat": "dog"}, replace_until=1):
        output = pipe(**call, generator=seeded()).images
    with brute(pipe, encoded(pipe, source, PROMPT, length), False, [1], 2, moved(old, new)):
        expected = pipe(**call, generator=seeded()).images
    assert_same(output, expected, pipe(**call, generator=seeded()).images)


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_replacement_where_branches_have_forwards_of_their_own(guided: bool) -> None:
    pipe = tiny.flux_pipeline().to(torch.float64)
    source, length = PROMPT.replace("dog", "cat"), 24
    new = columns(pipe.tokenizer_2, PROMPT, "dog")
    old = columns(pipe.tokenizer_2, source, "cat")
    call = {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "output_type": "latent",
        "max_sequence_length": length,
    }
    if guided:
        call |= {"true_cfg_scale": 3.0, "negative_prompt": "tree"}
    with edit(pipe, [0, 3], replace={"cat": "dog"}, replace_until=0.5):
        output = pipe(**call, generator=seeded()).images
    with brute(pipe, encoded(pipe, source, PROMPT, length), True, [0, 3], 1, moved(old, new)) as rows:
        expected = pipe(**call, generator=seeded()).images
    assert rows == ([2, 1, 1, 1] if guided else [2, 1])
    assert (output - expected).abs().max() < 1e-6 * (
        expected - pipe(**call, generator=seeded()).images
    ).abs().max()


@torch.no_grad()
def test_every_image_has_the_words_of_its_prompt(pipe: Any) -> None:
    prompts = ["a dog", "red tree, a dog on a dog"]
    latents = torch.randn(4, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    with edit(pipe, [1], replace={"cat sofa": "dog"}):
        together = pipe(**{**CALL, "prompt": prompts, "latents": latents[::2]}).images
    for image, prompt in enumerate(prompts):
        call = {**CALL, "prompt": prompt, "latents": latents[2 * image : 2 * image + 1]}
        with edit(pipe, [1], replace={"cat sofa": "dog"}):
            alone = pipe(**call).images
        assert_same(together[image : image + 1], alone, pipe(**call).images)


@torch.no_grad()
def test_captures_and_guidance_around_and_inside(pipe: Any) -> None:
    """Captures see the drawn rows alone, and perturbed rows of guidance are edited as those they perturb."""
    call = {**CALL, "prompt": PROMPT}
    with seg4diff.capture(pipe, [0], steps=[0]) as plain:
        pipe(**call, generator=seeded())
    with (
        seg4diff.capture(pipe, [0], steps=[0]) as outer,
        edit(pipe, [0, 1], replace={"cat": "dog"}),
        seg4diff.capture(pipe, [0], steps=[0]) as inner,
    ):
        output = pipe(**call, generator=seeded()).images
    for captured in (outer, inner):  # the first layer's maps are those before the edit
        torch.testing.assert_close(captured.records[0].maps, plain.records[0].maps)
        assert captured.heatmap("dog").shape == (64, 64)
    with edit(pipe, [0, 1], replace={"cat": "dog"}):
        unperturbed = seg4diff.guide(
            pipe, PROMPT, layers=[1], scale=2.0, blur=Blur(kernel_size=1), generator=seeded(), **CALL_ALONE
        ).images
        perturbed = seg4diff.guide(
            pipe, PROMPT, layers=[1], scale=2.0, generator=seeded(), **CALL_ALONE
        ).images
    assert (unperturbed - output).abs().max() < 1e-10
    assert (perturbed - output).abs().max() > 1e-4


CALL_ALONE = {name: value for name, value in CALL.items() if name != "prompt"}


def test_words_change_places_by_occurrence() -> None:
    text, places = _with_old_words("A Dog and two dogs, dog", [("big cat", "dog"), ("or", "and")])
    assert text == "A big cat or two dogs, big cat"
    assert [(text[slice(*old)], "A Dog and two dogs, dog"[slice(*new)]) for old, new in places] == [
        ("big cat", "Dog"), ("or", "and"), ("big cat", "dog"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'dog' in the prompt is replaced twice"):
        _with_old_words("a dog", [("a cat", "a dog"), ("cat", "dog")])


@torch.no_grad()
def test_bad_replacements_are_named(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {**CALL, "prompt": PROMPT}
    with (
        pytest.raises(ValueError, match="replace_until=0 must be"),
        edit(pipe, replace={"cat": "dog"}, replace_until=0),
    ):
        pass
    with edit(pipe, replace={"dog": "cat"}), pytest.raises(ValueError, match="'cat' is not in the prompt"):
        pipe(**call)
    names = [f"{kind}prompt_embeds" for kind in ("", "negative_", "pooled_", "negative_pooled_")]
    embeddings = dict(zip(names, pipe.encode_prompt(PROMPT, None, None, max_sequence_length=77), strict=True))
    with edit(pipe, replace={"cat": "dog"}), pytest.raises(RuntimeError, match="no prompt is known"):
        pipe(**CALL_ALONE, **embeddings)
    monkeypatch.setattr(type(pipe), "num_timesteps", property(lambda _: None))
    with edit(pipe, replace={"cat": "dog"}), pytest.raises(ValueError, match="use replace_until=1"):
        pipe(**call)
    assert pipe(**call).images.isfinite().all()
