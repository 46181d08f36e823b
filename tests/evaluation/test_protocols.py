"""Protocols: which names are prompted, and how maps of names become classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seg4diff.backbones.base import Recipe
from seg4diff.backbones.text import TextSpan
from seg4diff.data.registry import Dataset, class_names
from seg4diff.evaluation.protocols import PROTOCOLS, Protocol, class_scores, predict
from seg4diff.segmentation.inputs import View
from seg4diff.segmentation.presets import find_preset
from tests.support import tiny

PAPER = find_preset("paper")
RECIPE = Recipe()


def view(height: int, width: int) -> View:
    image = Image.new("RGB", (width, height))
    return View(image, image)


def span() -> TextSpan:
    return TextSpan("clip", tiny.clip_tokenizer(), 0, 77, special=2)


def dataset(classes: tuple[str, ...], **changes: Any) -> Dataset:
    plain = Dataset("folder", "test", classes, tuple((name,) for name in classes), None, (), "made up")
    return replace(plain, **changes)


def spoken(columns: tuple[int, ...], text: str) -> str:
    """What the tokens of some columns of a prompt say."""
    ids = tiny.clip_tokenizer()(text, padding="max_length", max_length=77).input_ids
    return tiny.clip_tokenizer().decode([ids[column] for column in columns]).strip()


def test_oracle_names_what_is_there_and_full_names_all() -> None:
    some = dataset(("cat", "sofa", "dog", "tree"))
    labels = np.array([[3, 255], [1, 1]], np.uint8)
    oracle = Protocol("oracle", some, PAPER, span()).question(labels)
    assert oracle.labels == (1, 3)
    assert [prompt.text for prompt in oracle.prompts] == ["sofa tree"]
    full = Protocol("full", some, PAPER, span()).question(labels)
    assert full.labels == (0, 1, 2, 3)
    assert [prompt.text for prompt in full.prompts] == ["cat sofa dog tree"]
    assert [p.text for p in Protocol("unsupervised", some, PAPER, span()).question(labels).prompts] == [""]


@pytest.mark.parametrize(
    "classes",
    [class_names.ADE20K, class_names.COCO_THINGS + class_names.COCO_STUFF, class_names.PASCAL_CONTEXT],
    ids=["ade150", "coco-stuff171", "pc59"],
)
def test_a_large_vocabulary_is_spread_over_prompts_of_77_tokens(classes: tuple[str, ...]) -> None:
    question = Protocol("full", dataset(classes), PAPER, span()).question(np.zeros((2, 2), np.uint8))
    said = []
    for prompt in question.prompts:
        assert len(tiny.clip_tokenizer()(prompt.text).input_ids) <= 77
        said += [spoken(columns, prompt.text) for columns in prompt.columns]
        assert len({column for columns in prompt.columns for column in columns}) == sum(
            map(len, prompt.columns)
        )
    assert len(question.prompts) > 1
    assert question.labels == tuple(range(len(classes)))
    # The byte-level tokenizer of the tests sets off punctuation; letters are what counts.
    assert [name.replace(" ", "") for name in said] == [name.replace(" ", "") for name in classes]


def test_the_public_code_cuts_names_at_the_hyphen() -> None:
    names = dataset(("wall-brick", "sky-other"))
    question = Protocol("full", names, find_preset("reference"), span()).question(np.zeros((1, 1), np.uint8))
    assert [prompt.text for prompt in question.prompts] == ["wall sky"]
    assert Protocol("full", names, PAPER, span()).question(np.zeros((1, 1), np.uint8)).prompts[0].text == (
        "wall-brick sky-other"
    )


def test_scores_of_a_class_are_the_largest_of_its_names() -> None:
    names = dataset(("sofa", "animal"), prompts=(("sofa",), ("cat", "dog")))
    question = Protocol("full", names, PAPER, span()).question(np.zeros((1, 1), np.uint8))
    assert question.prompts[0].text == "sofa cat dog"
    scores = torch.tensor([[0.4, 0.4, 0.4, 0.4], [0.9, 0.1, 0.1, 0.2], [0.1, 0.8, 0.1, 0.3]]).view(3, 2, 2)
    by_class = class_scores(question, scores)
    assert torch.allclose(by_class, torch.tensor([[[0.4, 0.4], [0.4, 0.4]], [[0.9, 0.8], [0.1, 0.3]]]))
    assert predict(question, scores, view(2, 2), PAPER, RECIPE).tolist() == [[1, 1], [0, 0]]


def test_presence_leaves_out_classes_that_win_no_block() -> None:
    """The dog wins a single token, and pixels under `full` alone; if no class wins, the likeliest does."""
    names = dataset(("cat", "sofa", "dog"))
    scores = torch.full((3, 6, 6), 0.1)
    scores[0, :, :3] = scores[1, :, 3:] = 0.5
    scores[2, 2, 1] = 0.9
    kept = {}
    for name in ("full", "presence"):
        question = Protocol(name, names, PAPER, span()).question(np.zeros((1, 1), np.uint8))
        kept[name] = predict(question, scores, view(6, 6), PAPER, RECIPE)
    assert kept["full"].unique().tolist() == [0, 1, 2]
    assert kept["presence"].tolist() == [[0, 0, 0, 1, 1, 1]] * 6
    striped = (torch.arange(36).view(6, 6) % 2).float() * 0.1
    nobody = torch.stack([0.51 + striped, 0.6 - striped, torch.full((6, 6), 0.01)])
    assert predict(question, nobody, view(6, 6), PAPER, RECIPE).unique().tolist() == [0]


def test_the_label_map_is_that_of_resized_scores() -> None:
    """Positions of classes, not of names, in the order of the data set."""
    classes = tuple(f"{a}{b}" for a in "abcdef" for b in "ghijkl")
    question = Protocol("full", dataset(classes), PAPER, span()).question(np.zeros((1, 1), np.uint8))
    scores = torch.rand(36, 3, 4, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(scores[None], size=(31, 17), mode="bilinear")[0]
    found = predict(question, scores, view(31, 17), PAPER, RECIPE)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), resized.argmax(dim=0))
    assert len(found.unique()) > 16


def test_background_where_no_name_reaches() -> None:
    names = dataset(("background", "cat", "dog"), background=0)
    labels = np.array([[0, 1, 2]], np.uint8)
    question = Protocol("oracle", names, PAPER, span(), background="threshold", threshold=0.5).question(
        labels
    )
    assert question.labels == (1, 2)
    assert question.prompts[0].text == "cat dog"
    scores = torch.tensor([[[0.2, 0.8, 0.1]], [[0.3, 0.1, 0.5]]])  # 0.3 is below half of 0.8, 0.5 is not
    assert predict(question, scores, view(1, 3), PAPER, RECIPE).tolist() == [[0, 1, 2]]
    by_prompt = Protocol("oracle", names, PAPER, span(), background="prompt").question(labels)
    assert by_prompt.labels == (0, 1, 2)
    assert by_prompt.prompts[0].text == "background cat dog"


def test_a_picture_of_nothing_but_background() -> None:
    names = dataset(("background", "cat"), background=0)
    protocol = Protocol("oracle", names, PAPER, span(), background="threshold")
    question = protocol.question(np.array([[0, 0], [0, 255]], np.uint8))
    assert question.prompts == ()
    assert predict(question, None, view(2, 2), PAPER, RECIPE).tolist() == [[0, 0], [0, 0]]


def test_the_stray_name_of_the_public_code() -> None:
    """It prompts "background" for COCO-Object, and counts pixels that go to it as misses."""
    things = dataset(("cat", "dog"), stray_name="background")
    labels = np.array([[1, 255]], np.uint8)
    protocol = Protocol("oracle", things, find_preset("reference"), span())
    question = protocol.question(labels)
    assert protocol.labels == 3
    assert (question.labels, question.prompts[0].text) == ((1, 2), "dog background")
    assert protocol.question(np.array([[1, 0]], np.uint8)).labels == (0, 1)  # no background in the image
    paper = Protocol("oracle", things, PAPER, span())
    assert paper.labels == 2
    assert paper.question(labels).prompts[0].text == "dog"


def test_names_that_cannot_be_prompted_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="has 120 tokens, but a prompt holds 75"):
        Protocol("oracle", dataset(("cat", "x" * 120)), PAPER, span())
    with pytest.raises(ValueError, match="has no tokens"):
        Protocol("full", dataset(("cat", " ")), PAPER, span())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "all"}, f"protocol 'all' is unknown; known: {', '.join(PROTOCOLS)}"),
        ({"background": "magic"}, "background by 'magic' is unknown"),
        ({"threshold": 1.0}, "threshold 1.0 must lie between 0 and 1"),
    ],
)
def test_bad_choices(arguments: dict[str, Any], message: str) -> None:
    choices = {"name": "oracle", **arguments}
    with pytest.raises(ValueError, match=message):
        Protocol(choices.pop("name"), dataset(("cat",)), PAPER, span(), **choices)


def test_better_names_of_every_data_set_can_be_prompted(tmp_path: Path) -> None:
    for classes in (
        class_names.VOC,
        class_names.PASCAL_CONTEXT,
        class_names.COCO_THINGS + class_names.COCO_STUFF,
        class_names.COCO_STUFF_27,
        class_names.ADE20K,
        class_names.CITYSCAPES,
    ):
        better = tuple(class_names.BETTER.get(name, (name,)) for name in classes)
        question = Protocol("full", dataset(classes, prompts=better), PAPER, span()).question(
            np.zeros((1, 1), np.uint8)
        )
        assert sum(len(prompt.columns) for prompt in question.prompts) == sum(map(len, better))
