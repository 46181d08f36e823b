"""Names found in a vocabulary: on maps made by hand, on a random pipeline, and bad input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff.attention.patch import patch_of
from seg4diff.backbones.base import Recipe
from seg4diff.backbones.text import TextSpan
from seg4diff.segmentation.inputs import Noising, View
from seg4diff.segmentation.maps import ImageMaps, Reading
from seg4diff.segmentation.presets import PRESETS
from tests.support import tiny

SEEN = {
    "cat": (slice(0, 8), slice(0, 5)),
    "red sofa": (slice(0, 3), slice(5, 8)),
    "tree": (slice(3, 8), slice(5, 8)),
}
"""What the image made by hand shows, and where on its 8 x 8 tokens."""
ABSENT = ("dog", "zebra", "a blue van", "lamp", "fog", "speckle")
PRESET = replace(PRESETS["fast"], recipe=Recipe(block=4 / 64, upsample="bicubic", floor=0.02))


def map_of(name: str) -> torch.Tensor:
    """Scores [8, 8]: 0.1 where the name is; fog is weaker and everywhere, speckles are strong and single."""
    scores = torch.full((8, 8), 0.001)
    if name in SEEN:
        scores[SEEN[name]] = 0.1
    if name == "fog":
        scores[:] = 0.06
    if name == "speckle":
        scores[::3, ::3] = 0.3
    return scores


@pytest.fixture
def pipe() -> Any:
    pipe = tiny.pipeline(layers=4)
    pipe.transformer.register_to_config(_seg4diff_expert_layers=[1])
    return seg4diff.patch(pipe)


def picture(width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class HandMade:
    """Stands for `run_maps`: every name has its own map whatever the prompt; outputs tell what is seen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pipe: Any, length: int = 77) -> None:
        self.prompts: list[list[str]] = []
        self.span: TextSpan = replace(patch_of(pipe).backbone.name_span(pipe), length=length)
        monkeypatch.setattr(type(patch_of(pipe).backbone), "name_span", lambda *_: self.span)
        monkeypatch.setattr("seg4diff.segmentation.passes.run_maps", self)

    def __call__(
        self,
        pipe: Any,
        views: Sequence[View],
        prompts: Sequence[Sequence[str]],
        reading: Reading,
        noising: Noising,
        **options: Any,
    ) -> Iterator[ImageMaps]:
        (texts,) = prompts
        assert views[0].latents is not None
        assert set(texts) <= set(options["known_text"])
        self.prompts.append(list(texts))
        maps = []
        for text in texts:
            columns = torch.full((self.span.length, 64), 0.5)  # of no name
            for name in (*SEEN, *ABSENT):
                start = f" {text} ".find(f" {name} ")
                if start >= 0:
                    columns[self.span.columns(text, start, start + len(name))] = map_of(name).flatten()
            maps.append(columns.T[None])
        outputs = torch.zeros(8, 8, len(SEEN))
        for number, place in enumerate(SEEN.values()):
            outputs[(*place, number)] = 1.0
        of_prompts = (outputs.flatten(0, 1)[None],) * len(texts)
        yield ImageMaps(0, tuple(maps), (8, 8), 8, 515.0, of_prompts if reading.output_layers else None)


