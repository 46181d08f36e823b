"""ImageNet-Segmentation: a file of MATLAB's, and a name of its own for each picture's object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from seg4diff.backbones.text import TextSpan
from seg4diff.data.registry import IncompleteDatasetError, open_dataset
from seg4diff.evaluation.protocols import Protocol
from seg4diff.segmentation.presets import find_preset
from tests.support import miniature, tiny

pytestmark = pytest.mark.extra("eval", "h5py")


def test_pictures_labels_and_names(tmp_path: Path) -> None:
    miniature.write_imagenet(tmp_path)
    dataset = open_dataset("imagenet-seg", tmp_path, partial=True)
    assert (dataset.classes, dataset.background) == (("background", "object"), 0)
    assert [item.name for item in dataset.items] == ["00000_n02690373_1016", "00001_n02123045_7"]
    for item, values in zip(dataset.items, miniature.IMAGENET_VALUES.values(), strict=True):
        assert item.labels().tolist() == values
        red = np.asarray(item.image())[:, :, 0]
        assert red.tolist() == (np.array(values) * 200 + np.arange(len(values[0]))).tolist()
    assert [item.prompts for item in dataset.items] == [{1: ("airliner",)}, {1: ("tabby",)}]


def test_each_picture_is_asked_for_its_own_object(tmp_path: Path) -> None:
    miniature.write_imagenet(tmp_path)
    dataset = open_dataset("imagenet-seg", tmp_path, partial=True)
    span = TextSpan("clip", tiny.clip_tokenizer(), 0, 77, special=2)
    for background, prompts in (
        ("prompt", ["background airliner", "background tabby"]),
        ("threshold", ["airliner", "tabby"]),
    ):
        protocol = Protocol("oracle", dataset, find_preset("paper"), span, background=background)  # type: ignore[arg-type]
        questions = [protocol.question(item.labels(), item.prompts) for item in dataset.items]
        assert [question.prompts[0].text for question in questions] == prompts
    with pytest.raises(ValueError, match="no vocabulary common to its images"):
        Protocol("full", dataset, find_preset("paper"), span)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    import h5py

    with pytest.raises(IncompleteDatasetError, match="missing: gtsegs_ijcv.mat, words.txt. Get"):
        open_dataset("imagenet-seg", tmp_path)
    miniature.write_imagenet(tmp_path)
    with pytest.raises(IncompleteDatasetError, match="2 of 4276 images"):
        open_dataset("imagenet-seg", tmp_path)
    with h5py.File(tmp_path / "gtsegs_ijcv.mat", "a") as file:
        file["#refs#/inside1"][:] = 2
    dataset = open_dataset("imagenet-seg", tmp_path, partial=True)
    with pytest.raises(ValueError, match="image 1 of .* holds 2, which stands for no class"):
        dataset.items[1].labels()
    (tmp_path / "words.txt").write_text("n02690373 airliner\n")
    with pytest.raises(ValueError, match="no line for 'n02123045'"):
        open_dataset("imagenet-seg", tmp_path, partial=True)
    (tmp_path / "gtsegs_ijcv.mat").write_bytes(b"\x89HDF but not really")
    with pytest.raises(ValueError, match="is damaged"):
        open_dataset("imagenet-seg", tmp_path, partial=True)


@pytest.mark.parametrize("name", ["n02690373_/../../../x", "n02690373_a\\b"])
def test_names_that_lead_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(miniature, "IMAGENET_VALUES", {name: [[0, 1]]})
    miniature.write_imagenet(tmp_path)
    with pytest.raises(ValueError, match="could lead out of the data set"):
        open_dataset("imagenet-seg", tmp_path, partial=True)