def truth(size: int = 64) -> np.ndarray:
    names = np.empty((8, 8), dtype=object)
    for name, place in SEEN.items():
        names[place] = name
    return names.repeat(size // 8, axis=0).repeat(size // 8, axis=1)


def named(result: seg4diff.Segmentation) -> np.ndarray:
    return np.array([*result.classes, ""], dtype=object)[result.labels.numpy()]


def test_names_are_found_and_distractors_are_not(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = HandMade(monkeypatch, pipe)
    result = seg4diff.discover(pipe, picture(), [*ABSENT, *SEEN], preset=PRESET)
    assert result.classes == ("cat", "tree", "red sofa")  # the largest first
    assert (named(result) == truth()).mean() > 0.97  # all but pixels at the edges
    assert result.scores.shape == (3, 8, 8)
    assert result.presence is not None
    assert result.presence.tolist() == pytest.approx([0.1 / 0.16] * 3, abs=0.01)  # beside fog
    assert result.scores[0, 4, 1] > 10 * result.scores[1, 4, 1]
    assert result.metadata["forwards"] == {"coarse": 0, "fine": 1}
    assert result.metadata["vocabulary"] == 9
    assert len(made.prompts) == 1


def test_where_prompts_end_does_not_matter(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies in any order, prompts of any length: one result, and a prompt for each forward."""
    results = []
    for length in (77, 22, 16):
        made = HandMade(monkeypatch, pipe, length)
        for names in ([*ABSENT, *SEEN], [*reversed(SEEN), *ABSENT], sorted((*SEEN, *ABSENT))):
            made.prompts.clear()
            results.append(seg4diff.discover(pipe, picture(), names, preset=PRESET))
            forwards = results[-1].metadata["forwards"]
            tokens = sum(map(made.span.token_count, names))
            assert [*forwards.values()] == [len(several) for several in made.prompts] or length == 77
            assert forwards["coarse"] == (0 if length == 77 else -(-tokens // made.span.room)), length
            assert set(SEEN) <= set(results[-1].metadata["candidates"])
            assert length == 77 or len(results[-1].metadata["candidates"]) < len(names)
    for result in results[1:]:
        assert result.classes == results[0].classes
        assert torch.equal(result.labels, results[0].labels)
        assert result.presence is not None
        torch.testing.assert_close(result.presence, results[0].presence)


def test_pixels_that_nothing_explains(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    HandMade(monkeypatch, pipe)
    few = ["cat", "dog"]
    everything = seg4diff.discover(pipe, picture(), few, preset=PRESET)
    assert everything.classes == ("cat",)
    assert (everything.labels == 0).all()
    explained = seg4diff.discover(pipe, picture(), few, preset=PRESET, background=True)
    assert explained.classes == ("cat",)
    assert ((named(explained) == "cat") == (truth() == "cat")).mean() > 0.97


def test_a_caption_chooses_the_names(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = HandMade(monkeypatch, pipe)
    captions = iter((["A dog beside TREES.", "nothing of it"],))
    results = seg4diff.discover(
        pipe, [picture(), picture()], [*SEEN, *ABSENT], preset=PRESET, captioner=lambda _: next(captions)
    )
    assert made.prompts[0] == ["tree dog"]
    assert results[0].classes == ("tree",)
    assert [result.metadata["vocabulary"] for result in results] == [2, 9]
    assert results[0].metadata["caption"] == "A dog beside TREES."
    assert len(results[1].classes) == 3


def test_one_encoding_and_the_forwards_that_are_counted(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real path: the autoencoder runs once, the transformer as often as the result says."""
    encoded: list[int] = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x, **o: (encoded.append(len(x)), encode(x, **o))[1])
    rows: list[int] = []
    last: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    patch_of(pipe).blocks[2].attn.to_q.register_forward_pre_hook(lambda *_: last.append(1))
    names = [f"word{number}" for number in range(40)]
    span = patch_of(pipe).backbone.name_span(pipe)
    prompts = -(-sum(map(span.token_count, names)) // span.room)
    for preset, passes in (("fast", 1), ("best", 2)):
        for batch_size in (1, 3):
            for found in (encoded, rows, last):
                found.clear()
            result = seg4diff.discover(pipe, picture(), names, preset=preset, batch_size=batch_size)
            assert encoded == [1] * passes
            assert result.metadata["forwards"] == {"coarse": prompts, "fine": passes}
            assert sum(rows) == prompts + passes
            assert len(rows) < sum(rows) or batch_size == 1
            assert len(last) <= passes  # the search stops at the expert layer


def test_encoded_prompts_are_kept(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"word{number}" for number in range(20)]
    asked: list[str] = []
    encode = type(patch_of(pipe).backbone).encode_text

    def encode_text(self: Any, pipe: Any, prompts: Sequence[str]) -> Any:
        asked.extend(prompts)
        return encode(self, pipe, prompts)

    monkeypatch.setattr(type(patch_of(pipe).backbone), "encode_text", encode_text)

    def found() -> tuple[torch.Tensor, int]:
        asked.clear()
        result = seg4diff.discover(pipe, picture(), names, cache=tmp_path / "texts")
        return result.pixel_scores(), len(asked)

    without = seg4diff.discover(pipe, picture(), names).pixel_scores()
    first, count = found()
    files = sorted((tmp_path / "texts").iterdir())
    assert count == len(files) > 2
    again, none = found()
    assert none == 0
    assert torch.equal(first, again)
    assert torch.equal(first, without)
    files[0].write_bytes(files[0].read_bytes()[:-1])
    repaired, one = found()
    assert (one, found()[1]) == (1, 0)
    assert torch.equal(first, repaired)
    assert "damaged" in caplog.text
    with torch.no_grad():
        pipe.text_encoder.text_model.final_layer_norm.weight.mul_(2)
    other, count = found()
    assert count > 2  # of another model
    assert not torch.equal(first[: len(other)], other[: len(first)])


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ([], r"vocabulary=\[\] is empty; give at least one name"),
        (["cat", " Cat"], "'cat' and ' Cat' are the same to the model; name each class once"),
        (["cat", " "], "class name ' ' is blank"),
        (["cat", 3], "class name 3 is not a string"),
        (["cat", "x" * 76], "has 76 tokens, but a prompt holds 75; shorten it"),
        ("imagenet", "vocabulary='imagenet' is neither 'coco', 'ade20k', 'lvis', 'wordnet', nor a text file"),
    ],
)
def test_bad_vocabularies(pipe: Any, vocabulary: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seg4diff.discover(pipe, picture(), vocabulary)


def test_bad_choices(pipe: Any) -> None:
    with pytest.raises(ValueError, match="preset='paper' does not compare image tokens; use \"fast\""):
        seg4diff.discover(pipe, picture(), ["cat"], preset="paper")  # type: ignore[call-overload]
    plain = seg4diff.patch(tiny.pipeline(layers=4))
    with pytest.raises(ValueError, match=r"no expert layer is known .* name it: layers="):
        seg4diff.discover(plain, picture(), ["cat"])
    with pytest.raises(TypeError, match="discover takes a whole pipeline"):
        seg4diff.discover(plain.transformer, picture(), ["cat"])
